"""Normalisation with a scale and a shift: batch (in evaluation mode), group, layer and root mean square."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from influence.grams.reverse import vector_gram
from influence.grams.rules import RULES, Grads, Layout, Node, Rule, Site, require_form


def _scale_and_shift(site: Site, grads: Tensor, normal: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Gradients ``(m, N, C, T)`` and normalised input ``(N, C, T)`` to the Grams."""
    # Both sums over the positions in one pass over the gradients.
    sums = torch.stack([normal, torch.ones_like(normal)], dim=2).to(grads.dtype) @ grads.permute(1, 2, 3, 0)
    for place in (1, 2):
        operand = site.operand(place)
        if operand is not None:
            yield vector_gram(operand, sums[:, :, place - 1].mT)


def _to_input(grad: Tensor, normal: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Gradient of the normalised values to that of the input, but for the deviation."""
    return grad - grad.mean(dim=axes, keepdim=True) - normal * (grad * normal).mean(dim=axes, keepdim=True)


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
    return _scale_and_shift(site, layout.channels(grad, 1), layout.channels(normal, 0))


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
    return _scale_and_shift(site, layout.channels(grad, 1), layout.channels(normal, 0))


def _group_vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    grad, weight = grads[0], node._saved_weight
    if grad is None or any(other is not None for other in grads[1:]) or any(wanted[1:]):
        return None
    normal, deviation = _grouped(node)
    inner = grad if weight is None else grad * weight.detach().view(-1, *(1,) * (grad.ndim - 3))
    inner = _to_input(inner.reshape(len(grad), *normal.shape), normal, (-1,))
    return [(inner * deviation).view(grad.shape), None, None]


# -- layer and root mean square ---------------------------------------------------------------------------------------


def _layer_normal(node: Node) -> Tensor:
    saved: Tensor = node._saved_input.detach()
    if node.name() == "FusedRmsNormBackward0":
        return saved * node._saved_result1
    return (saved - node._saved_result1) * node._saved_result2


def _layer_grams(site: Site, grad: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    axes = len(site.node._saved_normalized_shape)
    require_form(grad.ndim - 1 > axes)

    def by_example(tensor: Tensor, dim: int) -> Tensor:
        """(..., rows, *features) to (..., N, F, r)."""
        return layout.split(tensor.flatten(-axes).flatten(dim, -2), dim).mT

    return _scale_and_shift(site, by_example(grad, 1), by_example(_layer_normal(site.node), 0))


def _layer_vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    grad, weight = grads[0], node._saved_weight
    if grad is None or any(wanted[1:]):
        return None
    inner = grad if weight is None else grad * weight.detach()
    axes = range(-len(node._saved_normalized_shape), 0)
    return [_to_input(inner, _layer_normal(node), tuple(axes)) * node._saved_result2, None, None]


for _kind in ("Native", "Cudnn", "Miopen"):
    RULES[f"{_kind}BatchNormBackward0"] = Rule(frozenset({1, 2}), _batch_grams, _batch_vjp, _batch_over)
RULES["NativeGroupNormBackward0"] = Rule(frozenset({1, 2}), _group_grams, _group_vjp)
RULES["NativeLayerNormBackward0"] = Rule(frozenset({1, 2}), _layer_grams, _layer_vjp)
RULES["FusedRmsNormBackward0"] = Rule(frozenset({1}), _layer_grams)
