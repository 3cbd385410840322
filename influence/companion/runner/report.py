"""`influence report`: the artifacts of a profile as one static site, from the executed notebooks and the ledger."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ..ledger import manifest, paths, reference
from ..ledger.notebook import Notebook, discover
from . import site

_ROWS = 40  # of a table in the gallery; the file has the rest


class ReportError(RuntimeError):
    """A site that cannot be made; the message is one line for the reader."""


@dataclass(frozen=True)
class Artifact:
    """One card of the gallery; paths are relative to the site, `downloads` are (label, path), `table` is HTML."""

    stem: str
    title: str
    verdict: str
    page: str
    seconds: float | None = None
    device: str = ""
    figures: list[str] = field(default_factory=list)
    downloads: list[tuple[str, str]] = field(default_factory=list)
    comparisons: list[dict[str, str]] = field(default_factory=list)
    table: str = ""


def build(profile: str, out: Path | None = None) -> Path:
    """Make the site of a profile, in the place of the one before.

    Args:
        profile: name of the profile.
        out: folder of the site; None for `build/site/PROFILE/`. One that holds anything but a site is refused.

    Returns:
        The first page.

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


def _artifact(profile: str, book: Notebook, row: dict[str, Any] | None, folder: Path) -> Artifact:
    stem, page = book.stem, f"notebooks/{book.stem}.html"
    executed = paths.BUILD / "notebooks" / profile / f"{stem}.ipynb"
    source = executed if row and executed.is_file() else book.path
    note = "" if source == executed else "As it is committed, with the outputs of the profile smoke."
    (folder / page).parent.mkdir(parents=True, exist_ok=True)
    (folder / page).write_text(site.notebook_page(book, source, folder, note=note), encoding="utf-8")
    if row is None:
        return Artifact(stem, book.title, "not run", page)
    root, figures, downloads = manifest.folder(profile), [], []
    # The artifact's own figure before its parts.
    names = [*sorted(row["files"], key=lambda name: (name.count("."), name)), f"provenance/{stem}.json"]
    for name in (name for name in names if (root / name).is_file()):
        kept = site.copied(root / name, folder, f"files/{name}")
        if name.endswith(".png"):
            figures.append(kept)
        else:
            downloads.append((_label(name, stem), kept))
    provenance = _provenance(root / f"provenance/{stem}.json")
    return Artifact(
        stem,
        book.title,
        row["verdict"],
        page,
        seconds=provenance.get("seconds"),
        device=str(provenance.get("device", "")),
        figures=figures,
        downloads=downloads,
        comparisons=_comparisons(stem, row["findings"]),
        table=_table(root / f"tables/{stem}.csv"),
    )


def _label(name: str, stem: str) -> str:
    kind, _, rest = name.partition("/")
    part = rest.removeprefix(stem).lstrip(".")
    return f"{kind.rstrip('s') if kind != 'data' else kind} {part}".strip()


def _provenance(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}


def _comparisons(stem: str, findings: dict[str, Any]) -> list[dict[str, str]]:
    words = {True: "holds", False: "does not hold", None: ""}
    return [
        {
            "item": c.item.replace("_", " "),
            "paper": f"{c.reference.expected} ({c.reference.status})" if c.reference else "no reference",
            "ours": reference.format_finding(c.ours),
            "holds": words[c.holds],
            "source": c.reference.source if c.reference else "",
        }
        for c in reference.compare(stem, findings)
    ]


def _table(path: Path) -> str:
    if not path.is_file():
        return ""
    frame = pd.read_csv(path)
    text: str = frame.head(_ROWS).to_html(index=False, border=0, float_format=lambda value: f"{value:.4g}", na_rep="-")
    more = f"<p>The first {_ROWS} of {len(frame)} rows.</p>" if len(frame) > _ROWS else ""
    return text + more
