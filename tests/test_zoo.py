"""Recipes, the training loop, what a network is known by, and the published networks."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import predicted_classes
from influence.companion.images import data, outliers
from influence.companion.ledger import cache, paths
from influence.companion.runner import cli
from influence.companion.zoo import finetuning, pretrained, published, recipes, training
from influence.companion.zoo.finetuning import Arm
from influence.companion.zoo.recipes import Recipe, RecipeError
from influence.companion.zoo.training import TrainingError

TINY = Recipe("tiny-4", "resnet50", "digits", 3, ((1, 3e-3), (2, 1e-3)), width=0.05, batch_size=64, dropout=0.1, seed=4)
ROW = {"architecture": "resnet50", "data": "digits", "width": 0.05, "seeds": [0, 1], "published": True,
       "phases": [[1, 3e-3], [1, 1e-3]], "gate": {"test": 0.05}}  # fmt: skip


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> data.Dataset:
    """A quarter of the digits, with a cache of its own."""
    monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path / "cache"))
    whole = data.load("digits")
    return dataclasses.replace(whole, train=whole.train.sample(300), valid=whole.valid.sample(100))


def weights(trained: training.Trained) -> dict[str, torch.Tensor]:
    return trained.model.state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_recipes_of_the_papers() -> None:
    released = recipes.recipe("paper", "cifar10", "resnet50", seed=2)
    assert released.phases == ((200, 1e-3), (100, 5e-4), (100, 2.5e-4), (100, 1e-4)) and released.epochs == 500
    assert (released.width, released.dropout, released.batch_size, released.weight_decay) == (1.0, 0.2, 128, 2e-4)
    mnist = recipes.recipe("paper", "mnist", "densenet121")
    assert mnist.phases == tuple((50, rate) for rate in (1e-3, 5e-4, 2.5e-4, 1e-4))
    assert recipes.recipe("cpu", "cifar10", "resnet50", seed=1) == recipes.named("paper-resnet50-cifar10-1")
    names = recipes.with_seeds(["smoke-resnet50-digits", "resnet20", "paper-resnet50-mnist-2"], [0, 3])
    assert names == ["smoke-resnet50-digits-0", "smoke-resnet50-digits-3", "resnet20", "paper-resnet50-mnist-2"]
    with pytest.raises(RecipeError, match=r"no recipe for 'resnet50' on 'svhn' in profile 'cpu'; there are: paper-"):
        recipes.recipe("cpu", "svhn", "resnet50")
    with pytest.raises(RecipeError, match="unknown network 'paper-resnet50-cifar10-9'"):
        recipes.named("paper-resnet50-cifar10-9")


def test_every_recipe_builds_what_it_names() -> None:
    names = [recipe.name for recipe in recipes.everything()]
    assert len(names) == len(set(names)) == 36
    cifar = dataclasses.replace(data.load("photos", size=32), classes=tuple("0123456789"))
    for recipe in recipes.everything():
        if recipe.data != "cifar10" or recipe.seed or recipe.fold or (recipe.width == 1 and recipe.dropout):
            continue
        network = recipe.build(cifar)
        assert network(training.pixels(cifar.test.images[:2])).shape == (2, 10)
        assert recipe.best_from == (None if recipe.keep == "last" else recipe.epochs - recipe.phases[-1][0])


def test_rates() -> None:
    rates = [TINY.rate(step / 9) for step in range(9)]
    assert rates == [3e-3] * 3 + [1e-3] * 6
    cycle = dataclasses.replace(TINY, phases=(), one_cycle=0.1)
    found = [cycle.rate(share / 10) for share in range(10)]
    assert found == pytest.approx([0, 0.05, 0.1, 0.0875, 0.075, 0.0625, 0.05, 0.0375, 0.025, 0.0125])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "vgg"}, "unknown architecture 'vgg'"),
        ({"one_cycle": 0.1}, "phases or one_cycle, not both"),
        ({"epochs": 4}, "its phases have another sum"),
        ({"optimizer": "lamb"}, "expected one of adam, sgd, got 'lamb'"),
    ],
)
def test_recipes_that_make_no_sense(change: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        dataclasses.replace(TINY, **change)  # type: ignore[arg-type]


def test_an_unknown_value_in_the_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "_rows", lambda: {"tiny": {**ROW, "widht": 2}})
    with pytest.raises(RecipeError, match="tiny has unknown values widht"):
        list(recipes.everything())


def test_normalisation_is_inside_the_network() -> None:
    photos = data.load("photos", size=32)
    recipe = dataclasses.replace(TINY, normalise=True, dropout=0.0)
    network = recipe.build(photos)
    assert isinstance(network, recipes.Normalised)
    x = training.pixels(photos.train.images)
    inside = (x - network.mean) / network.std
    torch.testing.assert_close(inside.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(inside.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    assert {"mean", "std"} <= set(network.state_dict())


def test_held_out_folds_of_given_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.load("digits")
    given = torch.arange(50_000) % 10
    monkeypatch.setattr(outliers, "human_labels", lambda kind, folder: (given, given))
    folds = [recipes.data_set.__wrapped__("digits", "worse_label", (i, 4), None) for i in range(4)]
    held_out = torch.cat([fold.valid.index for fold in folds])
    assert sorted(held_out.tolist()) == sorted([*digits.train.index.tolist(), *digits.valid.index.tolist()])
    for fold in folds:
        assert not set(fold.train.index.tolist()) & set(fold.valid.index.tolist())
        assert torch.equal(fold.train.labels, given[fold.train.index])
        assert torch.equal(fold.test.labels, digits.test.labels)
    assert len({fold.digest for fold in folds}) == 4


# -- the loop ---------------------------------------------------------------------------------------------------------


def test_trained_once_then_loaded(digits: data.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first = training.fit(TINY, digits)
    assert not first.model.training and [row["epoch"] for row in first.history] == [1, 2, 3]
    assert [row["lr"] for row in first.history] == [3e-3, 1e-3, 1e-3]
    monkeypatch.setattr(training, "train", None)  # a second training would fail
    again = training.fit(TINY, digits)
    assert again.key == first.key and again.history == first.history and same(weights(again), weights(first))
    assert not list(training.folder().glob("*.resume.pt"))
    # The rounded network is the network.
    assert all(torch.equal(p, p.half().float()) for p in first.model.parameters())


def test_training_learns_and_keeps_the_best_validation_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path))
    digits = data.load("digits")
    recipe = dataclasses.replace(
        TINY, architecture="densenet121", width=0.0625, dropout=0.0, epochs=3, phases=((1, 5e-3), (2, 1e-3))
    )
    trained = training.fit(recipe, digits)
    found = training.accuracy(trained.model, digits.valid)
    assert found == pytest.approx(max(row["valid_accuracy"] for row in trained.history[1:]), abs=0.011)  # rounding
    assert found > 0.5


KILLED = """
import os, signal
from influence.companion.images import data
from influence.companion.zoo import training
from influence.companion.zoo.recipes import Recipe
from test_zoo import TINY
import dataclasses
count = 0
plain = training.cross_entropy

