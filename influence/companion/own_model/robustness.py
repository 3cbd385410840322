"""The robustness curves of Zheng et al. (2016) on a model and data of the reader's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import influence

from ..images import distortions
from ..zoo import training
from .material import Examples
from .study import Subject, quality

_BATCH = 64


def stabilise(
    subject: Subject, *, alpha: float, sigma: float, steps: int, learning_rate: float, seed: int = 0
) -> nn.Module:
    """A copy of the model continued for some steps with the stability loss; with ``alpha = 0`` by the task loss alone.

    The model stays in evaluation mode, and parameters that are frozen stay so. Steps are of Adam, the noise's `sigma`
    is a share of the range of the pixels, and order and noise are the same for every alpha. A ValueError where all
    parameters are frozen, or the images cannot be distorted.
    """
    model = copy.deepcopy(subject.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("every parameter is frozen: set requires_grad on those that fine-tuning may change")
    unit = pixel_range(subject)
    if unit is None:
        raise ValueError("fine-tuning needs images as bytes, or as floats in [0, 1] before normalisation")

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
        x, labels = (part.to(subject.device) for part in batch)
        noisy = influence.gaussian_perturbation(x, sigma=sigma * unit, clip=(0, unit))
        # Large images go through one after the other: the gradients of the parts add up to that of the batch.
        for part in torch.arange(len(x), device=x.device).split(subject.at_once(_BATCH)):
            clean = influence.checks.require_logits(model(x[part]))
            if alpha:
                moved = influence.checks.require_logits(model(noisy[part]))
                value = influence.stability_loss(clean, moved, labels[part], alpha=alpha)
            else:
                value = F.cross_entropy(clean.float(), labels[part])
            yield value * (len(part) / len(x))

    training.train(
        model,
        _Sampled(subject.material.train, steps),
        loss,
        torch.optim.Adam(trained, lr=learning_rate),
        steps=steps,
        rate=lambda _: learning_rate,
        seed=(seed, 6),
        title=f"stability {alpha:g}",
        training_mode=False,
    )
    return model


@dataclass(frozen=True)
class _Sampled:
    """Random batches of the reader's training examples, each drawn anew."""

    examples: Examples
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.steps):
            yield self.examples.batch(torch.randperm(len(self.examples))[:_BATCH].tolist())


def pixel_range(subject: Subject) -> float | None:
    """255 for bytes, 1 for floats in [0, 1], None for what cannot be distorted: no image, or a normalised one."""
    if not subject.image:
        return None
    inputs, _ = subject.material.train.stored(range(min(_BATCH, len(subject.material.train))))
    if inputs.dtype == torch.uint8:
        return 255.0
    return 1.0 if inputs.is_floating_point() and float(inputs.min()) >= 0 and float(inputs.max()) <= 1 else None


def robustness(
    subject: Subject, *, alpha: float, sigma: float, steps: int, learning_rate: float, images: int, seed: int = 0
) -> pd.DataFrame:
    """Accuracy on distorted test images of the model as it is, and continued without and with the stability loss.

    Where the data have no parts, a fifth of each class is held out of what the model is continued with, and all arms
    are measured on that.

    Returns:
        One row per arm, family of distortion and strength (0 is the original): what `study.quality` measures, n. Empty
        where `pixel_range` is None.
    """
    unit = pixel_range(subject)
    if unit is None:
        return pd.DataFrame()
    if steps and subject.material.test is None:
        halves = subject.material.train.hold_out()
        if halves is None:
            steps = 0
        else:
            subject = replace(subject, material=replace(subject.material, train=halves[0], test=halves[1]))
    test = subject.material.measured.sample(images, seed=seed)
    stored, labels = test.stored(range(len(test)))
    bytes_ = stored if stored.dtype == torch.uint8 else (stored * 255).round().to(torch.uint8)
    arms = {"as it is": subject.model}
    if steps:
        options: dict[str, Any] = {"sigma": sigma, "steps": steps, "learning_rate": learning_rate, "seed": seed}
        arms["continued"] = stabilise(subject, alpha=0.0, **options)
        arms[f"stability {alpha:g}"] = stabilise(subject, alpha=alpha, **options)
    rows = []
    for family, strength, pictures in _versions(bytes_):
        shown = Examples(labels, partial(_scaled, pictures, unit / 255), range(len(labels)))
        for arm, model in arms.items():
            found = quality(replace(subject, model=model), shown)
            rows.append({"arm": arm, "family": family, "strength": strength, **found, "n": len(labels)})
    return pd.DataFrame(rows)


def _versions(images: Tensor) -> Iterator[tuple[str, float, Tensor]]:
    """The paper's distortions, with strengths that mean the same at any size: family, strength and pictures.

    One at a time: all of them would not fit for many large images.
    """
    height, width = images.shape[-2:]
    families: list[tuple[str, Sequence[float], Callable[[Tensor, float], Tensor]]] = [
        ("100 - JPEG quality", (20, 50, 70, 90), lambda x, s: distortions.jpeg(x, 100 - int(s))),
        (
            "thumbnail: factor of shrinking - 1",
            (0.33, 1.0, 2.0),
            lambda x, s: distortions.thumbnail(x, max(1, round(height * width / (1 + s) ** 2))),
        ),
        (
            "crop: share of the side",
            (0.05, 0.1, 0.2),
            lambda x, share: distortions.crop(x, max(1, round(share * min(height, width)))),
        ),
        ("Gaussian noise: sigma", (0.05, 0.1, 0.2), distortions.noise),
    ]
    for family, strengths, distort in families:
        yield family, 0.0, images
        for strength in strengths:
            yield family, strength, distort(images, strength)


def _scaled(pictures: Tensor, scale: float, position: int) -> Tensor:
    return pictures[position].float() * scale
