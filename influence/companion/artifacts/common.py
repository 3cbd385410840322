"""What every artifact begins with: the data set and the trained network, each noted in the ledger of the run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from torch import nn

from influence.progress import progress_bar

from ..images import data
from ..ledger import cache, paths
from ..ledger.reference import Estimate
from ..ledger.results import Run
from ..scores.evaluation import mean_interval
from ..zoo import pretrained, recipes, training


def dataset(run: Run, name: str) -> data.Dataset:
    """The data set, its digest noted among the inputs of the run."""
    loaded = recipes.data_set(name, None, None, paths.data_dir())
    run.add_input(name, loaded.digest)
    return loaded


def classifier(run: Run, dataset_name: str, model: str, *, seed: int) -> training.Trained:
    """The network that the run's profile trains on a data set, shared by all notebooks through the checkpoint cache.

    A model such as "group-resnet32" is the network that others trained on this data set, whatever the seed.
    """
    if (others := f"{model}-{dataset_name}") in pretrained.NAMES:
        network, digest = pretrained.load(others, paths.data_dir(), device=run.device)
        run.add_input(others, digest)
        return training.Trained(network, digest, [], 0.0)
    return training.fit(
        recipes.recipe(run.profile, dataset_name, model, seed=seed), dataset(run, dataset_name), device=run.device
    )


@dataclass(frozen=True)
class Subject:
    """One of the networks that an artifact goes through."""

    trained: training.Trained
    dataset: data.Dataset  # what it was trained and tested on
    model: str  # a name of `models.NAMES`, or that of a network that others trained without its data set
    seed: int  # of its training

    @property
    def name(self) -> str:
        """Of its tables in the cache."""
        return f"{self.dataset.name}-{self.model}"

    @property
    def columns(self) -> dict[str, Any]:
        """What tells its rows from those of other networks."""
        return {"dataset": self.dataset.name, "model": self.model, "seed": self.seed}


def networks(run: Run) -> Iterator[Subject]:
    """Every network of the parameters `datasets`, `models` and `seeds` of a run, one after the other.

    A network that others trained comes once, with the first seed.
    """
    chosen = run.parameters
    product = itertools.product(chosen["datasets"], chosen["models"], chosen["seeds"])
    first = chosen["seeds"][:1]
    everything = [(d, m, s) for d, m, s in product if f"{m}-{d}" not in pretrained.NAMES or s in first]
    for name, model, seed in progress_bar(everything, desc=run.stem, unit="network", leave=False):
        yield Subject(classifier(run, name, model, seed=seed), dataset(run, name), model, seed)


def groups(frame: pd.DataFrame, *keys: str) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The rows that agree in some columns, each set after what these columns say; in the order of the table."""
    for values, group in frame.groupby(list(keys), sort=False):
        yield dict(zip(keys, values, strict=True)), group


def by_network(table: pd.DataFrame, column: str, *keys: str) -> list[Estimate]:
    """Of a column, `over_seeds` for each network; some columns name it, `dataset` and `model` where none is given."""
    found = groups(table, *(keys or ("dataset", "model")))
    return [over_seeds(group, column, of=" ".join(about.values())) for about, group in found]


def over_seeds(group: pd.DataFrame, column: str, *, of: str = "") -> Estimate:
    """The mean of a column with a value for each seed, each with its interval over `images`, in COLUMN_low and _high.

    Of the 95% t interval over seeds and the mean of the intervals over images it has the wider one: three seeds may
    agree by chance, and then the images leave more open than they do. The mean of the intervals holds whether the seeds
    share their images or not, since the error of a mean is at most the mean of the errors. One seed has its own.
    """
    value, low, high = (float(group[f"{column}{end}"].mean()) for end in ("", "_low", "_high"))
    over_images = Estimate(value, low, high, int(group["images"].iloc[0]), of)
    if len(group) == 1:
        return over_images
    return max(over_networks(group[column], of), over_images, key=lambda e: e.high - e.low)


def estimates(
    rows: pd.DataFrame, column: str, ends: str | None = None, *, of: str, n: str = "images"
) -> list[Estimate]:
    """A column with its interval, an estimate for each row; `of` is filled in from the row, `ends` as in `columns`."""
    ends = f"{column}_" if ends is None else ends
    return [
        Estimate(row[column], row[f"{ends}low"], row[f"{ends}high"], row[n], of.format_map(row))
        for row in rows.to_dict("records")
    ]


def over_networks(values: ArrayLike, of: str = "", *, within: float = np.inf) -> Estimate:
    """An estimate from one value for each network: their mean with its 95% t interval.

    `within` is the largest size the mean can have: one network leaves all of it open, and no infinity in a ledger.
    """
    networks = int(np.size(values))
    return Estimate(*mean_interval(values, within=(-within, within)), networks, of, df=networks - 1 or None)


@dataclass(frozen=True)
class Network:
    """A network by its name, and what it was trained and tested on."""

    model: nn.Module  # in evaluation mode
    key: str  # sha256 that it is known by
    family: str  # its name without the seed
    seed: int  # of its training; 0 for one that others trained
    dataset: str  # a name of `data.NAMES`
    parts: dict[str, data.Split]  # "train", "validation" (where something was held out) and "test"
    gate: dict[str, float]  # accuracies by part below which no verdict rests on it


def named(run: Run, name: str) -> Network:
    """The network of a name in `recipes.yaml` with its seed, or of `pretrained.NAMES`.

    A RecipeError where there is none of that name, a DataError where its data or its weights are not there.
    """
    if name in pretrained.NAMES:
        model, digest = pretrained.load(name, paths.data_dir(), device=run.device)
        run.add_input(name, digest)
        source = pretrained.SOURCES[name]
        whole = dataset(run, source.data)
        parts = {"train": whole.train.with_(whole.valid), "test": whole.test}
        return Network(model, digest, name, 0, source.data, parts, {"test": source.test_accuracy - 0.0005})
    recipe = recipes.named(name)
    found = recipe.dataset()
    run.add_input(recipe.data, found.digest)
    parts = {"train": found.train, "validation": found.valid, "test": found.test}
    made = training.fit(recipe, found, device=run.device)
    return Network(made.model, made.key, name.rpartition("-")[0], recipe.seed, recipe.data, parts, recipe.gate)


def scored(
    run: Run,
    name: str,
    function: Callable[..., pd.DataFrame],
    network: training.Trained | Network,
    *images: data.Split | data.Dataset,
    **options: Any,
) -> pd.DataFrame:
    """`function(model, *images, device=run.device, **options)`, computed once: the `cache.table` of this name.

    Its key is all that decides the result: the network, the digests of the images and the options, plain values.
    """
    key = {"model": network.key, "images": [part.digest for part in images], "device": run.device.type, **options}
    return cache.table(name, key, bound(function, network.model, *images, device=run.device, **options))


def bound(function: Callable[..., pd.DataFrame], *args: Any, **kwargs: Any) -> Callable[[], pd.DataFrame]:
    """`partial(function, ...)` that keeps the module of `function`, by which `cache.table` finds the code.

    A plain partial belongs to no module of the package, and its table to every file of it.
    """
    call = partial(function, *args, **kwargs)
    update_wrapper(call, function)
    return call
