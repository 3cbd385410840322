"""What every experiment begins with: the data set and the trained network, each noted in the run's ledger."""

from __future__ import annotations

from functools import cache

from .. import data, paths
from ..results import Run
from ..zoo import recipes, training


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


@cache
def _load(name: str) -> data.Dataset:
    return data.load(name, paths.data_dir())
