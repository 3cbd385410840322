"""`influence report`: the artifacts of a profile as one static site, from the executed notebooks and the ledger."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from ..ledger import manifest, paths, reference
from ..ledger.notebook import Notebook, discover
from . import site

_ROWS = 40  # of a table in the gallery; the file has the rest
_TOLD = 3  # findings that stand for an answer where none is judged


class ReportError(RuntimeError):
    """A site that cannot be made; the message is one line for the reader."""


def build(profile: str, out: Path | None = None) -> Path:
    """Make the site of a profile in `out`, or `build/site/PROFILE/`, in the place of the one before; its first page.

    Raises:
        ReportError: the profile has no results, or the folder holds something else.
        ValueError: not a name of a profile.
    """
    rows = manifest.read(profile)
    if not rows:
        command = "influence run" if profile == "smoke" else f"influence run --profile {profile}"
        raise ReportError(f"profile {profile!r} has no results yet: {command} makes them")
    target = out or paths.BUILD / "site" / profile
    if target.exists() and any(target.iterdir()) and not (target / site.MARK).exists():
        raise ReportError(f"{target} holds other files: name a folder that is empty or was made by influence report")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".site-") as temporary:
        folder = Path(temporary) / "site"
        folder.mkdir()
        artifacts = [_artifact(profile, book, rows.get(stem), folder) for stem, book in discover().items()]
        (folder / site.MARK).write_text(site.style(), encoding="utf-8")
        (folder / "index.html").write_text(site.gallery(profile, artifacts), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        os.replace(folder, target)
    return target / "index.html"


def _artifact(profile: str, book: Notebook, row: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """What the gallery shows of an artifact, files copied into the site; paths are relative to it."""
    stem, page = book.stem, f"notebooks/{book.stem}.html"
    executed = paths.BUILD / "notebooks" / profile / f"{stem}.ipynb"
    source = executed if row and executed.is_file() else book.path
    shown = book.parameters["profile"].default
    note = "" if source == executed else f"As it is committed, with the outputs of the profile {shown}."
    (folder / page).parent.mkdir(parents=True, exist_ok=True)
    (folder / page).write_text(site.notebook_page(book, source, folder, note=note), encoding="utf-8")
    question = site.question(book, folder)
    found = {"stem": stem, "title": book.title, "question": question, "page": page}
    if row is None:
        return found | {"verdict": "not run"}
    root, provenance = manifest.folder(profile), f"provenance/{stem}.json"
    # The artifact's own figure before its parts.
    names = [*sorted(row["files"], key=lambda name: (name.count("."), name)), provenance]
    kept = {name: site.copied(root / name, folder, f"files/{name}") for name in names if (root / name).is_file()}
    run: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        run = json.loads((root / provenance).read_text(encoding="utf-8"))
    comparisons = reference.compare(stem, row["findings"])
    judged = [c for c in comparisons if c.outcome is not None]
    return found | {
        "verdict": row["verdict"],
        "told": judged or comparisons[:_TOLD],
        "seconds": run.get("seconds"),
        "device": run.get("device", ""),
        "figures": [file for name, file in kept.items() if name.endswith(".png")],
        "downloads": [(_label(name, stem), file) for name, file in kept.items() if not name.endswith(".png")],
        "comparisons": comparisons,
        "table": _table(root / f"tables/{stem}.csv"),
    }


def _label(name: str, stem: str) -> str:
    kind, _, rest = name.partition("/")
    part = rest.removeprefix(stem).lstrip(".")
    return f"{kind.rstrip('s') if kind != 'data' else kind} {part}".strip()


def _table(path: Path) -> str:
    if not path.is_file():
        return ""
    frame = pd.read_csv(path)
    text: str = frame.head(_ROWS).to_html(index=False, border=0, float_format=lambda value: f"{value:.4g}", na_rep="-")
    more = f"<p>The first {_ROWS} of {len(frame)} rows.</p>" if len(frame) > _ROWS else ""
    return text + more
