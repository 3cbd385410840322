"""Tidy tables to figures. Nothing here computes a result or saves a file."""

from . import adapt, sensitivity, stability, style

__all__ = ["adapt", "sensitivity", "stability", "style"]
