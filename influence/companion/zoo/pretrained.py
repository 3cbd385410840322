"""CIFAR-10 networks that others trained: ResNet-20 and ResNet-56 of He et al. (2016), option A, full width."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import DataError

# Their input normalisation, for pixels in 0..1.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DEPTHS = {"resnet20": 20, "resnet56": 56}
NAMES = tuple(_DEPTHS)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters: every second pixel, new channels filled with 0."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.new = stride, c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) to (N, c_out, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.new:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """He et al. (2016), section 4.2: three stages of 16, 32 and 64 filters; takes raw pixels 0..255."""

    mean: Tensor
    std: Tensor

    def __init__(self, depth: int, *, initialise: bool = False) -> None:
        """Build the network; `initialise` draws the convolutions as He et al. (2015), else they await stored weights."""
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        stages, c = [], 16
        for c_out, stride in ((16, 1), (32, 2), (64, 2)):
            stages.append(
                nn.Sequential(*(Block(c if i == 0 else c_out, c_out, stride if i == 0 else 1) for i in range(blocks)))
            )
            c = c_out
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, 10)
        if initialise:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.register_buffer("mean", 255 * torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Raw pixels (N, 3, 32, 32) to logits (N, 10)."""
        x = F.relu(self.bn1(self.conv1((x - self.mean) / self.std)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))


def load(name: str, data_dir: str | Path | None, *, device: torch.device | str = "cpu") -> tuple[nn.Module, str]:
    """A trained network in evaluation mode, and the sha256 of its file.

    Args:
        name: one of `NAMES`.
        data_dir: folder with `checkpoints/NAME-*.th`, whose names end in the first 8 digits of their sha256.
        device: where to put it.

    Raises:
        DataError: unknown name, or the file is missing or corrupt.
    """
    if name not in _DEPTHS:
        raise DataError(f"unknown network {name!r}: expected one of {', '.join(NAMES)}")
    folder = None if data_dir is None else Path(data_dir).expanduser() / "checkpoints"
    found = [] if folder is None else sorted(folder.glob(f"{name}-*.th"))
    if not found:
        raise DataError(
            f"{name}: no {folder or 'checkpoints'}/{name}-*.th; name the folder with --data DIR or INFLUENCE_DATA=DIR "
            "(github.com/akamaster/pytorch_resnet_cifar10, pretrained_models)"
        )
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if not digest.startswith(found[0].stem.split("-")[-1]):
        raise DataError(f"{found[0]} is corrupt (its sha256 does not begin with the digits in its name)")
    stored = torch.load(found[0], map_location="cpu", weights_only=True)
    weights = {key.removeprefix("module."): value for key, value in stored["state_dict"].items()}
    network = CifarResNet(_DEPTHS[name])
    network.load_state_dict(weights)
    return network.to(device).eval(), digest
