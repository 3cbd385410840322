"""What there is: the list of artifacts for the terminal and for the README, and the check of the results folder."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from tabulate import tabulate

from ..ledger import manifest, paths, reference
from ..ledger.notebook import LAST, discover
from ..ledger.results import COMMITTED, published


def show(profile: str | None = None, *, markdown: bool = False, claims: bool = False) -> str:
    """What `influence list` prints: by default one line per artifact, stem, verdict in a profile, and title."""
    if claims:
        return claims_markdown()
    if markdown:
        return artifacts_markdown()
    lines = []
    for stem, notebook in discover().items():
        row = published(stem, profile)[1] if profile else None
        verdict = [row["verdict"] if row else "not run"] if profile else []
        lines.append((stem, *verdict, notebook.title))
    return tabulate(lines, tablefmt="plain", disable_numparse=True)


def artifacts_markdown() -> str:
    """The README's table: stem, title, and the verdict of the committed results where there is one.

    A notebook that does not draw what is published, but what it computed at small scale, has a mark.
    """
    rows, lines = manifest.read(COMMITTED, root=paths.ROOT / "results"), []
    for stem, notebook in discover().items():
        outcome = rows.get(stem, {}).get("verdict", "not run")
        outcome += "" if notebook.parameters["profile"].default == COMMITTED else " †"
        lines.append([f"[{stem}](notebooks/{stem}.ipynb)", notebook.title, outcome])
    return _markdown(["notebook", "what it shows", f"verdict, profile `{COMMITTED}`"], lines)


def claims(profile: str, *, root: Path | None = None) -> pd.DataFrame:
    """What each claim and value came to, in the results folder `root`, or what is published.

    One row per compared reference: artifact, item, reference (a value, a margin or "true"), ours, outcome, and source
    with the rule.
    """
    found = []
    for stem in discover():
        row = manifest.read(profile, root=root).get(stem) if root else published(stem, profile)[1]
        if row is not None and stem != LAST:
            for c in reference.compare(stem, row["findings"]):
                if c.reference is not None and c.outcome is not None:
                    found.append((stem, c.item, c.reference.expected, c.shown, c.outcome, c.reference.source))
    return pd.DataFrame(found, columns=["artifact", "item", "reference", "ours", "outcome", "source and rule"])


def claims_markdown() -> str:
    """The table of claims in results/README.md, from the committed results."""
    table = claims(COMMITTED, root=paths.ROOT / "results")
    return _markdown(list(table.columns), table.to_numpy().tolist())


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def problems() -> list[str]:
    """Everything below the results folder that is not as its ledger says."""
    stems = set(discover())
    return [problem for profile in profiles() for problem in manifest.problems(profile, stems)]


def profiles() -> list[str]:
    """The profiles that have results."""
    root = paths.results_dir()
    folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    return [p.name for p in folders if not p.name.startswith(".") and p.resolve() not in (paths.REFERENCE, paths.ZOO)]
