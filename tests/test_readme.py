"""The README: its commands and paths exist, its table of artifacts is the one the companion prints."""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import influence
from benchmarks import architectures, kernels, stability, weights
from benchmarks import run as benchmarks
from influence.companion.ledger import manifest, notebook, reference
from influence.companion.runner import cli, listing
from influence.companion.zoo import published

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
OTHERS = RESULTS / "architectures" / "cpu.json"


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def usage() -> str:
    command = ["/bin/bash", str(ROOT / "run_all.sh"), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _commands(text: str) -> list[str]:
    return [match.strip() for match in re.findall(r"\./run_all\.sh([^\n`#|;&]*)", text)]


def test_commands_are_accepted(readme: str, usage: str) -> None:
    commands = _commands(readme)
    assert "" in commands and "test" in commands  # the two that everybody needs
    for command in commands:
        words = command.split()
        for option in (w.partition("=")[0] for w in words if w.startswith("--")):
            assert re.search(rf"{re.escape(option)}\b", usage), f"./run_all.sh {command}: no {option}"
        if words and not words[0].startswith("-") and words[0][0].isalpha():
            assert f"./run_all.sh {words[0]}" in usage, f"./run_all.sh {command}: no such command"


def test_it_is_read_in_three_minutes(readme: str) -> None:
    assert len(readme.splitlines()) <= 120


def test_paths_exist(readme: str) -> None:
    linked = [target for target in re.findall(r"\]\(([^)#\s]+)", readme) if "://" not in target]
    assert linked
    missing = [target for target in linked if not (ROOT / target).exists()]
    assert missing == []


def test_table_of_artifacts(readme: str) -> None:
    found = re.search(r"<!-- artifacts -->\n(.*?)\n<!-- /artifacts -->", readme, re.S)
    assert found, "no table between <!-- artifacts --> and <!-- /artifacts -->"
    assert found[1].strip() == listing.artifacts_markdown(), (
        "renew it with: python -m influence.companion list --markdown"
    )


# Every number of "What we found" that was measured: the words around it, where it is published, and its unit there.
_ACCURACY, _JPEG = "sensitivity/table_accuracy", "stability/fig_jpeg_quality"
_OTHERS, _GENERALISES = "stability/fig_generalisation", "gaussian_training_generalises"
MEASURED = {
    r"networks with (\S+)% \(no augmentation;": ((_ACCURACY, "cifar10_paper-densenet121-cifar10_test"), 100),
    r"to (\S+)% of CIFAR-10 right": ((_ACCURACY, "cifar10_resnet56_test"), 100),
    r"and (\S+)% of MNIST": ((_ACCURACY, "mnist_paper-resnet50-mnist_test"), 100),
    r"\(AUROC (\S+) out of sample;": (("sensitivity/fig_label_noise", "aggre_label_noisy-resnet20_auroc_loss"), 1),
    r"; (\S+) of the harder kind\)": (("sensitivity/fig_label_noise", "worse_label_noisy-resnet20_auroc_loss"), 1),
    r"\((\S+) points at quality 10\)": ((_JPEG, "jpeg-10", "stability 0.01"), 100),
    r"at α = .1 it is (\S+) and": ((_JPEG, "jpeg-10", "stability 0.1"), 100),
    r"At α = 1 it is (\S+) and": ((_JPEG, "jpeg-10", "stability 1"), 100),
    r"for (\S+) on clean images": ((_JPEG, "original", "stability 1"), -100),
    r"other distortions \((\S+) points in the mean\)": ((_OTHERS, _GENERALISES), 100),
    r"at α = .1 it is \S+ and (\S+) points": ((_OTHERS, f"{_GENERALISES}_at_0.1"), 100),
    r"At α = 1 it is \S+ and (\S+) points": ((_OTHERS, f"{_GENERALISES}_strong"), 100),
    r"cross-entropy on noisy images too gives (\S+) of the": ((_OTHERS, f"{_GENERALISES}_mixed"), 100),
    r"makes the trace (\S+) times as large in the mean": (("bridge/fig_trace", "ratio_of_mean_traces"), 1),
    r"but (\S+) in the geometric mean": (("bridge/fig_trace", "ratio_of_traces"), 1),
    r"leave-one-out effects it orders in reverse \((\S+)\)": (
        ("beyond/fig_cross_sample", "cross_sample_fi_orders_changes"),
        1,
    ),
}
_WORDS = {"one": "1"}


def _published(stem: str, name: str, arm: str | None = None) -> float:
    """A finding of the ledger, or the gain of an arm in the artifact's table."""
    if arm is None:
        found = manifest.read("cpu", root=ROOT / "results")[stem]["findings"][name]
        return float(found[0]["value"] if isinstance(found, list) else found)
    table = pd.read_csv(ROOT / "results" / "cpu" / "tables" / f"{stem}.csv").set_index(["distortion", "arm"])
    return float(table.loc[(name, arm), "gain"])


def _untrue(text: str) -> list[str]:
    """What "What we found" says otherwise than the published results."""
    section = text[text.index("What we found") : text.index("## Read")].replace("\n", " ")
    section, wrong = re.sub(r" +", " ", section), []
    for pattern, (source, factor) in MEASURED.items():
        found = re.search(pattern, section)
        assert found, f"no sentence with {pattern}"
        said, value = _WORDS.get(found[1], found[1]).replace("−", "-"), factor * _published(*source)
        if float(said) != round(value, len(said.partition(".")[2])):
            wrong.append(f"{found[0]!r}: {value:.4g} is published")
    return wrong


def test_sentences_are_true_of_the_published_results(readme: str) -> None:
    assert _untrue(readme) == []


def test_accuracies_are_the_least_and_the_largest(readme: str) -> None:
    said = re.search(r"with (\d+)% \(no augmentation; (\d+)% trained on wrong labels\) to (\d+)% of CIFAR-10", readme)
    findings = manifest.read("cpu", root=ROOT / "results")[_ACCURACY]["findings"]
    tested = [100 * value for name, value in findings.items() if name.startswith("cifar10_") and name.endswith("_test")]
    rows = published.ledger()
    wrong = [
        100 * np.mean([row["accuracy"]["test"] for name, row in rows.items() if name.startswith(kind)])
        for kind in ("noisy-aggre-", "noisy-worse-")
    ]
    assert said and [int(number) for number in said.groups()] == [
        round(min(tested)),
        round(min(wrong)),
        round(max(tested)),
    ]


def test_pixels_of_fi_beat_random_ones_in_small_steps(readme: str) -> None:
    assert "its pixels beat random ones in small steps, seldom in full ones" in " ".join(readme.split())
    table = pd.read_csv(ROOT / "results" / "cpu" / "tables" / "sensitivity" / "fig_vulnerable_areas.csv")
    released = table[(table["target"] == "entries") & (table["ranking"] == "released")]
    for change, group in released.groupby("change"):
        surely = (group["beyond_random_low"] > 0).sum(), (group["beyond_random_high"] < 0).sum(), len(group)
        if change == "farther":
            assert surely == (4, 0, 18)
        else:
            assert surely[0] > 0.8 * len(group) and surely[1] == 0 and (group["beyond_saliency"] < 0).all()


# The weight at which the claims of stability training are scored, and how their rules, notebooks and the README say so.
SCORED_AT = ("0.01", "at the first alpha", r"$\alpha = .01$", "at its α = .01")


def _gains_of_arm(item: str, table: pd.DataFrame, arm: str) -> list[float]:
    """What a claim is scored by, from the mean gains of one arm in the table of its artifact."""
    part = table[table["arm"] == arm]
    for column, value in {"at": 1, "kind": "near-duplicate"}.items():
        part = part[part[column] == value] if column in part else part
    if item == "better_for_all_distortions_and_levels":
        ours = part[~part["distortion"].str.startswith("noise-") & part["metric"].str.contains("@")]
        return list(ours["gain"])
    for metric in ("triplet_accuracy", "below"):
        part = part[part["metric"] == metric] if "metric" in part and metric in set(part["metric"]) else part
    gain = part.set_index("distortion")["gain"]
    distorted = gain[[name for name in gain.index if name != "original" and not name.startswith("noise-")]]
    return [
        {
            "clean_accuracy_does_not_fall": lambda: gain["original"],
            "ranking_not_hurt_on_clean": lambda: gain["original"],
            "gain_grows_as_quality_falls": lambda: gain["jpeg-10"] - gain["original"],
        }.get(item, distorted.mean)()
    ]


def test_the_six_claims_of_stability_training_are_supported(readme: str) -> None:
    assert "Stability training does what its paper says, in small" in readme
    assert "clean accuracy stays and JPEG costs less" in readme and "so do other distortions" in readme
    found = manifest.read("cpu", root=ROOT / "results")[_OTHERS]["findings"]
    clean = manifest.read("cpu", root=ROOT / "results")[_JPEG]["findings"]["clean_accuracy_does_not_fall_at_0.1"]
    assert "clean accuracy staying" in readme and clean[0]["low"] > -0.01
    surely = [found[f"{_GENERALISES}{suffix}"][0]["low"] > 0 for suffix in ("", "_at_0.1", "_strong")]
    assert surely == [True, True, True]
    rows, claims = manifest.read("cpu", root=ROOT / "results"), {}
    for row in reference.load():
        number = re.search(r"claim \((i|ii|iii|iv|v|vi)\)", row.source)
        if row.artifact.startswith("stability/") and row.status == "paper" and row.kind != "context" and number:
            ours = rows[row.artifact]
            judged = {judged["item"]: judged["outcome"] for judged in ours["reference"]}
            claims.setdefault(number[1], set()).add(judged[row.item])
            alpha, rule, words, in_short = SCORED_AT
            cells = notebook.discover()[row.artifact].content["cells"]
            text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
            assert rule in row.source and words in text and in_short in " ".join(readme.split()), row.item
            assert float(alpha) == ours["parameters"]["alphas"][0]
            table = pd.read_csv(ROOT / "results" / "cpu" / "tables" / f"{row.artifact}.csv")
            found = [estimate["value"] for estimate in ours["findings"][row.item]]
            assert found == pytest.approx(_gains_of_arm(row.item, table, f"stability {alpha}"), rel=1e-9, abs=1e-12)
            others = {arm for arm in table["arm"] if arm.startswith("stability")} - {f"stability {alpha}"}
            for other in others:
                assert found != pytest.approx(_gains_of_arm(row.item, table, other), rel=1e-3)
    assert claims == {number: {"supported"} for number in ("i", "ii", "iii", "iv", "v", "vi")}


@pytest.mark.parametrize(("true", "false"), [("AUROC .96", "AUROC .97"), ("α = 1 it is 13", "α = 1 it is 12")])
def test_an_untrue_sentence_is_seen(readme: str, true: str, false: str) -> None:
    assert true in readme
    assert len(_untrue(readme.replace(true, false))) == 1


# -- what the README tells its readers to type ------------------------------------------------------------------------


def _blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme, re.S)


