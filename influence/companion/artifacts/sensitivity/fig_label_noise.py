"""Which score finds wrong labels: real ones (CIFAR-10N), or labels flipped at random where no download is allowed."""

from __future__ import annotations

import pandas as pd


def claims(table: pd.DataFrame) -> dict[str, bool | float]:
    """By rules fixed before the run, each for every network and kind of label.

    * fi_beats_jacobian_norm: the lower end of the interval of exact FI's AUROC lies above the upper end of that of the
      Jacobian norm.
    * nothing_beats_the_loss: no score's lower end lies above the loss's upper end.
    """
    found = table.set_index(["model", "kind", "score"])
    low, high = found["auroc_low"].unstack(), found["auroc_high"].unstack()
    return {
        "fi_beats_jacobian_norm": bool((low["exact"] > high["jacobian_norm"]).all()),
        "nothing_beats_the_loss": bool((low.max(axis=1) <= high["loss"]).all()),
    }
