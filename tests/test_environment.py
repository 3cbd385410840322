"""pyproject.toml, requirements.lock and environment.yml say the same; nothing tracked names a package host."""

from __future__ import annotations

import re
import subprocess
import sys
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


def test_conda_environment_is_pyprojects() -> None:
    content = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    pip = next(d["pip"] for d in content["dependencies"] if isinstance(d, dict))
    assert sorted(pip) == sorted(LINES)
    python = next(d for d in content["dependencies"] if str(d).startswith("python"))
    assert f'requires-python = "{python.removeprefix("python")}"' in (ROOT / "pyproject.toml").read_text()


def test_no_tracked_file_names_a_package_host() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    hosts = re.compile(rb"pypi\.|pythonhosted|download\.pytorch|--(extra-)?index-url|--find-links|index-url\s*=", re.I)
    tracked = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    assert ROOT / "requirements.lock" in tracked
    named = [p for p in tracked if p.is_file() and p != Path(__file__) and hosts.search(p.read_bytes())]
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
