"""What an interpreter lacks of the requirements in pyproject.toml.

Standard library only: `run_all.sh` runs it as a file, by an interpreter that may have nothing else, with the names of
extras, to learn whether an environment that is active already will do. It ends with 1 where something is missing.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

_PYPROJECT = Path(__file__).resolve().parents[3] / "pyproject.toml"


def requirements(extras: Iterable[str] = ()) -> list[str]:
    """The requirements of the package and of the extras, as they are written in pyproject.toml."""
    project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
    found: list[str] = list(project["dependencies"])
    for extra in extras:
        found += project["optional-dependencies"][extra]
    return found


def unmet(lines: Iterable[str]) -> list[str]:
    """Those requirements that this interpreter does not meet."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging"]
    found = []
    for line in lines:
        requirement = Requirement(line)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found.append(f"{line}: not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{line}: {version} is installed")
    return found


if __name__ == "__main__":
    lacking = unmet(requirements(sys.argv[1:]))
    print("\n".join(lacking) or "nothing is missing")
    sys.exit(1 if lacking else 0)
