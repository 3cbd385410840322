from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from influence.companion.images import data, outliers


def test_overlay_is_the_maximum_of_two_shifted_images(monkeypatch: pytest.MonkeyPatch) -> None:
    train, shifted = data.load("digits").train, outliers.shifted
    calls: list[tuple[torch.Tensor, int, int]] = []
    monkeypatch.setattr(outliers, "shifted", lambda *given: calls.append(given) or shifted(*given))
    found = outliers.overlay(train, np.ones(len(train), dtype=bool), per_class=20, shift=2, seed=3)
    assert torch.bincount(found.labels).tolist() == [18] * 10 and len(calls) == 2 * len(found)
    moves = torch.tensor([given[1:] for given in calls])
    assert moves.min() == -2 and moves.max() == 2
    where = {image.numpy().tobytes(): row for row, image in enumerate(train.images)}
    for i in range(0, 180, 7):
        pair = calls[2 * i : 2 * i + 2]
        first, second = (where[image.numpy().tobytes()] for image, _, _ in pair)
        assert train.index[first] == found.index[i]
        assert train.labels[first] == found.labels[i] != train.labels[second]
        moved = [np.roll(np.pad(x[0].numpy(), 2), by, axis=(0, 1))[2:-2, 2:-2] for x, *by in pair]
        np.testing.assert_array_equal(found.images[i, 0].numpy(), np.maximum(*moved))


def test_only_eligible_images_give_a_label() -> None:
    train = data.load("digits").train
    eligible = np.arange(len(train)) % 2 == 0
    found = outliers.overlay(train, eligible, per_class=10, shift=1)
    assert set(found.index.tolist()) <= set(train.index[eligible].tolist())
    with pytest.raises(ValueError, match="class 0 has 0 eligible images, 10 are needed"):
        outliers.overlay(train, np.zeros(len(train), dtype=bool), per_class=10)


def test_shift_loses_what_leaves() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3)
    assert outliers.shifted(image, 1, -1)[0].tolist() == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]
    assert not outliers.shifted(image, 3, 0).any() and not outliers.shifted(image, 0, -4).any()


def test_flipped_labels() -> None:
    labels = torch.arange(1000) % 10
    given = outliers.flip_labels(labels, share=0.2, classes=10, seed=1)
    assert int((given != labels).sum()) == 200 and given.min() == 0 and given.max() == 9
    assert not torch.equal(given, outliers.flip_labels(labels, share=0.2, classes=10, seed=2))
    with pytest.raises(ValueError, match="share"):
        outliers.flip_labels(labels, share=1.2, classes=10)


def test_missing_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"cifar10n.npz is missing; name its folder"):
        outliers.human_labels("worse_label", tmp_path)
    with pytest.raises(data.DataError, match="unknown labels"):
        outliers.human_labels("clean_label", tmp_path)


def test_human_labels_of_cifar10(data_dir: Path) -> None:
    if not (data_dir / "cifar10n.npz").is_file():
        pytest.skip("no cifar10n.npz")
    for kind, wrong in (("aggre_label", 0.0901), ("worse_label", 0.4021)):
        given, verified = outliers.human_labels(kind, data_dir)
        assert float((given != verified).double().mean()) == pytest.approx(wrong, abs=5e-4)
