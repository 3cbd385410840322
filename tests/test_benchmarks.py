"""The benchmark runs, holds a method against other numbers, and notices one that differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import architectures, gpu, methods, run, stability, weights
from influence.kernels.backend import HAS_TRITON

CASE = run.Case("chain1", 3, 2, "influence", 1.0, 8, 1, "cpu", False)


def listed(folder: Path) -> str:
    """The table, as if the chains were networks: those have curves of their own."""
    for file in folder.glob("*.json"):
        file.write_text(file.read_text().replace('"chain1"', '"small"'))
    return run.table(folder)


def test_one_json_for_each_method(tmp_path: Path) -> None:
    names = ["influence", "vmap(jacrev)"]
    options = ["--networks", "chain1", "--classes", "3", "--batch", "2", "--size", "8", "--repeats", "1"]
    run.main([*options, "--methods", *names, "--out", str(tmp_path)])
    results = {r["method"]: r for r in (json.loads(file.read_text()) for file in tmp_path.glob("*.json"))}
    assert set(results) == set(names)
    # The others in this process: what is timed is the same.
    for name in ("influence, input", "influence.score, input"):
        results[name] = run.run(replace(CASE, method=name))
    for result in results.values():
        assert result["status"] == "ok"
        assert result["difference"] < 1e-10
        assert result["ratio"] > 0
        assert result["environment"]["torch"]
    assert "| small 8x8 | 3 | 2 | vmap(jacrev) |" in listed(tmp_path)


def test_single_weights_beside_their_floor(tmp_path: Path) -> None:
    before, entries = torch.get_num_threads(), weights.ProductGradient.entries
    options = ["--networks", "resnet50", "--widths", "0.0625", "--batch", "2", "--repeats", "1", "--out", str(tmp_path)]
    try:
        weights.main(options)
    finally:
        torch.set_num_threads(before)
    (row,) = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert 0 < row["read"] < row["seconds"] and row["floor"] < row["seconds"]
    assert row["ratio"] == pytest.approx(row["seconds"] / (1.5 * row["floor"] + row["read"]))  # of one repeat
    assert weights.ProductGradient.entries is entries
    assert f"| resnet50 | 0.0625 | 2 | {row['floor']:.3f} |" in weights.table(tmp_path / "cpu.json")


def test_networks_of_torchvision() -> None:
    case = replace(CASE, network="torchvision:squeezenet1_1", size=32, method="influence.score, input", classes=4)
    assert run.run(case)["status"] == "ok"


def test_chains_are_drawn_and_not_listed(tmp_path: Path) -> None:
    rows = [
        {**asdict(CASE), "network": f"chain{depth}", "classes": classes, "batch": batch, "ratio": 2.0, "status": "ok"}
        for depth, classes, batch in ((16, 10, 8), (4, 10, 8), (16, 2, 8), (16, 10, 1))
    ]
    for i, row in enumerate([*rows, {**rows[0], "network": "resnet50"}]):
        (tmp_path / f"{i}.json").write_text(json.dumps(row))
    assert len(run.results(tmp_path, chains=True)) == 4 and [r["network"] for r in run.results(tmp_path)] == [
        "resnet50"
    ]
    run.main(["--plot", "--out", str(tmp_path)])
    assert {file.name for file in tmp_path.glob("*.png")} == {"engine.png", "scaling.png"}


def test_a_method_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda model, x: 1.001 * methods.autograd_loop(model, x)  # noqa: E731
    monkeypatch.setitem(methods.METHODS, "wrong", wrong)
    assert str(run.run(replace(CASE, method="wrong"))["status"]).startswith("gives other numbers")
    larger = lambda model, x: 1.001 * methods.score_input(model, x)  # noqa: E731
    monkeypatch.setattr(methods, "METHODS", {"influence.score, input": larger})
    assert str(run.run(replace(CASE, method="influence.score, input"))["status"]).startswith("gives other numbers")


def test_time_and_memory_have_limits(tmp_path: Path) -> None:
    options = ["--networks", "chain1", "--methods", "influence", "--out", str(tmp_path)]
    run.main([*options, "--limit", "1"])
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["status"] == "not finished in 1 s"
    assert "not finished" in listed(tmp_path)


def test_the_loss_is_timed_against_peers_that_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda: lambda z, w, labels: 1.01 * stability.eager(z, w, labels)  # noqa: E731
    chosen = {name: stability.PEERS[name] for name in ("eager", "influence, torch", "Liger KL")} | {"wrong": wrong}
    monkeypatch.setattr(stability, "PEERS", chosen)
    stability.main(["--classes", "3", "40", "--batch", "4", "--repeats", "2", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    found = {(row["method"], row["classes"]): row for row in rows}
    for classes in (3, 40):
        assert found["eager", classes]["ratio"] == 1 and found["influence, torch", classes]["status"] == "ok"
        assert found["wrong", classes]["status"] == "gives other numbers"
        assert found["Liger KL", classes]["status"].startswith(("not installed", "ok", "fails"))
    assert "| eager | 1.00 | 1.00 |" in stability.table(file)


def test_torchjd_where_it_runs_and_where_not(tmp_path: Path) -> None:
    pytest.importorskip("torchjd")
    case = replace(CASE, network="torchvision:squeezenet1_1", size=32, method="TorchJD autogram, parameters")
    assert run.run(case)["status"] == "ok"
    assert "BatchNorm2d" in str(run.run(replace(CASE, method="TorchJD autogram, parameters"))["status"])


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_acceptance_on_a_gpu_is_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, begun = tmp_path / "gpu.json", []

    def begin(path: str, command: list[str], environment: dict[str, str]) -> None:
        begun.append((path, command, environment))
        raise SystemExit

    # Triton looks at its variable when it is imported: the same command begins again with it.
    monkeypatch.setattr(os, "execve", begin)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--small", "--out", str(file)])
    [(path, command, environment)] = begun
    assert path == sys.executable and environment == {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=Path(run.__file__).parents[1]
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    stages = json.loads(file.read_text())["stages"]
    assert list(stages) == list(gpu.STAGES) and all(stage["ok"] and stage["rows"] for stage in stages.values())
    assert stages["scan"]["rows"][0]["hours for 50,000 images"] > 0
    named = {row["name"].partition(" ")[0] for row in stages["agreement of kernels"]["rows"]}
    assert named == {"gram", "relu_norm_backward", "stability_loss"}


def test_the_acceptance_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    calls: list[str] = []

    def stage(name: str, ok: bool = True, error: Exception | None = None):
        def rows(setting: gpu.Setting):
            calls.append(name)
            yield {"name": name, "ok": ok}
            if error is not None:
                raise error

        return rows

    options = ["--device", "cpu", "--out", str(tmp_path / "gpu.json")]
    monkeypatch.setattr(gpu, "STAGES", {"a": stage("a"), "b": stage("b")})
    assert gpu.main([*options, "--limit", "0"]) == 1 and not calls
    assert gpu.main(options) == 0 and calls == ["a", "b"]
    assert gpu.main(options) == 0 and calls == ["a", "b"]
    assert gpu.main([*options, "--fresh"]) == 0 and calls == ["a", "b"] * 2
    for other in (stage("c", ok=False), stage("c", error=ValueError("no device"))):
        monkeypatch.setattr(gpu, "STAGES", {"a": stage("a"), "c": other})
        assert gpu.main([*options, "--fresh"]) == 1
    assert "no device" in json.loads((tmp_path / "gpu.json").read_text())["stages"]["c"]["fails"]
    wrong = gpu._row("x", torch.ones(2) * 1.1, torch.ones(2), 1e-3)
    assert not wrong["ok"] and gpu._row("x", torch.ones(2), torch.ones(2), 1e-3)["ok"]


def test_the_table_of_a_gpu_is_what_its_file_says() -> None:
    done = json.loads((gpu.RESULTS / "cuda.json").read_text())
    page = (Path(gpu.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert page.partition("<!-- gpu -->\n")[2].partition("\n<!-- /gpu -->")[0] == gpu.table(done)


def test_networks_of_others_are_right_refused_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 1, 4, 4)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3))
    across = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3, track_running_stats=False))

    def broken() -> architectures.Made:
        raise OSError("no such file")

    def large() -> architectures.Made:
        raise architectures._LeftOutError("too large")

    found = {
        "a:plain": architectures.judged(lambda: (plain.eval(), x)),
        "a:across": architectures.judged(lambda: (across.eval(), x)),
        "a:broken": architectures.judged(broken),
        "b:large": architectures.judged(large),
    }
    assert [row["kind"] for row in found.values()] == ["right", "refused", "fails", "left out"]
    lengths = architectures.lengths
    monkeypatch.setattr(architectures, "lengths", lambda *a, **k: 1.01 * lengths(*a, **k))
    found["b:wrong"] = architectures.judged(lambda: (plain.eval(), x))
    assert found["b:wrong"]["kind"] == "wrong" and found["b:wrong"]["error"] == pytest.approx(0.01 / 1.01)
    lines = architectures.table(found).splitlines()
    assert lines[2:4] == ["| a | 3 | 1 | 0 | 1 | 0 | 1 | 0 | 0 |", "| b | 2 | 0 | 0 | 0 | 1 | 0 | 0 | 1 |"]
    assert [line.split(":")[1] for line in lines[5:]] == ["across", "broken", "wrong"]
