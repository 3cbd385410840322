"""Gradients of a parameter where it meets the data, one for each row of a Jacobian and each example.

They stay as their node made them; their Gram, or the entries of a few examples, are made from that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from influence.grams.reverse import vjp
from influence.grams.rules import Node, Operand
from influence.kernels.contraction import cheaper, ghost_gram, materialised_gram
from influence.kernels.gram import products


@dataclass(frozen=True)
class _Rows:
    """Gradients ``rows``, ``(N, m, *shape)``, of what an operand gives its node."""

    operand: Operand
    rows: Tensor

    @property
    def width(self) -> int:
        """Entries p for one row of one example."""
        return math.prod(self.rows.shape[2:])

    def gram(self) -> Tensor:
        """``(N, m, m)`` float64."""
        return products(self.rows.reshape(*self.rows.shape[:2], -1))

    def entries(self, chosen: slice) -> Tensor:
        """Of some examples: ``(n, m, p)``."""
        rows = self.rows[chosen]
        return rows.reshape(*rows.shape[:2], -1)


@dataclass(frozen=True)
class Gradient(_Rows):
    """Gradients ``rows``, ``(N, m, *shape)``, of what the picks of an operand leave of it.

    ``squares`` gives, in a given precision, the squares of what was added up for each entry, summed: ``(N, p)``.
    """

    squares: Callable[[torch.dtype], Tensor]

    @classmethod
    def of(cls, operand: Operand, rows: Tensor, squares: Callable[[torch.dtype], Tensor]) -> Gradient:
        """From gradients and ``squares`` ``(N, m, *shape)`` of what the node takes: back through all that picked."""
        picks = operand.picks
        return cls(operand, through(picks, rows), cache(lambda d: through(picks, squares(d)).flatten(2).sum(dim=1)))

    def terms(self, chosen: slice, dtype: torch.dtype) -> Tensor:
        """What was squared and added up over the rows before any sum could cancel: ``(n, p)``."""
        return self.squares(dtype)[chosen]

    def to_parameter(self, values: Tensor, weights: Tensor, chosen: slice) -> Tensor:
        """Sum values ``(n, p)`` for the entries of examples with weights ``(n,)``, as the node takes the parameter."""
        return (weights @ values).view(self.rows.shape[2:])


def through(nodes: Sequence[Node], rows: Tensor) -> Tensor:
    """Gradients ``(N, m, *shape)`` of the first node's result, sent back through all of them."""
    flat = rows.flatten(0, 1)
    for node in nodes:
        back = vjp(node, [flat], [True])[0]
        assert back is not None
        flat = back
    return flat.unflatten(0, rows.shape[:2])


