"""Parameters to tidy tables: one function per artifact. Nothing here plots."""

from . import (
    arms,
    bridge,
    near_duplicates,
    overview,
    ranking,
    robustness,
    sensitivity,
    stability,
    sweep,
    trace,
)

__all__ = [
    "arms",
    "bridge",
    "near_duplicates",
    "overview",
    "ranking",
    "robustness",
    "sensitivity",
    "stability",
    "sweep",
    "trace",
]
