"""Triton or PyTorch: which of two kernels of the same signature runs."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from influence.kernels.tolerances import KERNEL

_LOG = logging.getLogger("influence")
BACKENDS = ("auto", "torch", "triton")
# Triton has no build for every platform.
HAS_TRITON = importlib.util.find_spec("triton") is not None
_CHOSEN: ContextVar[str] = ContextVar("influence_backend", default="auto")
# What "auto" found on each device for each kind of shape, for as long as the process lives.
_BETTER: dict[tuple[Hashable, ...], bool] = {}
_REPEATS = 5
Kernel = Callable[[], tuple[Tensor, ...]]


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Choose the kernels for everything inside.

    Args:
        backend: "auto" takes Triton on a GPU where its kernel gives the reference's numbers in less time, PyTorch
            elsewhere; "torch" and "triton" insist.

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


def takes_triton(name: str, kind: Hashable, device: torch.device, *, triton: Kernel, torch: Kernel) -> bool:
    """Whether a kernel runs in Triton.

    Args:
        name: Of the kernel.
        kind: What its time depends on. "auto" tries both on the first shape of a kind.
        device: Where its arguments are.
        triton: Runs the kernel on the arguments at hand.
        torch: Runs the reference on them.

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
    key = (name, kind, _device_name(device))
    if key not in _BETTER:
        # Nothing can be timed while a graph is captured.
        better = None if _capturing() else is_better(name, triton, torch)
        if better is None:
            return False
        _BETTER[key] = better
    return _BETTER[key]


def is_better(name: str, triton: Kernel, reference: Kernel) -> bool | None:
    """Whether a kernel gives the reference's numbers, and in less time; None where both give nothing but zeros."""
    expected = reference()
    if not any(bool(value.any()) for value in expected):
        return None
    try:
        agree = all(_close(mine, theirs) for mine, theirs in zip(triton(), expected, strict=True))
    except torch.OutOfMemoryError:
        return None
    except Exception as error:  # the compiler's own errors have no common base
        _LOG.warning("%s: Triton does not run it here (%s); PyTorch's kernel is used", name, error)
        return False
    if not agree:
        _LOG.warning("%s: Triton gives other numbers here; PyTorch's kernel is used", name)
        return False
    return _seconds(triton, expected[0].device) < _seconds(reference, expected[0].device)


def _close(mine: Tensor, theirs: Tensor) -> bool:
    tolerance = KERNEL.get((theirs.dtype, theirs.device.type), torch.finfo(theirs.dtype).eps)
    return bool((mine - theirs).abs().max() <= tolerance * theirs.abs().max())


def _seconds(kernel: Kernel, device: torch.device) -> float:
    """The shortest of a few runs."""
    best = float("inf")
    for _ in range(_REPEATS):
        _synchronize(device)
        start = time.perf_counter()
        kernel()
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()