def test_python_blocks_run(readme: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    images, labels = torch.rand(6, 3, 2, 2), torch.arange(6) % 4
    names = {"torch": torch, "model": model, "x": images, "labels": labels, "loader": [(images, labels)] * 3}
    blocks = _blocks(readme, "python")
    assert blocks and "weight_influence" in blocks[0]
    for block in blocks:
        exec(block, names)
    assert len(names["table"]) == 6 and names["loss"].isfinite()


def test_commands_of_the_shell_run(readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`influence` runs as it is written (scores elsewhere); `./run_all.sh` has tests of its own."""
    lines = [line.partition("#")[0].strip() for block in _blocks(readme, "sh") for line in block.splitlines()]
    monkeypatch.setattr("influence.companion.zoo.training.fit", lambda *_, **__: SimpleNamespace(model=_network()))
    ran = 0
    for line in filter(None, lines):
        words = line.replace("build/scores", str(tmp_path / "scores")).split()
        if words[0] == "influence":
            try:
                assert cli.main(words[1:]) == 0
            except SystemExit as ended:
                assert ended.code == 0 and "--help" in words
            ran += 1
        else:
            assert words[0] == "./run_all.sh", line
    assert ran >= 2 and len(influence.read_scores(tmp_path / "scores")) == 64


def _network() -> nn.Module:
    # Training a ResNet50 is not what is tested here.
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()


def test_other_commands_in_the_text_are_understood(readme: str) -> None:
    for command in re.findall(r"`(?:influence|python -m influence\.companion) ([a-z][^`]*)`", readme):
        words = " ".join(command.split()).split()
        assert words[0] in ("run", "list", "check", "score", "report", "zoo")
        usage = cli._parser().parse_args
        if words[0] != "score":
            usage(words)
            if words[0] in ("list", "check"):
                assert cli.main(words) == 0
        else:
            usage(["score", "--model", "m", "--data", "d", *words[1:]])


def test_benchmarks_in_the_text_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case that a command asks for is one that can be made; none is timed here."""
    asked: list[benchmarks.Case] = []
    build = functools.cache(benchmarks.build)  # a network is asked for by many commands

    def measured(case: benchmarks.Case, options: argparse.Namespace) -> None:
        build(case.network, case.classes, case.width, case.size)
        assert case.method in benchmarks.methods.METHODS
        asked.append(case)

    monkeypatch.setattr(benchmarks, "alone", measured)
    commands = re.findall(r"`python -m benchmarks\.(run|stability)([^`]*)`", BENCHMARKS)
    assert len(commands) >= 4
    for module, options in commands:
        asked.clear()
        if module == "run":
            benchmarks.main(options.split())
            assert asked or "--table" in options
        else:
            stability.main([*options.split(), "--classes", "10", "--repeats", "1", "--out", str(tmp_path)])


def test_what_pip_is_told_to_install_exists(readme: str) -> None:
    (extra,) = re.findall(r'`pip install -e "\.\[(\w+)\]"`', readme)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extra in project["optional-dependencies"]
    assert project["scripts"]["influence"] == "influence.companion.runner.cli:main"


def test_table_of_claims() -> None:
    page = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    body = page.partition("<!-- claims -->")[2].partition("<!-- /claims -->")[0]
    assert body.strip() == listing.claims_markdown(), "renew it: python -m influence.companion list --claims"


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("engine", lambda: benchmarks.table(RESULTS)),
        ("loss", lambda: stability.table(RESULTS / "stability" / "cpu-loss-n128.json")),
        ("kernels", lambda: kernels.table(RESULTS / "kernels.json")),
        ("weights", lambda: weights.table(RESULTS / "weights" / "cpu.json")),
        ("architectures", lambda: architectures.table(json.loads(OTHERS.read_text())["networks"]).strip()),
    ],
)
def test_tables_of_benchmarks(name: str, table: Callable[[], str]) -> None:
    body = BENCHMARKS.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    assert body.strip() == table(), "renew it: --table of the module in benchmarks/"


