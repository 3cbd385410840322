"""A small Inception v3, made of the five block types of torchvision's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models.inception import BasicConv2d, InceptionA, InceptionB, InceptionC, InceptionD, InceptionE

# Every channel count of the blocks is a multiple of this, so that a width of n / 16 leaves whole numbers.
_UNIT = 16
_LARGEST_GRID = 16


class SmallInception(nn.Module):
    """One block of each type of Inception v3 (35x35, reduction, 17x17 with 7x1, reduction, 8x8), with fewer channels.

    The blocks are torchvision's; only their convolutions are told to have `width` times the channels. A stem of 3x3
    convolutions halves the image until its side is at most 16, so that any image from 8x8 up fits. Takes raw pixels
    0..255 and scales them to [-1, 1], as Inception does.

    Raises:
        ValueError: `side`, the smaller of H and W, is below 8, or `width` leaves no whole channels.
    """

    def __init__(self, channels: int, side: int, *, width: float, n_classes: int) -> None:
        super().__init__()
        if side < 8:
            raise ValueError(f"images must be at least 8x8 pixels, got a side of {side}")
        if width <= 0 or (width * _UNIT) % 1:
            raise ValueError(f"width must be a positive multiple of 1/{_UNIT}, got {width}")

        def conv(c_in: int, c_out: int, **options: Any) -> nn.Module:
            return BasicConv2d(round(c_in * width), round(c_out * width), **options)

        stem: list[nn.Module] = [BasicConv2d(channels, round(64 * width), kernel_size=3, padding=1)]
        while side > _LARGEST_GRID:
            stem.append(conv(64, 64, kernel_size=3, stride=2, padding=1))
            side = (side + 1) // 2
        self.stem = nn.Sequential(*stem)
        self.block35 = InceptionA(64, pool_features=32, conv_block=conv)
        self.reduction17 = InceptionB(256, conv_block=conv)
        self.block17 = InceptionC(736, channels_7x7=128, conv_block=conv)
        self.reduction8 = InceptionD(768, conv_block=conv)
        self.block8 = InceptionE(1280, conv_block=conv)
        self.head = nn.Linear(round(2048 * width), n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Raw pixels (N, C, H, W) to logits (N, K)."""
        x = self.stem(x / 127.5 - 1)
        x = self.block17(self.reduction17(self.block35(x)))
        logits: Tensor = self.head(self.block8(self.reduction8(x)).mean(dim=(2, 3)))
        return logits
