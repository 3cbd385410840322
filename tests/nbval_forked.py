"""A pytest plugin: nbval with the runner's kernels, forked from one process, and a file of what it found wrong."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

from influence.companion.runner import execute, kernels

with execute.without_grammars():
    import nbval.kernel

_wrong: dict[str, list[str]] = defaultdict(list)


def pytest_configure(config: pytest.Config) -> None:
    kernels.prepare({}, computing=False)
    nbval.kernel.start_new_kernel = _start


def _start(startup_timeout: float, cwd: str, **_: object) -> tuple[KernelManager, Any]:
    made = kernels.manager({}, Path(cwd), Path(os.devnull), KernelManager)()
    made.start_kernel()
    client = made.client()
    client.start_channels()
    client.wait_for_ready(timeout=startup_timeout)
    return made, client


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _wrong[str(item.path)] += [report.longreprtext] if report.failed else []
    return report


def pytest_unconfigure(config: pytest.Config) -> None:
    Path(os.environ["NBVAL_FOUND"]).write_text(json.dumps(_wrong), encoding="utf-8")
