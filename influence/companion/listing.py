"""What there is: the list of artifacts for the terminal and for the README, and the check of the results folder."""

from __future__ import annotations

from . import manifest, paths
from .notebook import discover

_COMMITTED = "cpu"


def plain() -> str:
    """One line per artifact: stem and title."""
    notebooks = discover()
    width = max(map(len, notebooks), default=0)
    return "\n".join(f"{stem:<{width}}  {notebook.title}" for stem, notebook in notebooks.items())


def markdown() -> str:
    """The README's table: stem, title, and the verdict of the committed results where there is one."""
    rows = manifest.read(_COMMITTED, root=paths.ROOT / "results")
    lines = [f"| notebook | what it shows | verdict, profile `{_COMMITTED}` |", "|---|---|---|"]
    for stem, notebook in discover().items():
        title = notebook.title.replace("|", "\\|")
        outcome = rows.get(stem, {}).get("verdict", "not run")
        lines.append(f"| [{stem}](notebooks/{stem}.ipynb) | {title} | {outcome} |")
    return "\n".join(lines)


def problems() -> list[str]:
    """Everything below the results folder that is not as its ledger says."""
    root, stems = paths.results_dir(), set(discover())
    folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    profiles = [p.name for p in folders if not p.name.startswith(".") and p.resolve() != paths.REFERENCE]
    return [problem for profile in profiles for problem in manifest.problems(profile, stems)]
