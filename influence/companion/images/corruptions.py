"""The fifteen corruptions of Hendrycks & Dietterich (2019, arXiv 1903.12261), as strong as in CIFAR-10-C.

Formulas and strengths 1 to 5 are those of the code that made CIFAR-10-C (hendrycks/robustness, make_cifar_c.py); the
draws are ours, the same at every call, and images come out rounded down, as there. ImageMagick's motion blur is made
here to one grey level, OpenCV's warp to 1e-6 (as of version 5; earlier ones round places to 1/32 pixel); photographs of
frost are read from the reader's folder. Images are (N, 3, 32, 32) uint8.
"""

from __future__ import annotations

from functools import cache as remember
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from ..ledger import cache
from . import distortions
from .data import DataError

SIDE = 32  # the constants are for this size
_Pixels = np.ndarray  # (N, H, W, 3) float64, pixels in [0, 1]


def _gaussian_noise(x: _Pixels, severity: int, draw: np.random.Generator) -> _Pixels:
    return x + draw.normal(scale=[0.04, 0.06, 0.08, 0.09, 0.10][severity - 1], size=x.shape)


def _shot_noise(x: _Pixels, severity: int, draw: np.random.Generator) -> _Pixels:
    photons = [500, 250, 100, 75, 50][severity - 1]
    return draw.poisson(x * photons) / photons


def _impulse_noise(x: _Pixels, severity: int, draw: np.random.Generator) -> _Pixels:
    """Values, not pixels, become 0 or 1, as scikit-image's "s&p" has it."""
    hit = draw.random(x.shape) <= [0.01, 0.02, 0.03, 0.05, 0.07][severity - 1]
    return np.where(hit, draw.random(x.shape) <= 0.5, x)


def _defocus_blur(x: _Pixels, severity: int, draw: np.random.Generator) -> _Pixels:
    """A disk, blurred over 3 x 3 against its jagged edge; the border is reflected about the outer pixels."""
    radius, blur = [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)][severity - 1]
    grid = np.arange(-8, 9)
    disk = (grid[:, None] ** 2 + grid**2 <= radius**2).astype(float)
    edge = np.exp(-(np.arange(-1, 2) ** 2) / (2 * blur**2))
    edge /= edge.sum()
    kernel = disk / disk.sum()
    for axis in (0, 1):
        kernel = ndimage.correlate1d(kernel, edge, axis=axis, mode="mirror")
    return ndimage.correlate(x, kernel[None, :, :, None], mode="mirror")


def _glass_blur(x: _Pixels, severity: int, draw: np.random.Generator) -> _Pixels:
    """A pixel takes the value of a neighbour: the swap of the published code overwrites before it reads."""
    sigma, reach, rounds = [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)][severity - 1]
    y, n = np.floor(255 * _gaussian(x, sigma)), np.arange(len(x))
    for _ in range(rounds):
        for h in range(SIDE - reach, reach, -1):
            for w in range(SIDE - reach, reach, -1):
                dx, dy = draw.integers(-reach, reach, size=(2, len(x)))
                y[:, h, w] = y[n, h + dy, w + dx]
    return _gaussian(y / 255, sigma)


def _gaussian(x: _Pixels, sigma: float) -> _Pixels:
    return ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")


def _zoom_blur(x: _Pixels, severity: int, draw: np.random.Generator) -> _Pixels:
    factors = np.arange(1, [1.06, 1.11, 1.16, 1.21, 1.26][severity - 1], 0.01)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _zoomed(x: _Pixels, factor: float) -> _Pixels:
    side = int(np.ceil(SIDE / factor))
    top = (SIDE - side) // 2
    wide = ndimage.zoom(x[:, top : top + side, top : top + side], (1, factor, factor, 1), order=1)
    trim = (wide.shape[1] - SIDE) // 2
    return wide[:, trim : trim + SIDE, trim : trim + SIDE]


def _fog(x: _Pixels, severity: int, draw: np.random.Generator) -> _Pixels:
    amount, decay = [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)][severity - 1]
    largest = x.max(axis=(1, 2, 3), keepdims=True)
    clouds = np.stack([_plasma(decay, draw) for _ in x])
    return (x + amount * clouds[..., None]) * largest / (largest + amount)


