"""The ledger: what a run leaves, byte for byte, and the verdict against the papers."""

from __future__ import annotations

import ast
import gzip
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

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
    started = results.start(STEM, dict(profile="smoke", seeds=[3], scale=2.0, limit=None))
    assert capsys.readouterr().out == f"profile smoke, device {started.device.type}\nwith limit = None\n"
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
        assert cache.sha256(workspace.results / "smoke" / name) == digest
    assert {k: v for k, v in row.items() if k not in ("files", "key", "code_hash", "package_hash")} == {
        "stem": STEM,
        "parameters": {"scale": 2.0, "limit": None},
        "seeds": [3],
        "inputs": {"digits": "abc"},
        "findings": {"auc": 0.5},
        "reference": [],
        "verdict": "not judged",
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
    with pytest.raises(TypeError, match="expected a bool, a number or estimates"):
        begun.save(table=table, findings={"auc": "high"})  # type: ignore[dict-item]
    begun.add_input("digits", "abc")
    with pytest.raises(ValueError, match="two contents"):
        begun.add_input("digits", "def")
    assert workspace.manifest() == {}


def test_start_wants_every_parameter(workspace: Workspace) -> None:
    workspace.notebook(STEM)
    with pytest.raises(NotebookError, match="missing: limit, scale"):
        results.start(STEM, dict(profile="smoke", seeds=[3]))
    with pytest.raises(NotebookError, match="no such notebook"):
        results.start("sensitivity/other", dict(profile="smoke"))
    for name in ("reference", "../smoke", ""):
        with pytest.raises(ValueError, match="profile"):
            results.start(STEM, dict(profile=name, seeds=[3], scale=2.0, limit=None))


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


def test_committed_results_are_owned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("INFLUENCE_RESULTS")
    assert paths.results_dir() == ROOT / "results"
    status = cli.main(["check"])
    assert status == 0, capsys.readouterr()


# -- verdict ----------------------------------------------------------------------------------------------------------


def _reference(
    kind: str, value: float | None = None, tolerance: float | None = None, status: str = "printed"
) -> reference.Reference:
    return reference.Reference("a/b", "item", kind, value, tolerance, status, "table 1")


def _estimate(low: float, high: float, value: float | None = None) -> reference.Estimate:
    return reference.Estimate((low + high) / 2 if value is None else value, low, high, 10)


@pytest.mark.parametrize(
    ("row", "ours", "outcome"),
    [
        (_reference("value", 2.0, 0.1), 2.19, "supported"),
        (_reference("value", 2.0, 0.1), 2.2001, "contradicted"),
        (_reference("value", 2.0, 0.1), 1.81, "supported"),
        (_reference("value", -2.0, 0.1), -2.1, "supported"),
        (_reference("value", -2.0, 0.1), 2.0, "contradicted"),
        (_reference("value", 0.0, 0.1), 1e-9, "contradicted"),
        (_reference("value", 2.0, 0.1), None, "contradicted"),
        (_reference("value", 2.0, 0.1), math.inf, "contradicted"),
        (_reference("claim"), True, "supported"),
        (_reference("claim"), False, "undetermined"),
        (_reference("claim", status="derived"), True, "checked"),
        (_reference("claim", status="derived"), False, "check fails"),
        (_reference("above", 1.0), (_estimate(1.1, 3),), "supported"),
        (_reference("above", 1.0), (_estimate(0.9, 3),), "undetermined"),
        (_reference("above", 1.0), (_estimate(-3, 0.9),), "contradicted"),
        (_reference("below", -1.0), (_estimate(-3, -1.1),), "supported"),
        (_reference("below", -1.0), (_estimate(-3, -0.9),), "undetermined"),
        (_reference("below", -1.0), (_estimate(-0.9, 3),), "contradicted"),
        (_reference("above", 0.0, status="derived"), (_estimate(1, 2),), "checked"),
        (_reference("above", 0.0), (_estimate(1, 2), _estimate(1, 2)), "supported"),
        (_reference("above", 0.0), (_estimate(1, 2), _estimate(-1, 2)), "undetermined"),
        (_reference("above", 0.0), (_estimate(1, 2), _estimate(-9, -3)), "contradicted"),
        # One look would contradict, one of ten does not.
        (_reference("above", 0.0), (_estimate(-2, -0.2),), "contradicted"),
        (_reference("above", 0.0), (*[_estimate(1, 2)] * 9, _estimate(-2, -0.2)), "undetermined"),
        (_reference("above", 0.0), (_estimate(math.nan, math.nan),), "undetermined"),
        (_reference("above", 0.0), (), "undetermined"),
        (_reference("context", 4.0), 400.0, None),
    ],
)
def test_rules(row: reference.Reference, ours: reference.Finding, outcome: str | None) -> None:
    assert row.outcome(ours) == outcome


@pytest.mark.parametrize(
    ("row", "ours"),
    [
        (_reference("claim"), 1.0),
        (_reference("value", 1.0, 0.1), True),
        (_reference("above", 1.0), 2.0),
        (_reference("value", 1.0, 0.1), (_estimate(0, 1),)),
    ],
)
def test_each_kind_has_its_form(row: reference.Reference, ours: reference.Finding) -> None:
    with pytest.raises(TypeError, match="expected"):
        row.outcome(ours)


@pytest.mark.parametrize(("n", "df"), [(1, None), (3, 2), (5, 4)])
def test_the_smallest_effect_is_found_four_times_in_five(n: int, df: int | None) -> None:
    generator, error, repeats = np.random.default_rng(0), 0.7, 20_000
    quantile = 1.959964 if df is None else stats.t.ppf(0.975, df)
    half = quantile * error / np.sqrt(n)
    effect = reference.Estimate(0, -half, half, n, df=df).smallest_effect
    drawn = generator.normal(effect, error, (repeats, n))
    spread = error if df is None else drawn.std(axis=1, ddof=1)
    found = drawn.mean(axis=1) > quantile * spread / np.sqrt(n)
    assert found.mean() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("df", [None, 2, 10])
def test_widened_intervals_hold_together(df: int | None) -> None:
    law = stats.norm if df is None else stats.t(df)
    estimate = reference.Estimate(1, 1 - law.ppf(0.975), 1 + law.ppf(0.975), 3, df=df)
    assert estimate.widened(1) == pytest.approx((estimate.low, estimate.high))
    low, high = estimate.widened(5)
    assert 5 * (law.cdf(low - 1) + law.sf(high - 1)) == pytest.approx(0.05)


def test_a_ratio_is_judged_by_its_logarithm() -> None:
    ratio = reference.Estimate(2, 1, 4, 3, df=2, ratio=True)
    log = reference.Estimate(math.log(2), 0, math.log(4), 3, df=2)
    assert ratio.smallest_effect == pytest.approx(math.exp(log.smallest_effect))
    assert ratio.widened(5) == pytest.approx(np.exp(log.widened(5)))
    assert "80% power for a factor of" in _line(_reference("above", 1.0), ratio)
    (stored,) = reference.plain((ratio,))
    assert reference.finding("item", [stored]) == (ratio,) and "ratio" not in reference.plain((log,))[0]
    assert reference.Estimate(1, 0, math.inf, 1, ratio=True).smallest_effect == math.inf


def test_an_estimate_of_before_is_read_without_degrees_of_freedom() -> None:
    old = {"value": 1.0, "low": 0.5, "high": 1.5, "n": 3, "of": "a"}
    assert reference.finding("item", [old]) == (reference.Estimate(1.0, 0.5, 1.5, 3, "a"),)


def _line(row: reference.Reference, *ours: reference.Estimate) -> str:
    return reference.Comparison("item", ours, row, row.outcome(ours)).line


def test_estimates_in_words() -> None:
    low, high = reference.Estimate(1, 0.5, 1.5, 9, "a"), reference.Estimate(2, -7, 11, 9, "b")
    between = f"ours 2 estimates, from {low} to {high}, reference -"
    assert _line(_reference("context"), high, low) == f"item: {between}"
    assert f"ours 2 of 2, the weakest {high}, reference above -8" in _line(_reference("above", -8), high, low)
    assert f"ours 1 of 2, the weakest {high}, reference above 0" in _line(_reference("above", 0), low, high)
    # The wide interval lies beyond the margin, so the power is that of the narrow one.
    wide, narrow = reference.Estimate(50, 10, 90, 9), reference.Estimate(1, -1, 3, 9)
    assert _line(_reference("above", 0), wide, narrow).endswith("(80% power for 2.9 beyond the margin)")


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["supported", "supported", None], "reproduced"),
        (["supported", "checked"], "reproduced"),
        (["supported", "undetermined"], "undetermined"),
        (["supported", "undetermined", "contradicted"], "contradicted"),
        (["checked", None], "checked"),
        (["supported", "check fails"], "check fails"),
        ([None], "no reference"),
        ([], "no reference"),
    ],
)
def test_verdict(outcomes: list[str | None], expected: str) -> None:
    assert reference.verdict(reference.Comparison("item", 1.0, None, o) for o in outcomes) == expected


