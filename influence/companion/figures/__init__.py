"""Tidy tables to figures. Nothing here computes a result or saves a file."""

from . import classification, embedding, sensitivity, stability, style

__all__ = ["classification", "embedding", "sensitivity", "stability", "style"]
