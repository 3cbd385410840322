"""The README: its commands and paths exist, its table of artifacts is the one the companion prints."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from influence.companion import listing

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def usage() -> str:
    command = ["/bin/bash", str(ROOT / "run_all.sh"), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _commands(text: str) -> list[str]:
    return [match.strip() for match in re.findall(r"\./run_all\.sh([^\n`#|;&]*)", text)]


def test_commands_are_accepted(readme: str, usage: str) -> None:
    commands = _commands(readme)
    assert "" in commands and "test" in commands  # the two that everybody needs
    for command in commands:
        words = command.split()
        for option in (w.partition("=")[0] for w in words if w.startswith("--")):
            assert re.search(rf"{re.escape(option)}\b", usage), f"./run_all.sh {command}: no {option}"
        if words and not words[0].startswith("-") and words[0][0].isalpha():
            assert f"./run_all.sh {words[0]}" in usage, f"./run_all.sh {command}: no such command"


def test_paths_exist(readme: str) -> None:
    linked = [target for target in re.findall(r"\]\(([^)#\s]+)", readme) if "://" not in target]
    assert linked
    missing = [target for target in linked if not (ROOT / target).exists()]
    assert missing == []


def test_table_of_artifacts(readme: str) -> None:
    found = re.search(r"<!-- artifacts -->\n(.*?)\n<!-- /artifacts -->", readme, re.S)
    assert found, "no table between <!-- artifacts --> and <!-- /artifacts -->"
    assert found[1].strip() == listing.markdown(), "renew it with: python -m influence.companion list --markdown"
