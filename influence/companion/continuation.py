"""Continue a trained classifier on its own training images and some more: the fine-tuned variant of Setup 0."""

from __future__ import annotations

import time
from dataclasses import asdict

import torch
from torch import nn

from . import cache, training
from .data import Dataset, Split
from .training import Recipe, Trained


def continue_with(
    recipe: Recipe,
    dataset: Dataset,
    extra: Split,
    *,
    phases: tuple[tuple[int, float], ...],
    notes: dict[str, object],
    device: torch.device | str = "cpu",
) -> list[Trained]:
    """The classifier of `recipe` after each phase of training on its own images together with `extra`.

    Args:
        recipe: made the classifier, and gives batch size, precision, dropout and seed.
        dataset: the recipe's.
        extra: images to add, such as made outliers.
        phases: (epochs, learning rate), one after the other, with one optimiser.
        notes: everything that decides `extra`; a part of the key.
        device: where to train.

    Returns:
        One network for each phase, in evaluation mode.
    """
    base = training.fit(recipe, dataset, device=device)
    key = cache.fingerprint(
        {
            "base": base.key,
            "phases": phases,
            "extra": notes,
            "code": cache.source_hash(__name__, "influence.companion.outliers"),
        }
    )
    names = [f"{dataset.name}-{recipe.model}-{recipe.seed}-continued{i + 1}-{key[:16]}" for i in range(len(phases))]
    found = _load(recipe, dataset, names, key, device)
    if found is None:
        _continue(recipe, dataset, extra, phases, base.model, torch.device(device), names)
        found = _load(recipe, dataset, names, key, device)
    assert found is not None
    return found


def _load(
    recipe: Recipe, dataset: Dataset, names: list[str], key: str, device: torch.device | str
) -> list[Trained] | None:
    found = []
    for name in names:
        model = training.fresh(recipe, dataset).to(device)
        record = training.stored(name, model, device)
        if record is None:
            return None
        found.append(Trained(model.eval(), f"{key}-{name}", *record))
    return found


def _continue(
    recipe: Recipe,
    dataset: Dataset,
    extra: Split,
    phases: tuple[tuple[int, float], ...],
    model: nn.Module,
    device: torch.device,
    names: list[str],
) -> None:
    train = joined(dataset.train.per_class(recipe.train_per_class), extra)
    optimizer = training.adam(model, phases[0][1])
    history: list[dict[str, float]] = []
    start, epoch = time.perf_counter(), 30_000  # far from the epochs of `fit`, so that the order differs from theirs
    for name, (epochs, rate) in zip(names, phases, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for _ in range(epochs):
            loss = training.train_epoch(recipe, train, model, optimizer, device, epoch)
            epoch += 1
            history.append({"epoch": len(history) + 1, "lr": rate, "loss": loss})
        record = history, time.perf_counter() - start
        training.store(name, model, record, {"recipe": asdict(recipe), "data": dataset.digest})


def joined(first: Split, second: Split) -> Split:
    """Both splits, one after the other."""
    pairs = [(getattr(first, name), getattr(second, name)) for name in ("images", "labels", "index")]
    return Split(*(torch.cat(pair) for pair in pairs))
