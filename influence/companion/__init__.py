"""The reproduction of the two papers: what the notebooks call.

A notebook needs `companion.start` (and the `save` of the run it returns) and the module of `artifacts` that has its
name: parameters to tables, tables to claims, tables to figures.
"""

from .ledger.results import Run, start

__all__ = ["Run", "start"]
