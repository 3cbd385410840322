"""Parameters to tidy tables: one function per artifact. Nothing here plots."""

from . import adapt, adapt_robustness, adapt_words, bridge, overview, sensitivity, stability

__all__ = ["adapt", "adapt_robustness", "adapt_words", "bridge", "overview", "sensitivity", "stability"]
