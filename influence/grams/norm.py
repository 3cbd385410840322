"""Normalisation with a scale and a shift: batch (in evaluation mode), group, layer and root mean square."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from influence.grams.gradients import Gradient, sum_of_squares
from influence.grams.rules import RULES, Grads, Layout, Node, Rule, Site, in_order_of, require_form


def _gradients(site: Site, grads: Tensor, normal: Tensor) -> Iterator[Gradient]:
    """From gradients ``(m, N, C, T)`` and normalised input ``(N, C, T)`` to those of scale and shift."""
    normal = in_order_of(grads, normal.to(grads.dtype))

    @cache
    def squares(dtype: torch.dtype) -> Tensor:
        return sum_of_squares(grads.to(dtype).unbind())

    def of_scale(dtype: torch.dtype) -> Tensor:
        return (squares(dtype) * normal.to(dtype).square()).sum(dim=-1)[:, None]

    scale, shift, sums = site.operand(1), site.operand(2), _sums(grads, normal)
    if scale is not None:
        yield Gradient.of(scale, sums[0], of_scale)
    if shift is not None:
        yield Gradient.of(shift, sums[1], lambda dtype: squares(dtype).sum(dim=-1)[:, None])


def _sums(grads: Tensor, normal: Tensor) -> Tensor:
    """Over the positions, of gradients ``(m, N, C, T)`` times values ``(N, C, T)``, and of them: ``(2, N, m, C)``."""
    if grads.stride(-1) == 1:
        # In one pass over the gradients.
        factors = torch.stack([normal, torch.ones_like(normal)], dim=2)
        return (factors @ grads.permute(1, 2, 3, 0)).permute(2, 0, 3, 1)
    # Where the channels come last in memory, a product of matrices would copy both.
    wide = grads.to(torch.promote_types(grads.dtype, torch.float32))
    sums = (wide * normal).sum(dim=-1), wide.sum(dim=-1)
    return torch.stack([part.to(grads.dtype).transpose(0, 1) for part in sums])


# -- batch ------------------------------------------------------------------------------------------------------------


def _evaluates(node: Node) -> bool:
    return not node._saved_training and node._saved_running_mean is not None


def _deviation(node: Node) -> Tensor:
    """1 / sqrt(running variance + epsilon), float64; cuDNN and MIOpen call the latter by its full name."""
    epsilon = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    return (node._saved_running_var.double() + epsilon).rsqrt()


def _batch_gradients(site: Site, grad: Tensor, layout: Layout) -> Iterator[Gradient]:
    node, shape = site.node, (-1, *(1,) * (grad.ndim - 3))
    require_form(_evaluates(node))
    centred = node._saved_input.detach() - node._saved_running_mean.view(shape)
    normal = centred * _deviation(node).to(grad.dtype).view(shape)
    return _gradients(site, layout.channels(grad, 1), layout.channels(normal, 0))


def _batch_entries(node: Node, grad: Tensor, over: bool) -> Tensor | None:
    if not _evaluates(node):
        return None
    weight, scale = node._saved_weight, _deviation(node)
    scale = scale if weight is None else scale * weight.detach().double()
    return torch.mul(grad, scale.to(grad.dtype).view(-1, *(1,) * (grad.ndim - 3)), out=grad if over else None)


# -- group, layer and root mean square --------------------------------------------------------------------------------


def _normalised(node: Node) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Normalised input, 1 / deviation, and the dimensions that share it; of a group ``(N, G, rest)``."""
    saved: Tensor = node._saved_input.detach()
    if node.name() == "NativeGroupNormBackward0":
        saved = saved.reshape(len(saved), node._saved_group, -1)
        mean, deviation = (part.unsqueeze(-1) for part in (node._saved_result1, node._saved_result2))
        return (saved - mean) * deviation, deviation, (-1,)
    axes = tuple(range(-len(node._saved_normalized_shape), 0))
    if node.name() == "FusedRmsNormBackward0":
        return saved * node._saved_result1, node._saved_result1, axes
    return (saved - node._saved_result1) * node._saved_result2, node._saved_result2, axes


def _group_gradients(site: Site, grad: Tensor, layout: Layout) -> Iterator[Gradient]:
    normal = _normalised(site.node)[0].view(grad.shape[1:])
    return _gradients(site, layout.channels(grad, 1), layout.channels(normal, 0))


def _layer_gradients(site: Site, grad: Tensor, layout: Layout) -> Iterator[Gradient]:
    normal, _, axes = _normalised(site.node)
    require_form(grad.ndim - 1 > len(axes))
    # (..., rows, *features) to (..., N, F, r)
    grads, normal = (tensor.flatten(-len(axes)) for tensor in (grad, normal))
    return _gradients(site, layout.split(grads.flatten(1, -2), 1).mT, layout.split(normal.flatten(0, -2), 0).mT)


def _vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    grad, weight = grads[0], node._saved_weight
    if grad is None or any(other is not None for other in grads[1:]) or any(wanted[1:]):
        return None
    normal, deviation, axes = _normalised(node)
    if weight is not None:
        by_channel = node.name() == "NativeGroupNormBackward0"
        grad = grad * (weight.view(-1, *(1,) * (grad.ndim - 3)) if by_channel else weight).detach()
    inner = grad.reshape(len(grad), *normal.shape)
    inner = inner - inner.mean(dim=axes, keepdim=True) - normal * (inner * normal).mean(dim=axes, keepdim=True)
    return [(inner * deviation).view(grad.shape), None, None]


for _kind in ("Native", "Cudnn", "Miopen"):
    RULES[f"{_kind}BatchNormBackward0"] = Rule(frozenset({1, 2}), _batch_gradients, entries=_batch_entries)
RULES["NativeGroupNormBackward0"] = Rule(frozenset({1, 2}), _group_gradients, _vjp)
RULES["NativeLayerNormBackward0"] = Rule(frozenset({1, 2}), _layer_gradients, _vjp)
RULES["FusedRmsNormBackward0"] = Rule(frozenset({1}), _layer_gradients)
