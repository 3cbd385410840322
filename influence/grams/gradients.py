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
        """From gradients ``(N, m, *shape)`` of what the node takes and ``squares``, as many or their sum over the rows.

        Both go back through all that picked.
        """
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
    known: tuple[Tensor, Tensor] | None = None  # squares of rows (N, G, P) and inputs (N, G, D), where they are

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

    def cancelled(self, chosen: slice, squares: Tensor, limit: float) -> Tensor:
        """Which of squares ``(n, G P D)``, flattened, are not 0 and at most ``limit`` of their terms: ``(k,)``."""
        none = squares.new_zeros(0, dtype=torch.int64)
        if self.rows.shape[-1] == 1:
            return none
        shaped = squares.view(len(squares), *self.rows.shape[2:4], -1)
        rows, inputs = self._squares
        if squares.dtype == rows.dtype:
            # The terms have the bound R_p A_d, of sums over positions. Masks are slow on a CPU, so that they come last.
            rows, inputs = limit * rows[chosen], inputs[chosen]
            above = torch.addcmul(shaped, rows[..., None], inputs[:, :, None], value=-1)
            if bool(above.amin() >= 0):
                return none
            outputs = within(above, shaped, 0.0, math.inf).amin(dim=-1) < 0
        else:
            outputs = torch.ones_like(shaped[..., 0], dtype=torch.bool)
        found = [none]
        for n in outputs.flatten(1).any(dim=1).nonzero()[:, 0].tolist():
            group, output = outputs[n].nonzero().T
            rows = self.rows[chosen][n][:, group, output].double().square().sum(dim=0)
            inputs = self.inputs[chosen][n].double().square().mT
            terms = rows @ inputs[0] if len(inputs) == 1 else (rows[:, None] @ inputs[group])[:, 0]
            places = below(shaped[n, group, output], limit * terms)
            row, width = places // terms.shape[1], terms.shape[1]
            first = (n * outputs.shape[1] + group[row]) * outputs.shape[2] + output[row]
            found.append(first * width + places % width)
        return torch.cat(found)

    @cached_property
    def _squares(self) -> tuple[Tensor, Tensor]:
        if self.known is not None:
            return self.known
        wide = torch.promote_types(self.rows.dtype, torch.float32)
        return summed_squares(self.rows, wide), summed_squares(self.inputs[:, None], wide)

    def row_squares(self, dtype: torch.dtype) -> Tensor:
        """Squares of the rows, summed over these and the positions: ``(N, G, P)``."""
        rows, _ = self._squares
        return rows if rows.dtype == dtype else summed_squares(self.rows, dtype)

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
            rows, known = self.rows[:, :, :, start : start + step], (of_rows[..., start : start + step], of_inputs)
            parts.append(replace(self, rows=rows, shape=(rows.shape[3], *self.shape[1:]), known=known))
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


def within(values: Tensor, of: Tensor, low: float, high: float) -> Tensor:
    """The values where low < ``of`` < high, else 0: a hardtanh's gradient is ten times as fast as a mask on a CPU."""
    return torch.ops.aten.hardtanh_backward(values, of, low, high)


def below(squares: Tensor, floor: Tensor) -> Tensor:
    """Which of squares, flattened, are not 0 and at most a ``floor`` in float64, where that has left no precision."""
    return ((squares <= floor) & (squares > 0) & (floor < math.inf)).flatten().nonzero()[:, 0]


def sum_of_squares(rows: Sequence[Tensor]) -> Tensor:
    """Of one row or more: one pass over each, where a norm over them takes ten times as long on a CPU."""
    total = rows[0].square()
    for row in rows[1:]:
        total.addcmul_(row, row)
    return total


def summed_squares(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Squares of values ``(N, m, ..., T)``, summed over m and T, in a precision that is none coarser than theirs."""
    return sum_of_squares(values.to(dtype).unbind(dim=1)).sum(dim=-1)


AnyGradient = Gradient | ProductGradient | TokenGradient
