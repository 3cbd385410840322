"""Continue a trained classifier as Zheng et al. (2016) do, or with one of the controls to compare that with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import influence
from influence.progress import progress_bar

from . import cache, distortions, models, training
from .data import Dataset, Split
from .training import Recipe, Trained, pixels

NOISE = "noise"


@dataclass(frozen=True)
class Arm:
    """One way of continuing a trained network; every arm of an experiment shares base, steps, order and noise.

    The network stays in evaluation mode: batch-normalisation statistics fixed, no dropout, so that the two branches of
    the stability loss differ by the noise alone.

    Attributes:
        objective: "control" (task loss, clean images), "augmentation" (task loss, noisy images) or "stability" (task
            loss on clean images + alpha * divergence between clean and noisy outputs).
        steps: optimiser steps (Adam).
        learning_rate: of Adam.
        sigma: standard deviation of the Gaussian noise on pixels in [0, 1].
        alpha: weight of the stability loss.
        divergence: "kl" or "ce".
        stop_gradient: hold the clean output constant in the stability loss; KL and CE then have the same gradient.
        layers: "all", or "last" for the dense layer alone.
        perturbation: what "augmentation" trains on: "noise", or a name of `distortions.apply`.
        batch_size: images a step.
    """

    objective: Literal["control", "augmentation", "stability"]
    steps: int
    learning_rate: float
    sigma: float = 0.04
    alpha: float = 0.0
    divergence: Literal["kl", "ce"] = "kl"
    stop_gradient: bool = False
    layers: Literal["all", "last"] = "all"
    perturbation: str = NOISE
    batch_size: int = 128

    def __post_init__(self) -> None:
        """Refuse what no arm stands for.

        Raises:
            ValueError: a stability loss on anything but Gaussian noise, or unknown layers.
        """
        if self.perturbation != NOISE and self.objective != "augmentation":
            raise ValueError(f"only augmentation trains on a distortion, got {self.objective} on {self.perturbation!r}")
        if self.layers not in ("all", "last"):
            raise ValueError(f"layers must be 'all' or 'last', got {self.layers!r}")


def finetune(recipe: Recipe, arm: Arm, dataset: Dataset, *, device: torch.device | str = "cpu") -> Trained:
    """Continue the classifier of `recipe` with the objective of `arm` for a fixed number of steps."""
    base = training.fit(recipe, dataset, device=device)
    made_by = {"base": base.key, "arm": asdict(arm), "code": cache.source_hash(__name__)}
    if arm.perturbation != NOISE:
        made_by["distortions"] = cache.source_hash(distortions)
    key = cache.fingerprint(made_by)
    name = f"{dataset.name}-{recipe.model}-{recipe.seed}-{arm.objective}-{key[:16]}"
    record = training.stored(name, base.model, device)
    if record is None:
        record = _continue(recipe, arm, dataset, base.model, torch.device(device), name)
    return Trained(base.model.eval(), key, *record)


def _continue(
    recipe: Recipe, arm: Arm, dataset: Dataset, model: nn.Module, device: torch.device, name: str
) -> training.Record:
    start = time.perf_counter()
    train = dataset.train.per_class(recipe.train_per_class)
    if arm.layers == "last":
        model.requires_grad_(False)
        model.get_submodule(models.trainable_layers(model)[-1]).requires_grad_(True)
    optimizer = training.adam(model, arm.learning_rate)
    noise = torch.Generator(device).manual_seed(training.mixed_seed(recipe.seed, 10_000))
    history: list[dict[str, float]] = []
    steps = _endless(train, arm.batch_size, recipe.seed)
    for step in progress_bar(range(arm.steps), desc=f"{arm.objective} {recipe.seed}", unit="step", leave=False):
        images, labels = next(steps)
        x, y = pixels(images, device), labels.to(device)
        # Drawn by every arm, so that step n of each sees the same images and the same noise.
        noisy = influence.gaussian_perturbation(x, sigma=arm.sigma * 255, generator=noise, clip=(0, 255))
        if arm.perturbation != NOISE:
            noisy = pixels(distortions.apply(arm.perturbation, images), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            loss = _loss(arm, model, x, noisy, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        history.append({"step": step + 1, "loss": float(loss.detach())})
    model.requires_grad_(True)
    record = history, time.perf_counter() - start
    training.store(name, model, record, {"recipe": asdict(recipe), "arm": asdict(arm), "data": dataset.digest})
    return record


def _loss(arm: Arm, model: nn.Module, x: Tensor, noisy: Tensor, y: Tensor) -> Tensor:
    if arm.objective != "stability":
        return F.cross_entropy(model(x if arm.objective == "control" else noisy).float(), y)
    # In evaluation mode one pass over both is two passes: no statistic is taken over the batch.
    clean_logits, noisy_logits = model(torch.cat([x, noisy])).float().chunk(2)
    return influence.stability_loss(
        clean_logits,
        noisy_logits,
        y,
        alpha=arm.alpha,
        divergence=arm.divergence,
        stop_gradient=arm.stop_gradient,
    )


def _endless(train: Split, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 20_000  # far from the epochs of `fit`, so that the order differs from theirs
    while True:
        yield from training.batches(train, size, seed, epoch)
        epoch += 1