def _plasma(decay: float, draw: np.random.Generator) -> np.ndarray:
    """Height map of the diamond-square algorithm on a torus, 0 to 1."""
    heights, step, wibble = np.zeros((SIDE, SIDE)), SIDE, 100.0

    def mean(four: np.ndarray) -> np.ndarray:
        return four / 4 + wibble * draw.uniform(-wibble, wibble, four.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        rows = corners + np.roll(corners, -1, axis=0)
        heights[half::step, half::step] = mean(rows + np.roll(rows, -1, axis=1))
        centres = heights[half::step, half::step]
        above = centres + np.roll(centres, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        heights[::step, half::step] = mean(above)
        beside = centres + np.roll(centres, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        heights[half::step, ::step] = mean(beside)
        step, wibble = half, wibble / decay
    heights -= heights.min()
    return heights / heights.max()


def _brightness(x: _Pixels, severity: int, draw: np.random.Generator) -> _Pixels:
    """The value of HSV, the largest of a pixel's three, is raised; hue and saturation stay."""
    largest = x.max(axis=-1, keepdims=True)
    raised = np.clip(largest + [0.05, 0.1, 0.15, 0.2, 0.3][severity - 1], 0, 1)
    return np.where(largest > 0, x / np.where(largest > 0, largest, 1), 1) * raised


def _contrast(x: _Pixels, severity: int, draw: np.random.Generator) -> _Pixels:
    means = x.mean(axis=(1, 2), keepdims=True)
    return (x - means) * [0.75, 0.5, 0.4, 0.3, 0.15][severity - 1] + means


def _pixelate(x: _Pixels, severity: int, draw: np.random.Generator) -> _Pixels:
    side = int(SIDE * [0.95, 0.9, 0.85, 0.75, 0.65][severity - 1])
    pictures = (Image.fromarray(one) for one in np.round(255 * x).astype(np.uint8))
    box = Image.Resampling.BOX
    return np.stack([np.asarray(p.resize((side, side), box).resize((SIDE, SIDE), box)) for p in pictures]) / 255


def _jpeg_compression(x: _Pixels, severity: int, draw: np.random.Generator) -> _Pixels:
    images = torch.from_numpy(np.round(255 * x).astype(np.uint8)).permute(0, 3, 1, 2)
    return distortions.jpeg(images, [80, 65, 58, 50, 40][severity - 1]).permute(0, 2, 3, 1).numpy() / 255


def _motion_blur(x: _Pixels, severity: int, draw: np.random.Generator) -> _Pixels:
    radius, sigma = [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)][severity - 1]
    return np.stack([_moved(one, radius, sigma, draw.uniform(-45, 45)) for one in x])


def _moved(x: _Pixels, radius: int, sigma: float, degrees: float) -> _Pixels:
    """One image (H, W, C) in 256 steps: half a Gaussian along a line of whole pixels, as ImageMagick blurs."""
    steps, angle = np.arange(2 * radius + 1), np.deg2rad(degrees)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    rows, columns = (
        np.clip(np.arange(side) + np.ceil(steps * part - 0.5).astype(int)[:, None], 0, side - 1)  # the border repeated
        for side, part in zip(x.shape, (np.sin(angle), np.cos(angle)), strict=False)
    )
    line = x[rows[:, :, None], columns[:, None, :]]  # (steps, H, W, C)
    return np.round(255 * np.tensordot(weights / weights.sum(), line, axes=1)) / 255


def _snow(x: _Pixels, severity: int, draw: np.random.Generator) -> _Pixels:
    mean, spread, zoom, least, radius, sigma, kept = [
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ][severity - 1]
    flakes = _zoomed(draw.normal(mean, spread, (*x.shape[:3], 1)), zoom)
    flakes = np.floor(255 * np.clip(np.where(flakes < least, 0, flakes), 0, 1)) / 255
    layer = np.stack([_moved(one, radius, sigma, draw.uniform(-135, -45)) for one in flakes])
    grey = (x @ [0.299, 0.587, 0.114])[..., None]
    whiter = kept * x + (1 - kept) * np.maximum(x, 1.5 * grey + 0.5)
    return whiter + layer + layer[:, ::-1, ::-1]


def _elastic_transform(x: _Pixels, severity: int, draw: np.random.Generator) -> _Pixels:
    """Three corners of a square move, and the image with them; then every pixel, as its neighbours do."""
    size, sigma, reach = SIDE * np.array(
        [(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)][severity - 1]
    )
    near, far = SIDE // 2 - SIDE // 3, SIDE // 2 + SIDE // 3
    corners = np.array([[far, far, 1], [near, far, 1], [near, near, 1]], dtype=float)  # row, column
    grid = np.stack([*np.indices((SIDE, SIDE), dtype=float), np.ones((SIDE, SIDE))], axis=-1)
    found = []
    for one in x:
        moved = corners + np.pad(draw.uniform(-reach, reach, (3, 2)), ((0, 0), (0, 1)))
        back = grid @ np.linalg.solve(moved, corners)  # where each pixel comes from
        one = _at(one, back[..., 0], back[..., 1], "mirror")
        shift = draw.uniform(-1, 1, (2, SIDE, SIDE))
        shift = size * ndimage.gaussian_filter(shift, (0, sigma, sigma), mode="reflect", truncate=3)
        found.append(_at(one, grid[..., 0] + shift[0], grid[..., 1] + shift[1], "reflect"))
    return np.stack(found)


def _at(x: _Pixels, rows: np.ndarray, columns: np.ndarray, mode: str) -> _Pixels:
    """One image (H, W, C) at places between its pixels."""
    places = [rows, columns]
    return np.stack([ndimage.map_coordinates(part, places, order=1, mode=mode) for part in np.moveaxis(x, -1, 0)], -1)


# -- photographs of frost ---------------------------------------------------------------------------------------------

FROST = "frost"
FROST_ADDRESS = "imagecorruptions/frost of the wheel imagecorruptions 1.1.2 on PyPI (github.com/hendrycks/robustness)"
FROST_SHA256 = {
    "frost1.png": "ff9f907860bd7a835d459e32f9d588062b7f61ee267343cc7222b56753a14755",
    "frost2.png": "fe211a89b336999c207a852ce05818d4545d0b57c5beadd824b4cc9d9a9b6137",
    "frost3.png": "2d0d50b4a9bb213f38b024ef7768731bb83cc08d2f26b5766bbc167cdfa0e504",
    "frost4.jpg": "3f8b91ca1a9fa7167b09e773da53f5ae60d0a1fd88f02a783f6e328a72887f6e",
    "frost5.jpg": "5fc6a19df4a429ba68abdcc8f8a4278d4c9f81c9ccafd2c92ab0c8cf8992ebd2",
}


@remember
def frost_photographs(data_dir: Path | None) -> tuple[_Pixels, ...]:
    """Five photographs of frost (H, W, 3) from `data_dir/frost`, a fifth as large, pixels in [0, 1].

    Raises:
        DataError: one is missing, or is another file.
    """
    found = []
    for name, digest in FROST_SHA256.items():
        file = (data_dir or Path("DIR")) / "frost" / name
        if not file.is_file():
            raise DataError(
                f"frost: {file} is missing: take it from {FROST_ADDRESS}, and name the folder by --data DIR"
            )
        if cache.sha256(file) != digest:
            raise DataError(f"frost: {file} is another file than that of {FROST_ADDRESS}")
        with Image.open(file) as photograph:
            whole = np.asarray(photograph.convert("RGB")) / 255
        # Linear interpolation at a fifth of the size falls on the middle one of five pixels.
        height, width = (round(side / 5) for side in whole.shape[:2])
        found.append(whole[2::5, 2::5][:height, :width])
    return tuple(found)


def _frosted(x: _Pixels, severity: int, draw: np.random.Generator, photographs: tuple[_Pixels, ...]) -> _Pixels:
    of_image, of_frost = [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)][severity - 1]
    crops = []
    for _ in x:
        frost = photographs[draw.integers(len(photographs))]
        top, left = (int(draw.integers(side - SIDE)) for side in frost.shape[:2])
        crops.append(frost[top : top + SIDE, left : left + SIDE])
    return of_image * x + of_frost * np.stack(crops)


# In the order that seeds their draws.
_NOISE = (_gaussian_noise, _shot_noise, _impulse_noise)
_BLUR = (_defocus_blur, _glass_blur, _zoom_blur)
_OTHERS = (_fog, _brightness, _contrast, _pixelate, _jpeg_compression, _motion_blur, _snow, _elastic_transform)
_BY_NAME = {function.__name__.removeprefix("_"): function for function in (*_NOISE, *_BLUR, *_OTHERS)}
NAMES = (*_BY_NAME, FROST)


def corrupt(name: str, images: Tensor, *, severity: int, data_dir: Path | None = None) -> Tensor:
    """A corruption of `NAMES`, of severity 1 to 5, of images ``(N, 3, 32, 32)`` uint8, in the same shape and type.

    In `data_dir` "frost" finds its photographs; the others need none.

    Raises:
        ValueError: unknown name or severity, or images of another shape.
        TypeError: images of another type.
        DataError: the photographs of frost are missing, or are others.
    """
    if name not in NAMES:
        raise ValueError(f"unknown corruption {name!r}: expected one of {', '.join(NAMES)}")
    if severity not in range(1, 6):
        raise ValueError(f"the severity must be 1, 2, 3, 4 or 5, got {severity}")
    if images.dtype != torch.uint8:
        raise TypeError(f"corruptions take uint8 images, got {images.dtype}")
    if images.ndim != 4 or images.shape[1:] != (3, SIDE, SIDE):
        raise ValueError(f"corruptions are defined for (N, 3, 32, 32) images, got {tuple(images.shape)}")
    draw = np.random.default_rng([NAMES.index(name), severity])
    pixels = images.permute(0, 2, 3, 1).numpy() / 255
    if name == FROST:
        corrupted = _frosted(pixels, severity, draw, frost_photographs(data_dir))
    else:
        corrupted = _BY_NAME[name](pixels, severity, draw)
    # A pixel that a formula gives back as it was must not fall by one in rounding.
    found = np.floor(255 * np.clip(corrupted, 0, 1) + 1e-6)
    return torch.from_numpy(found.astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
