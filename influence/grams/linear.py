"""Matrix products with a weight: ``nn.Linear`` at any number of positions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from influence.grams.reverse import vector_gram
from influence.grams.rules import RULES, Grads, Layout, Node, Operand, Rule, Site, require_form
from influence.kernels.contraction import cheaper, ghost_gram, materialised_gram


def weight_gram(grads: Tensor, inputs: Tensor) -> Tensor:
    """Gram of the gradients W_k = sum_t g_k[t] a[t]^T of a weight.

    Args:
        grads: g, ``(N, m, G, P, T)``: m classes, G groups, P outputs, T positions.
        inputs: a, ``(N, G, D, T)``.

    Returns:
        ``(N, m, m)`` float64, by the cheaper of two ways, see ``kernels.contraction``.
    """
    examples, classes, groups, outputs, positions = grads.shape
    rows, columns = grads.transpose(1, 2).flatten(0, 1), inputs.flatten(0, 1)
    features = columns.shape[1]
    way = cheaper(
        positions=positions,
        inputs=features,
        outputs=outputs,
        classes=classes,
        double=grads.itemsize == 8,
        shared=positions**2 * features,
    )
    if way == "ghost":
        wide = columns.double()
        gram = ghost_gram(rows, wide.mT @ wide)
    else:
        gram = materialised_gram(rows, columns)
    return gram.view(examples, groups, classes, classes).sum(dim=1)


def _rows(site: Site) -> Sequence[int]:
    return site.shape[:-1]


def _grams(
    site: Site, grad: Tensor, layout: Layout, weight: Operand | None, bias: Operand | None, inputs: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    grads = layout.split(grad, 1, 2).permute(1, 0, 3, 2)  # (N, m, P, T)
    if weight is not None:
        require_form(inputs is not None and inputs.shape[0] == grad.shape[1] and not weight.picks)
        assert inputs is not None
        columns = layout.split(inputs.detach(), 0, 1).mT  # (N, D, T)
        yield weight.name, weight_gram(grads.unsqueeze(2), columns.unsqueeze(1))
    if bias is not None:
        source, output = site.node.next_functions[bias.place]
        require_form(math.prod(source._input_metadata[output].shape) == grad.shape[2])
        yield vector_gram(bias, grads.sum(dim=-1))


def _addmm_grams(site: Site, grad: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    require_form(site.node._saved_alpha == 1 and site.node._saved_beta == 1)
    weight = site.operand(2)
    # The input is not kept where the weight is no parameter.
    inputs = None if weight is None else site.node._saved_mat1
    return _grams(site, grad, layout, weight, site.operand(0), inputs)


def _mm_grams(site: Site, grad: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    return _grams(site, grad, layout, site.operand(1), None, site.node._saved_self)


def _addmm_vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    if grads[0] is None or wanted[0] or wanted[2] or node._saved_alpha != 1:
        return None
    return [None, grads[0] @ node._saved_mat2.detach().mT, None]


def _mm_vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    if grads[0] is None or wanted[1]:
        return None
    return [grads[0] @ node._saved_mat2.detach().mT, None]


RULES["AddmmBackward0"] = Rule(frozenset({0, 2}), _rows, _addmm_grams, _addmm_vjp)
RULES["MmBackward0"] = Rule(frozenset({1}), _rows, _mm_grams, _mm_vjp)
