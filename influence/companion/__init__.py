"""The reproduction of the two papers: what the notebooks call.

A notebook needs three names of it: `companion.start` (and the `save` of the run it returns), `companion.experiments`
(parameters -> table) and `companion.figures` (table -> figure).
"""

from __future__ import annotations

import importlib
from types import ModuleType

from .results import Run, start

__all__ = ["Run", "data", "experiments", "figures", "start"]


def __getattr__(name: str) -> ModuleType:
    """Import `data`, `experiments` and `figures` when first used: the command line needs none of them."""
    if name in ("data", "experiments", "figures"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
