"""Which entries of a tensor belong to which example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The batch dimension of a tensor in memory order ``(outer, examples, the rest)``.

    ``outer`` is 1 where the batch comes first, the length of the sequence where that does; the rest is whatever
    follows, be it windows of the example that were folded into the batch or dimensions of their own.
    """

    outer: int
    examples: int

    def split(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Split dimensions start..stop-1 and put the examples before the others: ``(..., N, outer * inner, ...)``."""
        count = math.prod(tensor.shape[start:stop])
        inner = count // (self.outer * self.examples)
        flat = tensor.flatten(start, stop - 1) if stop - start > 1 else tensor
        if self.outer == 1:
            return flat.unflatten(start, (self.examples, inner))
        parts = flat.unflatten(start, (self.outer, self.examples, inner)).transpose(start, start + 1)
        return parts.flatten(start + 1, start + 2)


def candidates(sizes: Sequence[int], examples: int, shape: Sequence[int] | None = None) -> list[int]:
    """Every ``outer`` that dimensions of these sizes allow, once each; size 0 rules one out of ``shape``."""
    shape = sizes if shape is None else shape
    places = [i for i, size in enumerate(sizes) if size > 0 and size % examples == 0]
    return list(dict.fromkeys(math.prod(shape[:i]) for i in places))
