"""AUM and early EL2N, recorded while a network is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from influence.companion.images import data
from influence.companion.zoo import dynamics, training
from influence.companion.zoo.recipes import Recipe

STILL = Recipe("still", "resnet50", "digits", epochs=4, phases=((4, 0.0),), width=0.0625, batch_size=200)
MOVING = dataclasses.replace(STILL, name="moving", phases=((4, 1e-2),), batch_size=32, augment=True)
CPU = torch.device("cpu")


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> data.Dataset:
    monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path))
    whole = data.load("digits")
    return dataclasses.replace(whole, train=whole.train.sample(80), valid=whole.valid.sample(20))


def test_of_a_network_that_stays_as_it_is_by_definition(digits: data.Dataset) -> None:
    found = dynamics.recorded(STILL, digits, epochs=3, device=CPU)
    images = digits.train.with_(digits.valid)
    network = STILL.build(digits).train()
    # Logits of single precision, whose statistics over the batch are summed in the order of that epoch.
    with torch.no_grad():
        logits = network(training.pixels(images.images))
    for n, label in enumerate(images.labels.tolist()):
        others = [float(z) for k, z in enumerate(logits[n]) if k != label]
        assert float(found.aum()[n]) == pytest.approx(float(logits[n, label]) - max(others), abs=3e-3)
    for _ in range(dynamics.EARLY - 1):
        network(training.pixels(images.images))
    p = training.predict(network.eval(), images.images).softmax(dim=1)
    for n, label in enumerate(images.labels.tolist()):
        p[n, label] -= 1
    torch.testing.assert_close(found.el2n.data, p.norm(dim=1), rtol=1e-2, atol=1e-3)


def test_a_training_that_was_killed_goes_on_to_the_same_record(
    digits: data.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dynamics.recorded(MOVING, digits, epochs=3, device=CPU)
    assert float(whole.aum().std()) > 0 and float(whole.el2n.std()) > 0
    # EL2N is early: later epochs do not change it, and the schedule is the recipe's, however soon the record ends.
    short = dynamics.recorded(MOVING, digits, epochs=dynamics.EARLY, device=CPU)
    assert torch.equal(short.el2n, whole.el2n) and not torch.equal(short.aum(), whole.aum())
    monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path / "again"))
    write, written = training.cache.atomic_write, []

    def killed(path: Path, content: object) -> None:
        write(path, content)  # type: ignore[arg-type]
        written.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(training.cache, "atomic_write", killed)
    with pytest.raises(KeyboardInterrupt):
        dynamics.recorded(MOVING, digits, epochs=3, device=CPU)
    assert [path.name.endswith(".resume.pt") for path in written] == [True]
    monkeypatch.setattr(training.cache, "atomic_write", write)
    again = dynamics.recorded(MOVING, digits, epochs=3, device=CPU)
    for name, value in whole.named_parameters():
        assert torch.equal(value, again.get_parameter(name)), name
