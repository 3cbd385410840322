"""Every artifact of the companion with what the run's profile has found so far."""

from __future__ import annotations

import pandas as pd

from .. import manifest
from ..notebook import LAST, discover
from ..results import Run


def artifacts(run: Run) -> pd.DataFrame:
    """One row per artifact: artifact (stem), title, verdict ("not run" where this profile has no results yet)."""
    rows = manifest.read(run.profile)
    return pd.DataFrame(
        [
            {"artifact": stem, "title": notebook.title, "verdict": rows.get(stem, {}).get("verdict", "not run")}
            for stem, notebook in discover().items()
            if stem != LAST
        ]
    )
