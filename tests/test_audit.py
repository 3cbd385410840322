"""`influence check`: code that has changed is named, and a published value that is not what the code computes fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from influence.companion.artifacts.audits import AUDITS, NOT_AUDITED
from influence.companion.artifacts.sensitivity import fig_label_noise
from influence.companion.ledger import cache, manifest
from influence.companion.ledger.audit import Audit
from influence.companion.ledger.notebook import discover
from influence.companion.runner import cli

ROOT = Path(__file__).resolve().parents[1]
STEM = "sensitivity/fig_label_noise"
TABLE = f"data/{STEM}.scores.parquet"
PUBLISHED = pd.DataFrame(
    {"image": [3, 5, 8], "label": [1, 0, 1], "fi": [1e-7, 0.2, 0.0], "place": [0, 1, 2], "kind": ["a", "b", "a"]}
)
AUDIT = Audit(("image",), lambda run, examples: examples, others=("place",), jumps=("fi",))


def test_rounding_agrees() -> None:
    anew = PUBLISHED.assign(fi=PUBLISHED["fi"] * (1 + 5e-5), place=0)[::-1]
    assert AUDIT.compare(PUBLISHED, anew) == (9, 0, [])


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("fi", [1.001e-7, 0.2, 0.0], "image 3: fi is 1e-07 as published, 1.001e-07 anew"),
        ("fi", [1e-7, np.nan, 0.0], "image 5: fi is 0.2 as published, nan anew"),
        ("label", [1, 0, 0], "image 8: label is 1 as published, 0 anew"),
        ("kind", ["a", "b", "c"], "image 8: kind is a as published, c anew"),
        ("image", [3, 5, 9], "image 8: label is 1 as published, nan anew"),
    ],
)
def test_what_disagrees_is_named(column: str, value: list[object], shown: str) -> None:
    assert AUDIT.compare(PUBLISHED, PUBLISHED.assign(**{column: value}))[2][0] == shown


def test_a_column_that_is_no_longer_computed_disagrees() -> None:
    assert len(AUDIT.compare(PUBLISHED, PUBLISHED.drop(columns="label"))[2]) == 3


def test_what_rounding_decides_is_left_out_and_counted() -> None:
    anew = PUBLISHED.assign(fi=[0.0, 9.0, 9.0], near_cut=[True, False, True])
    compared, left_out, wrong = AUDIT.compare(PUBLISHED, anew)
    assert (compared, left_out) == (7, 2) and [line.partition(":")[0] for line in wrong] == ["image 5"]


def test_examples_are_drawn_by_seed() -> None:
    table = pd.DataFrame({"image": range(50)})
    first, again, other = (AUDIT.choose(table, 9, seed=seed)["image"].tolist() for seed in (0, 0, 1))
    assert len(first) == 9 and first == again != other and len(AUDIT.choose(table, 99, seed=0)) == 50


def test_rows_that_cannot_be_computed_anew_are_no_examples() -> None:
    table = pd.DataFrame({"image": range(50), "arm": ["all 1", "last 1"] * 25})
    chosen = Audit(("image", "arm"), AUDIT.again, where="arm.str.startswith('all ')").choose(table, 99, seed=0)
    assert sorted(chosen["image"]) == list(range(0, 50, 2))


def test_notebooks_with_an_audit_exist() -> None:
    stems = set(discover())
    folders = {stem.partition("/")[0] for stem in stems}
    assert set(AUDITS) <= stems and set(NOT_AUDITED) <= stems | folders and not set(AUDITS) & set(NOT_AUDITED)


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published results of one artifact alone, in a folder that may be changed."""
    row = manifest.read("cpu", root=ROOT / "results")[STEM]
    for name in row["files"]:
        (tmp_path / "cpu" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "results" / "cpu" / name, tmp_path / "cpu" / name)
    monkeypatch.setenv("INFLUENCE_RESULTS", str(tmp_path))
    _record(tmp_path, row)
    return tmp_path


def _record(results: Path, row: dict[str, object]) -> None:
    """The ledger of this row, its files as they are now."""
    digests = {name: cache.sha256(results / "cpu" / name) for name in row["files"]}  # type: ignore[attr-defined]
    (results / "cpu" / "manifest.json").write_text(json.dumps({STEM: {**row, "files": digests}}))


def test_code_that_has_changed_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row, named = manifest.read("cpu")[STEM], "cpu: 1 of 1 artifacts were computed by other code than today's"
    today = cache.computing_hash(fig_label_noise.__name__, "compute")
    for code, expected in ((today, False), ("0" * 64, True)):
        _record(copy, row | {"computed": {"code": code, "inputs": {}}})
        assert cli.main(["check"]) == 0  # it is no fault
        said = capsys.readouterr().out
        assert (named in said and f": {STEM}\n" in said) == expected
        assert ("cpu: every table was computed by today's code" in said) != expected


def test_without_data_it_says_so(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INFLUENCE_DATA", str(copy / "nothing"))
    assert cli.main(["check", "--recompute", "1", "--only", STEM, "stability/fig_examples"]) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].startswith(f"{STEM}: scores not audited: CIFAR-10N: {copy}/nothing/cifar10n.npz is missing")
    assert lines[1] == f"stability/fig_examples: not audited: {NOT_AUDITED['stability']}"
    assert cli.main(["check", "--recompute", "1", "--only", "fig_label_noise"]) == 2


def test_one_changed_value_is_found(copy: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", "--recompute", "2", "--seed", "5", "--only", STEM]
    assert cli.main(command) == 0
    assert "34 of 34 values of 2 examples agree" in capsys.readouterr().out
    published = pd.read_parquet(copy / "cpu" / TABLE)
    chosen = AUDITS[STEM]["scores"].choose(published, 2, seed=5).iloc[0]
    row = published.index[(published["kind"] == chosen["kind"]) & (published["image"] == chosen["image"])][0]
    published.loc[row, "trace"] *= 1.01
    published.to_parquet(copy / "cpu" / TABLE)
    _record(copy, manifest.read("cpu")[STEM])
    assert cli.main(command) == 1
    shown = f"{STEM}: scores: kind {chosen['kind']}, image {chosen['image']}: trace is {published.at[row, 'trace']} as"
    assert shown in capsys.readouterr().out
