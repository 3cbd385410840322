"""Run the notebooks of a profile that are not up to date.

Everything that can be wrong with a request is found before the first notebook starts. Short notebooks (smoke
networks, or published results drawn) run side by side, one on each core: their small tensors gain little from a second
thread. Long ones run one at a time.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influence.shards import TEMPORARY

from ..ledger import cache, manifest, notebook, paths
from ..ledger.notebook import Notebook, discover
from ..ledger.results import SMOKE, published
from . import audit, execute, needs

_TIME_LIMIT = {SMOKE: 3600.0}  # seconds a notebook may take; other profiles:
_LONG = 48 * 3600.0
_MOST_AT_ONCE = 8  # kernels, of about 1 GB each


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
    def only_redraws(self) -> bool:
        """Whether it draws what is published, and so has nothing to do where nothing is."""
        return self.notebook.redraws and not self.parameters["recompute"]

    @property
    def executed(self) -> Path:
        """Where the notebook lies after its run."""
        return paths.BUILD / "notebooks" / self.parameters["profile"] / f"{self.notebook.stem}.ipynb"

    @property
    def verdict(self) -> str:
        """What the ledger says of its last run."""
        return str(manifest.read(self.parameters["profile"])[self.notebook.stem]["verdict"])


@dataclass(frozen=True)
class Outcome:
    """How one artifact ended: `ok`, `unchanged`, `failed`, `no data` or `not there`; `note` is the verdict, or why."""

    stem: str
    status: str
    seconds: float | None
    note: str

    def line(self, width: int) -> str:
        """One line for the terminal."""
        seconds = "" if self.seconds is None else f"{self.seconds:.1f} s"
        return f"{self.stem:<{width}}  {self.status:<9}  {seconds:>9}  {self.note}".rstrip()


def plan(profile: str, only: Sequence[str] = (), *, recompute: bool = False) -> list[Job]:
    """The notebooks of a profile with their parameters, in the order in which they run.

    `smoke` has every notebook, computed anew; another profile what its file lists, drawn from what is published
    unless `recompute` is given. A UsageError where profile or stem are unknown, a NotebookError where parameters are.
    """
    notebooks, parameters = discover(), profile_of(profile)
    for stem in [*parameters, *only]:
        if stem not in notebooks:
            raise UsageError(f"unknown notebook {stem!r}: `list` names them all")
    chosen = [stem for stem in notebooks if stem in parameters or profile == SMOKE]
    for stem in only:
        if stem not in chosen:
            raise UsageError(f"{stem} is not a part of the profile {profile!r}")
    jobs = []
    for stem in chosen:
        anew = {"recompute": recompute or profile == SMOKE} if notebooks[stem].redraws else {}
        values = {**parameters.get(stem, {}), **anew}
        jobs.append(Job(notebooks[stem], notebooks[stem].merge(values, profile=profile)))
    return [job for job in jobs if not only or job.notebook.stem in only]


def profile_of(name: str) -> dict[str, dict[str, Any]]:
    """What a profile gives each of its notebooks; UsageError where there is no such profile."""
    known = sorted({SMOKE, *(p.stem for p in paths.PROFILES.glob("*.yaml"))})
    if name not in known:
        raise UsageError(f"unknown profile {name!r}: there are {', '.join(known)}")
    return notebook.profile(name)


def run(options: argparse.Namespace) -> int:
    """Run what is not up to date and say how each notebook ended. Exit status: 1 where one failed."""
    from . import kernels  # Jupyter takes half a second

    profile, refresh = options.profile, options.refresh_notebooks
    jobs = plan(profile, options.only, recompute=options.recompute or options.retrain)
    if refresh:  # each is committed as it runs by itself
        jobs = [job for job in jobs if job.notebook.parameters["profile"].default == profile]
    environment = _environment(options.data, options.device, retrain=options.retrain)
    _require_writable(manifest.folder(profile), paths.BUILD)
    with _alone():
        force = options.force or options.retrain or refresh
        # Asked of all: the code's digest must be older than the process that kernels get their modules from.
        due = [job for job in jobs if not _up_to_date(job) or force]
        lacking = _lacking(due, environment, asked=len(jobs))
        for half_written in manifest.folder(profile).rglob(f"{TEMPORARY}*"):  # by a run that was killed
            half_written.unlink(missing_ok=True)
        limit = options.time_limit or _TIME_LIMIT.get(profile, _LONG)
        width = max((len(job.notebook.stem) for job in jobs), default=0)
        cores = len(os.sched_getaffinity(0))
        long = profile != SMOKE and (options.recompute or options.retrain)
        at_once = 1 if long else min(cores, _MOST_AT_ONCE)
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(cores // at_once))
        if len(lacking) < len(due):
            kernels.prepare(environment, computing=not all(job.only_redraws for job in due))

        def finish(job: Job) -> Outcome:
            # Asked when its turn comes: the overview depends on what the others have just found.
            if not force and _up_to_date(job):
                found = Outcome(job.notebook.stem, "unchanged", None, job.verdict)
            elif job.notebook.stem in lacking:
                found = Outcome(job.notebook.stem, "no data", None, lacking[job.notebook.stem])
            elif job.only_redraws and published(job.notebook.stem, profile)[1] is None:
                found = Outcome(job.notebook.stem, "not there", None, "nothing is published: --recompute computes it")
            else:
                found = _execute(job, limit, environment)
            if refresh and found.status == "ok":
                execute.refresh(job.notebook.path, job.executed)
            return found

        by_stem: dict[str, Outcome] = {}
        for last in (False, True):
            part = [job for job in jobs if (job.notebook.stem == notebook.LAST) == last]
            for ended in _side_by_side(finish, part, at_once):
                by_stem[ended.stem] = ended
                print(ended.line(width), flush=True)
        outcomes = [by_stem[job.notebook.stem] for job in jobs]
    width = max(width, len("artifact"))
    print(f"\n{'artifact':<{width}}  {'status':<9}  {'seconds':>9}  verdict")
    for outcome in outcomes:
        print(outcome.line(width))
    count = {status: 0 for status in ("ok", "unchanged", "failed")} | Counter(o.status for o in outcomes)
    print(f"profile {profile}: " + ", ".join(f"{n} {status}" for status, n in count.items()))
    return 1 if count["failed"] or lacking else 0


def _side_by_side(finish: Callable[[Job], Outcome], jobs: Sequence[Job], at_once: int) -> Iterator[Outcome]:
    """The outcomes of the jobs as they end, so many at once."""
    from . import kernels

    with ThreadPoolExecutor(at_once) as pool:
        waiting = [pool.submit(finish, job) for job in jobs]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BaseException:  # Ctrl-C, before all others
            pool.shutdown(wait=False, cancel_futures=True)
            while wait(waiting, timeout=0.1).not_done:  # again and again: one may just be starting its kernel
                kernels.kill_all()
            raise


def _up_to_date(job: Job) -> bool:
    profile = job.parameters["profile"]
    try:
        expected = manifest.key(job.notebook, job.parameters)
    except ValueError as error:  # a reference file
        raise UsageError(str(error)) from None
    row = manifest.read(profile).get(job.notebook.stem)
    if profile != SMOKE and job.parameters.get("recompute") and row is not None and audit.computed_by_other(row):
        return False
    return manifest.up_to_date(profile, row, expected)


def _execute(job: Job, limit: float, environment: Mapping[str, str]) -> Outcome:
    stem = job.notebook.stem
    log = paths.BUILD / "logs" / job.parameters["profile"] / f"{stem}.log"
    started = time.monotonic()
    try:
        with execute.logged(log):
            execute.execute(job.notebook.path, job.executed, job.overrides, environment, limit=limit, log=log)
            if not _up_to_date(job):
                raise RuntimeError("ended without run.save(), or a file it depends on was edited meanwhile")
    except Exception as error:  # one notebook's failure must not stop the others
        where = os.path.relpath(log, paths.ROOT) if log.is_relative_to(paths.ROOT) else log
        return Outcome(stem, "failed", time.monotonic() - started, f"{execute.one_line(error)} (see {where})")
    return Outcome(stem, "ok", time.monotonic() - started, job.verdict)


def _environment(data: str | None, device: str | None, *, retrain: bool = False) -> dict[str, str]:
    """What the kernels get on top of our own environment."""
    found = {"TQDM_DISABLE": "1", "PYTHONHASHSEED": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    # glibc keeps freed tensors: page faults of new ones cost up to a third of the time.
    found |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    # The package beside these notebooks, also where another copy is installed.
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(paths.PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    if data:
        folder = Path(data).expanduser().resolve()
        if not folder.is_dir():
            raise UsageError(f"--data {data}: no such folder")
        found["INFLUENCE_DATA"] = str(folder)
    if retrain:  # no published network is there: each is trained when it is first asked for
        kept = paths.cache_dir() / "retrained"
        found |= {"INFLUENCE_ZOO": str(kept / "zoo"), "INFLUENCE_CACHE": str(kept)}
    device = device or os.environ.get("INFLUENCE_DEVICE")
    if device:
        check_device(device)
        found["INFLUENCE_DEVICE"] = device
    return found


def check_device(name: str) -> None:
    """Refuse a device that is not there, by a UsageError."""
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"device {name!r}: expected cpu, cuda or cuda:N")
    number = int(name.partition(":")[2] or 0)
    if name != "cpu" and number >= torch.cuda.device_count():
        raise UsageError(f"device {name!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices")


def _lacking(jobs: Sequence[Job], environment: Mapping[str, str], *, asked: int) -> dict[str, str]:
    """Say what the jobs read from the folder of the data sets; by stem, what cannot be made without.

    A UsageError where that is all that is asked for.
    """
    wanted = {job.notebook.stem: needs.of(job.parameters) for job in jobs}
    named = environment.get("INFLUENCE_DATA")
    folder = Path(named) if named else paths.data_dir()
    missing: dict[str, str] = {}
    for name in dict.fromkeys(name for names in wanted.values() for name in names):
        print(f"needs {needs.described(name)}", flush=True)
        if problem := needs.problem(name, folder):
            missing[name] = problem
            without = ", ".join(stem for stem, names in wanted.items() if name in names)
            print(f"  not there ({problem}), so not made: {without}", flush=True)
    lacking = {stem: ", ".join(name for name in names if name in missing) for stem, names in wanted.items()}
    lacking = {stem: f"needs {names}" for stem, names in lacking.items() if names}
    if lacking and len(lacking) == asked:
        raise UsageError(next(iter(missing.values())))
    return lacking


def _require_writable(*folders: Path) -> None:
    for folder in folders:
        probe = folder / f"{TEMPORARY}probe"
        try:
            cache.atomic_write(probe, lambda path: path.write_bytes(b""))
            probe.unlink()
        except OSError as error:
            raise UsageError(f"cannot write to {folder}: {error.strerror or error}") from None


def _alone() -> AbstractContextManager[None]:
    refusal = UsageError("another run is under way in this checkout: wait for its end")
    return cache.alone(paths.BUILD / "run.lock", refusal)
