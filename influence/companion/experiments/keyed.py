"""Bind arguments to a function so that a cached table depends on the code of that function's module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import pandas as pd


def bound(function: Callable[..., pd.DataFrame], *args: Any, **kwargs: Any) -> Callable[[], pd.DataFrame]:
    """`partial(function, ...)` that keeps the module of `function`, by which `cache.table` finds the code.

    A plain partial belongs to no module of the package, and its table to every file of it.
    """
    call = partial(function, *args, **kwargs)
    update_wrapper(call, function)
    return call
