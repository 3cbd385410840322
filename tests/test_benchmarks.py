"""The benchmark runs, holds a method against our numbers, and notices one that differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import methods, run


def test_one_json_for_each_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda model, x: 1.001 * methods.autograd_loop(model, x)  # noqa: E731
    monkeypatch.setitem(methods.METHODS, "wrong", wrong)
    names = ["influence", "autograd loop", "vmap(jacrev)", "wrong"]
    options = ["--networks", "chain1", "--classes", "3", "--batch", "2", "--size", "8", "--repeats", "1"]
    run.main([*options, "--methods", *names, "--out", str(tmp_path)])
    results = {r["method"]: r for r in (json.loads(file.read_text()) for file in tmp_path.glob("*.json"))}
    assert set(results) == set(names)
    for name in names[:3]:
        assert results[name]["status"] == "ok"
        assert results[name]["difference"] < 1e-10
        assert results[name]["ratio"] > 0
        assert results[name]["environment"]["torch"]
    assert results["wrong"]["status"].startswith("gives other numbers")
    assert "| chain1 | 3 | 2 | autograd loop |" in run.table(tmp_path)
