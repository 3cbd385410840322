"""The distortions of Zheng et al. (2016), section 5, and common corruptions: what the networks are tested on.

All take and return (N, C, H, W) uint8 with C = 1 or 3. Another dtype is a TypeError, other shapes and a strength out of
range are a ValueError. `apply` finds them by name and strength, as in "jpeg-50".
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_NOISE_SEED = 0
_BY_NAME: dict[str, tuple[Callable[..., Tensor], type]] = {}
ORIGINAL = "original"


def _distortion(short: str, number: type = float) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Give a distortion its name for `apply`, the type of its strength and the check of its images."""

    def named(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(function)
        def checked(images: Tensor, *strength: float, **by_name: float) -> Tensor:
            name = function.__name__
            if images.dtype != torch.uint8:
                raise TypeError(f"{name} takes uint8 images, got {images.dtype}")
            if images.dim() != 4 or images.shape[1] not in (1, 3):
                raise ValueError(f"{name} takes (N, 1 or 3, H, W) images, got shape {tuple(images.shape)}")
            return function(images, *strength, **by_name)

        _BY_NAME[short] = checked, number
        return checked

    return named


def _functional() -> Any:
    """Torchvision's transforms; PyTorch's compiler comes with them, two seconds of every start that does without."""
    from torchvision.transforms.v2 import functional

    return functional


@_distortion("jpeg", int)
def jpeg(images: Tensor, quality: int) -> Tensor:
    """Encode each image as JPEG of quality 1..100 and decode it again (libjpeg through Pillow).

    Colour images get 4:2:0 chroma subsampling, libjpeg's default; grey images have no chroma.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality must be in 1..100, got {quality}")
    decoded = [_encoded(image, quality) for image in images.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()


def _encoded(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.save(buffer, format="JPEG", quality=quality, subsampling=2)
    return np.asarray(Image.open(buffer)).reshape(pixels.shape)


@_distortion("thumb", int)
def thumbnail(images: Tensor, area: int) -> Tensor:
    """The paper's thumb-A: shrink to about A pixels, 1..H W, at the same aspect ratio, and enlarge again (bilinear)."""
    height, width = images.shape[-2:]
    if not 1 <= area <= height * width:
        raise ValueError(f"a thumbnail of {height}x{width} images has 1..{height * width} pixels, got {area}")
    factor = math.sqrt(area / (height * width))
    small = [max(1, round(height * factor)), max(1, round(width * factor))]
    resize = _functional().resize
    return resize(resize(images, small, antialias=True), [height, width], antialias=True)


@_distortion("crop", int)
def crop(images: Tensor, offset: int) -> Tensor:
    """The paper's crop-o: cut `offset` pixels, less than H and W, off the top and the left, and enlarge (bilinear)."""
    height, width = images.shape[-2:]
    if not 0 <= offset < min(height, width):
        raise ValueError(f"the offset must be in 0..{min(height, width) - 1}, got {offset}")
    return _functional().resize(images[..., offset:, offset:], [height, width], antialias=True)


@_distortion("noise")
def noise(images: Tensor, sigma: float) -> Tensor:
    """Gaussian noise of standard deviation `sigma` (pixels in [0, 1]), clipped; the same draw at every call."""
    if not sigma >= 0:
        raise ValueError(f"sigma must be at least 0, got {sigma}")
    draw = torch.randn(images.shape, generator=torch.Generator().manual_seed(_NOISE_SEED))
    return (images + 255 * sigma * draw).round().clamp(0, 255).to(torch.uint8)


@_distortion("blur")
def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of standard deviation `sigma` > 0 pixels, over a window of 6 sigma."""
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    half = min(math.ceil(3 * sigma), min(images.shape[-2:]) - 1)  # the window is reflected at the border
    return _functional().gaussian_blur(images, [2 * half + 1, 2 * half + 1], [sigma, sigma])


@_distortion("contrast")
def contrast(images: Tensor, factor: float) -> Tensor:
    """Mix with the mean grey: `factor` 1 changes nothing, 0 leaves grey (torchvision's adjust_contrast)."""
    # In whole grey levels torchvision rounds towards 0.
    mixed = _functional().adjust_contrast(images.float() / 255, factor)
    return (255 * mixed).round().to(torch.uint8)


@_distortion("brightness")
def brightness(images: Tensor, shift: float) -> Tensor:
    """Add `shift` (pixels in [0, 1]) to every pixel and clip."""
    return (images.float() + 255 * shift).round().clamp(0, 255).to(torch.uint8)


@_distortion("pixelate")
def pixelate(images: Tensor, factor: float) -> Tensor:
    """Shrink each side by `factor`, in (0, 1], by box averages and enlarge without interpolation."""
    if not 0 < factor <= 1:
        raise ValueError(f"the factor must be in (0, 1], got {factor}")
    height, width = images.shape[-2:]
    small = max(1, round(height * factor)), max(1, round(width * factor))
    averaged = torch.nn.functional.adaptive_avg_pool2d(images.float(), small).round().to(torch.uint8)
    from torchvision.transforms import InterpolationMode

    return _functional().resize(averaged, [height, width], interpolation=InterpolationMode.NEAREST_EXACT)


def apply(name: str, images: Tensor) -> Tensor:
    """Distort images by a name with its strength: "jpeg-50", "thumb-576", "crop-1", "noise-0.04", ..., "original"."""
    if name == ORIGINAL:
        return images
    kind, _, strength = name.partition("-")
    if kind not in _BY_NAME:
        raise ValueError(
            f"unknown distortion {name!r}: expected {ORIGINAL}, or one of {', '.join(_BY_NAME)} and -STRENGTH"
        )
    function, number = _BY_NAME[kind]
    try:
        value = number(strength)
    except ValueError:
        raise ValueError(f"{name!r}: expected {kind}-NUMBER ({number.__name__})") from None
    return function(images, value)