@dataclass(frozen=True)
class ProductGradient:
    """Gradients W_k = sum_t g_k[t] a[t]^T of a weight.

    ``rows`` are g, ``(N, m, G, P, T)``: m rows, G groups, P outputs, T positions; ``inputs`` a, ``(N, G, D, T)``. The
    node takes the weight in the given shape, which holds ``(G, P, D)``, or ``(G, D, P)`` where it is ``turned``.
    """

    operand: Operand
    rows: Tensor
    inputs: Tensor
    shape: tuple[int, ...]
    turned: bool = False
    squares: tuple[Tensor, Tensor] | None = None  # of rows (N, G, P) and inputs (N, G, D), where they are known

    @property
    def width(self) -> int:
        """G P D."""
        return math.prod(self.shape)

    def gram(self) -> Tensor:
        """``(N, m, m)`` float64, by the cheaper of two ways."""
        examples, classes, groups, outputs, positions = self.rows.shape
        rows, columns = self.rows.transpose(1, 2).flatten(0, 1), self.inputs.flatten(0, 1)
        sizes = {"positions": positions, "inputs": columns.shape[1], "outputs": outputs, "classes": classes}
        shared = positions**2 * columns.shape[1]
        if cheaper(**sizes, double=self.rows.itemsize == 8, shared=shared) == "ghost":
            wide = columns.double()
            gram = ghost_gram(rows, wide.mT @ wide)
        else:
            gram = materialised_gram(rows, columns)
        return gram.view(examples, groups, classes, classes).sum(dim=1)

    def entries(self, chosen: slice) -> Tensor:
        """Of some examples: ``(n, m, G P D)``."""
        rows, columns = self.rows[chosen], self.inputs[chosen].mT
        if rows.shape[-1] == 1:
            return (rows * columns[:, None]).flatten(2)
        # One product for all rows of a group: batched by rows, matmul would copy the inputs for each of them.
        found = rows.transpose(1, 2).flatten(2, 3) @ columns
        return found.unflatten(2, (rows.shape[1], -1)).transpose(1, 2).flatten(2)

    def terms(self, chosen: slice, dtype: torch.dtype) -> Tensor:
        """What was squared and added up over the rows before any sum could cancel: ``(n, G P D)``."""
        rows, inputs = (part[chosen].to(dtype).square() for part in (self.rows, self.inputs))
        return (rows.sum(dim=1) @ inputs.mT).flatten(1)

    def may_cancel(self, chosen: slice, squares: Tensor, limit: float) -> bool:
        """Whether squares ``(n, G P D)`` that are not 0 may be below ``limit`` of their terms, by a bound of these."""
        rows, inputs = self._squares
        if self.rows.shape[-1] == 1 or squares.dtype != rows.dtype:
            return self.rows.shape[-1] > 1
        bound = (limit * rows[chosen, ..., None]) * inputs[chosen, :, None]
        bound = bound.flatten(1)
        # Masks are slow on a CPU, so that they come last.
        return not bool((squares - bound).amin() >= 0) and bool(squares[squares < bound].any())

    @cached_property
    def _squares(self) -> tuple[Tensor, Tensor]:
        return self.squares or (_squares_of_rows(self.rows).sum(dim=1), _squares_of_rows(self.inputs))

    def pieces(self, most: int) -> list[ProductGradient]:
        """The gradients of some outputs each, with at most so many entries in all; one where they cannot be parted."""
        if self.turned or self.rows.shape[2] > 1:
            return [self]
        examples, classes, _, outputs, _ = self.rows.shape
        inputs = self.inputs.shape[2]
        step = max(1, most // (examples * classes * inputs))
        of_rows, of_inputs = self._squares
        parts = []
        for start in range(0, outputs, step):
            rows, squares = self.rows[:, :, :, start : start + step], of_rows[..., start : start + step]
            shape = (rows.shape[3], *self.shape[1:])
            parts.append(replace(self, rows=rows, shape=shape, squares=(squares, of_inputs)))
        return parts

    def to_parameter(self, values: Tensor, weights: Tensor, chosen: slice) -> Tensor:
        """Sum values ``(n, G P D)`` with weights ``(n,)``, in the shape in which the node takes the weight."""
        total = (weights @ values).view(*self.rows.shape[2:4], -1)
        return (total.mT if self.turned else total).reshape(self.shape)


@dataclass(frozen=True)
class TokenGradient(_Rows):
    """Gradients ``rows``, ``(N, m, L, D)``, of the rows of a table of some shape that ``tokens``, ``(N, L)``, name.

    Of the positions with the same token the first has the gradient, the others none.
    """

    tokens: Tensor
    shape: tuple[int, ...]

    def terms(self, chosen: slice, dtype: torch.dtype) -> Tensor:
        """The squares of the entries themselves, few of which are sums."""
        return self.entries(chosen).to(dtype).square().sum(dim=1)

    def to_parameter(self, values: Tensor, weights: Tensor, chosen: slice) -> Tensor:
        """Sum values ``(n, L D)`` for the tokens of some examples with weights ``(n,)``: ``(V, D)``."""
        rows = (weights[:, None] * values).view(-1, self.rows.shape[3])
        return rows.new_zeros(self.shape).index_add_(0, self.tokens[chosen].flatten(), rows)


def _squares_of_rows(values: Tensor) -> Tensor:
    """Sums of squares over the last dimension, in float32 at least."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return torch.linalg.vector_norm(values, dim=-1, dtype=wide).square_()


AnyGradient = Gradient | ProductGradient | TokenGradient
