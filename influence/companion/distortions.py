"""The distortions of Zheng et al. (2016), section 5: used for evaluation only, never in training."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Encode each image as JPEG and decode it again (libjpeg through Pillow).

    Colour images get 4:2:0 chroma subsampling, libjpeg's default; grey images have no chroma.

    Args:
        images: (N, C, H, W) uint8 with C = 1 or 3.
        quality: libjpeg's 1..100.

    Returns:
        (N, C, H, W) uint8.

    Raises:
        TypeError: the images are not uint8.
        ValueError: another number of channels, or a quality outside 1..100.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"jpeg takes uint8 images, got {images.dtype}")
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"jpeg takes (N, 1 or 3, H, W) images, got shape {tuple(images.shape)}")
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality must be in 1..100, got {quality}")
    decoded = [_jpeg_one(image, quality) for image in images.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()


def _jpeg_one(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.save(buffer, format="JPEG", quality=quality, subsampling=2)
    return np.asarray(Image.open(buffer)).reshape(pixels.shape)
