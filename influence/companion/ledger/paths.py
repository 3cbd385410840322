"""Absolute paths of the companion, in one place.

Everything hangs from the checkout. `INFLUENCE_ROOT` points the companion at another tree of the same layout (the tests
use it), `INFLUENCE_RESULTS`, `INFLUENCE_ZOO`, `INFLUENCE_CACHE` and `INFLUENCE_DATA` move one folder each.
"""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]
ROOT = Path(os.environ.get("INFLUENCE_ROOT") or PACKAGE.parent).resolve()
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
ZOO = Path(os.environ.get("INFLUENCE_ZOO") or ROOT / "results" / "zoo").resolve()
REFERENCE = ROOT / "results" / "reference"
BUILD = ROOT / "build"


def results_dir() -> Path:
    """Folder that holds one folder of results per profile: `INFLUENCE_RESULTS`, else `results/`."""
    return _from_environment("INFLUENCE_RESULTS") or ROOT / "results"


def cache_dir() -> Path:
    """Folder of checkpoints and cached tables: `INFLUENCE_CACHE`, else `build/cache/`."""
    return _from_environment("INFLUENCE_CACHE") or BUILD / "cache"


def data_dir() -> Path | None:
    """Folder of the data sets: `INFLUENCE_DATA`; None when it is not set."""
    return _from_environment("INFLUENCE_DATA")


def _from_environment(name: str) -> Path | None:
    value = os.environ.get(name)
    return Path(value).expanduser().resolve() if value else None
