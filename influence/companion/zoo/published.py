"""The published networks: `results/zoo` holds their weights, their histories and one ledger.

The rounded network is the network: parameters are float16 on disk and used as float32. What is too large to publish, or
what no table uses, has a row in the ledger all the same, with its checksum and the command that trains it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock
from tabulate import tabulate
from torch import nn

from ..ledger import cache, paths
from . import recipes, training
from .recipes import Recipe, RecipeError
from .training import Trained, TrainingError

_TOLERANCE = 0.001  # a tenth of a point: what a stored accuracy may differ by when it is measured anew
Row = dict[str, Any]


def ledger() -> dict[str, Row]:
    """One row for each network that was trained, by name; a TrainingError where the ledger is damaged."""
    file = paths.ZOO / "ledger.json"
    try:
        rows: dict[str, Row] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise TrainingError(f"{file}: damaged ({error}): restore it with git checkout") from None
    return rows


def load(key: str, model: nn.Module) -> Trained | None:
    """Put the weights of the trained network with this key into `model`; None where there are none here."""
    for name, row in ledger().items():
        # One that is not published has its weights only where it was trained.
        if row["key"] == key and (row["published"] or _file(name, row["published"]).exists()):
            training.load_weights(_checked(name, row), model)
            history = pd.read_csv(paths.ZOO / f"{name}.csv").to_dict("records")
            return Trained(
                model.eval(), key, [{str(k): v for k, v in line.items()} for line in history], row["seconds"]
            )
    return None


def _file(name: str, published: bool) -> Path:
    return (paths.ZOO if published else training.folder()) / f"{name}.safetensors"


def _checked(name: str, row: Row) -> Path:
    """The file of the weights, its checksum verified."""
    file = _file(name, row["published"])
    if not file.exists():
        raise TrainingError(
            f"{name}: {file} is missing: restore it with git checkout, or run `influence zoo train {name}`"
        )
    if cache.sha256(file) != row["sha256"]:
        raise TrainingError(f"{name}: {file} has another checksum than the ledger: restore it with git checkout")
    return file


def train(name: str, *, device: torch.device | str = "cpu", data_dir: Path | None = None) -> str:
    """Train a network of the zoo, or go on with it, and write its files and its row; returns a line about it.

    A RecipeError where there is no such network, a DataError where its data are not there, a TrainingError where
    another process is training it.
    """
    recipe = recipes.named(name)
    if recipe not in recipes.everything():
        raise RecipeError(f"{name} is no network of the zoo: a profile trains it where it needs it")
    dataset = recipe.dataset(data_dir)
    key = training.identity(recipe, dataset)
    row = ledger().get(name)
    if row is not None and row["key"] == key:
        return f"{_said(recipe, row)}, trained already"
    weights, resume = _file(name, recipe.published), paths.ZOO / f"{name}.resume.pt"
    made_by = training.provenance(torch.device(device))
    refusal = TrainingError(f"{name}: another process is training it; wait for its end")
    with cache.alone(training.folder() / f"{name}.lock", refusal):
        model = recipe.build(dataset).to(device)
        history, seconds = training.fit_into(model, recipe, dataset, resume)
        training.save_weights(weights, model, half=True)
        training.load_weights(weights, model)
        parts = {"train": dataset.train, "valid": dataset.valid, "test": dataset.test}
        row = {
            "recipe": recipe.decides(),
            "data": dataset.digest,
            "key": key,
            "published": recipe.published,
            "epochs": recipe.epochs,
            "seconds": round(seconds, 1),
            "accuracy": {part: training.accuracy(model, split, device=device) for part, split in parts.items()},
            "sha256": cache.sha256(weights),
            "bytes": weights.stat().st_size,
            "command": f"influence zoo train {name}",
            **made_by,
        }
        table = pd.DataFrame(history).to_csv(index=False)
        cache.atomic_write(paths.ZOO / f"{name}.csv", lambda file: file.write_text(table, encoding="utf-8"))
        with FileLock(training.folder() / "ledger.lock"):  # two trainings that end at once both stay in the ledger
            text = json.dumps(dict(sorted({**ledger(), name: row}.items())), indent=1) + "\n"
            cache.atomic_write(paths.ZOO / "ledger.json", lambda file: file.write_text(text, encoding="utf-8"))
        resume.unlink(missing_ok=True)
    return _said(recipe, row)


def listing() -> str:
    """Every network of the zoo as a table: recipe, data, epochs, hours, accuracies, gate."""
    rows, lines = ledger(), []
    for recipe in recipes.everything():
        row = rows.get(recipe.name)
        accuracy = {part: f"{100 * row['accuracy'][part]:.2f}" if row else "" for part in ("train", "valid", "test")}
        lines.append(
            {
                "network": recipe.name,
                "architecture": f"{recipe.architecture} x {recipe.width:g}",
                "data": f"{recipe.data} {recipe.labels or ''} {recipe.fold or ''}".strip(),
                "epochs": recipe.epochs,
                "hours": f"{row['seconds'] / 3600:.2f}" if row else "",
                **accuracy,
                "gate": ", ".join(f"{part} {100 * least:g}" for part, least in recipe.gate.items()) or "none",
                "state": _state(recipe, row),
            }
        )
    return tabulate(lines, headers="keys", disable_numparse=True)


def _state(recipe: Recipe, row: Row | None) -> str:
    if row is None:
        return "in training" if (paths.ZOO / f"{recipe.name}.resume.pt").exists() else "not trained"
    if missed(recipe, row):
        return "below its gate"
    return "published" if row["published"] else "not published"


def check(
    names: Sequence[str] = (), *, device: torch.device | str = "cpu", data_dir: Path | None = None
) -> Iterator[str]:
    """Measure each published network anew on its test images; yields what is wrong, one line each, nothing when well.

    A RecipeError where there is no such network, a DataError where its data are not there.
    """
    rows = ledger()
    for name in names or [name for name, row in rows.items() if row["published"]]:
        recipe = recipes.named(name)
        if name not in rows:
            yield f"{name}: not trained yet: influence zoo train {name}"
            continue
        row, dataset = rows[name], recipe.dataset(data_dir)
        if row["key"] != training.identity(recipe, dataset):
            yield f"{name}: the ledger's is of another recipe or of other data: influence zoo train {name}"
            continue
        model = recipe.build(dataset).to(device)
        try:
            training.load_weights(_checked(name, row), model)
        except TrainingError as error:
            yield str(error)
            continue
        found, stored = training.accuracy(model, dataset.test, device=device), row["accuracy"]["test"]
        if abs(found - stored) > _TOLERANCE:
            yield f"{name}: test accuracy {100 * found:.2f}%, the ledger has {100 * stored:.2f}%"
        elif missed(recipe, row):
            yield f"{name}: {missed(recipe, row)}"


def missed(recipe: Recipe, row: Row) -> str:
    """Which gates of the recipe the accuracies of a row miss, in words; empty for none."""
    return ", ".join(
        f"{part} {100 * row['accuracy'][part]:.2f}% below its gate of {100 * least:g}%"
        for part, least in recipe.gate.items()
        if row["accuracy"][part] < least
    )


def _said(recipe: Recipe, row: Row) -> str:
    accuracies = ", ".join(f"{part} {100 * value:.2f}%" for part, value in row["accuracy"].items())
    return f"{recipe.name}: {accuracies}, {row['seconds'] / 3600:.2f} h, {missed(recipe, row) or 'gate met'}"
