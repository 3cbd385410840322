from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
import torch

from influence.companion.images import pictures


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_back_from_a_file(channels: int) -> None:
    images = torch.randint(0, 256, (4, channels, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    file = io.BytesIO(pictures.packed(images).to_parquet(index=False))
    for image, (_, row) in zip(images, pd.read_parquet(file).iterrows(), strict=True):
        np.testing.assert_array_equal(pictures.unpacked(row), image.permute(1, 2, 0))
