"""Influence of every patch of an image where classes are many: from the Jacobian, without Grams of K x K."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from influence.checks import require_deterministic, require_labels
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
        TypeError, ValueError, RuntimeError: As ``metric_tensor`` and ``first_order_influence``.

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
    require_deterministic(model)
    inputs = Inputs.of(x).perturbing(None)
    blocks = patches.blocks(inputs.x.shape[1:])
    parts, compute = [], InputGrams(model)
    for n in range(len(inputs)):
        with exact_autograd(model, compute.perturbed):
            classes, jacobian, dtype = compute.jacobian(inputs[n : n + 1], Classes.of)
        log_probs = classes.log_probs
        wanted = log_probs.argmax(dim=1).expand(len(inputs)) if given is None else given
        every = require_labels(wanted, examples=len(inputs), classes=log_probs.shape[1], device=log_probs.device)
        label = every[n : n + 1]
        found = [
            exact_of_jacobians(part, log_probs.expand(len(part), -1), label.expand(len(part)), dtype)
            for part in _of_patches(jacobian[0], classes.order[0], patches)
        ]
        columns = [torch.cat(column)[None] for column in zip(*found, strict=True)]
        parts.append((*columns, log_ceiling(log_probs, label).exp(), label))
    fi, alignment, rank, near, ceiling, label = (torch.cat(column) for column in zip(*parts, strict=True))
    return Influence(fi, ceiling, alignment, rank, near, label, tuple(blocks))


def _of_patches(contrasts: Tensor, order: Tensor, patches: Patches) -> Iterator[Tensor]:
    """Jacobians ``(M, K, p)`` float64 of some patches at a time, from that of the K - 1 contrasts ``(K - 1, C, H, W)``.

    Entries beyond the border are zero, and so is the row of the predicted class.
    """
    channels, height, width = contrasts.shape[1:]
    most, stride = max(patches.sizes), patches.stride
    before = (most - 1) // 2
    rows = contrasts.new_zeros(len(order), channels, height + most - 1, width + most - 1)
    rows[order[:-1], :, before : before + height, before : before + width] = contrasts
    for k in patches.sizes:
        first = before - (k - 1) // 2
        inner = rows[:, :, first : first + height + k - 1, first : first + width + k - 1]
        windows = inner.unfold(2, k, stride).unfold(3, k, stride)
        # (C, rows, columns, K, k, k), or (1, rows, columns, K, C, k, k).
        windows = windows.permute(1, 2, 3, 0, 4, 5) if patches.per_channel else windows.permute(2, 3, 0, 1, 4, 5)[None]
        numbers = torch.arange(math.prod(windows.shape[:3]), device=rows.device)
        at_once = max(1, _ENTRIES // windows[0, 0, 0].numel())
        for chosen in numbers.split(at_once):
            yield windows[torch.unravel_index(chosen, windows.shape[:3])].flatten(2).double().contiguous()
