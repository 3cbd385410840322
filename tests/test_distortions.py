from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from influence.companion.images import data, distortions


def test_jpeg_is_the_encoders_own() -> None:
    images = data.load("photos").test.images[:2]
    ours = distortions.jpeg(images, 30)
    buffer = io.BytesIO()
    Image.fromarray(images[1].permute(1, 2, 0).numpy()).save(buffer, format="JPEG", quality=30, subsampling="4:2:0")
    assert np.array_equal(np.asarray(Image.open(buffer)), ours[1].permute(1, 2, 0).numpy())
    assert ours.shape == images.shape and ours.dtype == torch.uint8


def test_lower_quality_moves_further() -> None:
    for images in (data.load("photos").test.images, data.load("digits").test.images[:50]):
        errors = [(distortions.jpeg(images, q).float() - images.float()).square().mean() for q in (100, 90, 50, 10)]
        assert errors == sorted(errors) and errors[0] < errors[-1] / 20


def test_a_flat_grey_image_survives() -> None:
    flat = torch.full((1, 1, 16, 16), 128, dtype=torch.uint8)
    assert torch.equal(distortions.jpeg(flat, 10), flat)


@pytest.mark.parametrize(
    ("images", "quality", "error", "words"),
    [
        (torch.zeros(1, 3, 8, 8), 50, TypeError, "uint8 images, got torch.float32"),
        (torch.zeros(1, 2, 8, 8, dtype=torch.uint8), 50, ValueError, "1 or 3"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), 50, ValueError, "shape"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 0, ValueError, "1..100, got 0"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 101, ValueError, "1..100, got 101"),
    ],
)
def test_errors(images: torch.Tensor, quality: int, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        distortions.jpeg(images, quality)


def flat(value: int, *, channels: int = 3, size: int = 16) -> torch.Tensor:
    return torch.full((2, channels, size, size), value, dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["thumb-64", "crop-3", "blur-1.5", "pixelate-0.5", "contrast-0.3", "jpeg-90"])
def test_an_image_of_one_grey_stays_as_it_is(name: str, channels: int) -> None:
    assert torch.equal(distortions.apply(name, flat(100, channels=channels)), flat(100, channels=channels))


@pytest.mark.parametrize(
    "name", ["jpeg-20", "thumb-100", "crop-2", "noise-0.1", "blur-1", "contrast-0.5", "pixelate-0.5"]
)
def test_a_batch_is_its_images_one_by_one(name: str) -> None:
    images = data.load("photos", size=32).test.images[:3]
    together = distortions.apply(name, images)
    assert together.shape == images.shape and together.dtype == torch.uint8
    if not name.startswith("noise"):
        assert torch.equal(together[1:2], distortions.apply(name, images[1:2]))


def test_thumbnail_has_the_area_and_averages() -> None:
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(8).expand(1, 1, 16, 16)
    assert (distortions.thumbnail(stripes, 16).float() - 127.5).abs().max() < 40  # the stripes are gone, up to the edge
    assert torch.equal(distortions.thumbnail(stripes, 256), stripes)


def test_crop_moves_the_lower_right_corner_in() -> None:
    ramp = torch.arange(16, dtype=torch.uint8).mul(10).expand(1, 1, 16, 16)
    moved = distortions.crop(ramp, 4)[0, 0, 0]
    assert moved[0] == 40 and moved[-1] == 150 and (moved.diff() >= 0).all()
    assert torch.equal(distortions.crop(ramp, 0), ramp)


def test_noise_has_its_strength_and_is_the_same_each_time() -> None:
    noisy = distortions.noise(flat(128, size=64), 0.1)
    assert (noisy.float() - 128).std().item() == pytest.approx(25.5, rel=0.05)
    assert torch.equal(noisy, distortions.noise(flat(128, size=64), 0.1))


def test_brightness_contrast_blur_and_pixelate() -> None:
    assert torch.equal(distortions.brightness(flat(250), 0.1), flat(255))
    halves = torch.cat([flat(50), flat(150)], dim=-1)
    assert set(distortions.contrast(halves, 0.5).unique().tolist()) == {75, 125}
    point = flat(0, channels=1)
    point[..., 8, 8] = 255
    blurred = distortions.blur(point, 1.0)[0, 0]
    assert int(blurred[8, 8]) == pytest.approx(255 / (2 * np.pi), abs=2) and int(blurred.sum()) == pytest.approx(
        255, abs=25
    )
    blocks = distortions.pixelate(point, 0.5)[0, 0]
    assert set(blocks.unique().tolist()) == {0, 64} and (blocks == 64).sum() == 4


@pytest.mark.parametrize(
    ("name", "words"),
    [("fog-1", "unknown distortion"), ("jpeg-x", "jpeg-NUMBER"), ("thumb-999", "1..256"), ("crop-16", "0..15"),
     ("noise--1", "at least 0"), ("blur-0", "positive"), ("pixelate-2", r"\(0, 1\]")],
)  # fmt: skip
def test_names_and_strengths_that_make_no_sense(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        distortions.apply(name, flat(9))