def test_verdict_of_a_run(workspace: Workspace, table: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.notebook(STEM)
    begun = results.start(STEM, dict(profile="cpu", seeds=[3], scale=2.0, limit=None))
    workspace.reference(
        f"{STEM},auc,value,0.9,0.05,printed,table 1",
        f"{STEM},wins,claim,,,stated,abstract",
        f"{STEM},gain,above,0,,stated,abstract",
        f"{STEM},n,context,100,,printed,section 4",
        f"{STEM},never,claim,,,stated,abstract",
        "sensitivity/other,auc,value,0.1,0.05,printed,table 1",
    )
    gain = [reference.Estimate(2, 1, 3, 5, "a"), reference.Estimate(1, -1, 3, 5, "b")]
    findings = {"auc": 0.91, "wins": np.True_, "gain": gain, "n": 5, "extra": float("nan")}
    capsys.readouterr()
    begun.save(table=table, findings=findings)
    assert capsys.readouterr().out.splitlines() == [
        "auc: ours 0.91, reference 0.9 within 5%: supported",
        "wins: ours true, reference true: supported",
        "gain: ours 1 of 2, the weakest b 1 [-1, 3], n = 5, reference above 0: undetermined (80% power for 2.9 beyond "
        "the margin)",
        "n: ours 5, reference 100",
        "extra: ours not finite, no reference",
        "never: not measured here",
        "verdict: undetermined",
    ]
    row = workspace.manifest("cpu")[STEM]
    assert row["verdict"] == "undetermined"
    assert {k: v for k, v in row["findings"].items() if k != "gain"} == {
        "auc": 0.91,
        "wins": True,
        "n": 5,
        "extra": None,
    }
    assert [reference.Estimate(**e) for e in row["findings"]["gain"]] == gain
    outcomes = {r["item"]: r["outcome"] for r in row["reference"]}
    assert outcomes == {"auc": "supported", "wins": "supported", "gain": "undetermined", "n": None}
    text = (workspace.results / f"cpu/tables/{STEM}.md").read_text()
    assert "| 0.9 within 5%" in text and "table 1" in text and text.endswith("Verdict: undetermined\n")


def test_the_smoke_profile_is_not_judged(begun: Run, workspace: Workspace, table: pd.DataFrame) -> None:
    workspace.reference(f"{STEM},wins,claim,,,stated,abstract")
    begun.save(table=table, findings={"wins": True})
    assert workspace.manifest()[STEM]["verdict"] == "not judged"


# -- published tables -------------------------------------------------------------------------------------------------

REDRAWN = "profile: str = 'cpu'\nrecompute: bool = False\nseeds: list[int] | None = None\nscale: float | None = None"


def _namespace(**values: object) -> dict[str, object]:
    return {"profile": "cpu", "recompute": False, "seeds": None, "scale": None} | values


def _scaled(run: Run) -> dict[str, pd.DataFrame]:
    run.add_input("digits", "abc")
    return {"values": pd.DataFrame({"x": np.arange(3) * run.parameters["scale"] / 3})}


@pytest.fixture
def redrawn(workspace: Workspace) -> Workspace:
    workspace.notebook(STEM, parameters=REDRAWN)
    workspace.profile("cpu", {STEM: {"seeds": [1], "scale": 2.0}})
    return workspace


def test_figures_redraw_from_published_tables(redrawn: Workspace, table: pd.DataFrame) -> None:
    first = results.start(STEM, _namespace(recompute=True))
    assert first.parameters["scale"] == 2.0 and first.parameters["seeds"] == [1]  # None is the profile's
    computed = first.tables(_scaled)
    first.save(table=table, findings={})
    before = redrawn.contents("cpu")
    again = results.start(STEM, _namespace())
    read = again.tables(lambda run: pytest.fail("computed again"))
    pd.testing.assert_frame_equal(read["values"], computed["values"], check_exact=True)
    again.save(table=table, findings={})
    assert redrawn.contents("cpu") == before
    row = redrawn.manifest("cpu")[STEM]
    assert row["computed"]["inputs"] == row["inputs"] == {"digits": "abc"} and len(row["computed"]["code"]) == 64
    assert "recompute" not in row["parameters"]


def test_what_is_not_published_is_not_drawn(redrawn: Workspace, table: pd.DataFrame) -> None:
    with pytest.raises(NotebookError, match="nothing is published of the profile 'cpu': set recompute = True"):
        results.start(STEM, _namespace()).tables(_scaled)
    first = results.start(STEM, _namespace(recompute=True))
    first.tables(_scaled)
    first.save(table=table, findings={})
    with pytest.raises(NotebookError, match=r"published with scale = 2.0: set recompute = True"):
        results.start(STEM, _namespace(scale=3.0)).tables(_scaled)
    indexed = pd.DataFrame({"x": [1.0]}, index=["a"])
    with pytest.raises(ValueError, match="index"):
        results.start(STEM, _namespace(recompute=True)).tables(lambda run: {"t": indexed})


def test_the_first_cell_says_what_was_found(
    redrawn: Workspace, table: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    redrawn.reference(f"{STEM},gain,above,0,,stated,abstract")
    first = results.start(STEM, _namespace(recompute=True))
    first.tables(_scaled)
    first.save(table=table, findings={"gain": reference.Estimate(2, 1, 3, 5)})
    capsys.readouterr()
    results.start(STEM, _namespace())
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("with ")  # the values that the notebook leaves to the profile
    assert printed[2:] == ["gain: ours 2 [1, 3], n = 5, reference above 0: supported", "verdict: reproduced"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a/b,x,about,1,0.1,s,s", "none of above"),
        ("a/b,x,value,1,,s,s", "needs a value and a tolerance"),
        ("a/b,x,above,,,s,s", "needs a value, the margin"),
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


def test_a_table_that_is_found_counts_the_seconds_that_it_took(
    workspace: Workspace, table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(cache, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def inner() -> pd.DataFrame:
        now[0] += 5
        return table

    def outer() -> pd.DataFrame:
        now[0] += 2
        return cache.table("t/inner", {}, inner).assign(more=1)

    for key in ({"seed": 1}, {"seed": 1}, {"seed": 2}, {"seed": 2}):
        began = cache.clock()
        frame = cache.table("t/outer", key, outer)
        assert cache.clock() - began == 7
        assert frame.attrs == {}
    assert now == [5 + 2 + 2]


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


def test_threads_parse_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a SystemError in one of two notebooks side by side has shown."""
    parse, at_once, most = ast.parse, 0, 0

    def slowly(source: str) -> ast.Module:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.01)
        at_once -= 1
        return parse(source)

    monkeypatch.setattr(ast, "parse", slowly)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(cache.code_digest, ["x = 1"] * 8))) == 1
    assert most == 1


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
