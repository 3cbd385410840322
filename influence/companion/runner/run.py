"""`python -m influence.companion`: run the notebooks of a profile, list them, check the results folder.

Everything that can be wrong with a request is found before the first notebook starts, and said in one line. Notebooks
run one at a time: parallel kernels race for ports, and for the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from filelock import FileLock, Timeout

from ..ledger import cache, manifest, paths
from ..ledger.notebook import Notebook, NotebookError, discover
from . import execute, listing

_SMOKE = "smoke"
_TIME_LIMIT = {_SMOKE: 3600.0}  # seconds a notebook may take; other profiles:
_LONG = 48 * 3600.0


class UsageError(Exception):
    """A request that cannot be carried out; the message is one line for the reader."""


@dataclass(frozen=True)
class Job:
    """A notebook with the parameters it is to run with."""

    notebook: Notebook
    parameters: dict[str, Any]

    @property
    def overrides(self) -> dict[str, Any]:
        """The parameters that differ from the notebook's own: what is injected."""
        defaults = self.notebook.parameters
        return {k: v for k, v in self.parameters.items() if defaults[k].convert(defaults[k].default) != v}

    @property
    def datasets(self) -> list[str]:
        """The data sets that it reads, by the parameters `dataset` and `datasets`."""
        single, several = self.parameters.get("dataset"), self.parameters.get("datasets") or []
        return [*([single] if single else []), *([several] if isinstance(several, str) else several)]


@dataclass(frozen=True)
class Outcome:
    """How one artifact ended: `ok`, `unchanged` or `failed`; `note` is the verdict, or the error."""

    stem: str
    status: str
    seconds: float | None
    note: str

    def line(self, width: int) -> str:
        """One line for the terminal."""
        seconds = "" if self.seconds is None else f"{self.seconds:.1f} s"
        return f"{self.stem:<{width}}  {self.status:<9}  {seconds:>9}  {self.note}".rstrip()


def main(arguments: Sequence[str] | None = None, *, parser: Parser | None = None) -> int:
    """Carry out a command line; returns the exit status (0 well, 1 something failed, 2 bad usage, 130 interrupted)."""
    try:
        options = (parser or _parser()).parse_args(arguments)
        if options.command == "list":
            print(listing.show(markdown=options.markdown, claims=options.claims))
            return 0
        if options.command == "check":
            problems = listing.problems()
            print("\n".join(problems) or "results: every file is owned by a notebook and as its ledger says")
            return 1 if problems else 0
        return _run(options)
    except (UsageError, NotebookError, manifest.ManifestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: what has finished is kept, the same command goes on from here", file=sys.stderr)
        return 130


def plan(profile: str, only: Sequence[str] = ()) -> list[Job]:
    """The notebooks of a profile with their parameters, in the order in which they run.

    `smoke` is the defaults of every notebook; another profile is what its file lists.

    Raises:
        UsageError: unknown profile or stem.
        NotebookError: a parameter that the notebook does not have, or of the wrong type.
    """
    notebooks, parameters = discover(), _profile(profile)
    for stem in [*parameters, *only]:
        if stem not in notebooks:
            raise UsageError(f"unknown notebook {stem!r}: --list names them all")
    chosen = [stem for stem in notebooks if stem in parameters or profile == _SMOKE]
    for stem in only:
        if stem not in chosen:
            raise UsageError(f"{stem} is not a part of the profile {profile!r}")
    jobs = {s: Job(notebooks[s], notebooks[s].merge(parameters.get(s) or {}, profile=profile)) for s in chosen}
    return [job for stem, job in jobs.items() if not only or stem in only]


def _profile(name: str) -> dict[str, dict[str, Any]]:
    path = paths.PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = sorted({_SMOKE, *(p.stem for p in paths.PROFILES.glob("*.yaml"))})
        if name not in known:
            raise UsageError(f"unknown profile {name!r}: there are {', '.join(known)}")
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(v, dict | None) for v in content.values()):
        raise UsageError(f"{path}: expected a mapping from notebook to its parameters")
    return {stem: values or {} for stem, values in content.items()}


def _run(options: argparse.Namespace) -> int:
    profile = options.profile
    if options.refresh_notebooks and profile != _SMOKE:
        raise UsageError(f"--refresh-notebooks needs the profile {_SMOKE!r}: notebooks are committed as it runs them")
    jobs = plan(profile, options.only)
    environment = _environment(options)
    _writable(manifest.folder(profile), paths.BUILD)
    with _alone(), _applied(environment):
        force = options.force or options.refresh_notebooks
        stale = [job for job in jobs if force or not _up_to_date(job)]
        _require_data(stale)
        _sweep(manifest.folder(profile))
        limit = options.time_limit or _TIME_LIMIT.get(profile, _LONG)
        width = max((len(job.notebook.stem) for job in jobs), default=0)
        outcomes = []
        for job in jobs:
            # Asked again: the overview depends on what the others have just found.
            unchanged = not force and _up_to_date(job)
            outcomes.append(_unchanged(job) if unchanged else _execute(job, limit))
            print(outcomes[-1].line(width), flush=True)
            if options.refresh_notebooks and outcomes[-1].status == "ok":
                execute.refresh(job.notebook.path, _executed(job))
    return _report(profile, outcomes, width)


