"""Continue a trained classifier as Zheng et al. (2016) do, or with one of the controls to compare that with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import influence

from ..images import distortions
from ..images.data import Dataset
from ..ledger import cache
from . import training
from .recipes import Recipe
from .training import Record, Shuffled, Trained, pixels

NOISE = "noise"
_RISE = 1 / 8


@dataclass(frozen=True)
class Arm:
    """One way of continuing a trained network; every arm of an experiment shares base, steps, order and noise.

    The network stays in evaluation mode: batch-normalisation statistics fixed, no dropout, so that the two branches of
    the stability loss differ by the noise alone.

    The objective is the task loss on clean images ("control"), on noisy ones ("augmentation") or the mean of the two
    ("mixed"), or that on clean images + alpha * divergence between clean and noisy outputs ("stability").

    Raises:
        ValueError: a distortion with any objective but augmentation.
    """

    objective: Literal["control", "augmentation", "mixed", "stability"]
    steps: int  # of SGD, with gradients clipped at a norm of 1
    learning_rate: float  # its peak: it rises for an eighth of the steps and falls to 0
    sigma: float = 0.04  # standard deviation of the Gaussian noise on pixels in [0, 1]
    alpha: float = 0.0
    divergence: Literal["kl", "ce"] = "kl"
    stop_gradient: bool = False  # hold the clean output constant: KL and CE then have the same gradient
    perturbation: str = NOISE  # what "augmentation" trains on: "noise", or a name of `distortions.apply`
    batch_size: int = 128

    def __post_init__(self) -> None:
        if self.perturbation != NOISE and self.objective != "augmentation":
            raise ValueError(f"only augmentation trains on a distortion, got {self.objective} on {self.perturbation!r}")

    @property
    def name(self) -> str:
        """What files and progress bars call it."""
        return self.objective

    def network(self, classifier: nn.Module) -> nn.Module:
        """What is continued of a trained classifier."""
        return classifier

    def task(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of logits."""
        return F.cross_entropy(outputs, labels)

    def stable(self, clean: Tensor, noisy: Tensor, labels: Tensor) -> Tensor:
        """The task loss of clean logits + alpha * their divergence to noisy ones."""
        return influence.stability_loss(
            clean, noisy, labels, alpha=self.alpha, divergence=self.divergence, stop_gradient=self.stop_gradient
        )

    def loss(self, model: nn.Module, x: Tensor, perturbed: Tensor, labels: Tensor) -> Tensor:
        """The objective on pixels 0..255, (N, C, H, W), and their perturbed copies."""
        if self.objective in ("control", "augmentation"):
            return self.task(model(x if self.objective == "control" else perturbed).float(), labels)
        # In evaluation mode one pass over both is two passes: no statistic is taken over the batch.
        clean, noisy = model(torch.cat([x, perturbed])).float().chunk(2)
        if self.objective == "mixed":
            return (self.task(clean, labels) + self.task(noisy, labels)) / 2
        return self.stable(clean, noisy, labels)


def finetune(
    recipe: Recipe, arm: Arm, dataset: Dataset, *, device: torch.device | str = "cpu", publish: bool = False
) -> Trained:
    """The network of `recipe`, continued with the objective of `arm` for a fixed number of steps; made once."""
    model = arm.network(training.fit(recipe, dataset, device=device).model)
    name, key = _named(recipe, arm, dataset)
    make = partial(_continue, model, recipe, arm, dataset)
    return training.made_once(name, key, model, make, recipe=arm, half=True, publish=publish)


def is_published(recipe: Recipe, arm: Arm, dataset: Dataset) -> bool:
    """Whether `finetune` has only to load it, on any machine."""
    name, key = _named(recipe, arm, dataset)
    return (training.published_folder() / f"{name}-{key[:16]}.json").exists()


def _named(recipe: Recipe, arm: Arm, dataset: Dataset) -> tuple[str, str]:
    key = cache.fingerprint({"base": training.identity(recipe, dataset), "arm": asdict(arm)})
    return f"{recipe.name}-{arm.name}", key


def _continue(model: nn.Module, recipe: Recipe, arm: Arm, dataset: Dataset, resume: Path) -> Record:
    return training.train(
        model,
        Shuffled(dataset.train, arm.batch_size, recipe.augment),
        partial(_loss, arm),
        torch.optim.SGD(model.parameters(), arm.learning_rate, momentum=0.9),
        steps=arm.steps,
        rate=lambda done: arm.learning_rate * min(max(done, 0.01) / _RISE, (1 - done) / (1 - _RISE)),
        clip=1.0,
        seed=(recipe.seed, 2),
        title=f"{arm.name} {recipe.seed}",
        training_mode=False,
        precision=recipe.precision,
        resume=resume,
    )


def _loss(arm: Arm, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    device = next(model.parameters()).device
    x, y = pixels(images, device), labels.to(device)
    # Drawn by every arm, so that step n of each sees the same images and noise.
    noisy = influence.gaussian_perturbation(x, sigma=arm.sigma * 255, clip=(0, 255))
    if arm.perturbation != NOISE:
        noisy = pixels(distortions.apply(arm.perturbation, images), device)
    return arm.loss(model, x, noisy, y)
