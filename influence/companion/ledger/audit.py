"""Published rows of single examples against the same rows computed anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from .results import Run

# Ten times what float32 moves FI, loss and trace of the published networks away from their values in float64; another
# processor, number of threads or batch sums in another order, and stays within that. A -log P that was computed as one
# float64 near 0 has lost what is below a few of its roundings at 1.
RTOL, ATOL = 1e-4, 1e-14


@dataclass(frozen=True)
class Audit:
    """How examples of a published table are computed anew.

    `again` takes the run and examples, one row each with the columns `example`, to their rows of the table; it never
    trains a network. Columns in `jumps` may be moved by any amount by rounding, in those rows whose column "near_cut"
    in what `again` returns is true.
    """

    example: tuple[str, ...]  # columns that together name an example
    again: Callable[[Run, pd.DataFrame], pd.DataFrame]
    where: str = ""  # a pandas query: the rows that can be computed anew; all where it is empty
    within: tuple[str, ...] = ()  # further columns that tell apart the rows of one example, such as its layers
    others: tuple[str, ...] = ()  # columns that depend on other examples too, such as a place; they are not compared
    jumps: tuple[str, ...] = ()
    atol: dict[str, float] = field(default_factory=dict)  # absolute tolerances, as of a share, where one changes sides

    def choose(self, published: pd.DataFrame, count: int, *, seed: int) -> pd.DataFrame:
        """At most `count` random examples of a table, a row each."""
        if self.where:
            published = published.query(self.where)
        examples = published[list(self.example)].drop_duplicates(ignore_index=True)
        return examples.sample(min(count, len(examples)), random_state=seed)

    def compare(self, published: pd.DataFrame, anew: pd.DataFrame) -> tuple[int, int, list[str]]:
        """Every published value of some examples against what `again` returned for them.

        Returns:
            How many values were compared and how many left out, and a line for each that disagrees.
        """
        keys = [*self.example, *self.within]
        both = published.merge(anew, on=keys, how="left", suffixes=("", " anew"), validate="one_to_one", indicator=True)
        there = (both["_merge"] == "both").to_numpy()
        near = both["near_cut"].eq(True).to_numpy() if "near_cut" in both else ~there
        compared, left_out, wrong = 0, 0, []
        for column in published.columns.difference([*keys, *self.others], sort=False):
            old, new = both[column], both.get(f"{column} anew", pd.Series(np.nan, both.index))
            if pd.api.types.is_float_dtype(old) and pd.api.types.is_numeric_dtype(new):
                same = np.isclose(new, old, rtol=RTOL, atol=self.atol.get(str(column), ATOL), equal_nan=True)
            else:
                same = (new == old).to_numpy(dtype=bool)
            skipped = near & there if column in self.jumps else np.zeros_like(there)
            compared, left_out = compared + int((~skipped).sum()), left_out + int(skipped.sum())
            for row in np.flatnonzero(~(same & there) & ~skipped):
                where = ", ".join(f"{key} {both.at[row, key]!s}" for key in keys)
                before, after = str(old[row]), str(new[row])
                wrong.append(f"{where}: {column} is {before} as published, {after} anew")
        return compared, left_out, wrong