def dying(*arguments):
    global count
    count += 1
    if count == 13:  # in the third epoch, of five steps each
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*arguments)

training.cross_entropy = dying
whole = data.load("digits")
training.fit(TINY, dataclasses.replace(whole, train=whole.train.sample(300), valid=whole.valid.sample(100)))
"""


def test_killed_in_an_epoch_it_goes_on_and_ends_with_the_same_weights(
    digits: data.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training.fit(TINY, digits)
    monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path / "killed"))
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLED], env=os.environ | threads, check=False)
    assert done.returncode == -signal.SIGKILL
    (state,) = training.folder().glob("*.resume.pt")
    assert torch.load(state, weights_only=True)["epoch"] == 2
    steps = []
    plain = training.cross_entropy
    monkeypatch.setattr(training, "cross_entropy", lambda *a: steps.append(1) or plain(*a))
    resumed = training.fit(TINY, digits)
    assert len(steps) == 5, "finished epochs are not done again"
    assert same(weights(resumed), weights(whole)) and resumed.history == whole.history


def test_a_damaged_resume_file_is_named(digits: data.Dataset) -> None:
    name = f"{TINY.name}-{training.identity(TINY, digits)[:16]}"
    training.folder().mkdir(parents=True)
    (training.folder() / f"{name}.resume.pt").write_bytes(b"half")
    with pytest.raises(TrainingError, match=r"resume\.pt: no state of this training .* delete it to begin again"):
        training.fit(TINY, digits)


def test_a_loss_that_is_not_finite_stops(digits: data.Dataset) -> None:
    model, batches = nn.Linear(2, 2), [torch.zeros(1, 2)]
    with pytest.raises(TrainingError, match="a title: the loss of epoch 1 is not finite"):
        training.train(
            model, batches, lambda m, x: m(x).sum() * torch.inf, torch.optim.SGD(model.parameters(), lr=1.0),
            steps=1, rate=lambda _: 1.0, seed=(0,), title="a title",
        )  # fmt: skip


def test_the_global_random_state_is_left(digits: data.Dataset) -> None:
    before = torch.get_rng_state()
    training.fit(dataclasses.replace(TINY, epochs=1, phases=((1, 1e-3),)), digits)
    assert torch.equal(before, torch.get_rng_state())


def test_parts_of_a_loss_add_up() -> None:
    torch.manual_seed(0)
    x, models = torch.randn(6, 3), []

    def in_parts(model: nn.Module, batch: torch.Tensor):  # type: ignore[no-untyped-def]
        return (model(part).square().sum() for part in batch.split(2))

    for loss in (lambda model, batch: model(batch).square().sum(), in_parts):
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        history, _ = training.train(
            model, [x], loss, torch.optim.SGD(model.parameters(), lr=0.1),
            steps=1, rate=lambda _: 0.01, seed=(0,), title="",
        )  # fmt: skip
        models.append((model.weight, history[0]["loss"]))
    torch.testing.assert_close(models[0][0], models[1][0])
    assert models[0][1] == pytest.approx(models[1][1], rel=1e-6)


def test_crops_and_flips() -> None:
    torch.manual_seed(0)
    images = torch.arange(256).byte().view(1, 1, 16, 16).repeat(400, 3, 1, 1)
    found = training.cropped_and_flipped(images)
    assert found.shape == images.shape and found.dtype == torch.uint8
    assert torch.equal(found[:, 0], found[:, 2])
    padded = nn.functional.pad(images[:1].float(), (4, 4, 4, 4), mode="reflect")[0, 0].byte()
    windows = {padded[i : i + 16, j : j + 16].numpy().tobytes() for i in range(9) for j in range(9)}
    mirrored = [image[0].numpy().tobytes() not in windows for image in found]
    assert all(
        image[0].numpy().tobytes() in windows or image[0].flip(1).numpy().tobytes() in windows for image in found
    )
    assert 150 < sum(mirrored) < 250
    assert len({image[0].numpy().tobytes() for image in found}) > 100


# -- what a network is known by ---------------------------------------------------------------------------------------


def test_the_key_follows_recipe_and_data_and_no_code(digits: data.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        training.identity(TINY, digits),
        training.identity(dataclasses.replace(TINY, seed=5), digits),
        training.identity(dataclasses.replace(TINY, augment=True), digits),
        training.identity(TINY, dataclasses.replace(digits, valid=digits.valid.sample(50))),
    }
    assert len(keys) == 4
    monkeypatch.setattr(cache, "computing_hash", lambda module: "another state of the code")
    assert training.identity(TINY, digits) in keys
    gated = dataclasses.replace(TINY, gate={"test": 0.9}, published=True, name="other")
    assert training.identity(gated, digits) in keys
    trained = training.fit(dataclasses.replace(TINY, epochs=1, phases=((1, 1e-3),)), digits)
    (notes,) = training.folder().glob(f"*{trained.key[:16]}.json")
    assert json.loads(notes.read_text())["code"] == "another state of the code"


def test_arms_share_base_images_and_noise_and_follow_their_values(digits: data.Dataset) -> None:
    base = weights(training.fit(TINY, digits))
    one = {"steps": 1, "learning_rate": 1e-3}
    control = finetuning.finetune(TINY, Arm("control", **one), digits)
    weightless = finetuning.finetune(TINY, Arm("stability", alpha=0.0, **one), digits)
    stable = finetuning.finetune(TINY, Arm("stability", alpha=10.0, **one), digits)
    augmented = finetuning.finetune(TINY, Arm("augmentation", **one), digits)
    assert len({arm.key for arm in (control, weightless, stable, augmented)}) == 4
    assert not same(weights(control), base)
    for key, value in weights(weightless).items():  # the same gradient, through another graph
        torch.testing.assert_close(value, weights(control)[key], rtol=0, atol=2e-4)
    assert control.history[0]["loss"] == pytest.approx(weightless.history[0]["loss"], rel=1e-6, abs=0)
    assert stable.history[0]["loss"] > control.history[0]["loss"] != augmented.history[0]["loss"]
    statistics = [key for key in base if "running" in key]
    assert statistics and all(torch.equal(base[key], weights(stable)[key]) for key in statistics)


def test_outliers_of_another_second_network_make_another_network(digits: data.Dataset) -> None:
    """Made outliers depend on every network that classifies their images right: they enter the key by their pixels."""
    first = digits.train.sample(40, seed=0)
    second = digits.train.sample(40, seed=1)
    phases = ((1, 1e-3), (1, 1e-4))
    learnt = [training.learn(TINY, digits, extra, phases=phases) for extra in (first, second)]
    keys = {trained.key for states in learnt for trained in states}
    assert len(keys) == 4
    assert not same(weights(learnt[0][0]), weights(learnt[0][1])), "each phase is a network of its own"
    assert not same(weights(learnt[0][1]), weights(learnt[1][1]))
    again = training.learn(TINY, digits, first, phases=phases)
    assert same(weights(again[0]), weights(learnt[0][0])) and same(weights(again[1]), weights(learnt[0][1]))


# -- published networks -----------------------------------------------------------------------------------------------


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of two tiny networks of the digits."""
    monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(paths, "ZOO", tmp_path / "zoo")
    monkeypatch.setattr(recipes, "_rows", lambda: {"tiny": ROW})
    monkeypatch.setattr(recipes, "data_set", _some_digits)
    return tmp_path / "zoo"


