"""What is known of an operator, one ``Rule`` each, in the files of this folder, one for each family.

An operator without a rule runs its own backward formula; its parameters take the autograd path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from influence.grams.gradients import AnyGradient

# A node of the autograd graph. PyTorch types its attributes nowhere.
Node = Any
# Gradients ``(m, ...)``, one for each output or input of a node, None where there is none.
Grads = list[Tensor | None]


@dataclass(frozen=True)
class Operand:
    """A parameter at one input of a node, ``next_functions[place]``.

    Between them, from the input on, are ``picks``, nodes of which the last picks entries of the parameter and the
    others do that or rearrange, and ``rearranged``, nodes that only rearrange it.
    """

    name: str
    place: int
    picks: tuple[Node, ...]
    rearranged: tuple[Node, ...]


@dataclass(frozen=True)
class Site:
    """A node at which parameters meet the data.

    ``shape`` is that of its output, as the node after it sees it where that one only splits dimensions.
    """

    node: Node
    operands: tuple[Operand, ...]
    shape: tuple[int, ...]

    def operand(self, place: int) -> Operand | None:
        """The parameter at an input, if it is looked for."""
        return next((operand for operand in self.operands if operand.place == place), None)


@dataclass(frozen=True)
class Layout:
    """The batch dimension of a tensor in memory order ``(outer, examples, the rest)``.

    ``outer`` is 1 where the batch comes first, the length of the sequence where that does; the rest is whatever
    follows, be it windows of the example that were folded into the batch or dimensions of their own.
    """

    outer: int
    examples: int

    def split(self, tensor: Tensor, dim: int) -> Tensor:
        """Put the examples that a dimension holds before the rest of it: ``(..., N, outer * inner, ...)``."""
        parts = tensor.unflatten(dim, (self.outer, self.examples, -1))
        return parts.transpose(dim, dim + 1).flatten(dim + 1, dim + 2)

    def channels(self, tensor: Tensor, dim: int) -> Tensor:
        """``(..., N * r, C, *positions)`` to ``(..., N, C, r * T)``: windows in the batch are more positions."""
        flat = tensor.reshape(*tensor.shape[: dim + 2], -1)
        return self.split(flat, dim).movedim(dim + 1, -2).flatten(-2)


@dataclass(frozen=True)
class Rule:
    """An operator; what is left out it does not have.

    Attributes:
        places: Inputs at which it may take a parameter that has a Gram here.
        gradients: Gives those of each parameter of a site, example by example, from the gradients ``(m, ...)`` of its
            output and the layout of these. It raises an error where the node is not of the form that the rule was made
            for; any error sends the site's parameters to the autograd path.
        vjp: Gives the gradients of the inputs, from the node, those of its outputs and which inputs are asked for;
            None where the node is not of the form that it was made for.
        entries: The same where one input takes a gradient, each entry a multiple of that of the output, over which it
            is written where the last argument says so.
    """

    places: frozenset[int] = frozenset()
    gradients: Callable[[Site, Tensor, Layout], Iterable[AnyGradient]] | None = None
    vjp: Callable[[Node, Grads, Sequence[bool]], Grads | None] | None = None
    entries: Callable[[Node, Tensor, bool], Tensor | None] | None = None


# By the name of the node; each file of a family adds its own.
RULES: dict[str, Rule] = {}


def require_form(condition: bool) -> None:
    """Refuse a node that a rule was not made for."""
    if not condition:
        raise ValueError("not of the form its rule was made for")


def in_order_of(grads: Tensor, values: Tensor) -> Tensor:
    """Values ``(...)`` in the memory order of gradients ``(m, ...)``, copied where theirs is another one.

    From two memory orders an operator takes up to ten times as long; this is one copy for all m.
    """
    if values.stride() == grads.stride()[1:]:
        return values
    return torch.empty_like(grads[0], dtype=values.dtype).copy_(values)


def shape_of(node: Node, output: int = 0) -> tuple[int, ...]:
    """Shape of one result of a node; () of a nested tensor, which has none."""
    try:
        return tuple(int(size) for size in node._input_metadata[output].shape)
    except (RuntimeError, AttributeError):
        return ()
