"""Triton or PyTorch: which of two kernels of the same signature runs."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_LOG = logging.getLogger("influence")
BACKENDS = ("auto", "torch", "triton")
# Triton has no build for every platform.
HAS_TRITON = importlib.util.find_spec("triton") is not None
_CHOSEN: ContextVar[str] = ContextVar("influence_backend", default="auto")
# Kernels that were tried on a device, and whether they gave the reference's numbers there.
_TRIED: dict[tuple[str, str], bool] = {}


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Choose the kernels for everything inside.

    Args:
        backend: "auto" takes Triton on a GPU where its kernel gives the reference's numbers, PyTorch elsewhere;
            "torch" and "triton" insist.

    Raises:
        ValueError: For another name, or for "triton" where it is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}.")
    if backend == "triton" and not HAS_TRITON:
        raise ValueError("backend='triton' needs the package triton, which is not installed. Use backend='auto'.")
    token = _CHOSEN.set(backend)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def takes_triton(kernel: str, device: torch.device, check: Callable[[torch.device], bool]) -> bool:
    """Whether a kernel runs in Triton.

    Args:
        kernel: Its name.
        device: Where its arguments are.
        check: Compares it with the reference on a small problem.

    Raises:
        RuntimeError: For "triton" on a CPU without Triton's interpreter.
    """
    chosen = _CHOSEN.get()
    if chosen == "torch" or not HAS_TRITON:
        return False
    if chosen == "triton":
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("backend='triton' needs a GPU, or TRITON_INTERPRET=1 to run the kernels in Python.")
        return True
    if device.type != "cuda":
        return False
    key = (kernel, torch.cuda.get_device_name(device))
    if key not in _TRIED:
        try:
            _TRIED[key] = check(device)
        except Exception as error:  # the compiler's own errors have no common base
            _LOG.warning("%s: Triton does not compile it here (%s)", kernel, error)
            _TRIED[key] = False
        if not _TRIED[key]:
            _LOG.warning("%s: PyTorch's kernel is used instead of Triton's on %s", *key)
    return _TRIED[key]
