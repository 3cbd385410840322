"""Train an embedding on triplets, then continue it with the stability term of Zheng et al. (2016) or a control."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

import influence

from ..images.data import Dataset, Split
from ..ledger import cache
from . import inception, training
from .training import Record, Trained, pixels

_EPOCH = 50  # steps after which the state is kept; there is no end to triplets


@dataclass(frozen=True)
class EmbeddingRecipe:
    """Everything that decides a trained embedding, besides the data."""

    dimensions: int = 32
    width: float = 0.125  # channel multiplier of the small Inception
    steps: int = 60  # of Adam
    triplets: int = 24  # of (query, image of its class, image of another class), a step
    learning_rate: float = 1e-3
    margin: float = 0.2  # g of the hinge
    seed: int = 0  # of weights, triplets and noise


@dataclass(frozen=True)
class EmbeddingArm:
    """One way of continuing an embedding; batch-normalisation statistics stay fixed, as for the classifiers.

    The objective is the triplet loss of clean images ("control") or noisy ones ("augmentation"), or that of clean
    images + alpha * mean distance between the embeddings of an image and of its noisy copy ("stability").
    """

    objective: Literal["control", "augmentation", "stability"]
    steps: int  # of Adam
    learning_rate: float
    sigma: float = 0.04  # standard deviation of the Gaussian noise on pixels in [0, 1]
    alpha: float = 0.0


def fit(recipe: EmbeddingRecipe, dataset: Dataset, *, device: torch.device | str = "cpu") -> Trained:
    """Train the embedding of `recipe` on triplets, or load it; interrupted, it goes on from the last saved step."""
    key = cache.fingerprint({"recipe": asdict(recipe), "data": dataset.digest})
    model = inception.small_embedding(
        dataset.shape, dimensions=recipe.dimensions, width=recipe.width, seed=recipe.seed
    ).to(device)
    make = partial(_train, model, recipe, None, dataset.train)
    return training.made_once(f"{dataset.name}-embedding-{recipe.seed}", key, model, make, recipe=recipe)


def finetune(
    recipe: EmbeddingRecipe, arm: EmbeddingArm, dataset: Dataset, *, device: torch.device | str = "cpu"
) -> Trained:
    """Continue the embedding of `recipe` with the objective of `arm` for a fixed number of steps; made once."""
    base = fit(recipe, dataset, device=device)
    key = cache.fingerprint({"base": base.key, "arm": asdict(arm)})
    make = partial(_train, base.model, recipe, arm, dataset.train)
    name = f"{dataset.name}-embedding-{recipe.seed}-{arm.objective}"
    return training.made_once(name, key, base.model, make, recipe=arm)


def _train(model: Module, recipe: EmbeddingRecipe, arm: EmbeddingArm | None, train: Split, resume: Path) -> Record:
    """By the hinge alone, in training mode, or with the objective of an arm."""
    plan = arm or recipe
    return training.train(
        model,
        Triplets(train, recipe.triplets),
        partial(_loss, recipe, arm),
        torch.optim.Adam(model.parameters(), lr=plan.learning_rate),
        steps=plan.steps,
        rate=plan.learning_rate,
        seed=(recipe.seed, 3 if arm is None else 4),
        title=f"{'embedding' if arm is None else arm.objective} {recipe.seed}",
        training_mode=arm is None,
        resume=resume,
    )


def _loss(recipe: EmbeddingRecipe, arm: EmbeddingArm | None, model: Module, batch: Tensor) -> Tensor:
    x = pixels(batch, next(model.parameters()).device)
    if arm is None:
        return _hinge(recipe, model(x))
    noisy = influence.gaussian_perturbation(x, sigma=arm.sigma * 255, clip=(0, 255))
    if arm.objective != "stability":
        return _hinge(recipe, model(x if arm.objective == "control" else noisy))
    clean, perturbed = model(torch.cat([x, noisy])).chunk(2)
    return _hinge(recipe, clean) + arm.alpha * influence.embedding_stability_loss(clean, perturbed)


def _hinge(recipe: EmbeddingRecipe, z: Tensor) -> Tensor:
    query, positive, negative = z.chunk(3)
    return influence.triplet_loss(query, positive, negative, margin=recipe.margin)


@dataclass(frozen=True)
class Triplets:
    """Batches (3 n, C, H, W): n queries, then for each another image of its class, then one of another class."""

    split: Split
    count: int

    def __len__(self) -> int:
        return _EPOCH

    def __iter__(self) -> Iterator[Tensor]:
        labels = self.split.labels.numpy()
        generator = np.random.default_rng(int(torch.randint(2**62, ())))
        members = {k: np.flatnonzero(labels == k) for k in np.unique(labels)}
        others = {k: np.flatnonzero(labels != k) for k in members}
        for _ in range(_EPOCH):
            query = generator.integers(len(labels), size=self.count)
            positive = [generator.choice(members[labels[q]][members[labels[q]] != q]) for q in query]
            negative = [generator.choice(others[labels[q]]) for q in query]
            yield self.split.images[torch.as_tensor(np.concatenate([query, positive, negative]))]
