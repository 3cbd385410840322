"""ResNet50 and DenseNet121 as Shu & Zhu (2019) have them, at any width and any image size from 8x8 up.

Both have a 3x3 stride-1 stem and no max-pooling, convolutions with bias, He-normal kernels and dropout 0.2; read off
the authors' released network definitions. They take raw pixels (0..255, not normalised) and return logits.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAMES = ("resnet50", "densenet121")
# Keras 2.1.5. Its momentum of 0.99 suits hundreds of epochs; the schedules here can be short and keep PyTorch's 0.9.
_BATCHNORM_EPS = 1e-3


def build(
    name: str, *, shape: tuple[int, int, int], n_classes: int, width: float = 1.0, dropout: float = 0.2, seed: int = 0
) -> nn.Module:
    """A freshly initialised network of `NAMES` for images (C, H, W); the global random state is left as it was.

    `width` multiplies every channel count: 1 is the paper's network. `dropout` is the probability of dropping an
    activation in training mode.

    Raises:
        ValueError: unknown name, H or W below 8, fewer than 2 classes, or width not positive.
    """
    channels, height, image_width = shape
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(NAMES)}")
    if min(height, image_width) < 8:
        raise ValueError(f"images must be at least 8x8 pixels, got {height}x{image_width}")
    if n_classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, got {n_classes}")
    if width <= 0:
        raise ValueError(f"width must be positive, got {width}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "resnet50":
            return ResNet50(channels, (height, image_width), n_classes, width, dropout)
        return DenseNet121(channels, n_classes, width, dropout)


def trainable_layers(model: nn.Module) -> list[str]:
    """Names of the modules that own parameters, in `named_modules()` order: the columns of Setup 2."""
    return [name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]


def in_turn(**modules: nn.Module) -> nn.Sequential:
    """Modules with names, one after the other."""
    return nn.Sequential(OrderedDict(modules))


class Append(nn.Sequential):
    """What its modules make of the input, appended to the input's channels."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) to (N, c_in + c_out, H, W)."""
        return torch.cat([x, super().forward(x)], dim=1)


def _conv(c_in: int, c_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(c_in, c_out, size, stride, padding=size // 2)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _batchnorm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_BATCHNORM_EPS)


def _dense(c_in: int, n_classes: int) -> nn.Linear:
    head = nn.Linear(c_in, n_classes)
    nn.init.xavier_uniform_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


class Dropout(nn.Dropout):
    """`nn.Dropout` whose masks on a CPU come from NumPy, seeded by PyTorch's generator.

    PyTorch draws a CPU mask number by number on one thread, half of a training step of these networks.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Zero each entry with probability p (to 1 / 65,536), scale the rest by 1 / (1 - p), in training mode."""
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        words = np.random.SFC64(int(torch.randint(2**62, ()))).random_raw(-(-x.numel() // 4))
        bits = torch.from_numpy(words.view(np.int16)[: x.numel()])
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):  # a mask of the same memory order
            bits = bits.as_strided(x.shape, x.stride())
        keep = bits.view(x.shape) >= round(self.p * 65536) - 32768
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))


# -- ResNet50 ---------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut; the stride is on the first 1x1, dropout follows every ReLU."""

    def __init__(self, c_in: int, c_mid: int, c_out: int, stride: int, project: bool, dropout: float) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(c_in, c_mid, 1, stride), _batchnorm(c_mid)
        self.conv2, self.bn2 = _conv(c_mid, c_mid, 3), _batchnorm(c_mid)
        self.conv3, self.bn3 = _conv(c_mid, c_out, 1), _batchnorm(c_out)
        self.shortcut = nn.Sequential(_conv(c_in, c_out, 1, stride), _batchnorm(c_out)) if project else nn.Identity()
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) to (N, c_out, H / stride, W / stride)."""
        out = self.dropout(F.relu(self.bn1(self.conv1(x))))
        out = self.dropout(F.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        return self.dropout(F.relu(out + self.shortcut(x)))


class ResNet50(nn.Module):
    """53 convolutions, 53 batch normalisations and 1 dense layer: 107 trainable layers."""

    def __init__(self, channels: int, size: tuple[int, int], n_classes: int, width: float, dropout: float) -> None:
        super().__init__()
        c = _scaled(64, width)
        self.conv1, self.bn1 = _conv(channels, c, 3), _batchnorm(c)
        stages = []
        for stage, (depth, filters) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True)):
            c_mid, c_out = _scaled(filters, width), _scaled(4 * filters, width)
            stride = 1 if stage == 0 else 2
            first = Bottleneck(c, c_mid, c_out, stride, True, dropout)
            others = (Bottleneck(c_out, c_mid, c_out, 1, False, dropout) for _ in range(depth - 1))
            stages.append(nn.Sequential(first, *others))
            c = c_out
        self.stage2, self.stage3, self.stage4, self.stage5 = stages
        height, image_width = (-(-side // 8) for side in size)
        # 2x2 average pool without padding; an 8x8 image arrives here as a single pixel, which has nothing to pool.
        self.pool = (min(2, height), min(2, image_width))
        self.head = _dense(c * (height // self.pool[0]) * (image_width // self.pool[1]), n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Raw pixels (N, C, H, W) to logits (N, K)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stage5(self.stage4(self.stage3(self.stage2(x))))
        return self.head(F.avg_pool2d(x, self.pool).flatten(1))


# -- DenseNet121 ------------------------------------------------------------------------------------------------------


def _dense_layer(c_in: int, growth: int, dropout: float) -> Append:
    first = {"bn1": _batchnorm(c_in), "relu1": nn.ReLU(), "conv1": _conv(c_in, 4 * growth, 1)}
    second = {"bn2": _batchnorm(4 * growth), "relu2": nn.ReLU(), "conv2": _conv(4 * growth, growth, 3)}
    return Append(OrderedDict(first | {"drop1": Dropout(dropout)} | second | {"drop2": Dropout(dropout)}))


class DenseNet121(nn.Module):
    """120 convolutions, 121 batch normalisations and 1 dense layer: 242 trainable layers."""

    def __init__(self, channels: int, n_classes: int, width: float, dropout: float) -> None:
        super().__init__()
        growth = _scaled(32, width)
        c = 2 * growth
        self.conv1, self.bn1 = _conv(channels, c, 3), _batchnorm(c)
        parts: list[nn.Module] = []
        for block, depth in enumerate((6, 12, 24, 16)):
            parts.append(nn.Sequential(*(_dense_layer(c + i * growth, growth, dropout) for i in range(depth))))
            c += depth * growth
            if block < 3:
                bn, conv = _batchnorm(c), _conv(c, c // 2, 1)
                parts.append(in_turn(bn=bn, relu=nn.ReLU(), conv=conv, drop=Dropout(dropout), pool=nn.AvgPool2d(2)))
                c //= 2
        self.block2, self.pool2, self.block3, self.pool3, self.block4, self.pool4, self.block5 = parts
        self.bn = _batchnorm(c)
        self.head = _dense(c, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Raw pixels (N, C, H, W) to logits (N, K)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.pool4(self.block4(self.pool3(self.block3(self.pool2(self.block2(x))))))
        x = F.relu(self.bn(self.block5(x)))
        return self.head(x.mean(dim=(2, 3)))