def _report(profile: str, outcomes: Sequence[Outcome], width: int) -> int:
    width = max(width, len("artifact"))
    print(f"\n{'artifact':<{width}}  {'status':<9}  {'seconds':>9}  verdict")
    for outcome in outcomes:
        print(outcome.line(width))
    count = {status: sum(o.status == status for o in outcomes) for status in ("ok", "unchanged", "failed")}
    print(f"profile {profile}: " + ", ".join(f"{n} {status}" for status, n in count.items()))
    return 1 if count["failed"] else 0


def _up_to_date(job: Job) -> bool:
    profile = job.parameters["profile"]
    row = manifest.read(profile).get(job.notebook.stem)
    try:
        return manifest.up_to_date(profile, row, manifest.key(job.notebook, job.parameters))
    except ValueError as error:  # a reference file
        raise UsageError(str(error)) from None


def _unchanged(job: Job) -> Outcome:
    row = manifest.read(job.parameters["profile"])[job.notebook.stem]
    return Outcome(job.notebook.stem, "unchanged", None, row["verdict"])


def _execute(job: Job, limit: float) -> Outcome:
    stem, profile = job.notebook.stem, job.parameters["profile"]
    log = paths.BUILD / "logs" / profile / f"{stem}.log"
    started = time.monotonic()
    try:
        with execute.logged(log):
            execute.execute(job.notebook.path, _executed(job), parameters=job.overrides, limit=limit, log=log)
            if not _up_to_date(job):
                raise RuntimeError("ended without run.save(), or a file it depends on was edited meanwhile")
    except Exception as error:  # one notebook's failure must not stop the others
        where = os.path.relpath(log, paths.ROOT) if log.is_relative_to(paths.ROOT) else log
        return Outcome(stem, "failed", time.monotonic() - started, f"{execute.one_line(error)} (see {where})")
    verdict = manifest.read(profile)[stem]["verdict"]
    return Outcome(stem, "ok", time.monotonic() - started, verdict)


def _executed(job: Job) -> Path:
    profile: str = job.parameters["profile"]
    return paths.BUILD / "notebooks" / profile / f"{job.notebook.stem}.ipynb"


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """What the kernels get on top of our own environment.

    Raises:
        UsageError: no such folder of data, or no such device.
    """
    found = {"TQDM_DISABLE": "1", "PYTHONHASHSEED": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    # The package beside these notebooks, also where another copy is installed.
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(paths.PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    if options.data:
        folder = Path(options.data).expanduser().resolve()
        if not folder.is_dir():
            raise UsageError(f"--data {options.data}: no such folder")
        found["INFLUENCE_DATA"] = str(folder)
    device = options.device or os.environ.get("INFLUENCE_DEVICE")
    if device:
        check_device(device)
        found["INFLUENCE_DEVICE"] = device
    return found


def check_device(name: str) -> None:
    """Refuse a device that is not there.

    Raises:
        UsageError: naming it.
    """
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"device {name!r}: expected cpu, cuda or cuda:N")
    number = int(name.partition(":")[2] or 0)
    if name != "cpu" and number >= torch.cuda.device_count():
        raise UsageError(f"device {name!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices")


def _require_data(jobs: Sequence[Job]) -> None:
    names = sorted({name for job in jobs for name in job.datasets})
    if not names:
        return
    from ..images import data

    try:
        data.require(names, paths.data_dir())
    except data.DataError as error:
        raise UsageError(str(error)) from None


def _writable(*folders: Path) -> None:
    for folder in folders:
        try:
            cache.atomic_write(folder / f"{cache.TEMPORARY}probe", lambda path: path.write_bytes(b""))
            (folder / f"{cache.TEMPORARY}probe").unlink()
        except OSError as error:
            raise UsageError(f"cannot write to {folder}: {error.strerror or error}") from None


def _sweep(folder: Path) -> None:
    """Remove what a killed run left half written."""
    for path in folder.rglob(f"{cache.TEMPORARY}*"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    try:
        with FileLock(paths.BUILD / "run.lock", timeout=0):
            yield
    except Timeout:
        raise UsageError("another run is under way in this checkout: wait for its end") from None


@contextlib.contextmanager
def _applied(environment: dict[str, str]) -> Iterator[None]:
    former = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UsageError(f"{message} (--help shows the options)")


def _parser() -> Parser:
    parser = Parser(prog="python -m influence.companion", description="Regenerate the artifacts of the companion.")
    add_commands(parser.add_subparsers(dest="command", required=True))
    return parser


def add_commands(commands: Any, *, epilog: str = "") -> None:
    """Add `run`, `list` and `check` to a command line."""
    plain = argparse.RawDescriptionHelpFormatter
    run = commands.add_parser("run", help="regenerate what has changed", epilog=epilog, formatter_class=plain)
    run.add_argument("--profile", default=_SMOKE, help="smoke, cpu or paper (default: smoke)")
    run.add_argument("--only", nargs="+", default=[], metavar="STEM", help="these notebooks alone")
    run.add_argument("--force", action="store_true", help="run what is unchanged as well")
    run.add_argument("--data", metavar="DIR", help="folder of the data sets (default: INFLUENCE_DATA)")
    run.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    run.add_argument("--time-limit", type=_seconds, metavar="SECONDS", help="for each notebook")
    run.add_argument("--refresh-notebooks", action="store_true", help="for maintainers: keep the outputs in notebooks/")
    listed = commands.add_parser("list", help="name every notebook")
    listed.add_argument("--markdown", action="store_true", help="as the README's table")
    listed.add_argument("--claims", action="store_true", help="what each claim came to in the committed results")
    commands.add_parser("check", help="is every results file owned by a notebook, and as its ledger says?")


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value