def _some_digits(name: str, labels: object, fold: object, data_dir: object) -> data.Dataset:
    digits = data.load(name)
    return dataclasses.replace(digits, train=digits.train.sample(200))


def test_the_life_of_a_published_network(
    zoo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["zoo"]) == 0 and capsys.readouterr().out.count("not trained") == 2
    assert cli.main(["zoo", "train", "tiny-0"]) == 0
    assert "tiny-0: train " in capsys.readouterr().out
    assert sorted(p.name for p in zoo.iterdir()) == ["ledger.json", "tiny-0.csv", "tiny-0.safetensors"]
    row = published.ledger()["tiny-0"]
    assert row["bytes"] == (zoo / "tiny-0.safetensors").stat().st_size and set(row["accuracy"]) == {
        "train",
        "valid",
        "test",
    }
    assert {"commit", "code", "torch", "threads", "device", "key", "data", "sha256"} <= set(row)

    monkeypatch.setattr(training, "train", None)  # from here on nothing may train
    recipe = recipes.named("tiny-0")
    fitted = training.fit(recipe, recipe.dataset())
    assert training.accuracy(fitted.model, recipe.dataset().test) == row["accuracy"]["test"]
    assert [line["epoch"] for line in fitted.history] == [1, 2]
    assert cli.main(["zoo", "train", "tiny-0"]) == 0 and "trained already" in capsys.readouterr().out
    assert cli.main(["zoo", "check"]) == 0
    listed = cli.main(["zoo"]), capsys.readouterr().out
    assert "published" in listed[1] and "not trained" in listed[1]

    # A gate and a stored accuracy that are missed each end with 1.
    monkeypatch.setattr(recipes, "_rows", lambda: {"tiny": {**ROW, "gate": {"test": 0.999}}})
    assert cli.main(["zoo", "check"]) == 1 and "below its gate of 99.9%" in capsys.readouterr().out
    monkeypatch.setattr(recipes, "_rows", lambda: {"tiny": ROW})
    ledger = zoo / "ledger.json"
    sound = ledger.read_text()
    changed = json.loads(sound)
    changed["tiny-0"]["accuracy"]["test"] += 0.01
    ledger.write_text(json.dumps(changed))
    assert cli.main(["zoo", "check"]) == 1 and "the ledger has" in capsys.readouterr().out
    ledger.write_text(sound)

    # Damaged weights: another checksum, and a checksum of something else.
    weights = zoo / "tiny-0.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert cli.main(["zoo", "check"]) == 1 and "another checksum than the ledger" in capsys.readouterr().out
    with pytest.raises(TrainingError, match="another checksum"):
        training.fit(recipe, recipe.dataset())
    weights.write_bytes(whole[:100])
    changed = json.loads(sound)
    changed["tiny-0"]["sha256"] = cache.sha256(weights)
    ledger.write_text(json.dumps(changed))
    assert cli.main(["zoo", "check"]) == 1
    assert "damaged, or the weights of another network" in capsys.readouterr().out
    weights.unlink()
    assert cli.main(["zoo", "check"]) == 1 and "is missing: restore it" in capsys.readouterr().out
    ledger.write_text(sound[:-20])
    assert cli.main(["zoo"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_network_too_large_to_publish_is_loaded_where_it_was_trained(
    zoo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "_rows", lambda: {"tiny": {**ROW, "published": False}})
    published.train("tiny-0")
    assert sorted(p.name for p in zoo.iterdir()) == ["ledger.json", "tiny-0.csv"]
    assert cli.main(["zoo"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny-0 ")]
    assert line.split()[-2:] == ["not", "published"]
    monkeypatch.setattr(training, "train", None)  # from here on nothing may train
    recipe = recipes.named("tiny-0")
    model = training.fit(recipe, recipe.dataset()).model
    stored = published.ledger()["tiny-0"]["accuracy"]["test"]
    assert training.accuracy(model, recipe.dataset().test) == stored


def test_a_recipe_that_changed_is_no_longer_the_published_network(
    zoo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    published.train("tiny-0")
    monkeypatch.setattr(recipes, "_rows", lambda: {"tiny": {**ROW, "width": 0.06}})
    assert cli.main(["zoo", "check"]) == 1
    assert "of another recipe or of other data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "tiny-7"], "unknown network 'tiny-7'"),
        (["train"], "name the networks to train"),
        (["check", "vgg"], "unknown network 'vgg'"),
        (["train", "tiny-0", "--device", "cuda:99"], "device 'cuda:99'"),
    ],
)
def test_bad_requests_are_one_line(zoo: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert cli.main(["zoo", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_missing_data_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["zoo", "train", "paper-resnet50-mnist-0", "--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "mnist: " in error and "is missing" in error and error.count("\n") == 1


SIDE_BY_SIDE = """
import sys
from pathlib import Path
import torch
from influence.companion.ledger import paths
from influence.companion.zoo import published, recipes
import test_zoo

paths.ZOO = Path(sys.argv[1])
recipes._rows = lambda: {"tiny": test_zoo.ROW}
recipes.data_set = test_zoo._some_digits
print(published.train(sys.argv[2]))
"""


def test_trainings_side_by_side_do_not_disturb_each_other(zoo: Path, tmp_path: Path) -> None:
    """Two at once end with the weights that each has alone, both in the ledger; the same twice is refused."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "INFLUENCE_CACHE": str(tmp_path / "other"),
    }
    for name in ("tiny-0", "tiny-1"):
        published.train(name)
    command = [sys.executable, "-c", SIDE_BY_SIDE, str(tmp_path / "both"), "tiny-0"]
    other = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with pytest.MonkeyPatch.context() as patch:  # this process is the second one
        patch.setenv("INFLUENCE_CACHE", environment["INFLUENCE_CACHE"])
        patch.setattr(paths, "ZOO", tmp_path / "both")
        while not (tmp_path / "other/checkpoints/tiny-0.lock").exists() and other.poll() is None:
            time.sleep(0.01)
        try:
            said = published.train("tiny-0")
        except TrainingError as error:
            said = str(error)
        assert "another process is training it" in said or "trained already" in said
        published.train("tiny-1")
    ended = other.communicate(timeout=300)
    assert other.returncode == 0, ended
    for name in ("tiny-0", "tiny-1"):
        alone, beside = ((folder / f"{name}.safetensors").read_bytes() for folder in (zoo, tmp_path / "both"))
        assert alone == beside
    assert set(json.loads((tmp_path / "both/ledger.json").read_text())) == {"tiny-0", "tiny-1"}


def test_committed_zoo_is_as_its_ledger_says() -> None:
    """Checksums, sizes and histories of what is published; accuracies are measured anew by `influence zoo check`."""
    rows = published.ledger()
    known = {recipe.name: recipe for recipe in recipes.everything()}
    assert set(rows) <= set(known)
    files = {file.name for file in paths.ZOO.glob("*")} if paths.ZOO.exists() else set()
    owned = {"ledger.json"} | {f"{name}.{suffix}" for name in known for suffix in ("safetensors", "csv", "resume.pt")}
    assert files <= owned | {"continued"}
    for name, row in rows.items():
        assert row["recipe"] == json.loads(json.dumps(known[name].decides())), name
        assert (paths.ZOO / f"{name}.csv").is_file()
        if row["published"]:
            file = published._checked(name, row)
            assert file.stat().st_size == row["bytes"] < 5e6
    for notes in (paths.ZOO / "continued").glob("*.json"):
        assert json.loads(notes.read_text())["sha256"] == cache.sha256(notes.with_suffix(".safetensors")), notes
    assert sum(file.stat().st_size for file in paths.ZOO.rglob("*") if file.is_file()) < 80e6


@pytest.mark.data
@pytest.mark.parametrize("name", predicted_classes.PUBLISHED)
def test_published_networks_measure_what_the_ledger_says(
    name: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`influence zoo check` has nothing to say: recipe, data, checksum, gates, accuracy on all test images.

    That of the classes in a file; the network still predicts these for 500 images, among which are the 250 whose class
    changes first where its weights change.
    """
    measured = []

    def accuracy(model: nn.Module, part: data.Split, *, device: str) -> float:
        measured.append(predicted_classes.accuracy(name, model, part))
        return measured[0]

    monkeypatch.setattr(training, "accuracy", accuracy)
    assert list(published.check([name], data_dir=data_dir)) == []
    assert len(measured) == 1


# -- networks that others trained -------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("name", pretrained.NAMES)
def test_networks_that_others_trained(name: str, data_dir: Path) -> None:
    """The accuracy of its source, measured as that of published networks."""
    source = pretrained.SOURCES[name]
    if not (data_dir / "checkpoints" / source.file).is_file():
        pytest.skip(f"INFLUENCE_DATA has no checkpoints/{source.file}")
    network, digest = pretrained.load(name, data_dir)
    assert len(digest) == 64 and not network.training
    test = data.load(source.data, data_dir).test
    found = predicted_classes.accuracy(name, network, test)
    assert found == pytest.approx(source.test_accuracy, abs=0.0005)


def test_networks_of_others_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="unknown network 'resnet21': expected one of resnet20, "):
        pretrained.load("resnet21", tmp_path)
    for name, source in pretrained.SOURCES.items():
        with pytest.raises(data.DataError, match=r"--data DIR .* from github\.com/"):
            pretrained.load(name, None)
        file = tmp_path / "checkpoints" / source.file
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"something else")
        with pytest.raises(data.DataError, match="corrupt"):
            pretrained.load(name, tmp_path)
