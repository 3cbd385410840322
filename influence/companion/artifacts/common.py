"""What every artifact begins with: the data set and the trained network, each noted in the ledger of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial, update_wrapper
from typing import Any

import pandas as pd
from torch import nn

from ..images import data
from ..ledger import paths
from ..ledger.results import Run
from ..zoo import pretrained, recipes, training


def dataset(run: Run, name: str) -> data.Dataset:
    """The data set, its digest noted among the inputs of the run."""
    loaded = _load(name)
    run.add_input(name, loaded.digest)
    return loaded


def classifier(run: Run, dataset_name: str, model: str, *, seed: int) -> training.Trained:
    """The network that the run's profile trains on a data set, shared by all notebooks through the checkpoint cache."""
    return training.fit(
        recipes.recipe(run.profile, dataset_name, model, seed=seed), dataset(run, dataset_name), device=run.device
    )


@dataclass(frozen=True)
class Network:
    """A network by its name, and what it was trained and tested on.

    Attributes:
        model: in evaluation mode.
        family: its name without the seed.
        seed: of its training; 0 for one that others trained.
        dataset: a name of `data.NAMES`.
        parts: "train", "validation" (where something was held out) and "test".
        gate: accuracies by part below which no verdict rests on it.
    """

    model: nn.Module
    family: str
    seed: int
    dataset: str
    parts: dict[str, data.Split]
    gate: dict[str, float]


def named(run: Run, name: str) -> Network:
    """The network of a name in `recipes.yaml` with its seed, or of `pretrained.NAMES`.

    Raises:
        RecipeError: there is none of that name.
        DataError: its data or its weights are not there.
    """
    if name in pretrained.NAMES:
        model, digest = pretrained.load(name, paths.data_dir(), device=run.device)
        run.add_input(name, digest)
        source = pretrained.SOURCES[name]
        whole = dataset(run, source.data)
        parts = {"train": whole.train.with_(whole.valid), "test": whole.test}
        return Network(model, name, 0, source.data, parts, {"test": source.test_accuracy - 0.0005})
    recipe = recipes.named(name)
    found = recipe.dataset()
    run.add_input(recipe.data, found.digest)
    parts = {"train": found.train, "validation": found.valid, "test": found.test}
    model = training.fit(recipe, found, device=run.device).model
    return Network(model, name.rpartition("-")[0], recipe.seed, recipe.data, parts, recipe.gate)


@cache
def _load(name: str) -> data.Dataset:
    return data.load(name, paths.data_dir())


def bound(function: Callable[..., pd.DataFrame], *args: Any, **kwargs: Any) -> Callable[[], pd.DataFrame]:
    """`partial(function, ...)` that keeps the module of `function`, by which `cache.table` finds the code.

    A plain partial belongs to no module of the package, and its table to every file of it.
    """
    call = partial(function, *args, **kwargs)
    update_wrapper(call, function)
    return call
