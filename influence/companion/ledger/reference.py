"""Claims and values of the papers with their rules, and what became of each: supported, contradicted or undetermined.

`results/reference/*.csv` has one row per item with the columns artifact, item, kind, value, tolerance, status, source:

* above    a claim: the 95% interval of our estimate lies above `value`, the margin
* below    a claim: it lies below `value`
* claim    a claim that is either seen or not: ours is a truth value
* value    ours is within `tolerance` * |value| of `value`
* context  is shown beside ours and never compared

What is of status "derived" is a statement of ours: it is checked, or its check fails, and no paper is judged by it.
A claim about several networks or data sets needs all of them: it is supported where every interval lies beyond the
margin, contradicted where one, widened for the number of looks (Bonferroni), lies on the other side.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy import special

from . import paths

KINDS = ("above", "below", "claim", "value", "context")
COLUMNS = ("artifact", "item", "kind", "value", "tolerance", "status", "source")
SUPPORTED, CONTRADICTED, UNDETERMINED = "supported", "contradicted", "undetermined"
CHECKED, FAILS = "checked", "check fails"
REPRODUCED, NO_REFERENCE, NOT_JUDGED = "reproduced", "no reference", "not judged"
_SIDES, _POWER = 0.975, 0.8  # of a 95% interval; of the smallest effect


@dataclass(frozen=True)
class Estimate:
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float
    n: int  # how many networks, or images, it rests on
    of: str = ""  # what it is of, where a claim is made of several
    df: int | None = None  # degrees of freedom where the interval is a t interval; None for one that is nearly normal
    ratio: bool = False  # whether it is a ratio, whose interval is even on a logarithmic scale

    @property
    def smallest_effect(self) -> float:
        """The distance from a margin that this design finds with a probability of 80%, by its interval's width.

        Of a ratio the factor by which it has to differ, more than 1.
        """
        quantile = self._quantile(_SIDES)
        if self.df is None:
            errors = quantile + self._quantile(_POWER)
        else:  # of a t statistic that lies beyond its quantile four times in five
            errors = float(special.nctdtrinc(self.df, 1 - _POWER, quantile))
        if self.ratio:
            return (self.high / self.low) ** (errors / quantile / 2) if self.low > 0 else math.inf
        return (self.high - self.low) / 2 * errors / quantile

    def widened(self, looks: int) -> tuple[float, float]:
        """The interval that all of `looks` such intervals hold together with 95%, by the normal or the t law."""
        factor = self._quantile(1 - (1 - _SIDES) / looks) / self._quantile(_SIDES)
        if self.ratio:
            return self.value * (self.low / self.value) ** factor, self.value * (self.high / self.value) ** factor
        return self.value - factor * (self.value - self.low), self.value + factor * (self.high - self.value)

    def _quantile(self, p: float) -> float:
        return float(special.ndtri(p) if self.df is None else special.stdtrit(self.df, p))

    def __str__(self) -> str:
        """Value, interval and n; with what it is of."""
        text = f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}], n = {self.n:,}"
        return f"{self.of} {text}" if self.of else text


Finding = bool | float | None | tuple[Estimate, ...]


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
        """Refuse, by a ValueError, an unknown kind, or a row without a value or tolerance that its kind needs."""
        name = f"reference {self.artifact} {self.item}"
        if self.kind not in KINDS:
            raise ValueError(f"{name}: kind {self.kind!r} is none of {', '.join(KINDS)}")
        if self.kind == "value" and (self.value is None or self.tolerance is None):
            raise ValueError(f"{name}: kind value needs a value and a tolerance")
        if self.kind in ("above", "below") and self.value is None:
            raise ValueError(f"{name}: kind {self.kind} needs a value, the margin")

    def outcome(self, ours: Finding) -> str | None:
        """What becomes of the row, None where nothing is compared; a TypeError where ours is not of its kind."""
        if self.kind == "context":
            return None
        expected = {"above": "estimates", "below": "estimates", "value": "a number"}.get(self.kind, "a bool")
        got = "estimates" if isinstance(ours, tuple) else "a bool" if isinstance(ours, bool) else "a number"
        if got != expected:
            raise TypeError(f"finding {self.item!r} of {self.artifact}: expected {expected}, got {ours!r}")
        found = self._judged(ours)
        return {SUPPORTED: CHECKED, CONTRADICTED: FAILS}.get(found, found) if self.status == "derived" else found

    def _judged(self, ours: Finding) -> str:
        if isinstance(ours, tuple):
            return self._of_estimates(ours)
        if self.kind == "claim":
            return SUPPORTED if ours else CONTRADICTED if self.status == "derived" else UNDETERMINED
        assert self.value is not None and self.tolerance is not None  # __post_init__ saw to it
        if ours is None or not abs(ours - self.value) <= self.tolerance * abs(self.value):
            return CONTRADICTED
        return SUPPORTED

    def beyond(self, ours: Estimate) -> float:
        """How far the nearer end of an interval lies beyond the margin; negative where it does not."""
        assert self.value is not None  # __post_init__ saw to it
        return ours.low - self.value if self.kind == "above" else self.value - ours.high

    def _of_estimates(self, ours: tuple[Estimate, ...]) -> str:
        assert self.value is not None
        sign = 1 if self.kind == "above" else -1
        if ours and all(self.beyond(e) > 0 for e in ours):
            return SUPPORTED
        far = [max(sign * (end - self.value) for end in e.widened(len(ours))) for e in ours]
        return CONTRADICTED if any(end < 0 for end in far) else UNDETERMINED

    @property
    def expected(self) -> str:
        """What is expected, in words."""
        if self.kind == "claim":
            return "true"
        if self.value is None:
            return "-"
        return {"above": "above ", "below": "below "}.get(self.kind, "") + (
            f"{self.value:.4g} within {self.tolerance:.0%}" if self.kind == "value" else f"{self.value:.4g}"
        )


@dataclass(frozen=True)
class Comparison:
    """A finding beside its reference; `outcome` is None where there is nothing to compare."""

    item: str
    ours: Finding
    reference: Reference | None
    outcome: str | None

    @property
    def line(self) -> str:
        """One line for the notebook."""
        against = f"reference {self.reference.expected}" if self.reference else "no reference"
        return f"{self.item}: ours {self.shown}, {against}{f': {self.outcome}' if self.outcome else ''}{self._power}"

    @property
    def shown(self) -> str:
        """Ours in words; of several estimates that are judged the one nearest to failing, of others their range."""
        if self.ours is None:
            return "not finite"
        if not isinstance(self.ours, tuple):
            return str(self.ours).lower() if isinstance(self.ours, bool) else f"{self.ours:.4g}"
        if len(self.ours) < 2 or self.reference is None:
            return "; ".join(map(str, self.ours))
        if self.reference.kind == "context":
            least, most = (chosen(self.ours, key=lambda e: e.value) for chosen in (min, max))
            return f"{len(self.ours)} estimates, from {least} to {most}"
        margins = list(map(self.reference.beyond, self.ours))
        weakest = self.ours[margins.index(min(margins))]
        return f"{sum(margin > 0 for margin in margins)} of {len(self.ours)}, the weakest {weakest}"

    @property
    def _power(self) -> str:
        """What those estimates that leave a claim undetermined could have found."""
        if self.outcome != UNDETERMINED or not isinstance(self.ours, tuple) or self.reference is None:
            return ""
        open_ones = [e for e in self.ours if not self.reference.beyond(e) > 0]
        if not open_ones:
            return ""
        effect = max(e.smallest_effect for e in open_ones)
        return f" (80% power for {'a factor of ' * open_ones[0].ratio}{effect:.2g} beyond the margin)"


def plain(ours: Finding) -> Any:
    """A finding as JSON has it; only a ratio says whether it is one."""
    if not isinstance(ours, tuple):
        return ours
    return [{name: x for name, x in asdict(estimate).items() if name != "ratio" or x} for estimate in ours]


def finding(item: str, value: object) -> Finding:
    """What a notebook found, a bool, a number or estimates in any form; None for a number that is not finite."""
    if isinstance(value, Estimate):
        return (value,)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(Estimate(**e) if isinstance(e, Mapping) else e for e in value)
    value = value.item() if hasattr(value, "item") else value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if math.isfinite(value) else None
    raise TypeError(f"finding {item!r}: expected a bool, a number or estimates, got {value!r}")


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


def compare(artifact: str, findings: Mapping[str, Any]) -> list[Comparison]:
    """Every finding beside its reference row, in the order of the findings."""
    known = {row.item: row for row in load(artifact)}
    found = {item: finding(item, value) for item, value in findings.items()}
    return [
        Comparison(item, ours, known.get(item), known[item].outcome(ours) if item in known else None)
        for item, ours in found.items()
    ]


def verdict(comparisons: Iterable[Comparison]) -> str:
    """What became of an artifact.

    Of the paper's claims and values: `reproduced` where all are supported, `contradicted` where one is contradicted,
    else `undetermined`. Where there are none, of our own statements: `checked` or `check fails`; else `no reference`.
    """
    outcomes = [c.outcome for c in comparisons if c.outcome is not None]
    judged = [outcome for outcome in outcomes if outcome not in (CHECKED, FAILS)]
    if FAILS in outcomes:
        return FAILS
    if not judged:
        return CHECKED if outcomes else NO_REFERENCE
    if CONTRADICTED in judged:
        return CONTRADICTED
    return REPRODUCED if set(judged) == {SUPPORTED} else UNDETERMINED


def _parse(row: Mapping[str, str], name: str) -> Reference:
    def number(column: str) -> float | None:
        if row["kind"] == "claim" or not (row[column] or "").strip():
            return None
        try:
            return float(row[column])
        except ValueError:
            message = f"{name}: {row['artifact']} {row['item']}: {column} {row[column]!r} is no number"
            raise ValueError(message) from None

    values: dict[str, Any] = {**row, "value": number("value"), "tolerance": number("tolerance")}
    return Reference(**values)
