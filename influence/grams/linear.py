"""Matrix products with a weight: ``nn.Linear`` at any number of positions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from influence.grams.reverse import vector_gram
from influence.grams.rules import RULES, Grads, Layout, Node, Rule, Site, require_form, shape_of
from influence.kernels.contraction import cheaper, ghost_gram, materialised_gram


def weight_gram(grads: Tensor, inputs: Tensor) -> Tensor:
    """Gram ``(N, m, m)`` float64 of the gradients W_k = sum_t g_k[t] a[t]^T of a weight, by the cheaper of two ways.

    ``grads`` are g, ``(N, m, G, P, T)``: m classes, G groups, P outputs, T positions; ``inputs`` a, ``(N, G, D, T)``.
    """
    examples, classes, groups, outputs, positions = grads.shape
    rows, columns = grads.transpose(1, 2).flatten(0, 1), inputs.flatten(0, 1)
    features = columns.shape[1]
    shared, double = positions**2 * features, grads.itemsize == 8
    way = cheaper(positions=positions, inputs=features, outputs=outputs, classes=classes, double=double, shared=shared)
    if way == "ghost":
        wide = columns.double()
        gram = ghost_gram(rows, wide.mT @ wide)
    else:
        gram = materialised_gram(rows, columns)
    return gram.view(examples, groups, classes, classes).sum(dim=1)


def _grams(site: Site, grad: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    node, added = site.node, site.node.name() == "AddmmBackward0"
    require_form(not added or node._saved_alpha == node._saved_beta == 1)
    weight, bias = (site.operand(2), site.operand(0)) if added else (site.operand(1), None)
    grads = layout.split(grad, 1).permute(1, 0, 3, 2)  # (N, m, P, T)
    if weight is not None:
        inputs = (node._saved_mat1 if added else node._saved_self).detach()
        require_form(inputs.shape[0] == grad.shape[1] and not weight.picks)
        columns = layout.split(inputs, 0).mT  # (N, D, T)
        yield weight.name, weight_gram(grads.unsqueeze(2), columns.unsqueeze(1))
    if bias is not None:
        require_form(math.prod(shape_of(*node.next_functions[0])) == grad.shape[2])
        yield vector_gram(bias, grads.sum(dim=-1))


def _vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    place = 1 if node.name() == "AddmmBackward0" else 0
    others = any(want for i, want in enumerate(wanted) if i != place)
    if grads[0] is None or others or getattr(node, "_saved_alpha", 1) != 1:
        return None
    below = grads[0] @ node._saved_mat2.detach().mT
    return [below if i == place else None for i in range(len(wanted))]


RULES["AddmmBackward0"] = Rule(frozenset({0, 2}), _grams, _vjp)
RULES["MmBackward0"] = Rule(frozenset({1}), _grams, _vjp)
