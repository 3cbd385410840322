"""pyproject.toml, requirements.lock and environment.yml say the same; nothing tracked names a package host."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from influence.companion.runner import environment

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("companion", "test")
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
LINES = environment.requirements(EXTRAS)


def _locked() -> dict[str, list[str]]:
    """Name -> its lines: a package may be pinned once for each version of Python."""
    found: dict[str, list[str]] = {}
    for line in LOCK.splitlines():
        if not line.startswith((" ", "#")):
            requirement = Requirement(line.rstrip(" \\"))
            found.setdefault(canonicalize_name(requirement.name), []).append(str(requirement.specifier))
    return found


@pytest.mark.parametrize("line", LINES)
def test_lock_pins_what_pyproject_asks_for(line: str) -> None:
    requirement = Requirement(line)
    pins = _locked()[canonicalize_name(requirement.name)]
    for pin in pins:
        assert pin.startswith("==")
        assert requirement.specifier.contains(pin.removeprefix("=="), prereleases=True)


def test_every_pin_has_hashes() -> None:
    blocks = re.split(r"\n(?=\S)", LOCK.strip())
    assert len(blocks) >= len(LINES)
    for block in blocks:
        assert "==" in block.splitlines()[0]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block.splitlines()[0]


def test_torch_and_torchvision_are_a_pair() -> None:
    """torchvision 0.(N + 15).p is compiled against torch 2.N.p; a range in its metadata does not say so."""
    (torch_pin,), (vision_pin,) = _locked()["torch"], _locked()["torchvision"]
    torch_version, vision_version = (Version(pin.removeprefix("==")) for pin in (torch_pin, vision_pin))
    assert (torch_version.major, vision_version.major) == (2, 0)
    assert vision_version.minor == torch_version.minor + 15
    assert vision_version.micro == torch_version.micro


def test_installed_torchvision_takes_the_locked_torch() -> None:
    (torch_pin,), (vision_pin,) = _locked()["torch"], _locked()["torchvision"]
    if Version(metadata.version("torchvision")).public != vision_pin.removeprefix("=="):
        pytest.skip(f"torchvision {metadata.version('torchvision')} is installed, {vision_pin} is locked")
    asked = [Requirement(r) for r in metadata.requires("torchvision") or [] if Requirement(r).name == "torch"]
    assert asked and all(r.specifier.contains(torch_pin.removeprefix("==")) for r in asked)


def test_conda_installs_the_lock() -> None:
    content = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, last = content["dependencies"]
    assert f'requires-python = "{python.removeprefix("python")}"' in (ROOT / "pyproject.toml").read_text()
    assert (pip, last) == ("pip", {"pip": ["-r requirements.lock"]})


def test_container_runs_the_readme_commands() -> None:
    """Neither is built here: what they name exists, and the devcontainer is made from the Dockerfile."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert "FROM python:3.12-slim" in lines
    assert any("COPY requirements.lock" in line for line in lines) and any("--require-hashes" in line for line in lines)
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    built = container["build"]
    assert (ROOT / ".devcontainer" / built["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert (ROOT / ".devcontainer" / built["context"]).resolve() == ROOT


def test_citation_names_the_software_and_both_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"cff-version", "message", "title", "authors", "references"} <= set(citation)
    assert (citation["type"], citation["version"], citation["license"]) == ("software", project["version"], "MIT")
    papers = [(paper["type"], paper["year"], len(paper["authors"])) for paper in citation["references"]]
    assert papers == [("conference-paper", 2019, 2), ("conference-paper", 2016, 4)]
    assert "preferred-citation" not in citation  # would hide all but one of the three from whoever cites


def test_no_tracked_file_names_a_package_host() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    words = (b"pypi.", b"pythonhosted", b"download.pytorch", b"--index-url", b"--extra-index-url", b"--find-links")

    def names_a_host(content: bytes) -> bool:  # a hundred megabytes of weights and tables are looked through
        return any(word in content for word in words) or re.search(rb"index-url\s*=", content) is not None

    tracked = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    assert ROOT / "requirements.lock" in tracked
    named = [p for p in tracked if p.is_file() and p != Path(__file__) and names_a_host(p.read_bytes().lower())]
    assert named == []
    assert "://" not in LOCK


def test_unmet_says_what_is_missing() -> None:
    assert environment.unmet(["numpy>=1", "numpy>=999", "no-such-package>=1"]) == [
        f"numpy>=999: {metadata.version('numpy')} is installed",
        "no-such-package>=1: not installed",
    ]


def test_check_runs_as_a_file() -> None:
    command = [sys.executable, "-P", str(ROOT / "influence/companion/runner/environment.py"), *EXTRAS]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (0, "nothing is missing\n")
