"""The Triton kernels: in their interpreter where Triton is installed, and optional where it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import influence
from influence.kernels import backend

ROOT = str(Path(influence.__file__).parents[1])


def run(arguments: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT, **extra}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton is not installed")
def test_kernels_in_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_kernels.py")
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_the_library_does_without_triton() -> None:
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch, influence\n"
        "from influence.kernels import backend\n"
        "assert not backend.HAS_TRITON\n"
        "x = torch.zeros(2, 5)\n"
        "print(influence.metric_tensor(torch.nn.Linear(5, 3), x, wrt='layers').rank().tolist())\n"
        "try: influence.metric_tensor(torch.nn.Linear(5, 3), x, backend='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    done = run(["-c", code])
    assert done.stdout.splitlines()[0] == "[[2], [2]]", done.stderr
    assert "not installed" in done.stdout


def test_unknown_backend_and_no_device() -> None:
    model, x = nn.Linear(4, 3), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="backend must be one of"):
        influence.metric_tensor(model, x, backend="jax")
    if backend.HAS_TRITON and os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(RuntimeError, match="needs a GPU"):
            influence.metric_tensor(model, x, wrt="layers", backend="triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_on_the_gpu_against_their_references() -> None:
    from influence.kernels import pivots, projected, stability_loss

    device = torch.device("cuda")
    assert projected._check(device)
    assert pivots._check(device)
    assert stability_loss._check(device)
