"""The ledger: what a run leaves, byte for byte, and the verdict against the papers."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from influence.companion.ledger import cache, manifest, paths, reference, results
from influence.companion.ledger.notebook import NotebookError
from influence.companion.ledger.results import Run
from influence.companion.runner import cli
from workspace import Workspace

STEM = "sensitivity/good"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def begun(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> Run:
    workspace.notebook(STEM)
    started = results.start(STEM, profile="smoke", seeds=[3], scale=2.0, limit=None)
    assert capsys.readouterr().out == f"profile smoke, device {started.device.type}\n"
    return started


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame({"x": [0.1, 1 / 3, 1e-17], "name": ["a", "b, c", "d"], "n": [1, 2, 3]})


def _figure() -> Figure:
    figure, axes = plt.subplots()
    axes.plot([0, 1], [1, 0], label="line")
    axes.set_title(r"$\sigma$ of the letters")
    plt.close(figure)
    return figure


# -- files ------------------------------------------------------------------------------------------------------------


def test_files_and_row(begun: Run, workspace: Workspace, table: pd.DataFrame) -> None:
    begun.add_input("digits", "abc")
    figures = {"all": _figure(), "zoom": _figure()}
    begun.save(table=table, figures=figures, data=table, findings={"auc": np.float32(0.5)})
    row = workspace.manifest()[STEM]
    assert set(row["files"]) == {
        f"{kind}/{STEM}{suffix}"
        for kind, suffix in [
            ("figures", ".all.png"),
            ("figures", ".all.pdf"),
            ("figures", ".zoom.png"),
            ("figures", ".zoom.pdf"),
            ("tables", ".csv"),
            ("tables", ".md"),
            ("data", ".csv"),
        ]
    }
    for name, digest in row["files"].items():
        assert manifest.sha256(workspace.results / "smoke" / name) == digest
    assert {k: v for k, v in row.items() if k not in ("files", "key", "code_hash", "package_hash")} == {
        "stem": STEM,
        "parameters": {"scale": 2.0, "limit": None},
        "seeds": [3],
        "inputs": {"digits": "abc"},
        "findings": {"auc": 0.5},
        "reference": [],
        "verdict": "no reference",
    }
    assert all(len(row[name]) == 64 for name in ("key", "code_hash", "package_hash"))
    assert row["package_hash"] == cache.package_hash()
    provenance = json.loads((workspace.results / f"smoke/provenance/{STEM}.json").read_text())
    assert {"seconds", "machine", "versions", "device", "finished"} <= set(provenance)


def test_second_save_is_byte_identical(begun: Run, workspace: Workspace, table: pd.DataFrame) -> None:
    begun.save(table=table, figures=_figure(), data=table, findings={"auc": 0.5})
    before = workspace.contents()
    assert len(before) == 6
    for path in (workspace.results / "smoke").rglob("*.p*"):
        path.unlink()
    begun.save(table=table, figures=_figure(), data=table, findings={"auc": 0.5})
    assert workspace.contents() == before
    for content in (before[f"figures/{STEM}.png"], before[f"figures/{STEM}.pdf"]):
        assert b"Date" not in content and b"atplotlib" not in content


def test_csv_keeps_every_digit(begun: Run, workspace: Workspace, table: pd.DataFrame) -> None:
    begun.save(table=table, findings={})
    path = workspace.results / f"smoke/tables/{STEM}.csv"
    assert path.read_bytes().startswith(b"x,name,n\n0.1,a,1\n0.3333333333333333,")
    pd.testing.assert_frame_equal(pd.read_csv(path), table, check_exact=True)


def test_large_data_is_compressed_without_a_date(begun: Run, workspace: Workspace, table: pd.DataFrame) -> None:
    large = pd.DataFrame({"x": np.random.default_rng(0).random(60_000)})
    begun.save(table=table, data=table, findings={})
    assert f"data/{STEM}.csv" in workspace.contents()
    begun.save(table=table, data=large, findings={})
    contents = workspace.contents()
    assert f"data/{STEM}.csv" not in contents  # what the artifact owned before is gone
    packed = contents[f"data/{STEM}.csv.gz"]
    assert packed[4:8] == b"\0\0\0\0"
    assert len(gzip.decompress(packed).splitlines()) == 60_001


def test_what_cannot_be_written_is_refused(begun: Run, workspace: Workspace, table: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="index"):
        begun.save(table=table.set_index("name"), findings={})
    with pytest.raises(TypeError, match="expected a bool or a number"):
        begun.save(table=table, findings={"auc": "high"})  # type: ignore[dict-item]
    begun.add_input("digits", "abc")
    with pytest.raises(ValueError, match="two contents"):
        begun.add_input("digits", "def")
    assert workspace.manifest() == {}


def test_start_wants_every_parameter(workspace: Workspace) -> None:
    workspace.notebook(STEM)
    with pytest.raises(NotebookError, match="missing: limit, scale"):
        results.start(STEM, profile="smoke", seeds=[3])
    with pytest.raises(NotebookError, match="unknown parameter 'width'"):
        results.start(STEM, profile="smoke", seeds=[3], scale=2.0, limit=None, width=1)
    with pytest.raises(NotebookError, match="no such notebook"):
        results.start("sensitivity/other", profile="smoke")
    for name in ("reference", "../smoke", ""):
        with pytest.raises(ValueError, match="profile"):
            results.start(STEM, profile=name, seeds=[3], scale=2.0, limit=None)


def test_check_finds_what_nobody_owns(begun: Run, workspace: Workspace, table: pd.DataFrame) -> None:
    begun.save(table=table, findings={})
    assert cli.main(["check"]) == 0
    stray = workspace.results / "smoke" / "figures" / "old.png"
    stray.parent.mkdir()
    stray.write_bytes(b"")
    assert manifest.problems("smoke", {STEM}) == ["smoke: figures/old.png is owned by no notebook"]
    assert cli.main(["check"]) == 1
    stray.unlink()
    (workspace.results / f"smoke/tables/{STEM}.csv").write_text("edited")
    assert manifest.problems("smoke", {STEM}) == [f"smoke: tables/{STEM}.csv of {STEM} is missing or changed"]
    assert f"smoke: row {STEM} has no notebook" in manifest.problems("smoke", set())


def test_committed_results_are_owned() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "INFLUENCE_RESULTS"}
    command = [sys.executable, "-m", "influence.companion", "check"]
    finished = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


# -- verdict ----------------------------------------------------------------------------------------------------------


def _reference(kind: str, value: float | None = None, tolerance: float | None = None) -> reference.Reference:
    return reference.Reference("a/b", "item", kind, value, tolerance, "printed", "table 1")


@pytest.mark.parametrize(
    ("row", "ours", "holds"),
    [
        (_reference("value", 2.0, 0.1), 2.19, True),
        (_reference("value", 2.0, 0.1), 2.2001, False),
        (_reference("value", 2.0, 0.1), 1.81, True),
        (_reference("value", -2.0, 0.1), -2.1, True),
        (_reference("value", -2.0, 0.1), 2.0, False),
        (_reference("value", 0.0, 0.1), 1e-9, False),
        (_reference("value", 2.0, 0.1), None, False),
        (_reference("value", 2.0, 0.1), math.inf, False),
        (_reference("claim"), True, True),
        (_reference("claim"), False, False),
        (_reference("range", 4.0, 0.5), 2.0, True),
        (_reference("range", 4.0, 0.5), 4.0, True),
        (_reference("range", 4.0, 0.5), 1.99, False),
        (_reference("range", 4.0, 0.5), 4.01, False),
        (_reference("context", 4.0), 400.0, None),
    ],
)
def test_rules(row: reference.Reference, ours: bool | float | None, holds: bool | None) -> None:
    assert row.holds(ours) is holds


@pytest.mark.parametrize(("row", "ours"), [(_reference("claim"), 1.0), (_reference("value", 1.0, 0.1), True)])
def test_a_claim_is_a_bool_and_a_value_is_not(row: reference.Reference, ours: bool | float) -> None:
    with pytest.raises(TypeError, match="expected a"):
        row.holds(ours)


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([True, True, None], "reproduced"),
        ([True, False], "partly"),
        ([False, False, None], "not reproduced"),
        ([None], "no reference"),
        ([], "no reference"),
    ],
)
def test_verdict(held: list[bool | None], expected: str) -> None:
    assert reference.verdict(reference.Comparison("item", 1.0, None, h) for h in held) == expected


def test_verdict_of_a_run(
    begun: Run, workspace: Workspace, table: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.reference(
        f"{STEM},auc,value,0.9,0.05,printed,table 1",
        f"{STEM},wins,claim,,,stated,abstract",
        f"{STEM},top,range,10,0.2,read off,figure 2",
        f"{STEM},n,context,100,,printed,section 4",
        f"{STEM},never,claim,,,stated,abstract",
        "sensitivity/other,auc,value,0.1,0.05,printed,table 1",
    )
    findings = {"auc": 0.91, "wins": np.True_, "top": float("nan"), "n": 5, "extra": 1.0}
    begun.save(table=table, findings=findings)
    assert capsys.readouterr().out.splitlines() == [
        "auc: ours 0.91, reference 0.9 within 5%  holds",
        "wins: ours true, reference true  holds",
        "top: ours not finite, reference 2 to 10  DOES NOT HOLD",
        "n: ours 5, reference 100",
        "extra: ours 1, no reference",
        "never: not measured here",
        "verdict: partly",
    ]
    row = workspace.manifest()[STEM]
    assert row["verdict"] == "partly"
    assert row["findings"] == {"auc": 0.91, "wins": True, "top": None, "n": 5, "extra": 1.0}
    assert {r["item"]: r["holds"] for r in row["reference"]} == {"auc": True, "wins": True, "top": False, "n": None}
    text = (workspace.results / f"smoke/tables/{STEM}.md").read_text()
    assert "| 0.9 within 5%" in text and "table 1" in text and text.endswith("Verdict: partly\n")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a/b,x,about,1,0.1,s,s", "none of value"),
        ("a/b,x,value,1,,s,s", "needs a value and a tolerance"),
        ("a/b,x,value,one,0.1,s,s", "is no number"),
        ("a/b,x,value,1,0.1,s,s\na/b,x,value,2,0.1,s,s", "two rows"),
    ],
)
def test_bad_reference_row(workspace: Workspace, row: str, message: str) -> None:
    workspace.reference(row)
    with pytest.raises(ValueError, match=message):
        reference.load()


def test_committed_reference_can_be_read() -> None:
    assert paths.REFERENCE == ROOT / "results" / "reference"
    assert all(row.status and row.source for row in reference.load())


# -- cache ------------------------------------------------------------------------------------------------------------


def test_table_is_computed_once(workspace: Workspace, table: pd.DataFrame) -> None:
    calls = []

    def compute() -> pd.DataFrame:
        calls.append(1)
        return table.assign(part=pd.Categorical(["u", "v", "u"]))

    fresh = cache.table("a/t", {"seed": 1, "sizes": (1, 2)}, compute)
    cached = cache.table("a/t", {"seed": 1, "sizes": [1, 2]}, compute)
    assert len(calls) == 1
    pd.testing.assert_frame_equal(fresh, cached, check_exact=True)
    cache.table("a/t", {"seed": 2, "sizes": (1, 2)}, compute)
    assert len(calls) == 2
    for path in paths.cache_dir().rglob("*.parquet"):
        path.write_bytes(b"torn")
    with pytest.warns(UserWarning, match="computed again"):
        pd.testing.assert_frame_equal(cache.table("a/t", {"seed": 1, "sizes": (1, 2)}, compute), fresh)
    assert not list(workspace.root.rglob(".tmp-*"))


def test_failed_write_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("former")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        cache.atomic_write(path, fail)
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_code_digest_sees_code_alone() -> None:
    code = 'def f(x):\n    """Twice."""\n    return 2 * x  # why\n'
    assert cache.code_digest(code) == cache.code_digest("def f(x):\n\n    return 2*x\n")
    assert cache.code_digest(code) != cache.code_digest(code.replace("2", "3"))
    assert cache.code_digest("%magic\nx") != cache.code_digest("%magic\ny")


def test_hashes_of_code_differ_by_what_they_cover() -> None:
    one, other = (cache.computing_hash(f"influence.companion.images.{name}") for name in ("data", "distortions"))
    assert len({one, other, cache.package_hash(), cache.computing_hash("elsewhere")}) == 4
    assert cache.computing_hash("json") == cache.computing_hash("elsewhere")  # outside the package: all of it


def test_a_table_depends_on_the_code_that_computes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = (
        "import influence\nfrom ..images import data\nfrom ..ledger.cache import x\nfrom . import style\n"
        "def helper():\n    return data.x\n\ndef compute():\n    return helper() + influence.solve\n\n"
        "def draw():\n    return style.colour\n"
    )
    sources = {
        "__init__.py": "from .kernel import solve\n",
        "kernel.py": "solve = 1\n",
        "companion/__init__.py": "",
        "companion/ledger/cache.py": "x = 1\n",
        "companion/images/data.py": "x = 1\n",
        "companion/artifacts/__init__.py": "",
        "companion/artifacts/style.py": "colour = 1\n",
        "companion/artifacts/one.py": one,
        "companion/artifacts/two.py": "from . import one\ndef compute():\n    return one.compute()\n",
    }
    package = tmp_path / "influence"
    monkeypatch.setattr(paths, "PACKAGE", package)

    def hashes(**changed: str) -> list[str]:
        for name, source in {**sources, **changed}.items():
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            (package / name).write_text(source)
        cache.computing_hash.cache_clear()
        return [cache.computing_hash(f"influence.companion.artifacts.{name}", "compute") for name in ("one", "two")]

    try:
        before = hashes()
        for name, (old, new), affected in (
            ("kernel.py", ("1", "2"), (True, True)),
            ("companion/images/data.py", ("1", "2"), (True, True)),
            ("companion/ledger/cache.py", ("1", "2"), (False, False)),
            ("companion/artifacts/style.py", ("1", "2"), (False, False)),
            ("companion/artifacts/one.py", ("data.x", "data.x + 1"), (True, True)),
            ("companion/artifacts/one.py", ("style.colour", "style.colour + 1"), (False, False)),
            ("companion/artifacts/two.py", ("one.compute()", "-one.compute()"), (False, True)),
        ):
            assert old in sources[name]
            after = hashes(**{name: sources[name].replace(old, new)})
            assert tuple(x != y for x, y in zip(before, after, strict=True)) == affected, (name, old)
    finally:
        cache.computing_hash.cache_clear()


def test_fingerprint() -> None:
    assert cache.fingerprint({"a": 1, "b": (1, 2)}) == cache.fingerprint({"b": [1, 2], "a": np.int64(1)})
    assert cache.fingerprint(1) != cache.fingerprint(1.0) != cache.fingerprint("1.0")
    assert cache.fingerprint(_reference("claim")) != cache.fingerprint(_reference("context"))
    for bad in (Path("x"), {1: 2}, {1, 2}):
        with pytest.raises(TypeError):
            cache.fingerprint(bad)
