from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from influence.companion.images import data


def test_digits_are_the_published_ones_split_class_by_class() -> None:
    digits = data.load("digits")
    assert [len(part) for part in (digits.train, digits.valid, digits.test)] == [1197, 200, 400]
    assert digits.shape == (1, 8, 8) and len(digits.classes) == 10
    for part, count in ((digits.valid, 20), (digits.test, 40)):
        assert torch.bincount(part.labels).tolist() == [count] * 10
    everywhere = torch.cat([digits.train.index, digits.valid.index, digits.test.index])
    assert sorted(everywhere.tolist()) == list(range(1797))
    from sklearn.datasets import load_digits

    published = load_digits()
    row = 17
    image = digits.train.images[row, 0].numpy()
    assert np.array_equal(np.rint(published.images[digits.train.index[row]] * 255 / 16), image)
    assert published.target[digits.train.index[row]] == digits.train.labels[row]
    assert image.dtype == np.uint8


def test_photos_parts_share_no_pixel() -> None:
    photos = data.load("photos", size=32)
    assert photos.shape == (3, 32, 32) and photos.classes == ("china", "flower")
    crops = [{image.numpy().tobytes() for image in part.images} for part in (photos.train, photos.valid, photos.test)]
    assert all(
        not first & second for first, second in ((crops[0], crops[1]), (crops[0], crops[2]), (crops[1], crops[2]))
    )
    assert len(photos.train) == 2 * 13 * (20 - 3 - 3) and len(photos.valid) == len(photos.test) == 2 * 13 * 3


def test_digest_follows_the_content() -> None:
    digits = data.load("digits")
    assert digits.digest == data.load("digits").digest
    changed = digits.train.labels.clone()
    changed[0] = (changed[0] + 1) % 10
    other = data.Dataset(
        digits.name,
        digits.classes,
        data.Split(digits.train.images, changed, digits.train.index),
        digits.valid,
        digits.test,
    )
    assert other.digest != digits.digest


def test_samples_keep_images_labels_and_positions_together() -> None:
    digits = data.load("digits").train
    where = {int(index): row for row, index in enumerate(digits.index)}
    for part in (digits.sample(50, seed=3), digits.take([3, 1])):
        for image, label, index in zip(part.images, part.labels, part.index, strict=True):
            assert torch.equal(image, digits.images[where[int(index)]]) and label == digits.labels[where[int(index)]]
    assert len(digits.sample(10**6)) == len(digits)
    assert not torch.equal(digits.sample(50, seed=3).index, digits.sample(50, seed=4).index)


def test_real_sets_have_the_splits_of_the_paper(data_dir: Path) -> None:
    mnist, cifar = data.load("mnist", data_dir), data.load("cifar10", data_dir)
    assert [len(part) for part in (mnist.train, mnist.valid, mnist.test)] == [54_000, 6_000, 10_000]
    assert [len(part) for part in (cifar.train, cifar.valid, cifar.test)] == [45_000, 5_000, 10_000]
    assert torch.bincount(mnist.valid.labels).tolist() == [600] * 10
    assert torch.bincount(cifar.valid.labels).tolist() == [500] * 10
    assert mnist.shape == (1, 28, 28) and cifar.shape == (3, 32, 32)
    assert mnist.test.labels[:5].tolist() == [7, 2, 1, 0, 4]  # the published test order
    assert cifar.classes[cifar.test.labels[0]] == "cat" and cifar.train.images.float().mean() > 100


def test_a_corrupt_file_is_named_before_any_work(data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir / "MNIST", tmp_path / "MNIST")
    data.require(["mnist"], tmp_path)
    labels = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = bytearray(labels.read_bytes())
    content[-1] ^= 1
    labels.write_bytes(content)
    with pytest.raises(data.DataError, match=r"mnist: .*t10k-labels-idx1-ubyte is corrupt") as caught:
        data.require(["digits", "mnist"], tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["mnist"], r"mnist: .*train-images-idx3-ubyte is missing"),
        (["cifar10"], r"cifar10: .*data_batch_1 is missing"),
        (["imagefolder"], "holds no train/ and val/ folders"),
        (["imagenet"], "unknown data set 'imagenet': expected one of digits"),
    ],
)
def test_missing_data_say_so(names: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=words):
        data.require(names, tmp_path)


def test_a_failed_download_is_one_line_that_says_how_to_get_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str, root: Path) -> None:
        raise OSError("Network is unreachable\nsecond line")

    monkeypatch.setattr(data, "_download", offline)
    monkeypatch.setattr("influence.companion.ledger.paths.BUILD", tmp_path)
    with pytest.raises(data.DataError, match=r"mnist: the download failed .*--data DIR or INFLUENCE_DATA") as caught:
        data.require(["mnist"])
    assert "\n" not in str(caught.value)


def test_image_folder(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (30 + i, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    folder = data.load("imagefolder", tmp_path, size=16)
    assert folder.classes == ("cat", "dog") and folder.shape == (3, 16, 16)
    assert [len(part) for part in (folder.train, folder.valid, folder.test)] == [6, 2, 4]
    shutil.rmtree(tmp_path / "val" / "dog")
    with pytest.raises(data.DataError, match="different classes"):
        data.load("imagefolder", tmp_path, size=16)