def test_the_readme_has_the_times_of_the_engine_table(readme: str) -> None:
    """K = 10, batch 4, all layers; a loop over autograd is no package."""
    said = re.search(
        r"takes (\S+) \(ResNet50\) and (\S+) times \(DenseNet121\).*?packages (\S+) to (\S+) and (\S+) to (\S+) times",
        readme,
        re.S,
    )
    expected = []
    for network in ("resnet50", "densenet121"):
        rows = [r for r in benchmarks.results(RESULTS) if (r["network"], r["classes"], r["batch"]) == (network, 10, 4)]
        ratios = {r["method"]: r["ratio"] for r in rows if "ratio" in r}
        others = [ratio for name, ratio in ratios.items() if not name.startswith(("influence", "autograd"))]
        expected.append((ratios["influence"], min(others), max(others)))
    assert said
    ours, theirs = said.groups()[:2], (said.groups()[2:4], said.groups()[4:])
    for number, ends, (ratio, least, most) in zip(ours, theirs, expected, strict=True):
        for words, value in ((number, ratio), (ends[0], least), (ends[1], most)):
            assert float(words) == round(value, len(words.partition(".")[2])), words


def test_links_of_benchmarks() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", BENCHMARKS)
    assert links and all((ROOT / "benchmarks" / link).exists() for link in links)
