"""Tables looked up by index: ``nn.Embedding``."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

from influence.grams.gradients import TokenGradient
from influence.grams.rules import RULES, Layout, Rule, Site, require_form, shape_of


def _gradients(site: Site, grad: Tensor, layout: Layout) -> Iterator[TokenGradient]:
    node, operand = site.node, site.operands[0]
    require_form(not node._saved_scale_grad_by_freq and not operand.picks)
    rows = layout.split(grad.flatten(1, -2), 1).permute(1, 0, 3, 2)
    mine = layout.split(node._saved_indices.flatten(), 0)
    # Positions that hold the same token add up: each goes to the token's first one.
    same = mine[:, :, None] == mine[:, None, :]
    first = F.one_hot(same.byte().argmax(dim=2), mine.shape[1]).to(grad.dtype)
    # The index comes back unsigned: -1, no padding, is the last number of 64 bits.
    padding = node._saved_padding_idx
    if padding < 2**63:
        first = first * (mine != padding)[:, :, None]
    yield TokenGradient(operand, (rows @ first[:, None]).mT, mine, shape_of(*node.next_functions[0]))


RULES["EmbeddingBackward0"] = Rule(frozenset({0}), _gradients)
