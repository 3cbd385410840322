"""Fixtures: data sets where there are any, one place for what tests write, a small companion of their own."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from influence.companion.ledger import paths
from influence.companion.runner import execute, kernels

with execute.without_grammars():
    from workspace import Workspace


def pytest_configure() -> None:
    # Two cores are shared with the kernels of the notebooks; small tensors gain nothing from more.
    torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)))


# The longest files go first, so that no core works on one of them while the others have ended.
_LONG = tuple(
    f"test_{name}.py"
    for name in ("notebooks", "zoo", "run", "fuzz", "scoring", "benchmarks", "networks", "triton", "cuda_nodes", "cli")
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))


def pytest_collection_finish() -> None:
    gc.freeze()  # modules stay: the searches for garbage that benchmarks ask for, half a second each, are without them


@pytest.fixture(scope="session", autouse=True)
def _results_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test writes into results/: notebooks that run under test write here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFLUENCE_RESULTS", str(tmp_path_factory.mktemp("results")))
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the real data sets."""
    folder = paths.data_dir()
    if folder is None:
        pytest.skip("INFLUENCE_DATA is not set: no MNIST and CIFAR-10 here")
    for part in ("MNIST/raw", "cifar-10-batches-py"):
        if not (folder / part).is_dir():
            pytest.skip(f"INFLUENCE_DATA has no {part}")
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    """An empty tree for the companion to work in, in the place of the checkout."""
    yield from _companion_in(tmp_path)


@pytest.fixture(scope="module")
def shared_workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """The same for all tests of a module; they must not use `workspace` meanwhile."""
    yield from _companion_in(tmp_path_factory.mktemp("companion"))


def _companion_in(root: Path) -> Iterator[Workspace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFLUENCE_ROOT", str(root))
        for name in ("INFLUENCE_RESULTS", "INFLUENCE_CACHE", "INFLUENCE_DATA", "INFLUENCE_DEVICE"):
            patch.delenv(name, raising=False)
        patch.setattr(kernels, "_COMPUTING", ())  # these notebooks compute nothing
        importlib.reload(paths)
        forkserver._forkserver._stop()  # what it has imported knows another tree
        yield Workspace(root)
    forkserver._forkserver._stop()
    importlib.reload(paths)
    torch.set_deterministic_debug_mode("default")
