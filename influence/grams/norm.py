"""Normalisation with a scale and a shift: batch (in evaluation mode), group, layer and root mean square."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from influence.grams.reverse import vector_gram
from influence.grams.rules import RULES, Grads, Layout, Node, Rule, Site, require_form


def _scale_and_shift(site: Site, grads: Tensor, normal: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Gradients ``(m, N, C, T)`` and normalised input ``(N, C, T)``, or a constant, to the Grams."""
    weight, bias = site.operand(1), site.operand(2)
    # Both sums over the positions in one pass over the gradients.
    sums = torch.stack([normal, torch.ones_like(normal)], dim=2).to(grads.dtype) @ grads.permute(1, 2, 3, 0)
    for operand, row in ((weight, sums[:, :, 0]), (bias, sums[:, :, 1])):
        if operand is not None:
            yield vector_gram(operand, row.mT)


def _channels(tensor: Tensor, layout: Layout, start: int) -> Tensor:
    """(..., N * r, C, *positions) to (..., N, C, r * T)."""
    split = layout.split(tensor, start, start + 1)
    split = split.flatten(start + 3) if split.ndim > start + 3 else split.unsqueeze(-1)
    if split.shape[start + 1] == 1:
        return split.squeeze(start + 1)
    return split.movedim(start + 1, -2).flatten(-2, -1)


def _rows_last(tensor: Tensor, axes: int, layout: Layout, start: int) -> Tensor:
    """(..., rows, *features) to (..., N, F, r)."""
    flat = tensor.flatten(tensor.ndim - axes)
    return layout.split(flat, start, flat.ndim - 1).mT


# -- batch ------------------------------------------------------------------------------------------------------------


def _deviation(node: Node) -> Tensor:
    """1 / sqrt(running variance + epsilon), float64; cuDNN and MIOpen call the latter by its full name."""
    epsilon = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    deviation: Tensor = (node._saved_running_var.double() + epsilon).rsqrt()
    return deviation


def _evaluates(node: Node) -> bool:
    return not node._saved_training and node._saved_running_mean is not None


def _batch_grams(site: Site, grad: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    node, shape = site.node, (-1, *(1,) * (grad.ndim - 3))
    require_form(_evaluates(node))
    centred = node._saved_input.detach() - node._saved_running_mean.view(shape)
    normal = centred * _deviation(node).to(grad.dtype).view(shape)
    yield from _scale_and_shift(site, _channels(grad, layout, 1), _channels(normal, layout, 0))


def _factor(node: Node, grad: Tensor) -> Tensor:
    """Weight / deviation, in the shape that multiplies a gradient ``(m, N, C, ...)``."""
    scale = _deviation(node)
    if node._saved_weight is not None:
        scale = scale * node._saved_weight.detach().double()
    return scale.to(grad.dtype).view(-1, *(1,) * (grad.ndim - 3))


def _batch_vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    grad = grads[0]
    if grad is None or any(wanted[1:]) or not _evaluates(node):
        return None
    return [grad * _factor(node, grad), None, None]


def _batch_over(node: Node, grad: Tensor) -> bool:
    if not _evaluates(node):
        return False
    grad.mul_(_factor(node, grad))
    return True


# -- group ------------------------------------------------------------------------------------------------------------


def _grouped(node: Node) -> tuple[Tensor, Tensor]:
    """Normalised input ``(N, G, rest)`` and 1 / deviation ``(N, G, 1)``."""
    saved = node._saved_input.detach()
    batch, groups = saved.shape[0], node._saved_group
    mean, deviation = (part.view(batch, groups, 1) for part in (node._saved_result1, node._saved_result2))
    return (saved.reshape(batch, groups, -1) - mean) * deviation, deviation


def _group_grams(site: Site, grad: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    normal = _grouped(site.node)[0].view(grad.shape[1:])
    yield from _scale_and_shift(site, _channels(grad, layout, 1), _channels(normal, layout, 0))


def _group_vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    grad = grads[0]
    if grad is None or any(other is not None for other in grads[1:]) or any(wanted[1:]):
        return None
    normal, deviation = _grouped(node)
    if node._saved_weight is not None:
        inner = grad * node._saved_weight.detach().view(-1, *(1,) * (grad.ndim - 3))
    else:
        inner = grad
    inner = inner.reshape(len(grad), *normal.shape)
    inner = inner - inner.mean(dim=-1, keepdim=True) - normal * (inner * normal).mean(dim=-1, keepdim=True)
    return [(inner * deviation).view(grad.shape), None, None]


# -- layer ------------------------------------------------------------------------------------------------------------


def _unnormalised(site: Site) -> Sequence[int]:
    return site.shape[: len(site.shape) - len(site.node._saved_normalized_shape)]


def _layer_normal(node: Node) -> Tensor:
    normal: Tensor = (node._saved_input.detach() - node._saved_result1) * node._saved_result2
    return normal


def _layer_grams(site: Site, grad: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    axes = len(site.node._saved_normalized_shape)
    require_form(grad.ndim - 1 > axes)
    normal = _rows_last(_layer_normal(site.node), axes, layout, 0)
    yield from _scale_and_shift(site, _rows_last(grad, axes, layout, 1), normal)


def _layer_vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    grad = grads[0]
    if grad is None or any(wanted[1:]):
        return None
    weight, axes = node._saved_weight, tuple(range(-len(node._saved_normalized_shape), 0))
    normal = _layer_normal(node)
    inner = grad if weight is None else grad * weight.detach()
    inner = inner - inner.mean(dim=axes, keepdim=True) - normal * (inner * normal).mean(dim=axes, keepdim=True)
    return [inner * node._saved_result2, None, None]


def _rms_grams(site: Site, grad: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    axes = len(site.node._saved_normalized_shape)
    require_form(grad.ndim - 1 > axes)
    normal = _rows_last(site.node._saved_input.detach() * site.node._saved_result1, axes, layout, 0)
    yield from _scale_and_shift(site, _rows_last(grad, axes, layout, 1), normal)


for _name in ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"):
    RULES[_name] = Rule(frozenset({1, 2}), grams=_batch_grams, vjp=_batch_vjp, over=_batch_over)
RULES["NativeGroupNormBackward0"] = Rule(frozenset({1, 2}), grams=_group_grams, vjp=_group_vjp)
RULES["NativeLayerNormBackward0"] = Rule(frozenset({1, 2}), _unnormalised, _layer_grams, _layer_vjp)
RULES["FusedRmsNormBackward0"] = Rule(frozenset({1}), _unnormalised, _rms_grams)
