"""Operators that act on each entry: sums, products, ReLU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from influence.grams.gradients import Gradient
from influence.grams.rules import RULES, Grads, Layout, Node, Rule, Site, in_order_of, require_form, shape_of


def _sum_to_operand(site: Site, grad: Tensor, layout: Layout) -> Tensor:
    """Sum gradients ``(m, *output)`` over what was broadcast, example by example: ``(N, m, *operand)``."""
    full, shape = grad.shape[1:], shape_of(*site.node.next_functions[site.operands[0].place])
    own = (1,) * (len(full) - len(shape)) + shape
    # A parameter is the same for all examples: it has size 1 where they are counted.
    counts = [i for i, size in enumerate(full) if math.prod(full[:i]) == layout.outer and own[i] == 1]
    axis = next((i for i in counts if full[i] and full[i] % layout.examples == 0), None)
    require_form(axis is not None or layout.examples == 1)
    parts = grad.unsqueeze(1) if axis is None else grad.unflatten(axis + 1, (layout.examples, -1)).movedim(axis + 1, 1)
    summed = [i + 2 for i, size in enumerate(own) if size == 1 and parts.shape[i + 2] != 1]
    parts = parts.sum(dim=summed, keepdim=True) if summed else parts
    return parts.transpose(0, 1).reshape(layout.examples, len(grad), *shape)


def _gradients(site: Site, grad: Tensor, layout: Layout) -> Iterator[Gradient]:
    node, operand = site.node, site.operands[0]
    require_form(len(site.operands) == 1)
    if node.name() == "MulBackward0":
        # A product with another parameter alone keeps no data.
        other = node._saved_other if operand.place == 0 else node._saved_self
        require_form(isinstance(other, Tensor))
        factor = other.detach()
    else:
        # A difference has the Gram of a sum.
        factor = grad.new_tensor(node._saved_alpha if operand.place == 1 else 1.0)

    def summed(squares: torch.dtype | None = None) -> Tensor:
        terms = (part * factor for part in grad)
        given = (t if squares is None else t.to(squares).square() for t in terms)
        return torch.cat([_sum_to_operand(site, t[None], layout) for t in given], dim=1)

    yield Gradient.of(operand, summed(), summed)


def _add_vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    return [grads[0], grads[0]] if node._saved_alpha == 1 else None


def _relu_entries(node: Node, grad: Tensor, over: bool) -> Tensor:
    mask, result = torch.ops.aten.threshold_backward, in_order_of(grad, node._saved_result)
    return mask.grad_input(grad, result, 0, grad_input=grad) if over else mask(grad, result, 0)


for _kind in ("Add", "Sub", "Mul"):
    RULES[f"{_kind}Backward0"] = Rule(frozenset({0, 1}), _gradients, _add_vjp if _kind == "Add" else None)
RULES["ExpandBackward0"] = Rule(frozenset({0}), _gradients)
RULES["ReluBackward0"] = Rule(entries=_relu_entries)
