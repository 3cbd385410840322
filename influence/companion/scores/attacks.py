"""Attacks in an l_inf ball: fast gradient sign (Goodfellow et al. 2015), projected gradient (Madry et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..images.data import Split
from ..zoo import dynamics
from .imagewise import chunks

_AT_ONCE = 250  # images: their starts are drawn together


def margins(
    model: nn.Module, split: Split, attack: Callable[[nn.Module, Tensor, Tensor], Tensor], device: torch.device
) -> np.ndarray:
    """`margin` of each image of a split, ``(N,)``, when an attack has moved it: above 0 where it is still right."""
    found = []
    for _, x, labels in chunks(split, _AT_ONCE, device, "attacks"):
        moved = attack(model, x, labels)
        with torch.no_grad():
            found.append(margin(model(moved), labels))
    return np.concatenate(found)


def margin(logits: Tensor, labels: Tensor) -> np.ndarray:
    """The logit of each label less the largest other one, ``(N,)``: above 0 where the prediction is right."""
    return dynamics.margins(logits, labels).double().cpu().numpy()


def near_tie(margins: np.ndarray, *, attacked: bool) -> np.ndarray:
    """Where rounding may turn a prediction round: a tie but for that, and less of one after an attack's many signs."""
    return np.abs(margins) < (0.5 if attacked else 1e-3)


def fgsm(model: nn.Module, x: Tensor, labels: Tensor, *, epsilon: float) -> Tensor:
    """One step of size epsilon along the sign of the gradient of the loss; takes and returns what `pgd` does."""
    return pgd(model, x, labels, epsilon=epsilon, steps=1, step_size=epsilon)


def pgd(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    steps: int = 10,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Several such steps, each projected back into the ball and the pixel range, from (N, C, H, W) floats 0..255.

    The model takes these; `epsilon`, the radius of the ball, and `step_size`, a quarter of it where None, are of pixels
    in [0, 1]. With a generator the start is uniform in the ball, else it is the image.

    Raises:
        ValueError: a negative radius, or a model in training mode.
    """
    if epsilon < 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}")
    if model.training:
        raise ValueError("expected a model in evaluation mode: call model.eval() first")
    radius = 255 * epsilon
    low, high = (x - radius).clamp(min=0), (x + radius).clamp(max=255)
    step = 255 * (epsilon / 4 if step_size is None else step_size)
    moved = x.detach().clone()
    if generator is not None:
        start = torch.rand(x.shape, generator=generator, device=generator.device).to(x.device)
        moved = low + (high - low) * start
    for _ in range(steps):
        moved.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(moved), labels, reduction="sum"), moved)
        moved = (moved.detach() + step * gradient.sign()).clamp(low, high)
    return moved.detach()
