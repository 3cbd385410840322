"""Tidy tables to figures. Nothing here computes a result or saves a file."""

from . import sensitivity, stability, style

__all__ = ["sensitivity", "stability", "style"]
