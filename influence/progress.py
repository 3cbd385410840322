"""Progress bars."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tqdm import auto

if TYPE_CHECKING:
    from tqdm.asyncio import tqdm_asyncio


def progress_bar(iterable: Iterable[Any] | None = None, *, disable: bool = False, **options: Any) -> tqdm_asyncio[Any]:
    """Show the progress of a loop in a terminal or a notebook, with the options of ``tqdm.auto.tqdm``.

    Silent where the environment variable TQDM_DISABLE is set. The bars of notebooks do not look at it by themselves,
    and one of some minutes is a thousand messages to whoever reads the kernel's output, who loses the last of too many.
    """
    return auto.tqdm(iterable, disable=disable or bool(os.environ.get("TQDM_DISABLE")), **options)
