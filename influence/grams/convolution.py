"""Convolutions and transposed convolutions in any number of dimensions, with stride, padding, dilation, groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from influence.grams.linear import weight_gram
from influence.grams.reverse import vector_gram
from influence.grams.rules import RULES, Grads, Layout, Node, Rule, Site, require_form, shape_of

# Positions from which on a matrix product for each example is faster on a CPU than a library's 1x1 convolution.
_MANY_POSITIONS = 64


def im2col(x: Tensor, kernel: Sequence[int], out: Sequence[int], node: Node) -> Tensor:
    """Columns that a convolution multiplies its weight with.

    Args:
        x: ``(N, C, *positions)``, any number of dimensions.
        kernel: Size of the window.
        out: Positions of the window along each dimension.
        node: The convolution's, for its stride, padding and dilation.

    Returns:
        ``(N, C * prod(kernel), T)`` with T the product of ``out``; a view of ``x`` for windows of one entry.
    """
    stride, padding, dilation = node._saved_stride, node._saved_padding, node._saved_dilation
    if any(padding):
        x = F.pad(x, [p for size in reversed(padding) for p in (size, size)])
    steps, size = x.stride(), (*x.shape[:2], *kernel, *out)
    inside = [step * d for step, d in zip(steps[2:], dilation, strict=True)]
    across = [step * s for step, s in zip(steps[2:], stride, strict=True)]
    view = x.as_strided(size, (*steps[:2], *inside, *across), x.storage_offset())
    return view.reshape(x.shape[0], x.shape[1] * math.prod(kernel), math.prod(out))


def _grams(site: Site, grad: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    node, weight, bias = site.node, site.operand(1), site.operand(2)
    require_form(layout.outer == 1)
    groups = node._saved_groups

    def by_example(tensor: Tensor, start: int) -> Tensor:
        """(..., N * r, G * C, T) to (..., N, G, C, r * T): windows folded into the batch are more positions."""
        split = tensor.unflatten(start + 1, (groups, -1)).unflatten(start, (layout.examples, -1))
        return split.squeeze(start + 1) if split.shape[start + 1] == 1 else split.movedim(start + 1, -2).flatten(-2)

    if weight is not None:
        require_form(not weight.picks)
        kernel, saved = tuple(node._saved_weight.shape[2:]), node._saved_input.detach()
        if node._saved_transposed:
            # Roles change: the input plays the gradient's part, and the gradient's columns differ by class.
            columns = im2col(grad.flatten(0, 1), kernel, tuple(saved.shape[2:]), node).unflatten(0, grad.shape[:2])
            grads, inputs = by_example(columns, 1), by_example(saved.flatten(2), 0)
        else:
            grads = by_example(grad.flatten(3), 1)
            inputs = by_example(im2col(saved, kernel, tuple(grad.shape[3:]), node), 0)
        yield weight.name, weight_gram(grads.transpose(0, 1), inputs)
    if bias is not None:
        summed = grad.flatten(3).sum(dim=-1).unflatten(1, (layout.examples, -1)).sum(dim=2)
        yield vector_gram(bias, summed.transpose(0, 1))


def _vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    grad, weight = grads[0], node._saved_weight.detach()
    if grad is None or any(wanted[1:]):
        return None
    classes, batch = grad.shape[:2]
    shape = (classes * batch, *shape_of(*node.next_functions[0])[1:])
    if _is_product(node, grad):
        # Several times as fast as a library's convolution; the pixels that a stride left out get zeros.
        flat = grad.flatten(0, 1).flatten(2)
        seen = torch.bmm(weight.flatten(1).T.expand(len(flat), -1, -1), flat)
        if all(step == 1 for step in node._saved_stride):
            return [seen.view(classes, batch, *shape[1:]), None, None]
        result = grad.new_zeros(shape)
        index: tuple[Any, ...] = (..., *(slice(None, None, step) for step in node._saved_stride))
        result[index] = seen.view(result[index].shape)
        return [result.unflatten(0, (classes, batch)), None, None]
    if _is_convolution(node, grad):
        # With the weight turned round: a library's forward pass is its fastest.
        turned = weight.flip(*range(2, weight.ndim)).transpose(0, 1)
        sides = zip(weight.shape[2:], node._saved_padding, node._saved_dilation, strict=True)
        padding, ones = [d * (size - 1) - p for size, p, d in sides], [1] * (weight.ndim - 2)
        result = torch.convolution(
            grad.flatten(0, 1), turned, None, ones, padding, node._saved_dilation, False, [0] * len(ones), 1
        )
        return [result.unflatten(0, (classes, batch)), None, None]
    # Only the shape of the input matters: untouched memory on a CPU, a single number on a GPU.
    like = grad.new_empty(shape) if grad.device.type == "cpu" else grad.new_empty(()).expand(shape)
    result = torch.ops.aten.convolution_backward(
        grad.flatten(0, 1),
        like,
        weight,
        None,
        node._saved_stride,
        node._saved_padding,
        node._saved_dilation,
        node._saved_transposed,
        node._saved_output_padding,
        node._saved_groups,
        [True, False, False],
    )[0]
    return [result.unflatten(0, (classes, batch)), None, None]


def _is_product(node: Node, grad: Tensor) -> bool:
    """A 1x1 convolution that a batched matrix product does faster: one with many positions, or that skips some."""
    one = all(size == 1 for size in node._saved_weight.shape[2:])
    plain = node._saved_groups == 1 and not any(node._saved_padding) and not node._saved_transposed
    many = grad.device.type == "cpu" and math.prod(grad.shape[3:]) >= _MANY_POSITIONS
    return one and plain and (many or any(step > 1 for step in node._saved_stride))


def _is_convolution(node: Node, grad: Tensor) -> bool:
    """Whether going back is a convolution too: no stride, and no padding that reaches beyond the window."""
    sides = zip(node._saved_weight.shape[2:], node._saved_padding, node._saved_dilation, strict=True)
    inside = all(dilation * (size - 1) >= padding for size, padding, dilation in sides)
    plain = node._saved_groups == 1 and not node._saved_transposed and all(step == 1 for step in node._saved_stride)
    return plain and inside and grad.device.type == "cpu" and math.prod(grad.shape[3:]) >= 4 * _MANY_POSITIONS


RULES["ConvolutionBackward0"] = Rule(frozenset({1, 2}), grams=_grams, vjp=_vjp)
