"""Thousands of random networks against brute force: how many the engine has right, announces, refuses or gets wrong.

    python -m benchmarks.fuzz                         # 2,000 networks, a table by part; exit status 1 if one is wrong
    python -m benchmarks.fuzz --start 123 --models 1  # one of them, printed
    python -m benchmarks.fuzz --part routed           # only networks that hold this part

The networks are those of tests/random_models.py, the judge is tests/brute_force.py. A run that was interrupted goes on
where it stopped, unless the engine or the networks have changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import influence

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"
sys.path.insert(0, str(ROOT / "tests"))

import brute_force  # noqa: E402
import random_layers  # noqa: E402
import random_models  # noqa: E402
import random_parts  # noqa: E402

_SAVE_EVERY = 50
_COLUMNS = (brute_force.RIGHT, brute_force.ANNOUNCED, brute_force.REFUSED)


def fingerprint() -> str:
    """Of the engine and of the networks."""
    files = [*Path(influence.__file__).parent.glob("*.py"), *Path(influence.__file__).parent.glob("*/*.py")]
    files += [Path(module.__file__) for module in (random_models, random_layers, random_parts, brute_force)]
    files = [file for file in files if "companion" not in file.parts]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def judged(seed: int) -> dict[str, Any]:
    """One network, as it goes into the file."""
    torch.set_num_threads(1)
    case = random_models.random_case(seed)
    verdict = brute_force.judge(case)
    torch.compiler.reset()
    parts = sorted(set(case.parts))
    return {"seed": seed, "kind": verdict.kind, "parts": parts} | ({} if verdict.good else {"detail": verdict.detail})


def results(seeds: list[int], jobs: int) -> Iterator[dict[str, Any]]:
    if jobs == 1:
        yield from map(judged, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=200) as pool:
        yield from pool.imap(judged, seeds, chunksize=8)


def table(cases: Iterable[dict[str, Any]]) -> str:
    """Markdown: how many networks hold a part, and what came of them."""
    counts: dict[str, Counter[str]] = {}
    for case in cases:
        for name in [*case["parts"], "**all**"]:
            counts.setdefault(name, Counter())[case["kind"]] += 1
    lines = [f"| part | networks | {' | '.join(_COLUMNS)} | wrong |", "|---|" + "--:|" * (len(_COLUMNS) + 2)]
    for name, kinds in sorted(counts.items()):
        good = [kinds[kind] for kind in _COLUMNS]
        cells = [name, *map(str, [kinds.total(), *good, kinds.total() - sum(good)])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit status is 1 if a network is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--part", help="judge only networks that hold it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON to write and to go on from")
    options = parser.parse_args(arguments)

    seeds = list(range(options.start, options.start + options.models))
    if options.part:
        seeds = [seed for seed in seeds if options.part in random_models.random_case(seed).parts]
    if len(seeds) == 1:
        print(random_models.random_case(seeds[0]))
    run = {"engine": fingerprint(), "torch": torch.__version__, "python": platform.python_version(), "seconds": 0.0}
    cases: dict[int, dict[str, Any]] = {}
    if options.results.exists():
        before = json.loads(options.results.read_text())
        if before["engine"] == run["engine"]:
            run["seconds"] = before["seconds"]
            cases = {case["seed"]: case for case in before["cases"]}

    def save() -> None:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        listed = ",\n".join(json.dumps(cases[seed]) for seed in sorted(cases))
        head = json.dumps(run | {"seconds": round(run["seconds"], 1)})[:-1]
        options.results.write_text(f'{head}, "cases": [\n{listed}\n]}}\n')

    before = time.perf_counter()
    for done, case in enumerate(results([seed for seed in seeds if seed not in cases], options.jobs), start=1):
        cases[case["seed"]] = case
        run["seconds"] += time.perf_counter() - before
        before = time.perf_counter()
        if case["kind"] not in _COLUMNS:
            print(f"{case['seed']}: {case['kind']}: {' '.join(case['parts'])}: {case['detail']}", flush=True)
        if done % _SAVE_EVERY == 0:
            save()
    save()
    asked = [cases[seed] for seed in seeds]
    print(table(asked))
    return int(any(case["kind"] not in _COLUMNS for case in asked))


if __name__ == "__main__":
    sys.exit(main())
