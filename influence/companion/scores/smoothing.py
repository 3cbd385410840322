"""Randomised smoothing (Cohen, Rosenfeld, Kolter 2019): an l2 radius within which the smoothed class cannot change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor, nn

from ..zoo.training import pixels

ABSTAIN = -1
_COPIES = 256  # noisy copies at a time


@dataclass(frozen=True)
class Certificate:
    """The class of one image, or ABSTAIN, and its l2 radius, pixels in [0, 1]; 0 when abstaining."""

    predicted: int
    radius: float


def certify(
    model: nn.Module,
    image: Tensor,
    *,
    sigma: float,
    select: int,
    estimate: int,
    level: float,
    generator: torch.Generator,
) -> Certificate:
    """CERTIFY of the paper: choose a class from some noisy copies, bound its probability from others.

    The smoothed classifier returns the most probable class of model(x + eps), eps ~ N(0, sigma^2 I), not clipped. With
    p a lower bound of that probability at confidence 1 - `level` and p > 1/2, it is constant within sigma Phi^-1(p),
    in the unit of sigma: pixels in [0, 1]. The model takes raw pixels, the image is (C, H, W) uint8; `select` noisy
    copies choose the class, `estimate` others bound its probability.

    Raises:
        ValueError: sigma not positive, or no copies.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    if select < 1 or estimate < 1:
        raise ValueError(f"select and estimate must be at least 1, got {select} and {estimate}")
    chosen = int(_votes(model, image, sigma, select, generator).argmax())
    count = int(_votes(model, image, sigma, estimate, generator)[chosen])
    low = lower_bound(count, estimate, level=level)
    if low <= 0.5:
        return Certificate(ABSTAIN, 0.0)
    return Certificate(chosen, sigma * float(stats.norm.ppf(low)))


def lower_bound(count: int, total: int, *, level: float) -> float:
    """One-sided Clopper-Pearson bound of a probability at confidence 1 - `level`."""
    found = stats.binomtest(count, total, alternative="greater").proportion_ci(1 - level, method="exact")
    return float(found.low)


@torch.inference_mode()
def _votes(model: nn.Module, image: Tensor, sigma: float, count: int, generator: torch.Generator) -> Tensor:
    device = generator.device
    x = pixels(image[None], device)
    votes = []
    for done in range(0, count, _COPIES):
        noise = torch.randn((min(_COPIES, count - done), *image.shape), generator=generator, device=device)
        logits = model(x + 255 * sigma * noise)
        votes.append(logits.argmax(1).bincount(minlength=logits.shape[1]))
    return torch.stack(votes).sum(0)
