"""Operators that act on each entry or only move entries: sums, products, ReLU, views, concatenation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from influence.grams.reverse import vector_gram
from influence.grams.rules import RULES, Grads, Layout, Node, Rule, Site, require_form, shape_of


def _operand_shape(site: Site) -> tuple[int, ...]:
    """Shape of the parameter at its input, with as many dimensions as the output."""
    own = shape_of(*site.node.next_functions[site.operands[0].place])
    return (1,) * (len(shape_of(site.node)) - len(own)) + own


def _broadcast(site: Site) -> Sequence[int]:
    # A parameter is the same for all examples: it has size 1 where they are counted.
    own = _operand_shape(site)
    return [size if mine == 1 else -size for size, mine in zip(shape_of(site.node), own, strict=True)]


def _sum_to_operand(site: Site, grad: Tensor, layout: Layout) -> Tensor:
    """Sum gradients ``(m, *output)`` over what was broadcast, example by example: ``(N, m, *operand)``."""
    full, own, examples = grad.shape[1:], _operand_shape(site), layout.examples
    if examples == 1:
        parts = grad.unsqueeze(1)
    else:
        # Where the batch dimension is: one of ``_broadcast`` that has ``outer`` entries before it.
        axis = next(
            i
            for i, size in enumerate(full)
            if own[i] == 1 and size and size % examples == 0 and math.prod(full[:i]) == layout.outer
        )
        parts = grad.unflatten(axis + 1, (examples, -1)).movedim(axis + 1, 1)
    summed = [i + 2 for i, size in enumerate(own) if size == 1 and parts.shape[i + 2] != 1]
    parts = parts.sum(dim=summed, keepdim=True) if summed else parts
    shape = shape_of(*site.node.next_functions[site.operands[0].place])
    return parts.transpose(0, 1).reshape(examples, len(grad), *shape)


def _grams(site: Site, grad: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    node, kind = site.node, site.node.name()
    require_form(len(site.operands) == 1)
    operand = site.operands[0]
    if kind == "MulBackward0":
        # A product with another parameter alone keeps no data.
        other = node._saved_other if operand.place == 0 else node._saved_self
        require_form(isinstance(other, Tensor))
        parts = [_sum_to_operand(site, (part * other.detach())[None], layout) for part in grad]
        yield vector_gram(operand, torch.cat(parts, dim=1))
        return
    factor = 1
    if operand.place == 1:
        factor = -node._saved_alpha if kind == "SubBackward0" else node._saved_alpha
    rows = _sum_to_operand(site, grad, layout)
    yield vector_gram(operand, rows if factor == 1 else rows * factor)


def _add_vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    return [grads[0], grads[0]] if node._saved_alpha == 1 else None


def _relu_vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    return None if grads[0] is None else [torch.ops.aten.threshold_backward(grads[0], node._saved_result, 0)]


def _relu_over(node: Node, grad: Tensor) -> bool:
    torch.ops.aten.threshold_backward.grad_input(grad, node._saved_result, 0, grad_input=grad)
    return True


def _cat_vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    grad = grads[0]
    if grad is None:
        return None
    shapes = [() if source is None else shape_of(source, output) for source, output in node.next_functions]
    if any(len(shape) != grad.ndim - 1 for shape in shapes):
        return None
    # The index comes back unsigned: a negative dimension is one of the last numbers of 64 bits.
    axis = ((node._saved_dim + 2**63) % 2**64 - 2**63) % (grad.ndim - 1)
    return list(grad.split([shape[axis] for shape in shapes], dim=axis + 1))


def _view_vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    if grads[0] is None:
        return None
    shape = shape_of(*node.next_functions[0])
    # A view as another type changes the number of entries.
    if math.prod(shape) != math.prod(grads[0].shape[1:]):
        return None
    return [grads[0].reshape(len(grads[0]), *shape)]


RULES["AddBackward0"] = Rule(frozenset({0, 1}), _broadcast, _grams, _add_vjp)
RULES["SubBackward0"] = Rule(frozenset({0, 1}), _broadcast, _grams)
RULES["MulBackward0"] = Rule(frozenset({0, 1}), _broadcast, _grams)
RULES["ExpandBackward0"] = Rule(frozenset({0}), _broadcast, _grams)
RULES["CatBackward0"] = Rule(vjp=_cat_vjp)
RULES["ReluBackward0"] = Rule(vjp=_relu_vjp, over=_relu_over)
RULES["UnsafeViewBackward0"] = RULES["ViewBackward0"] = Rule(vjp=_view_vjp)
