"""Progress bars."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Never, TypeVar, overload

from tqdm import auto

if TYPE_CHECKING:
    from tqdm.asyncio import tqdm_asyncio

T = TypeVar("T")


@overload
def progress_bar(iterable: Iterable[T], *, disable: bool = ..., **options: Any) -> tqdm_asyncio[T]: ...
@overload
def progress_bar(iterable: None = ..., *, disable: bool = ..., **options: Any) -> tqdm_asyncio[Never]: ...
def progress_bar(iterable: Iterable[Any] | None = None, *, disable: bool = False, **options: Any) -> tqdm_asyncio[Any]:
    """Show the progress of a loop in a terminal or a notebook.

    Silent where the environment variable TQDM_DISABLE is set. The bars of notebooks do not look at it by themselves,
    and one of some minutes is a thousand messages to whoever reads the kernel's output, who loses the last of too many.

    Args:
        iterable: What to loop over; None for a bar that is moved by hand.
        disable: Silent in any case.
        options: Those of ``tqdm.auto.tqdm``.

    Returns:
        The bar, which gives what the iterable gives.
    """
    return auto.tqdm(iterable, disable=disable or bool(os.environ.get("TQDM_DISABLE")), **options)
