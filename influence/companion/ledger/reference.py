"""Reference values of the papers, and the verdict of our findings against them.

`results/reference/*.csv` has one row per value with the columns artifact, item, kind, value, tolerance, status, source:

* value    holds when |ours - value| <= tolerance * |value|
* claim    holds when ours is True
* range    holds when ours lies in [tolerance * value, value], the range of a printed axis
* context  is shown beside ours and never compared
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from . import paths

KINDS = ("value", "claim", "range", "context")
COLUMNS = ("artifact", "item", "kind", "value", "tolerance", "status", "source")
REPRODUCED, PARTLY, NOT_REPRODUCED, NO_REFERENCE = "reproduced", "partly", "not reproduced", "no reference"


@dataclass(frozen=True)
class Reference:
    """One row of `results/reference/*.csv`; `value` and `tolerance` are None where the row has none."""

    artifact: str
    item: str
    kind: str
    value: float | None
    tolerance: float | None
    status: str
    source: str

    def __post_init__(self) -> None:
        """Refuse a row that could not be compared.

        Raises:
            ValueError: unknown kind, or no value and tolerance where the kind needs them.
        """
        if self.kind not in KINDS:
            raise ValueError(f"reference {self.artifact} {self.item}: kind {self.kind!r} is none of {', '.join(KINDS)}")
        if self.kind in ("value", "range") and (self.value is None or self.tolerance is None):
            raise ValueError(f"reference {self.artifact} {self.item}: kind {self.kind} needs a value and a tolerance")

    @property
    def _range(self) -> tuple[float, float]:
        value, tolerance = self.value or 0.0, self.tolerance or 0.0
        return min(tolerance * value, value), max(tolerance * value, value)

    def holds(self, ours: bool | float | None) -> bool | None:
        """Whether our finding agrees; None where nothing is compared.

        Raises:
            TypeError: a claim needs a bool, a value or range a number.
        """
        if self.kind == "context":
            return None
        if isinstance(ours, bool) != (self.kind == "claim"):
            expected = "a bool" if self.kind == "claim" else "a number"
            raise TypeError(f"finding {self.item!r} of {self.artifact}: expected {expected}, got {ours!r}")
        if self.kind == "claim":
            return bool(ours)
        if ours is None or not math.isfinite(ours):
            return False
        assert self.value is not None and self.tolerance is not None  # __post_init__ saw to it
        if self.kind == "value":
            return abs(ours - self.value) <= self.tolerance * abs(self.value)
        return self._range[0] <= ours <= self._range[1]

    @property
    def expected(self) -> str:
        """What is expected, in words."""
        if self.kind == "claim":
            return "true"
        if self.value is None:
            return "-"
        if self.kind == "range":
            return "{:.4g} to {:.4g}".format(*self._range)
        return f"{self.value:.4g} within {self.tolerance:.0%}" if self.kind == "value" else f"{self.value:.4g}"


@dataclass(frozen=True)
class Comparison:
    """A finding beside its reference; `holds` is None where there is nothing to compare."""

    item: str
    ours: bool | float | None
    reference: Reference | None
    holds: bool | None

    @property
    def line(self) -> str:
        """One line for the notebook."""
        against = f"reference {self.reference.expected}" if self.reference else "no reference"
        end = {True: "  holds", False: "  DOES NOT HOLD", None: ""}[self.holds]
        return f"{self.item}: ours {format_finding(self.ours)}, {against}{end}"


def format_finding(value: bool | float | None) -> str:
    """Four significant digits, or the truth value."""
    if value is None:
        return "not finite"
    return str(value).lower() if isinstance(value, bool) else f"{value:.4g}"


def load(artifact: str | None = None) -> list[Reference]:
    """The reference rows of an artifact (of all of them when None), sorted by artifact and item.

    Raises:
        ValueError: a file has other columns, a number that is none, or two rows for one item.
    """
    rows: dict[tuple[str, str], Reference] = {}
    for path in sorted(paths.REFERENCE.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"{path.name}: expected the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
            for row in reader:
                if (row["artifact"], row["item"]) in rows:
                    raise ValueError(f"{path.name}: two rows for {row['artifact']} {row['item']}")
                rows[row["artifact"], row["item"]] = _parse(row, path.name)
    return [rows[key] for key in sorted(rows) if artifact in (None, key[0])]


def compare(artifact: str, findings: Mapping[str, bool | float | None]) -> list[Comparison]:
    """Every finding beside its reference row, in the order of the findings."""
    known = {row.item: row for row in load(artifact)}
    return [
        Comparison(item, ours, known.get(item), known[item].holds(ours) if item in known else None)
        for item, ours in findings.items()
    ]


def verdict(comparisons: Iterable[Comparison]) -> str:
    """`reproduced` when all that is compared holds, `partly`, `not reproduced` when none does, or `no reference`."""
    held = [c.holds for c in comparisons if c.holds is not None]
    if not held:
        return NO_REFERENCE
    if all(held):
        return REPRODUCED
    return PARTLY if any(held) else NOT_REPRODUCED


def _parse(row: Mapping[str, str], name: str) -> Reference:
    def number(column: str) -> float | None:
        if row["kind"] == "claim" or not (row[column] or "").strip():
            return None
        try:
            return float(row[column])
        except ValueError:
            message = f"{name}: {row['artifact']} {row['item']}: {column} {row[column]!r} is no number"
            raise ValueError(message) from None

    return Reference(
        row["artifact"], row["item"], row["kind"], number("value"), number("tolerance"), row["status"], row["source"]
    )
