"""Influence of every patch of an image where classes are many: from the Jacobian, without Grams of K x K."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from influence.checks import require_deterministic, require_labels, require_logits
from influence.contrasts import Classes
from influence.inputs import Inputs
from influence.measures import Influence, exact_of_jacobians, given_labels, log_ceiling
from influence.metric import exact_autograd
from influence.pixels import InputGrams, Patches

# Float64 entries of the Jacobians of some patches at once: 2 MiB, which stay in a core's cache.
_ENTRIES = 2**18


def patch_influence(
    model: nn.Module,
    x: Tensor,
    labels: Tensor | Sequence[int] | Literal["predicted"] | None = None,
    *,
    patches: Patches | None = None,
) -> Influence:
    """Exact FI of every patch, as ``first_order_influence`` gives it for ``metric_tensor(model, x, wrt=patches)``.

    That metric tensor has a K x K Gram for each patch: with 10 classes the faster way, with 1,000 classes 8 MB for each
    pixel. A patch of p < K - 1 values has rank p at most, and its K x p Jacobian is a factor of that Gram.

    Args:
        model: As for ``metric_tensor``.
        x: ``(N, C, H, W)`` floating images. Each Jacobian, C H W numbers for each class, is in memory for a while.
        labels: As for ``first_order_influence``.
        patches: Which. None: ``Patches(3)``.

    Returns:
        The influence, with one block for each patch.

    Raises:
        TypeError: As ``metric_tensor`` and ``first_order_influence``.
        ValueError: As these.
        RuntimeError: As ``metric_tensor``.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 40))
        >>> patch_influence(model, torch.zeros(1, 1, 4, 4), patches=Patches(2)).rank.view(4, 4)
        tensor([[4, 4, 4, 2],
                [4, 4, 4, 2],
                [4, 4, 4, 2],
                [2, 2, 2, 1]])
    """
    patches = Patches() if patches is None else patches
    given = given_labels(labels)
    inputs = Inputs.of(x).perturbing(None)
    blocks = patches.blocks(x.shape[1:])
    require_deterministic(model)
    if given is not None:
        with torch.no_grad():
            logits = require_logits(model(x[:1].clone()), examples=1)
        given = require_labels(given, examples=len(x), classes=logits.shape[1], device=logits.device)
    parts, compute = [], InputGrams(model)
    for n in range(len(x)):
        with exact_autograd(model, compute.perturbed):
            classes, jacobian, dtype = compute.jacobian(inputs[n : n + 1], Classes.of)
        label = classes.log_probs.argmax(dim=1) if given is None else given[n : n + 1]
        rows = _by_class(jacobian[0].flatten(1), classes.order[0])
        found = []
        for part in _of_patches(rows, patches, x.shape[1:]):
            log_probs = classes.log_probs.expand(len(part), -1)
            found.append(exact_of_jacobians(part, log_probs, label.expand(len(part)), dtype))
        fi, alignment, rank, near = (torch.cat(column) for column in zip(*found, strict=True))
        ceiling = log_ceiling(classes.log_probs, label).exp()
        parts.append((fi[None], ceiling, alignment[None], rank[None], near[None], label))
    fi, ceiling, alignment, rank, near, label = (torch.cat(column) for column in zip(*parts, strict=True))
    return Influence(fi, ceiling, alignment, rank, near, label, tuple(blocks))


def _by_class(contrasts: Tensor, order: Tensor) -> Tensor:
    """Rows of the K - 1 contrasts ``(K - 1, V)`` at their classes ``(K, V)``, with zeros for the predicted one."""
    rows = contrasts.new_zeros(len(order), contrasts.shape[1])
    return rows.index_copy_(0, order[:-1], contrasts)


def _of_patches(rows: Tensor, patches: Patches, shape: Sequence[int]) -> Iterator[Tensor]:
    """Jacobians ``(M, K, p)`` float64 of some patches at a time; entries beyond the border are zero."""
    for places, inside in patches.entries(shape, rows.device):
        at_once = max(1, _ENTRIES // (len(rows) * places.shape[1]))
        for where, within in zip(places.split(at_once), inside.split(at_once), strict=True):
            yield (rows[:, where].double() * within).transpose(0, 1).contiguous()
