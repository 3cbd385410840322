"""How many examples fit: a chunk size from the memory that is free, halved where that was too much."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

Part = TypeVar("Part")

# More examples at once gain nothing, and on a CPU their gradients are new memory each time.
_MOST = 64
_MOST_BYTES_CPU = 2**30
# Examples and input values in one backward pass that keep a processor busy, and passes for which it is worth while to
# go forward again with copies of the examples.
_MOST_COPIES, _MOST_VALUES, _FEWEST_PASSES = 32, 2**18, 16


def examples_that_fit(bytes_per_example: int, device: torch.device) -> int:
    """Examples for which half of what is free is enough, between 1 and 64."""
    budget = free_bytes(device) // 2
    if device.type == "cpu":
        budget = min(budget, _MOST_BYTES_CPU)
    return max(1, min(_MOST, budget // max(1, bytes_per_example)))


def require_room(blocks: int, classes: int, device: torch.device, instead: str) -> int:
    """Bytes that the Grams ``(B, K, K)`` of one example take: they are made, put at their classes and kept.

    Raises:
        ValueError: If so much is not free; ``instead`` says what to do.
    """
    needed, free = 3 * 8 * blocks * classes**2, free_bytes(device)
    if needed > free:
        raise ValueError(
            f"the Grams of {blocks:,} blocks with K = {classes:,} classes need {needed / 2**30:,.0f} GiB for an "
            f"example, {free / 2**30:,.0f} are free. {instead}"
        )
    return needed


def copies_at_once(rows: int, *, examples: int, values: int) -> int:
    """Copies of a batch of so many input values that a backward pass for so many rows of a Jacobian should have."""
    return max(1, min(rows // _FEWEST_PASSES, _MOST_COPIES // examples, _MOST_VALUES // max(1, values)))


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device; 4 GiB where nothing says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = (_left_on_machine(), _left_in_container()) if device.type == "cpu" else ()
    return min((free for free in known if free is not None), default=2**32)


def _left_on_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_container() -> int | None:
    group = Path("/sys/fs/cgroup")
    try:
        return max(0, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return None


def in_chunks(compute: Callable[[slice], Part], count: int, size: int, *, may_halve: bool) -> Iterator[Part]:
    """Yield ``compute(chunk)`` for chunks of so many examples; with ``may_halve``, of half when memory runs out."""
    start = 0
    while start < count:
        try:
            yield compute(slice(start, min(start + size, count)))
            start += size
            continue
        except (RuntimeError, MemoryError) as error:
            if not (may_halve and size > 1 and is_out_of_memory(error)):
                raise
        # Only here is the failed attempt's memory free: the error held its frames.
        size = max(1, min(size, count - start) // 2)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in words for sign in ("out of memory", "can't allocate memory", "alloc_failed")
    )
