"""Train an embedding on triplets, then continue it with the stability term of Zheng et al. (2016) or a control."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import influence
from influence.progress import progress_bar

from .. import cache
from . import inception, training
from ..data import Dataset, Split
from .inception import Embedding
from .training import Trained, pixels

_SAVE_EVERY = 50  # steps


@dataclass(frozen=True)
class EmbeddingRecipe:
    """Everything that decides a trained embedding, besides the data and the code.

    Attributes:
        dimensions: length of the embedding.
        width: channel multiplier of the small Inception.
        steps: of Adam.
        triplets: of (query, image of its class, image of another class), a step.
        learning_rate: of Adam.
        margin: g of the hinge.
        seed: of weights, triplets and noise.
    """

    dimensions: int = 32
    width: float = 0.125
    steps: int = 60
    triplets: int = 24
    learning_rate: float = 1e-3
    margin: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class EmbeddingArm:
    """One way of continuing an embedding; batch-normalisation statistics stay fixed, as for the classifiers.

    Attributes:
        objective: "control" (triplet loss), "augmentation" (triplet loss of noisy images) or "stability" (triplet loss
            of clean images + alpha * mean distance between the embeddings of an image and of its noisy copy).
        steps: of Adam.
        learning_rate: of Adam.
        sigma: standard deviation of the Gaussian noise on pixels in [0, 1].
        alpha: weight of the stability loss.
    """

    objective: Literal["control", "augmentation", "stability"]
    steps: int
    learning_rate: float
    sigma: float = 0.04
    alpha: float = 0.0


def fit(recipe: EmbeddingRecipe, dataset: Dataset, *, device: torch.device | str = "cpu") -> Trained:
    """Train the embedding of `recipe` on triplets, or load it; interrupted, it goes on from the last saved step."""
    key = cache.fingerprint({"recipe": asdict(recipe), "data": dataset.digest, "code": code()})
    name = f"{dataset.name}-embedding-{recipe.seed}-{key[:16]}"
    model = inception.small_embedding(
        dataset.shape, dimensions=recipe.dimensions, width=recipe.width, seed=recipe.seed
    ).to(device)
    record = training.stored(name, model, device)
    if record is None:
        record = _train(recipe, dataset, model, torch.device(device), name)
    return Trained(model.eval(), key, *record)


def finetune(
    recipe: EmbeddingRecipe, arm: EmbeddingArm, dataset: Dataset, *, device: torch.device | str = "cpu"
) -> Trained:
    """Continue the embedding of `recipe` with the objective of `arm` for a fixed number of steps."""
    base = fit(recipe, dataset, device=device)
    key = cache.fingerprint({"base": base.key, "arm": asdict(arm), "code": code()})
    name = f"{dataset.name}-embedding-{recipe.seed}-{arm.objective}-{key[:16]}"
    model = base.model
    assert isinstance(model, Embedding)
    record = training.stored(name, model, device)
    if record is None:
        start = time.perf_counter()
        optimizer = torch.optim.Adam(model.parameters(), lr=arm.learning_rate)
        noise = torch.Generator(device).manual_seed(training.mixed_seed(recipe.seed, 10_000))
        losses = []
        steps = progress_bar(range(arm.steps), desc=f"{arm.objective} {recipe.seed}", unit="step", leave=False)
        for step, batch in zip(steps, _triplets(dataset.train, recipe, 20_000), strict=False):
            x = pixels(batch, device)
            noisy = influence.gaussian_perturbation(x, sigma=arm.sigma * 255, generator=noise, clip=(0, 255))
            losses.append({"step": step + 1, "loss": _update(optimizer, _loss(recipe, arm, model, x, noisy))})
        record = losses, time.perf_counter() - start
        training.store(name, model, record, {"recipe": asdict(recipe), "arm": asdict(arm), "data": dataset.digest})
    return Trained(model.eval(), key, *record)


def code() -> str:
    """Hash of the code that decides a trained embedding."""
    return cache.source_hash(inception, __name__)


# -- what one call does -----------------------------------------------------------------------------------------------


def _train(
    recipe: EmbeddingRecipe, dataset: Dataset, model: Embedding, device: torch.device, name: str
) -> training.Record:
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    file = training.folder() / f"{name}.resume.pt"
    state: dict[str, Any] = {"step": 0, "history": [], "seconds": 0.0}
    if file.exists():
        state = torch.load(file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    model.train()
    start = time.perf_counter() - state["seconds"]
    steps = progress_bar(range(recipe.steps), desc=name.rsplit("-", 1)[0], unit="step", leave=False)
    for step, batch in zip(steps, _triplets(dataset.train, recipe, 0), strict=False):
        if step < state["step"]:
            continue
        loss = _update(optimizer, _hinge(recipe, model(pixels(batch, device))))
        state["history"].append({"step": step + 1, "loss": loss})
        if (step + 1) % _SAVE_EVERY == 0:
            state |= {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state["seconds"] = time.perf_counter() - start
            cache.atomic_write(file, partial(torch.save, state))
    model.eval()
    record = state["history"], time.perf_counter() - start
    training.store(name, model, record, {"recipe": asdict(recipe), "data": dataset.digest})
    file.unlink(missing_ok=True)
    return record


def _loss(recipe: EmbeddingRecipe, arm: EmbeddingArm, model: Embedding, x: Tensor, noisy: Tensor) -> Tensor:
    if arm.objective != "stability":
        return _hinge(recipe, model(x if arm.objective == "control" else noisy))
    clean, perturbed = model(torch.cat([x, noisy])).chunk(2)
    return _hinge(recipe, clean) + arm.alpha * influence.embedding_stability_loss(clean, perturbed)


def _hinge(recipe: EmbeddingRecipe, z: Tensor) -> Tensor:
    query, positive, negative = z.chunk(3)
    return influence.triplet_loss(query, positive, negative, margin=recipe.margin)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _triplets(train: Split, recipe: EmbeddingRecipe, stream: int) -> Iterator[Tensor]:
    """Batches (3 n, C, H, W): n queries, then for each another image of its class, then one of another class."""
    labels = train.labels.numpy()
    generator = np.random.default_rng(training.mixed_seed(recipe.seed, stream))
    members = {k: np.flatnonzero(labels == k) for k in np.unique(labels)}
    others = {k: np.flatnonzero(labels != k) for k in members}
    while True:
        query = generator.integers(len(labels), size=recipe.triplets)
        positive = [generator.choice(members[labels[q]][members[labels[q]] != q]) for q in query]
        negative = [generator.choice(others[labels[q]]) for q in query]
        yield train.images[torch.as_tensor(np.concatenate([query, positive, negative]))]
