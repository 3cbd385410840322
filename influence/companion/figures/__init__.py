"""Tidy tables to figures. Nothing here computes a result or saves a file."""

from . import (
    adapt,
    classification,
    detection,
    embedding,
    generalisation,
    layers,
    meaning,
    sensitivity,
    stability,
    style,
    vulnerability,
)

__all__ = [
    "adapt",
    "classification",
    "detection",
    "embedding",
    "generalisation",
    "layers",
    "meaning",
    "sensitivity",
    "stability",
    "style",
    "vulnerability",
]
