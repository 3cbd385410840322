"""Convolutions and transposed convolutions in any number of dimensions, with stride, padding, dilation, groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from influence.grams.gradients import AnyGradient, Gradient, ProductGradient, summed_squares
from influence.grams.rules import RULES, Grads, Layout, Node, Rule, Site, require_form, shape_of

# Positions from which on a matrix product for each example is faster on a CPU than a library's 1x1 convolution.
_MANY_POSITIONS = 64


def im2col(x: Tensor, kernel: Sequence[int], out: Sequence[int], node: Node) -> Tensor:
    """Columns of ``x`` ``(N, C, *positions)`` that the convolution of a node multiplies its weight with.

    The window has the size ``kernel`` and ``out`` positions along each dimension, T in all. Returns
    ``(N, C * prod(kernel), T)``, a view of ``x`` for windows of one entry.
    """
    padding = node._saved_padding
    if math.prod(kernel) > 1:
        x = x.contiguous()  # its windows overlap: each of its entries is read several times
    if any(padding):
        x = F.pad(x, [p for size in reversed(padding) for p in (size, size)])
    steps, size = x.stride(), (*x.shape[:2], *kernel, *out)
    inside = [step * d for step, d in zip(steps[2:], node._saved_dilation, strict=True)]
    across = [step * s for step, s in zip(steps[2:], node._saved_stride, strict=True)]
    view = x.as_strided(size, (*steps[:2], *inside, *across), x.storage_offset())
    return view.reshape(x.shape[0], x.shape[1] * math.prod(kernel), math.prod(out))


def _gradients(site: Site, grad: Tensor, layout: Layout) -> Iterator[AnyGradient]:
    node, weight, bias = site.node, site.operand(1), site.operand(2)
    product: ProductGradient | None = None
    if weight is not None:
        require_form(not weight.picks)
        kernel, groups, saved = node._saved_weight.shape[2:], node._saved_groups, node._saved_input.detach()
        if node._saved_transposed:
            # Roles change: the input plays the gradient's part, and the gradient's columns differ by class.
            columns = im2col(grad.flatten(0, 1), kernel, saved.shape[2:], node)
            grads, inputs = columns.unflatten(0, grad.shape[:2]), saved
        else:
            grads, inputs = grad, im2col(saved, kernel, grad.shape[3:], node)
        grads = layout.channels(grads, 1).unflatten(2, (groups, -1))
        inputs = layout.channels(inputs, 0).unflatten(1, (groups, -1))
        shape, turned = tuple(node._saved_weight.shape), node._saved_transposed
        product = ProductGradient(weight, grads.transpose(0, 1), inputs, shape, turned)
        yield product
    if bias is not None:
        shifts = layout.channels(grad, 1).transpose(0, 1)

        def of_shifts(dtype: torch.dtype) -> Tensor:
            if product is None or product.turned:
                return summed_squares(shifts, dtype)[:, None]
            return product.row_squares(dtype).flatten(1)[:, None]  # which the weight needs as well

        yield Gradient.of(bias, shifts.sum(dim=-1), of_shifts)


def _vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    if grads[0] is None or any(wanted[1:]):
        return None
    grad, weight = grads[0].flatten(0, 1), node._saved_weight.detach()
    if grad.device.type == "cpu" and grad.is_contiguous():
        weight = weight.contiguous()  # or the result would have another memory order
    stride, padding, dilation = node._saved_stride, node._saved_padding, node._saved_dilation
    plain, strided = node._saved_groups == 1 and not node._saved_transposed, any(step > 1 for step in stride)
    positions = math.prod(grad.shape[2:]) if grad.device.type == "cpu" else 0
    reach = [d * (size - 1) - p for size, p, d in zip(weight.shape[2:], padding, dilation, strict=True)]
    one, shape = math.prod(weight.shape[2:]) == 1, (len(grad), *shape_of(*node.next_functions[0])[1:])
    if plain and one and not any(padding) and (strided or positions >= _MANY_POSITIONS):
        # Several times as fast as a library's convolution; the pixels that a stride left out get zeros.
        result = torch.bmm(weight.flatten(1).T.expand(len(grad), -1, -1), grad.flatten(2)).unflatten(2, grad.shape[2:])
        if strided:
            index: tuple[Any, ...] = (..., *(slice(None, None, step) for step in stride))
            seen, result = result, grad.new_zeros(shape)
            result[index] = seen
    elif plain and not strided and min(reach) >= 0 and positions >= 4 * _MANY_POSITIONS:
        # Going back is a convolution too, with the weight turned round: a library's forward pass is its fastest.
        turned = weight.flip(*range(2, weight.ndim)).transpose(0, 1)
        result = torch.convolution(grad, turned, None, stride, reach, dilation, False, [0] * len(reach), 1)
    else:
        # Only the shape of the input matters.
        rest = node._saved_transposed, node._saved_output_padding, node._saved_groups, [True, False, False]
        result = torch.ops.aten.convolution_backward(
            grad, grad.new_empty(shape), weight, None, stride, padding, dilation, *rest
        )[0]
    return [result.unflatten(0, grads[0].shape[:2]), None, None]


RULES["ConvolutionBackward0"] = Rule(frozenset({1, 2}), _gradients, _vjp)
