"""The ledger of a profile: `results/PROFILE/manifest.json`, one row per artifact, and the files it owns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from . import cache, paths, reference
from .notebook import LAST, Notebook

NAME = "manifest.json"
_RESERVED = ("reference", "zoo")


class ManifestError(RuntimeError):
    """The ledger cannot be read; the message is one line for the reader."""


def folder(profile: str) -> Path:
    """Where the results of a profile lie, a folder of its own; a ValueError where its name is none, or is reserved."""
    if not profile.replace("_", "").replace("-", "").isalnum() or profile in _RESERVED:
        raise ValueError(f"profile {profile!r}: expected letters, digits, - and _, and not {' or '.join(_RESERVED)}")
    return paths.results_dir() / profile


def key(notebook: Notebook, parameters: Mapping[str, Any]) -> str:
    """What an artifact depends on: the notebook's code, the package, every parameter and the reference values.

    The overview shows what the others found, so it depends on their rows as well.
    """
    values = {name: value for name, value in parameters.items() if name != "recompute"}
    parts = [notebook.code_hash, cache.package_hash(), values, reference.load(notebook.stem)]
    if notebook.stem == LAST:
        others = {stem: row for stem, row in read(parameters["profile"]).items() if stem != LAST}
        parts.append({stem: [row["key"], row["findings"], row["verdict"]] for stem, row in others.items()})
    return cache.fingerprint(parts)


def read(profile: str, *, root: Path | None = None) -> dict[str, dict[str, Any]]:
    """The rows by stem, in the folder `root` of all results, or where this run writes; none where nothing has run."""
    path = (root / profile if root else folder(profile)) / NAME
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {stem: dict(row) for stem, row in rows.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ManifestError(f"{path} is damaged ({error}): delete it, and everything runs again") from None


def record(profile: str, row: Mapping[str, Any]) -> None:
    """Put an artifact's row into the ledger and delete files that it owned before and owns no longer."""
    root = folder(profile)
    with FileLock(root / ".manifest.lock"):
        rows = read(profile)
        former = rows.get(row["stem"], {}).get("files", {})
        rows[row["stem"]] = dict(row)
        text = json.dumps(rows, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        cache.atomic_write(root / NAME, lambda path: path.write_text(text, encoding="utf-8"))
        kept = {relative for other in rows.values() for relative in other["files"]}
        for relative in set(former) - kept:
            (root / relative).unlink(missing_ok=True)


def up_to_date(profile: str, row: Mapping[str, Any] | None, expected: str) -> bool:
    """Whether the row was made from what is there now, and all of its files are there with their content."""
    if row is None or row.get("key") != expected:
        return False
    return not _damaged(folder(profile), row)


def problems(profile: str, stems: set[str]) -> list[str]:
    """What is wrong with a profile's results: files and rows of none of these notebooks, files missing or changed."""
    root, rows = folder(profile), read(profile)
    found = [f"{profile}: row {stem} has no notebook" for stem in rows if stem not in stems]
    for stem, row in rows.items():
        found += [f"{profile}: {relative} of {stem} is missing or changed" for relative in _damaged(root, row)]
    owned = {NAME} | {f"provenance/{stem}.json" for stem in rows}
    owned |= {relative for row in rows.values() for relative in row["files"]}
    files = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")}
    return found + [f"{profile}: {relative} is owned by no notebook" for relative in sorted(files - owned)]


def _damaged(root: Path, row: Mapping[str, Any]) -> list[str]:
    files: Mapping[str, str] = row.get("files", {})
    kept = {name: cache.sha256(root / name) for name in files if (root / name).is_file()}
    return [name for name, digest in files.items() if kept.get(name) != digest]
