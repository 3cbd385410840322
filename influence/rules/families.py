"""The exact rule of each kind of node that takes a parameter: from the gradient of its output to the Gram.

A rule gets the gradients ``(m, ...)`` of all classes for all examples at once, knows which entries are whose, and
gives back for each of its parameters, or all of them together, a ``(N, m, m)`` Gram. ``ValueError`` says that a node is
not of the form that the rule was made for; its parameters then take the autograd path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from influence.kernels.contraction import cheaper, ghost_gram, materialised_gram
from influence.kernels.projected import products
from influence.rules.graph import Node, Operand, Site
from influence.rules.layout import Layout
from influence.rules.reverse import step
from influence.rules.windows import patches, pixel_gram

# Names of parameters, and the Gram of them together.
Grams = Iterable[tuple[tuple[str, ...], Tensor]]
Rule = Callable[[Site, Tensor, Layout, bool], Grams]


def knows(kind: str, place: int) -> bool:
    """Whether a parameter at this input of such a node has a rule."""
    return place in RULES[kind][0] if kind in RULES else False


def grams(site: Site, grad: Tensor, layout: Layout, *, together: bool) -> Grams:
    """Grams at a site.

    Args:
        site: The site.
        grad: ``(m, ...)`` gradient of its output.
        layout: Which entries are whose.
        together: Whether weight and bias lie in the same blocks, so that the sum of their Grams is enough.

    Yields:
        Names of parameters and their Gram ``(N, m, m)``, float64.

    Raises:
        ValueError: If the node is not of the form its rule was made for.
    """
    yield from RULES[site.node.name()][1](site, grad, layout, together)


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError("not of the form this rule was made for")


def _named(site: Site) -> dict[int, Operand]:
    return {operand.place: operand for operand in site.operands}


def _vector(operand: Operand, rows: Tensor) -> tuple[tuple[str, ...], Tensor]:
    """Gram of ``(N, m, *operand)`` gradients, sent back through whatever picked entries of the parameter."""
    if operand.picks:
        examples, classes = rows.shape[:2]
        flat = rows.flatten(0, 1)
        for node in operand.picks:
            (back,) = step(node, [flat], [True])[:1]
            assert back is not None
            flat = back
        rows = flat.unflatten(0, (examples, classes))
    return (operand.name,), products(rows.reshape(*rows.shape[:2], -1))


# -- weights --------------------------------------------------------------------------------------------------------


def _weighted(
    site: Site,
    weight: Operand | None,
    bias: Operand | None,
    grads: Tensor,
    shared: Callable[[], Tensor],
    shape: tuple[int, int],
    gram: tuple[float, Callable[[], Tensor]] | None,
    together: bool,
) -> Grams:
    """Weight and bias of a matrix product at each position.

    Args:
        site: The site.
        weight: The weight, if it is looked for.
        bias: The bias, if it is looked for.
        grads: ``(N, m, G, P, T)``, G groups.
        shared: Makes the input, ``(N, G, D, T)``.
        shape: D and T.
        gram: Multiplications for S in some other way, and S ``(N, T, T)`` itself.
        together: Whether to add weight and bias up.
    """
    del site
    examples, classes, groups, outputs, positions = grads.shape
    inputs = shape[0]
    merged = False
    if weight is not None:
        _require(not weight.picks)
        cost = positions**2 * inputs if gram is None else min(gram[0], positions**2 * inputs)
        way = cheaper(
            positions=positions,
            inputs=inputs,
            outputs=outputs,
            classes=classes,
            double=grads.dtype == torch.float64,
            shared=cost,
        )
        rows = grads.squeeze(2) if groups == 1 else grads.transpose(1, 2).flatten(0, 1)
        if way == "ghost":
            if gram is not None and gram[0] < positions**2 * inputs:
                similar = gram[1]()
            else:
                wide = shared().flatten(0, 1).double()
                similar = wide.mT @ wide
            merged = together and bias is not None and not bias.picks
            # The bias is one more input that is always 1.
            result = ghost_gram(rows, similar + 1 if merged else similar)
        else:
            result = materialised_gram(rows, shared().flatten(0, 1))
        names = (weight.name, bias.name) if merged and bias is not None else (weight.name,)
        yield names, result.view(examples, groups, classes, classes).sum(dim=1)
    if bias is not None and not merged:
        yield _vector(bias, grads.sum(dim=-1).flatten(2))


def _addmm(site: Site, grad: Tensor, layout: Layout, together: bool) -> Grams:
    node, named = site.node, _named(site)
    bias, weight = named.get(0), named.get(2)
    yield from _linear(site, grad, layout, together, weight, bias, "_saved_mat1", node._saved_alpha, node._saved_beta)


def _mm(site: Site, grad: Tensor, layout: Layout, together: bool) -> Grams:
    yield from _linear(site, grad, layout, together, _named(site)[1], None, "_saved_self", 1, 1)


def _linear(
    site: Site,
    grad: Tensor,
    layout: Layout,
    together: bool,
    weight: Operand | None,
    bias: Operand | None,
    saved: str,
    alpha: float,
    beta: float,
) -> Grams:
    _require(alpha == 1 and beta == 1)
    rows, outputs = grad.shape[1:]
    if bias is not None:
        source, output = site.node.next_functions[0]
        _require(math.prod(source._input_metadata[output].shape) == outputs)
    grads = layout.split(grad, 1, 2)
    positions = grads.shape[2]
    # (m, N, T, P) to (N, m, 1, P, T)
    grads = grads.permute(1, 0, 3, 2).unsqueeze(2)
    inputs = 1

    def shared() -> Tensor:
        return layout.split(getattr(site.node, saved).detach(), 0, 1).mT.unsqueeze(1)

    if weight is not None:
        kept = getattr(site.node, saved)
        _require(kept is not None and kept.shape[0] == rows)
        inputs = kept.shape[1]
    yield from _weighted(site, weight, bias, grads, shared, (inputs, positions), None, together)


def _convolution(site: Site, grad: Tensor, layout: Layout, together: bool) -> Grams:
    node, named = site.node, _named(site)
    weight, bias = named.get(1), named.get(2)
    _require(layout.outer == 1)
    groups, kernel = node._saved_groups, tuple(node._saved_weight.shape[2:])
    geometry = {"stride": node._saved_stride, "padding": node._saved_padding, "dilation": node._saved_dilation}
    saved = node._saved_input.detach()
    batch, examples = saved.shape[0], layout.examples
    inside = batch // examples

    def positions_last(tensor: Tensor, start: int) -> Tensor:
        """(..., N * r, G, C, T) to (..., N, G, C, r * T)."""
        if inside == 1:
            return tensor
        split = tensor.unflatten(start, (examples, inside))
        return split.movedim(start + 1, -2).flatten(-2, -1)

    if not node._saved_transposed:
        places = tuple(grad.shape[3:])
        grads = grad.flatten(3).unflatten(2, (groups, -1))
        grads = positions_last(grads, 1).transpose(0, 1)

        def shared() -> Tensor:
            columns = patches(saved, kernel, out=places, **geometry)
            return positions_last(columns.unflatten(1, (groups, -1)), 0)

        depth = saved.shape[1] // groups * math.prod(kernel)
        other = None
        if groups == 1 and inside == 1 and math.prod(kernel) > 1:
            cost, make = pixel_gram(saved, kernel, out=places, **geometry)
            other = (cost, make)
        shape = (depth, grads.shape[-1])
        yield from _weighted(site, weight, bias, grads, shared, shape, other, together)
        return
    if weight is not None:
        # Roles change: the input plays the gradient's part, and windows of the gradient are what differs by class.
        places = tuple(saved.shape[2:])
        classes = grad.shape[0]
        columns = patches(grad.flatten(0, 1), kernel, out=places, **geometry)
        columns = columns.unflatten(0, (classes, batch)).unflatten(2, (groups, -1))
        grads = positions_last(columns, 1).transpose(0, 1)

        def input_columns() -> Tensor:
            return positions_last(saved.flatten(2).unflatten(1, (groups, -1)), 0)

        shape = (saved.shape[1] // groups, grads.shape[-1])
        yield from _weighted(site, weight, None, grads, input_columns, shape, None, False)
    if bias is not None:
        summed = grad.flatten(3).sum(dim=-1)
        yield _vector(bias, summed.unflatten(1, (examples, inside)).sum(dim=2).transpose(0, 1))


def _embedding(site: Site, grad: Tensor, layout: Layout, together: bool) -> Grams:
    del together
    node, operand = site.node, site.operands[0]
    _require(not node._saved_scale_grad_by_freq and not operand.picks)
    tokens = node._saved_indices
    rows = layout.split(grad.flatten(1, -2), 1, 2).permute(1, 0, 3, 2)
    mine = layout.split(tokens.flatten(), 0, 1)
    # Places that hold the same token add up: S is 1 there, and its root sends each place to the token's first one.
    same = mine[:, :, None] == mine[:, None, :]
    first = same.to(torch.int8).argmax(dim=2)
    root = F.one_hot(first, mine.shape[1]).to(grad.dtype)
    padding = node._saved_padding_idx
    padding = padding - 2**64 if padding >= 2**63 else padding
    if padding >= 0:
        root = root * (mine != padding)[:, :, None]
    summed = rows @ root[:, None]
    yield (operand.name,), products(summed.flatten(2))


# -- scales and shifts ----------------------------------------------------------------------------------------------


def _affine(site: Site, grads: Tensor, normal: Callable[[], Tensor]) -> Grams:
    """Scale and shift of C channels: gradients ``(m, N, C, T)``, normalised input ``(N, C, T)``."""
    named = _named(site)
    weight, bias = named.get(1), named.get(2)
    if weight is None:
        assert bias is not None
        yield _vector(bias, grads.sum(dim=-1).transpose(0, 1))
        return
    # Both sums in one pass over the gradients.
    factors = normal()
    factors = torch.stack([factors, torch.ones_like(factors)], dim=2) if bias is not None else factors.unsqueeze(2)
    sums = factors @ grads.permute(1, 2, 3, 0)
    yield _vector(weight, sums[:, :, 0].mT)
    if bias is not None:
        yield _vector(bias, sums[:, :, 1].mT)


def _channels(tensor: Tensor, layout: Layout, start: int) -> Tensor:
    """(..., N * r, C, *places) to (..., N, C, r * T)."""
    split = layout.split(tensor, start, start + 1)
    split = split.flatten(start + 3) if split.ndim > start + 3 else split.unsqueeze(-1)
    if split.shape[start + 1] == 1:
        return split.squeeze(start + 1)
    return split.movedim(start + 1, -2).flatten(-2, -1)


def _batch_norm(site: Site, grad: Tensor, layout: Layout, together: bool) -> Grams:
    del together
    node = site.node
    _require(not node._saved_training and node._saved_running_mean is not None)

    def normal() -> Tensor:
        shape = (-1, *(1,) * (grad.ndim - 3))
        mean = node._saved_running_mean
        deviation = (node._saved_running_var.double() + node._saved_eps).rsqrt().to(grad.dtype)
        saved = node._saved_input.detach()
        return _channels((saved - mean.view(shape)) * deviation.view(shape), layout, 0)

    yield from _affine(site, _channels(grad, layout, 1), normal)


def _group_norm(site: Site, grad: Tensor, layout: Layout, together: bool) -> Grams:
    del together
    node = site.node

    def normal() -> Tensor:
        saved = node._saved_input.detach()
        grouped = saved.reshape(saved.shape[0], node._saved_group, -1)
        centred = (grouped - node._saved_result1[..., None]) * node._saved_result2[..., None]
        return _channels(centred.view(saved.shape), layout, 0)

    yield from _affine(site, _channels(grad, layout, 1), normal)


def _rows_last(tensor: Tensor, axes: int, layout: Layout, start: int) -> Tensor:
    """(..., rows, *features) to (..., N, F, r)."""
    flat = tensor.flatten(tensor.ndim - axes)
    return layout.split(flat, start, flat.ndim - 1).mT


def _layer_norm(site: Site, grad: Tensor, layout: Layout, together: bool) -> Grams:
    del together
    node = site.node
    axes = len(node._saved_normalized_shape)

    def normal() -> Tensor:
        centred = (node._saved_input.detach() - node._saved_result1) * node._saved_result2
        return _rows_last(centred, axes, layout, 0)

    _require(grad.ndim - 1 > axes)
    yield from _affine(site, _rows_last(grad, axes, layout, 1), normal)


def _rms_norm(site: Site, grad: Tensor, layout: Layout, together: bool) -> Grams:
    del together
    node = site.node
    axes = len(node._saved_normalized_shape)
    _require(grad.ndim - 1 > axes)
    normal = _rows_last(node._saved_input.detach() * node._saved_result1, axes, layout, 0)
    sums = normal.unsqueeze(2) @ _rows_last(grad, axes, layout, 1).permute(1, 2, 3, 0)
    yield _vector(site.operands[0], sums[:, :, 0].mT)


def _sum_to_operand(tensor: Tensor, node: Node, place: int, layout: Layout) -> Tensor:
    """Sum gradients ``(m, *output)`` over what was broadcast, example by example: ``(N, m, *operand)``."""
    source, output = node.next_functions[place]
    shape = tuple(int(size) for size in source._input_metadata[output].shape)
    full = tuple(tensor.shape[1:])
    padded = (1,) * (len(full) - len(shape)) + shape
    _require(len(padded) == len(full))
    if layout.examples == 1:
        parts, kept = tensor.unsqueeze(1), padded
    else:
        axis = next(
            (
                i
                for i, size in enumerate(full)
                if math.prod(full[:i]) == layout.outer and size % layout.examples == 0 and size > 0
            ),
            None,
        )
        # One value for all examples: what differs between them is no parameter alone.
        _require(axis is not None and padded[axis] == 1)
        assert axis is not None
        parts = tensor.unflatten(axis + 1, (layout.examples, -1)).movedim(axis + 1, 1)
        kept = padded
    broadcast = [i + 2 for i, size in enumerate(kept) if size == 1 and parts.shape[i + 2] != 1]
    summed = parts.sum(dim=broadcast, keepdim=True) if broadcast else parts
    return summed.transpose(0, 1).reshape(layout.examples, len(tensor), *shape)


def _broadcast(site: Site, grad: Tensor, layout: Layout, factor: Callable[[int], Any]) -> Grams:
    _require(len(site.operands) == 1)
    operand = site.operands[0]
    scale = factor(operand.place)
    if isinstance(scale, Tensor):
        # A product with another parameter alone is no data.
        rows = [_sum_to_operand((part * scale)[None], site.node, operand.place, layout) for part in grad]
        yield _vector(operand, torch.cat(rows, dim=1))
        return
    rows_ = _sum_to_operand(grad, site.node, operand.place, layout)
    yield _vector(operand, rows_ if scale == 1 else rows_ * scale)


def _add(site: Site, grad: Tensor, layout: Layout, together: bool) -> Grams:
    del together
    sign = -1 if site.node.name() == "SubBackward0" else 1
    return _broadcast(site, grad, layout, lambda place: sign * site.node._saved_alpha if place == 1 else 1)


def _mul(site: Site, grad: Tensor, layout: Layout, together: bool) -> Grams:
    del together

    def other(place: int) -> Tensor:
        saved = site.node._saved_other if place == 0 else site.node._saved_self
        _require(isinstance(saved, Tensor))
        return saved.detach()

    return _broadcast(site, grad, layout, other)


def _expand(site: Site, grad: Tensor, layout: Layout, together: bool) -> Grams:
    del together
    return _broadcast(site, grad, layout, lambda place: 1)


# For each kind of node: the inputs at which it may take a parameter, and the rule.
RULES: dict[str, tuple[frozenset[int], Rule]] = {
    "AddBackward0": (frozenset({0, 1}), _add),
    "AddmmBackward0": (frozenset({0, 2}), _addmm),
    "ConvolutionBackward0": (frozenset({1, 2}), _convolution),
    "CudnnBatchNormBackward0": (frozenset({1, 2}), _batch_norm),
    "EmbeddingBackward0": (frozenset({0}), _embedding),
    "ExpandBackward0": (frozenset({0}), _expand),
    "FusedRmsNormBackward0": (frozenset({1}), _rms_norm),
    "MmBackward0": (frozenset({1}), _mm),
    "MulBackward0": (frozenset({0, 1}), _mul),
    "NativeBatchNormBackward0": (frozenset({1, 2}), _batch_norm),
    "NativeGroupNormBackward0": (frozenset({1, 2}), _group_norm),
    "NativeLayerNormBackward0": (frozenset({1, 2}), _layer_norm),
    "SubBackward0": (frozenset({0, 1}), _add),
}
