"""Parameters to tidy tables: one function per artifact. Nothing here plots."""

from . import (
    adapt,
    adapt_robustness,
    adapt_words,
    bridge,
    generalisation,
    label_noise,
    layers,
    meaning,
    outlier_simulation,
    overview,
    sensitivity,
    stability,
    vulnerability,
)

__all__ = [
    "adapt",
    "adapt_robustness",
    "adapt_words",
    "bridge",
    "generalisation",
    "label_noise",
    "layers",
    "meaning",
    "outlier_simulation",
    "overview",
    "sensitivity",
    "stability",
    "vulnerability",
]
