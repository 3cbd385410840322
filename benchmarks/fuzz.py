"""Thousands of random networks against brute force: how many the engine has right, announces, refuses or gets wrong.

    python -m benchmarks.fuzz                         # 2,000 networks, a table by part; exit status 1 if one is wrong
    python -m benchmarks.fuzz --start 123 --models 1  # one of them, printed
    python -m benchmarks.fuzz --part routed           # only networks that hold this part

The networks are those of tests/random_models.py, the judge is tests/brute_force.py. A run that was interrupted goes on
where it stopped, unless the engine or the networks have changed since; its result is benchmarks/results/fuzz/cpu.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import multiprocessing
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import influence

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fuzz" / "cpu.json"
sys.path.insert(0, str(ROOT / "tests"))

import brute_force  # noqa: E402
import random_layers  # noqa: E402
import random_models  # noqa: E402
import random_parts  # noqa: E402

_SAVE_EVERY = 50
_GOOD = (brute_force.RIGHT, brute_force.ANNOUNCED, brute_force.REFUSED)


def fingerprint() -> str:
    """Of the engine and of the networks."""
    folder = Path(influence.__file__).parent
    files = [file for file in folder.rglob("*.py") if "companion" not in file.parts]
    files += [Path(module.__file__) for module in (random_models, random_layers, random_parts, brute_force)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def judged(seed: int) -> dict[str, Any]:
    """What came of one network."""
    torch.set_num_threads(1)
    case = random_models.random_case(seed)
    verdict = brute_force.judge(case)
    torch.compiler.reset()
    return {"seed": seed, "kind": verdict.kind, "parts": sorted(set(case.parts)), "detail": verdict.detail}


def results(seeds: list[int], jobs: int) -> Iterator[dict[str, Any]]:
    """In the order of the seeds."""
    if jobs == 1:
        yield from map(judged, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=200) as pool:
        yield from pool.imap(judged, seeds, chunksize=8)


def table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Markdown: how many networks hold a part, and what came of them."""
    lines = [f"| part | networks | {' | '.join(_GOOD)} | wrong |", "|---|" + "--:|" * (len(_GOOD) + 2)]
    for name, kinds in sorted(counts.items()):
        good = [kinds.get(kind, 0) for kind in _GOOD]
        everything = sum(kinds.values())
        lines.append(f"| {' | '.join([name, *map(str, [everything, *good, everything - sum(good)])])} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit status is 1 if a network is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--part", help="judge only networks that hold it; no result is written")
    parser.add_argument("--results", type=Path, help="JSON to go on from and to write; none unless it starts at seed 0")
    options = parser.parse_args(arguments)
    file = options.results or (RESULTS if options.start == 0 and options.part is None else None)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)

    run: dict[str, Any] = {
        "engine": fingerprint(),
        "start": options.start,
        "models": 0,
        "seconds": 0.0,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "wrong": [],
        "counts": {},
    }
    if file is not None and file.exists():
        before = json.loads(file.read_text())
        if all(before[key] == run[key] for key in ("engine", "start", "torch")):
            run = before
    seeds = list(range(options.start + run["models"], options.start + options.models))
    if options.part:
        seeds = [seed for seed in seeds if options.part in random_models.random_case(seed).parts]
    if len(seeds) == 1:
        print(random_models.random_case(seeds[0]))

    def save() -> None:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(run | {"seconds": round(run["seconds"], 1)}, indent=1, sort_keys=True) + "\n")

    clock = time.perf_counter()
    for case in results(seeds, options.jobs):
        for name in [*case["parts"], "**all**"]:
            kinds = run["counts"].setdefault(name, {})
            kinds[case["kind"]] = kinds.get(case["kind"], 0) + 1
        if case["kind"] not in _GOOD:
            run["wrong"].append(case)
            print(f"{case['seed']}: {case['kind']}: {' '.join(case['parts'])}: {case['detail']}", flush=True)
        run["models"] += 1
        run["seconds"] += time.perf_counter() - clock
        clock = time.perf_counter()
        if run["models"] % _SAVE_EVERY == 0:
            save()
    save()
    print(table(run["counts"]))
    return int(bool(run["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
