"""The robustness curves of Zheng et al. (2016) on a model and data of the reader's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import influence

from .. import distortions
from .adapt import Subject


def stabilise(
    subject: Subject, *, alpha: float, sigma: float, steps: int, learning_rate: float, seed: int = 0
) -> nn.Module:
    """A copy of the model continued for some steps with the stability loss; with ``alpha = 0`` by the task loss alone.

    The model stays in evaluation mode, and parameters that are frozen stay so.

    Args:
        subject: model and training images.
        alpha: weight of the stability loss.
        sigma: standard deviation of the noise, as a share of the range of the pixels.
        steps: of Adam.
        learning_rate: of Adam.
        seed: of order and noise, the same for every alpha.

    Raises:
        ValueError: all parameters are frozen.
    """
    model = copy.deepcopy(subject.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("every parameter is frozen: set requires_grad on those that fine-tuning may change")
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    order = np.random.default_rng(seed)
    noise = torch.Generator(device=subject.device).manual_seed(seed)
    train = subject.material.train
    unit = _range(subject)
    for _ in range(steps):
        x, labels = train.batch(order.choice(len(train), min(64, len(train)), replace=False))
        x, labels = x.to(subject.device), labels.to(subject.device)
        noisy = influence.gaussian_perturbation(x, sigma=sigma * unit, generator=noise, clip=(0, unit))
        clean = influence.checks.require_logits(model(x))
        if alpha:
            other = influence.checks.require_logits(model(noisy))
            loss = influence.stability_loss(clean, other, labels, alpha=alpha)
        else:
            loss = F.cross_entropy(clean.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


def _range(subject: Subject) -> float:
    """255 for bytes, 1 for floats in [0, 1]."""
    inputs, _ = subject.material.train.stored(range(min(64, len(subject.material.train))))
    if inputs.dtype == torch.uint8:
        return 255.0
    if inputs.is_floating_point() and float(inputs.min()) >= 0 and float(inputs.max()) <= 1:
        return 1.0
    raise ValueError("the distortions need images as bytes, or as floats in [0, 1] before normalisation")


def robustness(
    subject: Subject, *, alpha: float, sigma: float, steps: int, learning_rate: float, images: int, seed: int = 0
) -> pd.DataFrame:
    """Accuracy on distorted test images of the model as it is, and continued without and with the stability loss.

    Returns:
        One row per arm, family of distortion and strength (0 is the original): accuracy with its 95% Wilson interval,
        n. Empty for what is no image.
    """
    if not subject.image:
        return pd.DataFrame()
    unit = _range(subject)
    stored, labels = subject.material.test.sample(images, seed=seed).stored(
        range(min(images or len(subject.material.test), len(subject.material.test)))
    )
    bytes_ = stored if stored.dtype == torch.uint8 else (stored * 255).round().to(torch.uint8)
    versions = list(_versions(bytes_, seed))
    arms = {"as it is": subject.model}
    if steps:
        options: dict[str, Any] = {"sigma": sigma, "steps": steps, "learning_rate": learning_rate, "seed": seed}
        arms["continued"] = stabilise(subject, alpha=0.0, **options)
        arms[f"stability {alpha:g}"] = stabilise(subject, alpha=alpha, **options)
    rows = []
    for arm, model in arms.items():
        for family, strength, pictures in versions:
            right = _hits(model, pictures.float() * (unit / 255), labels, subject.device)
            interval = stats.binomtest(right, len(labels)).proportion_ci(method="wilson")
            rows.append(
                {
                    "arm": arm,
                    "family": family,
                    "strength": strength,
                    "accuracy": right / len(labels),
                    "low": interval.low,
                    "high": interval.high,
                    "n": len(labels),
                }
            )
    return pd.DataFrame(rows)


def _versions(images: Tensor, seed: int) -> list[tuple[str, float, Tensor]]:
    height, width = images.shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[str, float, Tensor]] = []
    for family, strengths, make in _families(height, width, generator):
        found.append((family, 0.0, images))
        found += [(family, float(strength), make(images, strength)) for strength in strengths]
    return found


_Family = tuple[str, Sequence[float], Callable[[Tensor, float], Tensor]]


def _families(height: int, width: int, generator: torch.Generator) -> list[_Family]:
    def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(images.float(), size, mode="bilinear", antialias=True)

    def thumbnail(images: Tensor, shrink: float) -> Tensor:
        small = (max(1, round(height / shrink)), max(1, round(width / shrink)))
        return resized(resized(images, small), (height, width)).round().clamp(0, 255).to(torch.uint8)

    def crop(images: Tensor, share: float) -> Tensor:
        top, left = max(1, round(share * height)), max(1, round(share * width))
        return resized(images[..., top:, left:], (height, width)).round().clamp(0, 255).to(torch.uint8)

    def noisy(images: Tensor, sigma: float) -> Tensor:
        noise = torch.randn(images.shape, generator=generator)
        return (images.float() + 255 * sigma * noise).round().clamp(0, 255).to(torch.uint8)

    return [
        ("100 - JPEG quality", (20, 50, 70, 90), lambda images, s: distortions.jpeg(images, 100 - int(s))),
        ("thumbnail: shrunk by", (1.33, 2.0, 3.0), thumbnail),
        ("crop: share of the side", (0.05, 0.1, 0.2), crop),
        ("Gaussian noise: sigma", (0.05, 0.1, 0.2), noisy),
    ]


def _hits(model: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> int:
    total = 0
    with torch.no_grad():
        for x, y in zip(images.split(64), labels.split(64), strict=True):
            total += int((influence.checks.require_logits(model(x.to(device))).argmax(1).cpu() == y).sum())
    return total
