"""One notebook through papermill: execute it, keep its log, write its outputs back."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..ledger import cache


def execute(
    source: Path,
    target: Path,
    parameters: Mapping[str, Any],
    environment: Mapping[str, str],
    *,
    limit: float,
    log: Path,
) -> None:
    """Execute a notebook in its own folder, with the interpreter that runs this, into the file `target`.

    The kernel gets `environment` on top of our own variables; `log` gets what the kernel itself has to say. A
    TimeoutError where the whole notebook takes over `limit` seconds.
    """
    with without_grammars():
        import papermill
        from nbclient.exceptions import CellTimeoutError

    from . import kernels

    deadline = time.monotonic() + limit
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            source,
            target,
            parameters=dict(parameters),
            kernel_name="python3",
            language="python",
            cwd=source.parent,
            progress_bar=False,
            log_output=True,
            # A limit for the notebook, not for each cell: every cell gets what is left.
            timeout_func=lambda cell: max(1, round(deadline - time.monotonic())),
            kernel_manager_class=kernels.manager(environment, source.parent, log),
        )
    except CellTimeoutError:
        raise TimeoutError(f"over its limit of {limit:g} s") from None


@contextlib.contextmanager
def without_grammars() -> Iterator[None]:
    """Inside, imports of Jupyter do without grammars of addresses, which jsonschema takes three seconds to compile."""
    name = "rfc3987_syntax"  # optional there, and no notebook has anything for it to check
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop(name, None)  # notebooks are started by several threads
        if before is not None:
            sys.modules[name] = before


def refresh(source: Path, executed_path: Path) -> None:
    """Write the outputs of a run back into the notebook, without times and traces of the runner."""
    import nbformat

    executed = nbformat.read(executed_path, as_version=4)
    executed.metadata.pop("papermill", None)
    executed.metadata.get("language_info", {}).pop("version", None)
    executed.metadata["kernelspec"] = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    executed.cells = [c for c in executed.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    for cell in executed.cells:
        for name in ("papermill", "execution", *(() if cell.metadata.get("tags") else ("tags",))):
            cell.metadata.pop(name, None)
    for count, cell in enumerate((c for c in executed.cells if c.cell_type == "code"), start=1):
        for counted in (cell, *(output for output in cell.outputs if "execution_count" in output)):
            counted.execution_count = count
    text = nbformat.writes(executed).rstrip("\n") + "\n"
    cache.atomic_write(source, lambda path: path.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Send what papermill reports in this thread, the notebook's own output with it, and a traceback to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    thread = threading.get_ident()  # other notebooks run in others
    handler.addFilter(lambda record: record.thread == thread)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("papermill")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    except BaseException:
        logger.error(_without_colours(traceback.format_exc()))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


def one_line(error: Exception) -> str:
    """An error in one line: the notebook's own where it was raised there."""
    name = getattr(error, "ename", type(error).__name__)
    lines = _without_colours(str(getattr(error, "evalue", error))).strip().splitlines()
    return f"{name}: {lines[0]}" if lines else name


def _without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
