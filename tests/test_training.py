from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from influence.companion import data
from influence.companion.zoo import finetuning, recipes, training

TINY = training.Recipe("resnet50", 0.05, 20, ((1, 3e-3), (2, 1e-3)), batch_size=64, dropout=0.1, seed=4)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path))
    return tmp_path


def weights(trained: training.Trained) -> dict[str, torch.Tensor]:
    return trained.model.state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


def test_phases_are_the_papers() -> None:
    assert recipes.phases(500) == ((200, 1e-3), (100, 5e-4), (100, 2.5e-4), (100, 1e-4))
    assert recipes.phases(200, parts=(1, 1, 1, 1)) == ((50, 1e-3), (50, 5e-4), (50, 2.5e-4), (50, 1e-4))
    for epochs in range(4, 30):
        lengths = [length for length, _ in recipes.phases(epochs)]
        assert sum(lengths) == epochs and min(lengths) >= 1
    with pytest.raises(ValueError, match="at least as many epochs, got 3"):
        recipes.phases(3)


def test_trained_once_then_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.load("digits")
    first = training.fit(TINY, digits)
    assert not first.model.training and [row["epoch"] for row in first.history] == [1, 2, 3]
    assert [row["lr"] for row in first.history] == [3e-3, 1e-3, 1e-3]
    monkeypatch.setattr(training, "train_epoch", None)  # a second training would fail
    again = training.fit(TINY, digits)
    assert again.key == first.key and again.history == first.history and same(weights(again), weights(first))
    assert not list(cache.rglob("*.resume.pt"))


def test_the_key_follows_recipe_and_data(cache: Path) -> None:
    digits = data.load("digits")
    short = dataclasses.replace(TINY, phases=((1, 1e-3),))
    keys = {training.fit(short, digits).key, training.fit(dataclasses.replace(short, seed=5), digits).key}
    fewer = dataclasses.replace(digits, valid=digits.valid.sample(100))
    keys.add(training.fit(short, fewer).key)
    assert len(keys) == 3


def test_training_learns_and_keeps_the_best_validation_accuracy(cache: Path) -> None:
    digits = data.load("digits")
    recipe = dataclasses.replace(
        TINY, model="densenet121", width=0.0625, train_per_class=None, dropout=0.0, phases=((4, 5e-3), (2, 1e-3))
    )
    trained = training.fit(recipe, digits)
    accuracy = float(
        (training.predict(trained.model, digits.valid.images).argmax(1) == digits.valid.labels).double().mean()
    )
    assert accuracy == max(row["valid_accuracy"] for row in trained.history[4:])
    assert accuracy > 0.5


KILLED = """
import os, signal
from influence.companion import data
from influence.companion.zoo import training
from influence.companion.zoo.training import Recipe
epoch, count = training.train_epoch, 0

def dying(*arguments):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return epoch(*arguments)

training.train_epoch = dying
training.fit({recipe!r}, data.load("digits"))
"""


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = data.load("digits")
    monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path / "whole"))
    whole = training.fit(TINY, digits)
    monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path / "killed"))
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    script = KILLED.format(recipe=TINY)
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | threads, check=False)
    assert done.returncode == -signal.SIGKILL
    (state,) = (tmp_path / "killed").rglob("*.resume.pt")
    assert torch.load(state, weights_only=True)["epoch"] == 2
    epochs = []
    epoch = training.train_epoch
    monkeypatch.setattr(training, "train_epoch", lambda *a: epochs.append(a[-1]) or epoch(*a))
    resumed = training.fit(TINY, digits)
    assert epochs == [2], "finished epochs are not done again"
    assert same(weights(resumed), weights(whole)) and resumed.history == whole.history


def test_arms_share_base_images_and_noise(cache: Path) -> None:
    digits = data.load("digits")
    base = weights(training.fit(TINY, digits))
    one_step = {"steps": 1, "learning_rate": 1e-3}
    control = finetuning.finetune(TINY, finetuning.Arm("control", **one_step), digits)
    weightless = finetuning.finetune(TINY, finetuning.Arm("stability", alpha=0.0, **one_step), digits)
    stable = finetuning.finetune(TINY, finetuning.Arm("stability", alpha=10.0, **one_step), digits)
    augmented = finetuning.finetune(TINY, finetuning.Arm("augmentation", **one_step), digits)
    assert not same(weights(control), base)
    for key, value in weights(weightless).items():  # the same gradient, through another graph
        torch.testing.assert_close(value, weights(control)[key], rtol=0, atol=2e-4)
    assert control.history[0]["loss"] == pytest.approx(weightless.history[0]["loss"], rel=1e-6, abs=0)
    assert stable.history[0]["loss"] > control.history[0]["loss"] != augmented.history[0]["loss"]
    statistics = [key for key in base if "running" in key]
    assert statistics and all(torch.equal(base[key], weights(stable)[key]) for key in statistics)


def test_recipes_name_what_there_is() -> None:
    assert recipes.recipe("paper", "cifar10", "resnet50", seed=2).width == 1.0
    assert recipes.recipe("paper", "mnist", "densenet121").dropout == 0.2
    with pytest.raises(ValueError, match=r"no recipe for 'resnet50' on 'svhn' in profile 'cpu'"):
        recipes.recipe("cpu", "svhn", "resnet50")
