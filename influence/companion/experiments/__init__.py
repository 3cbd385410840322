"""Parameters to tidy tables: one function per artifact. Nothing here plots."""

from . import bridge, overview, sensitivity, stability

__all__ = ["bridge", "overview", "sensitivity", "stability"]
