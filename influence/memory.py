"""How many examples fit: a chunk size from the memory that is free, halved where that was too much."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")

# More examples at once gain nothing, and on a CPU they leave the cache.
_MOST = 64
_MOST_BYTES_CPU = 2**30


def chunk_size(bytes_per_example: int, device: torch.device) -> int:
    """Examples for which half of what is free is enough, between 1 and 64."""
    budget = free_bytes(device) // 2
    if device.type == "cpu":
        budget = min(budget, _MOST_BYTES_CPU)
    return max(1, min(_MOST, budget // max(1, bytes_per_example)))


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device; 4 GiB where nothing says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        known = [value for value in (_available(), _left_in_group()) if value is not None]
        if known:
            return min(known)
    return 2**32


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_group() -> int | None:
    """Below a container's limit, where there is one."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        return None if limit == "max" else max(0, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return None


def in_chunks(compute: Callable[[Tensor], Part], x: Tensor, size: int, *, may_halve: bool) -> Iterator[Part]:
    """Compute a batch in chunks.

    Args:
        compute: What to do with a chunk.
        x: ``(N, ...)``.
        size: Examples in a chunk; the last one takes the rest.
        may_halve: Whether to go on with half of it when memory runs out.

    Yields:
        The result for each chunk.
    """
    start = 0
    while start < len(x):
        try:
            part = compute(x[start : start + size])
        except (RuntimeError, MemoryError) as error:
            if not (may_halve and size > 1 and is_out_of_memory(error)):
                raise
            part = None
        if part is None:
            # Only here is the failed attempt's memory free: the error held its frames.
            size = max(1, min(size, len(x) - start) // 2)
            release()
            continue
        yield part
        start += size


def release() -> None:
    """Give back what is held for no one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = str(error).lower()
    return "out of memory" in words or "can't allocate memory" in words or "alloc_failed" in words
