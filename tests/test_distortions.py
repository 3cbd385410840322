from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from influence.companion import data, distortions


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
