"""Matrix products with a weight: ``nn.Linear`` at any number of positions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from influence.grams.gradients import AnyGradient, Gradient, ProductGradient, summed_squares
from influence.grams.rules import RULES, Grads, Layout, Node, Rule, Site, require_form, shape_of


def _gradients(site: Site, grad: Tensor, layout: Layout) -> Iterator[AnyGradient]:
    node, added = site.node, site.node.name() == "AddmmBackward0"
    require_form(not added or node._saved_alpha == node._saved_beta == 1)
    weight, bias = (site.operand(2), site.operand(0)) if added else (site.operand(1), None)
    grads = layout.split(grad, 1).permute(1, 0, 3, 2)  # (N, m, P, T)
    if weight is not None:
        inputs = (node._saved_mat1 if added else node._saved_self).detach()
        require_form(inputs.shape[0] == grad.shape[1] and not weight.picks)
        columns = layout.split(inputs, 0).mT  # (N, D, T)
        shape = (columns.shape[1], grads.shape[2])
        yield ProductGradient(weight, grads.unsqueeze(2), columns.unsqueeze(1), shape, turned=True)
    if bias is not None:
        require_form(math.prod(shape_of(*node.next_functions[0])) == grad.shape[2])
        yield Gradient.of(bias, grads.sum(dim=-1), lambda dtype: summed_squares(grads, dtype)[:, None])


def _vjp(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    place = 1 if node.name() == "AddmmBackward0" else 0
    others = any(want for i, want in enumerate(wanted) if i != place)
    if grads[0] is None or others or getattr(node, "_saved_alpha", 1) != 1:
        return None
    below = grads[0] @ node._saved_mat2.detach().mT
    return [below if i == place else None for i in range(len(wanted))]


RULES["AddmmBackward0"] = Rule(frozenset({0, 2}), _gradients, _vjp)
RULES["MmBackward0"] = Rule(frozenset({1}), _gradients, _vjp)
