"""The command `influence`: it teaches, it scores a model and data of one's own, and it refuses in one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import influence
from influence.companion.own_model import material
from influence.companion.runner import cli

MODULE = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3)).eval()

def rgb():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.Linear(2, 3), nn.Linear(3, 5)).eval()

def many():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 40)).eval()

def with_dropout():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3), AlwaysOn())

class AlwaysOn(nn.Dropout):
    def train(self, mode=True):
        return super().train(True)

def rows():
    return torch.randn(12, 6), torch.arange(12) % 3

def frame():
    import later  # a module beside this one
    return later.frame(torch.randn(12, 6))

def words():
    return torch.randn(12, 6), ["a", "b", "c"] * 4

def unlabelled():
    return torch.randn(12, 6), None

def small():
    return torch.randn(12, 6).numpy(), (torch.arange(12) % 3).numpy().astype("uint16")

def nan():
    x = torch.randn(12, 6)
    x[7, 2] = float("nan")
    return x, torch.arange(12) % 3

def six():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 3)).eval()

class Raises(nn.Linear):
    most = 0

    def forward(self, x):
        if len(x) > self.most:
            raise KeyError("pixel_values")
        return super().forward(x)

def raises():
    return Raises(6, 3)

def raises_later():
    model = Raises(6, 3)
    model.most = 2
    return model

def no_model():
    return 3

def fails():
    raise OSError("no such weights")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module and data of the reader's own, as the current one."""
    (tmp_path / "own_model.py").write_text(MODULE, encoding="utf-8")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(20) % 3)
    other = generator.integers(0, 256, (9, 8, 8), dtype=np.uint8)
    parts = {"test_images": other, "test_labels": np.arange(9) % 3}
    np.savez(tmp_path / "parts.npz", images=images, labels=np.arange(20) % 3, **parts)
    np.savez(tmp_path / "far.npz", images=images, labels=np.arange(20) % 3 + 5)
    np.savez(tmp_path / "bare.npz", images=images)
    np.savez(tmp_path / "named.npz", images=images, labels=np.arange(20) % 3, classes=["a", "b"])
    np.savez(tmp_path / "more.npz", images=images, labels=np.arange(20) % 3, classes=["a", "b", "c", "d"])
    np.savez(tmp_path / "half.npz", images=images, labels=np.arange(20) % 3, test_images=images)
    np.savez(tmp_path / "tokens.npz", images=np.arange(120).reshape(20, 6), labels=np.arange(20) % 3)
    torch.save({"optimizer": nn.Linear(1, 1)}, tmp_path / "pickled.PT")
    frame = "import pandas as pd\ndef frame(x): return pd.DataFrame(x.numpy()), pd.Series(range(12)) % 3\n"
    (tmp_path / "later.py").write_text(frame, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("own_model", "later"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize("command", ["", "run", "list", "check", "score", "report"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*([command] if command else []), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    if command in ("run", "score", "report"):
        examples = re.findall(r"^  influence (\w+)", text.partition("examples:")[2], re.M)
        assert examples and set(examples) == {command}


def test_examples_of_the_help_are_understood() -> None:
    text = cli._SCORE_EXAMPLES + cli._RUN_EXAMPLES + cli._REPORT_EXAMPLES
    lines = re.findall(r"^  influence (.+?)(?:   .*)?$", text, re.M)
    assert len(lines) >= 6
    for line in lines:
        assert cli._parser().parse_args(line.split()).command == line.split()[0]


@pytest.mark.parametrize("wrt", ["input", "parameters", "layers", "patches:3", "1, 3", "model.1,model.3"])
def test_score(here: Path, wrt: str) -> None:
    command = [
        "score",
        "--model",
        "own_model:network",
        "--data",
        "data.npz",
        "--wrt",
        wrt,
    ]
    assert cli.main([*command, "--out", "scores"]) == 0
    table = influence.read_scores(here / "scores")
    assert table["example"].drop_duplicates().tolist() == list(range(20))
    assert (table["label"] == table["example"] % 3).all()
    before = {file: file.stat().st_mtime_ns for file in (here / "scores").glob("*.parquet")}
    assert cli.main([*command, "--out", "scores"]) == 0  # goes on: nothing is left to do
    assert before == {file: file.stat().st_mtime_ns for file in (here / "scores").glob("*.parquet")}


@pytest.mark.parametrize(
    ("name", "option", "files"), [("narrow", "", 1), ("many", "", 3), ("many", "--closed-form", 1)]
)
def test_files_are_small_where_an_example_takes_many_passes(here: Path, name: str, option: str, files: int) -> None:
    command = ["score", "--model", f"own_model:{name}", "--data", "data.npz", "--batch-size", "4", "--out", "scores"]
    assert cli.main([*command, *option.split()]) == 0
    assert len(list((here / "scores").glob("part-*.parquet"))) == files and len(influence.read_scores("scores")) == 20


def test_rows_keep_the_numbers_of_their_examples(here: Path) -> None:
    """Of a sample, of a part of the data, and of one that is drawn because it was asked for."""
    command = ["score", "--model", "own_model:network", "--data", "data.npz"]
    assert cli.main([*command, "--out", "all"]) == 0
    everything = influence.read_scores("all").set_index("example")
    assert everything.index.tolist() == list(range(20))
    numbers = {}
    for name, options in {"few": ["--images", "7"], "train": ["--part", "train"], "test": ["--part", "test"]}.items():
        assert cli.main([*command, *options, "--out", name]) == 0
        table = influence.read_scores(name).set_index("example")
        numbers[name] = table.index.tolist()
        assert np.allclose(table["fi"], everything["fi"].loc[numbers[name]], rtol=1e-5)
    assert len(numbers["few"]) == 7 and numbers["few"] != list(range(7))
    assert sorted(numbers["train"] + numbers["test"]) == list(range(20)) and len(numbers["test"]) == 3


def test_what_is_scored_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["score", "--model", "own_model:network", "--data"]
    for data, options, words in (
        ("data.npz", "", "20 of 20 examples of shape (1, 8, 8) times 0.00392157, K = 3: input"),
        (
            "data.npz",
            "--part test --images 2",
            "2 of 20 examples, of part 'test' after a fifth of each",
        ),
        ("parts.npz", "", "20 of 20 examples of part 'train' of shape"),
        ("parts.npz", "--part test", "9 of 9 examples of part 'test' of shape"),
    ):
        assert cli.main([*command, data, *options.split(), "--out", f"out {data} {options}", "--closed-form"]) == 0
        assert words in capsys.readouterr().out


def test_classes_and_files_of_a_folder_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("bus", "car")):
        (here / "pictures" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("L", (9 + i, 9), 80 * number).save(here / "pictures" / name / f"{i}.png")
    command = ["score", "--model", "own_model:rgb", "--data", "pictures", "--size", "8", "--part", "test"]
    assert cli.main([*command, "--out", "scores"]) == 0
    assert "classes: 0 = bus, 1 = car\n" in capsys.readouterr().out
    table = influence.read_scores("scores").merge(pd.read_csv("scores/_examples.csv"), on="example")
    assert len(table) == 2 and [Path(file).parent.name for file in table["file"]] == ["bus", "car"]
    assert pd.read_parquet("scores").shape == (2, table.shape[1] - 1)


def test_other_data_or_another_scale_in_the_same_folder_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["score", "--model", "own_model:network", "--out", "scores", "--data"]
    assert cli.main([*command, "parts.npz", "--part", "test"]) == 0
    assert cli.main([*command, "data.npz"]) == 2
    assert "another run, with other data" in capsys.readouterr().err
    for option in (["--scale", "0.5"], ["--mean", "0.5", "--std", "0.2"]):
        assert cli.main([*command, "parts.npz", "--part", "test", *option]) == 2
        assert "another run, with other model" in capsys.readouterr().err


def test_closed_form_is_what_the_metric_tensor_says(here: Path) -> None:
    command = ["score", "--model", "own_model:network", "--data", "data.npz", "--part", "test"]
    assert cli.main([*command, "--out", "a"]) == 0 and cli.main([*command, "--out", "b", "--closed-form"]) == 0
    a, b = influence.read_scores("a"), influence.read_scores("b")
    assert np.allclose(a["fi"], b["fi"], rtol=1e-5) and (a["rank"] == b["rank"]).all()
    assert b["trace"].isna().all() and a["trace"].notna().all()


def test_closed_form_is_refused_where_the_rank_is_not_full(tmp_path: Path) -> None:
    # Two numbers in the middle, three features, four contrasts: the features cannot move on their own.
    narrow = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 3), nn.Linear(3, 5)).eval()
    reason = "K - 1 = 4, got rank 2 .* fewer than 4 values, and FI .* 3 features either.* for up to 4 backward passes"
    with pytest.raises(ValueError, match=reason):
        influence.score(narrow, [torch.randn(3, 6)], tmp_path, closed_form=2, labels="predicted", progress=False)
    with pytest.raises(ValueError, match="closed_form is that of Exact"):
        influence.score(narrow, [], tmp_path, closed_form=2, estimator=influence.Released(1e-3))


def test_checkpoints(here: Path) -> None:
    from safetensors.torch import save_file

    state = material.call("own_model:network").state_dict()
    torch.save({"state_dict": {f"module._orig_mod.model.{name}": value for name, value in state.items()}}, "weights.pt")
    save_file(state, "weights.SAFETENSORS")
    tables = []
    for number, model in enumerate(("own_model:network", "weights.pt", "weights.SAFETENSORS")):
        command = ["score", "--model", model, "--data", "data.npz", "--out", str(number)]
        assert cli.main([*command, *(["--architecture", "own_model:network"] if number else [])]) == 0
        tables.append(influence.read_scores(str(number)))
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])


