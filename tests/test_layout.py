"""The companion's floors: imports go from a higher one to a lower one, never up."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from influence.companion.ledger import notebook, paths

# From the lowest to the highest; what lies beside them belongs to all.
FLOORS = ("ledger", "images", "zoo", "scores", "own_model", "artifacts", "runner")
COMPANION = paths.PACKAGE / "companion"
FILES = sorted(COMPANION.rglob("*.py"))


def upward(file: Path, source: str) -> list[str]:
    """Modules of a higher floor that a file imports, relatively or by their full name."""
    package = file.relative_to(COMPANION.parent.parent).parent.parts
    mine = file.relative_to(COMPANION).parts[0]
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = [*package[: len(package) - node.level + 1]] if node.level else []
        base += (node.module or "").split(".") if node.module else []
        for alias in node.names:
            floor = [*base, alias.name][2:3]
            if mine in FLOORS and floor and floor[0] in FLOORS and FLOORS.index(floor[0]) > FLOORS.index(mine):
                found.append(".".join([*base, alias.name]))
    return found


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(COMPANION)) for f in FILES])
def test_no_import_goes_up(file: Path) -> None:
    assert not upward(file, file.read_text(encoding="utf-8"))


def test_an_import_that_goes_up_is_found() -> None:
    file = COMPANION / "zoo" / "models.py"
    assert upward(file, "from ..runner import cli\nfrom ..images import data\n") == ["influence.companion.runner.cli"]
    assert upward(file, "from influence.companion.artifacts import overview\n")


def test_every_notebook_has_the_module_of_its_name() -> None:
    alone = {notebook.LAST, "adapt_your_model"}
    for stem in set(notebook.discover()) - alone:
        assert (COMPANION / "artifacts" / f"{stem}.py").is_file(), stem
