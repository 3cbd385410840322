"""`influence check`: is what is published what today's code computes?"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from ..ledger import cache, manifest
from ..ledger.audit import Audit
from ..ledger.notebook import LAST, NotebookError, discover
from ..ledger.results import start


def computed_by_other(row: Mapping[str, Any]) -> bool:
    """Whether the tables of a published row were computed by other code than today's."""
    module = _module(row["stem"])
    if module is None or "computed" not in row:
        return False
    # A module may have the function of another.
    return bool(row["computed"]["code"] != cache.computing_hash(module.compute.__module__, module.compute.__name__))


def changed(profile: str) -> str:
    """A line that names the published rows whose computing code is not the one that computed them."""
    rows = manifest.read(profile)
    found = [stem for stem in rows if computed_by_other(rows[stem])]
    if not found:
        return f"{profile}: every table was computed by today's code"
    many = f"{len(found)} of {len(rows)} artifacts were computed by other code than today's"
    return f"{profile}: {many}, which `check --recompute 20` holds against it: {', '.join(found)}"


def audit(profile: str, count: int, *, seed: int, only: Sequence[str] = ()) -> Iterator[tuple[str, bool]]:
    """Compute random examples of each published table anew, of the stems in `only` (none for all), and compare.

    Yields lines, and whether each is a complaint.
    """
    from ..artifacts.audits import AUDITS, NOT_AUDITED

    rows = manifest.read(profile)
    for stem in only or discover():
        prefix = f"data/{stem}."
        files = rows[stem]["files"] if stem in rows else {}
        names = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
        tables = [name.removesuffix(".parquet") for name in names if name.endswith(".parquet")]
        if stem not in AUDITS:
            why = NOT_AUDITED.get(stem) or NOT_AUDITED.get(stem.partition("/")[0], "no audit of it is defined")
            yield f"{stem}: not audited: {why}", False
        elif not tables:
            yield f"{stem}: not audited: no tables of it are published", False
        else:
            for name in tables:
                if name in AUDITS[stem]:
                    yield from _table(stem, name, AUDITS[stem][name], rows[stem], profile, count, seed)
                else:
                    yield f"{stem}: {name} not audited: its rows are aggregates, or taken from its other tables", False


def _table(
    stem: str, name: str, audit: Audit, row: dict[str, Any], profile: str, count: int, seed: int
) -> Iterator[tuple[str, bool]]:
    from ..images.data import DataError
    from ..zoo.recipes import RecipeError
    from ..zoo.training import TrainingError

    published = pd.read_parquet(manifest.folder(profile) / f"data/{stem}.{name}.parquet")
    examples = audit.choose(published, count, seed=seed)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what a notebook says when it starts
            run = start(stem, {**row["parameters"], "seeds": row["seeds"], "profile": profile, "recompute": True})
        anew = audit.again(run, examples)
    except (DataError, NotebookError, RecipeError, TrainingError) as error:
        yield f"{stem}: {name} not audited: {' '.join(str(error).split())}", False
        return
    compared, left_out, wrong = audit.compare(published.merge(examples, on=list(audit.example)), anew)
    yield from ((f"{stem}: {name}: {line}", True) for line in wrong)
    more = f", {left_out} left out, which rounding decides" if left_out else ""
    yield f"{stem}: {name}: {compared - len(wrong)} of {compared} values of {len(examples)} examples agree{more}", False


def _module(stem: str) -> Any:
    """The module of a notebook; None where there is none."""
    name = "overview" if stem == LAST else stem.replace("/", ".")
    try:
        return importlib.import_module(f"..artifacts.{name}", __package__)
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("influence"):
            raise
        return None