ERRORS = {
    "--model torchvision:resnet1 --data data.npz": "did you mean resnet18",
    "--model nowhere:network --data data.npz": "cannot import nowhere",
    "--model own_model:nothing --data data.npz": "no function 'nothing'",
    "--model own_model:no_model --data data.npz": "must return a torch.nn.Module, got int",
    "--model own_model:fails --data data.npz": "OSError: no such weights",
    "--model weights.pt --data data.npz": "no such file",
    "--model data.npz --data data.npz": "name the network that they belong to",
    "--model data.npz --architecture own_model:network --data data.npz": "cannot be read as weights alone",
    "--model own_model:network --data nowhere.npz": "no such file or folder",
    "--model own_model:network --data bare.npz": "has no array 'labels'",
    "--model own_model:network --data far.npz": "labels must lie in 0..2",
    "--model own_model:network --data own_model:rows": "does not take a batch of shape",
    "--model own_model:with_dropout --data data.npz": "in training mode",
    "--model own_model:network --data data.npz --wrt nothing": "unknown module 'nothing'",
    "--model own_model:network --data data.npz --wrt patches:0": "expected patches:K",
    "--model own_model:network --data data.npz --mean .5": "one number per channel each",
    "--model own_model:network --data data.npz --device tpu": "expected cpu, cuda",
    "--model own_model:narrow --data data.npz --closed-form": "in a sample of 4, as where a layer has fewer than 4",
    "--model own_model:network --data torchvision:Nothing": "has no data set 'Nothing'",
    "--model own_model:network --data data.npz --images x": "--images",
    "--data data.npz": "--model",
    "--model own_model:network --data .": "one folder of images for each class",
    "--model own_model:network --data ": "data '': no such file or folder",
    "--model torchvision:resnet18@NOPE --data data.npz": "of resnet18: there are IMAGENET1K_V1, DEFAULT",
    "--model pickled.PT --architecture own_model:six --data own_model:rows": "weights alone (it holds torch.nn.modules",
    "--model own_model:raises --data own_model:rows": "KeyError: 'pixel_values', at {here}/own_model.py:",
    "--model own_model:raises_later --data own_model:rows": "KeyError: 'pixel_values', at {here}/own_model.py:",
    "--model own_model:six --data own_model:words": "lists of numbers, got list (can't convert",
    "--model own_model:six --data own_model:unlabelled": "lists of numbers, got NoneType (can't convert",
    "--model own_model:six --data own_model:nan": "NaN or infinity, first in example 7",
    "--model own_model:six --data tokens.npz": "whole numbers are tokens: give a table as floats",
    "--model own_model:network --data named.npz": "classes must name all of 0..2, got 2 names",
    "--model own_model:network --data more.npz": "the data have 4 classes, the model has K = 3",
    "--model own_model:network --data half.npz": "test_images and test_labels go together",
    "--model own_model:network --data data.npz --mean 0 0 --std 1 1": "1 or 1 numbers, one for each channel, got 2",
    "--model companion:resnet50 --data digits --mean 0 --std 1": "--mean would change nothing",
    "--model own_model:network --data data.npz --classes 3": "--classes would change nothing: the model has its K",
    "--model torchvision:resnet18@DEFAULT --data data.npz --classes 3": "--classes would change nothing",
    "--model own_model:network --data data.npz --architecture x": "--architecture would change nothing",
    "--model own_model:network --data digits --size 8": "--size would change nothing",
    "--model own_model:network --data data.npz --root .": "--root would change nothing",
    "--model own_model:network --data data.npz --profile cpu": "--profile would change nothing",
    "--model own_model:network --data mnist --root nowhere": "where no folder is named, it is downloaded",
    "--model own_model:network --data torchvision:MNIST --root nowhere": "not found in nowhere: --root or",
    "--model own_model:network --data data.npz --batch-size 0": "expected a whole number >= 1, got '0'",
    "--model own_model:network --data data.npz --check x": "expected a whole number >= 1, got 'x'",
}


@pytest.mark.parametrize("words", list(ERRORS))
def test_errors_are_one_line(here: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", *words.split(" ")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and ERRORS[words].format(here=here) in lines[0]


@pytest.mark.parametrize(
    "words", ["list --profile x", "check --profile x", "check --only x", "check --recompute 1 --only x"]
)
def test_unknown_names_are_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.split()) == 2
    assert re.match("error: unknown (profile|notebook) 'x'", capsys.readouterr().err)


def test_what_functions_return_is_taken(here: Path) -> None:
    for data in ("frame", "small"):
        assert cli.main(["score", "--model", "own_model:six", "--data", f"own_model:{data}", "--out", data]) == 0
        assert influence.read_scores(data)["label"].tolist() == [0, 1, 2] * 4


def test_under_torchrun(here: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m"]
    command += ["influence.companion", "score", "--model", "own_model:network", "--data", "data.npz", "--out", "two"]
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(influence.__file__).parents[1]),
        "PATH": "/usr/bin:/bin",
    }
    options = ["--batch-size", "4", "--batches-per-file", "1"]
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(influence.read_scores("two")) == 20 and len(list((here / "two").glob("*.parquet"))) == 5
