"""Triton or PyTorch: which of two kernels of the same signature runs."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

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
Kernel = Callable[..., Tensor | tuple[Tensor, ...]]


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


def takes_triton(kind: Hashable, triton: Kernel, reference: Kernel, *given: Any, **options: Any) -> bool:
    """Whether a kernel runs in Triton for some arguments, the first of them a tensor.

    "auto" tries both on these the first time that it meets a kind of shape, what the time depends on.

    Raises:
        RuntimeError: For "triton" on a CPU without Triton's interpreter.
    """
    device, name = given[0].device, triton.__name__
    chosen = _CHOSEN.get()
    if chosen == "torch" or not HAS_TRITON:
        return False
    if chosen == "triton":
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("backend='triton' needs a GPU, or TRITON_INTERPRET=1 to run the kernels in Python.")
        return True
    if device.type != "cuda":
        return False
    key = (name, kind, torch.cuda.get_device_name(device))
    # Nothing can be timed while a graph is captured.
    if key not in _BETTER and not torch.cuda.is_current_stream_capturing():
        better = is_better(name, lambda: triton(*given, **options), lambda: reference(*given, **options))
        if better is not None:
            _BETTER[key] = better
    return _BETTER.get(key, False)


def is_better(name: str, triton: Kernel, reference: Kernel) -> bool | None:
    """Whether a kernel gives the reference's numbers, and in less time; None where both give nothing but zeros."""
    expected = _parts(reference())
    if not any(bool(value.any()) for value in expected):
        return None
    try:
        agree = all(_close(mine, theirs) for mine, theirs in zip(_parts(triton()), expected, strict=True))
        reason = "gives other numbers"
    except torch.OutOfMemoryError:
        return None
    except Exception as error:  # the compiler's own errors have no common base
        agree, reason = False, f"does not run it ({error})"
    if not agree:
        _LOG.warning("%s: Triton %s here; PyTorch's kernel is used", name, reason)
    return agree and _seconds(triton) < _seconds(reference)


def _parts(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def _close(mine: Tensor, theirs: Tensor) -> bool:
    tolerance = KERNEL.get((theirs.dtype, theirs.device.type), torch.finfo(theirs.dtype).eps)
    return bool((mine - theirs).abs().max() <= tolerance * theirs.abs().max())


def _seconds(kernel: Kernel) -> float:
    """The shortest of a few runs."""
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        result = _parts(kernel())[0]
        result[(0,) * result.ndim].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times)
