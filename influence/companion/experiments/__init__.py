"""Parameters to tidy tables: one function per artifact. Nothing here plots."""

from . import (
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
