"""Networks that others trained, read from the reader's folder and never shipped with the companion.

He et al.'s ResNet-20 and -56, the ResNet-32 that the group of Shu & Zhu trained for their follow-up mFI-PSO (on
CIFAR-10 and on MNIST), and a DenseNet-BC-40-12. All take raw pixels 0..255, and scale them as they were trained to.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..images.data import DataError
from ..ledger import cache
from .models import Append, in_turn


@dataclass(frozen=True)
class Source:
    """Where a network is to be had, and what it must measure."""

    file: str  # name below `checkpoints/`; its last digits begin the sha256
    address: str
    data: str  # a name of `data.NAMES`
    test_accuracy: float  # on the 10,000 test images, to .0005
    licence: str  # of the weights
    build: Callable[[], nn.Module]  # without its weights


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
        """Build the network; `initialise` draws the convolutions as He et al. (2015), for a training from scratch."""
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _stages(Block, blocks)
        self.linear = nn.Linear(64, 10)
        if initialise:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        _scale_by(self, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))

    def forward(self, x: Tensor) -> Tensor:
        """Raw pixels (N, 3, 32, 32) to logits (N, 10)."""
        x = F.relu(self.bn1(self.conv1((x - self.mean) / self.std)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))


class PreActivationBlock(nn.Module):
    """Normalise and rectify before each of two 3x3 convolutions; a 1x1 convolution on the shortcut at a stride."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), SameConv2d(c_in, c_out, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), SameConv2d(c_out, c_out, 3)
        self.shortcut = SameConv2d(c_in, c_out, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) to (N, c_out, H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active))


class SameConv2d(nn.Conv2d):
    """TensorFlow's "same" padding: what a stride leaves over goes to the right and below."""

    def __init__(self, c_in: int, c_out: int, size: int, stride: int = 1) -> None:
        super().__init__(c_in, c_out, size, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) to (N, c_out, ceil(H / stride), ceil(W / stride))."""
        pads: list[int] = []
        for side, size, stride in zip(reversed(x.shape[2:]), reversed(self.kernel_size), self.stride, strict=True):
            missing = max(0, (-(-side // stride) - 1) * stride + size - side)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, pads))


class PreActivationResNet32(nn.Module):
    """ResNet-32 v2 of the group's repository, whose training divided the pixels 0..255 by `scale`."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.conv = SameConv2d(channels, 16, 3)
        self.blocks = nn.Sequential(*(block for stage in _stages(PreActivationBlock, 5) for block in stage))
        self.bn, self.dense = nn.BatchNorm2d(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Raw pixels (N, C, H, W) to logits (N, 10)."""
        return self.dense(F.relu(self.bn(self.blocks(self.conv(x / self.scale)))).mean(dim=(2, 3)))


def _densenet_layer(c_in: int) -> Append:
    """1x1 to 48, then 3x3 to 12."""
    first = {"bn1": nn.BatchNorm2d(c_in), "relu1": nn.ReLU(), "conv1": nn.Conv2d(c_in, 48, 1, bias=False)}
    second = {"bn2": nn.BatchNorm2d(48), "relu2": nn.ReLU(), "conv2": nn.Conv2d(48, 12, 3, padding=1, bias=False)}
    return Append(OrderedDict(first | second))


class DenseNetBC(nn.Module):
    """DenseNet-BC of depth 40 and growth 12 (Huang et al. 2017); takes raw pixels 0..255."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()

        def block(c_in: int) -> nn.Sequential:
            return in_turn(layer=nn.Sequential(*(_densenet_layer(c_in + 12 * i) for i in range(6))))

        def halved(c: int) -> nn.Sequential:
            conv = nn.Conv2d(c, c // 2, 1, bias=False)
            return in_turn(bn1=nn.BatchNorm2d(c), relu=nn.ReLU(), conv1=conv, pool=nn.AvgPool2d(2))

        self.conv1 = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.block1, self.trans1 = block(24), halved(96)
        self.block2, self.trans2 = block(48), halved(120)
        self.block3 = block(60)
        self.bn1, self.fc = nn.BatchNorm2d(132), nn.Linear(132, 10)
        _scale_by(self, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))

    def forward(self, x: Tensor) -> Tensor:
        """Raw pixels (N, 3, 32, 32) to logits (N, 10)."""
        x = self.trans1(self.block1(self.conv1((x - self.mean) / self.std)))
        x = F.relu(self.bn1(self.block3(self.trans2(self.block2(x)))))
        return self.fc(x.mean(dim=(2, 3)))


def _stages(block: Callable[[int, int, int], nn.Module], count: int) -> list[nn.Sequential]:
    """Three stages of `count` blocks, of 16, 32 and 64 channels; the later two begin with a stride of 2."""
    return [
        nn.Sequential(block(c_in, c_out, stride), *(block(c_out, c_out, 1) for _ in range(count - 1)))
        for c_in, c_out, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
    ]


def _scale_by(network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    for name, values in (("mean", mean), ("std", std)):
        network.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)


_HE = "github.com/akamaster/pytorch_resnet_cifar10, pretrained_models/"
_GROUP = "github.com/BruceResearch/mFI-PSO, FI_Image_Choose/"
_HAZY = "github.com/HazyResearch/ukb-cardiac-mri, ukb/models/frame/pretrained_densenet_4012BC.pth.tar"
_BSD, _APACHE = "BSD 2-clause", "Apache-2.0"
SOURCES: dict[str, Source] = {
    "resnet20": Source("resnet20-12fca82f.th", _HE, "cifar10", 0.9173, _BSD, lambda: CifarResNet(20)),
    "resnet56": Source("resnet56-4bfd9763.th", _HE, "cifar10", 0.9339, _BSD, lambda: CifarResNet(56)),
    "group-resnet32-cifar10": Source(
        "mfipso_resnet32_cifar10-f508f29a.h5", _GROUP, "cifar10", 0.9128, _APACHE, lambda: PreActivationResNet32(3, 1.0)
    ),
    "group-resnet32-mnist": Source(
        "mfipso_resnet32_mnist-b27eb6b6.h5", _GROUP, "mnist", 0.9925, _APACHE, lambda: PreActivationResNet32(1, 255.0)
    ),
    "densenet-bc-40-12": Source("densenet_bc_40_12-59022af1.pth.tar", _HAZY, "cifar10", 0.9316, _APACHE, DenseNetBC),
}
NAMES = tuple(SOURCES)


def load(name: str, data_dir: str | Path | None, *, device: torch.device | str = "cpu") -> tuple[nn.Module, str]:
    """The network of `NAMES`, in evaluation mode, and the sha256 of its file, `data_dir/checkpoints/FILE`.

    Raises:
        DataError: unknown name, or the file is missing, corrupt or of another network.
    """
    if name not in SOURCES:
        raise DataError(f"unknown network {name!r}: expected one of {', '.join(NAMES)}")
    source = SOURCES[name]
    file = Path(data_dir or "").expanduser() / "checkpoints" / source.file
    if data_dir is None or not file.is_file():
        raise DataError(
            f"{name}: no {file}; name the folder with --data DIR or INFLUENCE_DATA=DIR "
            f"(the file is from {source.address})"
        )
    digest = cache.sha256(file)
    expected = source.file.partition(".")[0].rpartition("-")[2]
    if not digest.startswith(expected):
        raise DataError(f"{file} is corrupt (its sha256 begins with {digest[:8]}, not {expected})")
    network = source.build()
    if file.suffix == ".h5":
        _load_keras(network, file)
    else:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        network.load_state_dict({k.removeprefix("module."): v for k, v in stored["state_dict"].items()})
    return network.to(device).eval(), digest


_KERAS_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def _load_keras(network: nn.Module, file: Path) -> None:
    """Keras numbers its layers of a kind in the order of their calls, which is that of the modules here."""
    import h5py

    kinds = {nn.Conv2d: "conv2d", nn.BatchNorm2d: "batch_normalization", nn.Linear: "dense"}
    with h5py.File(file, "r") as opened:
        layers = opened["model_weights"] if "model_weights" in opened else opened
        for kind, word in kinds.items():
            alike = (module for module in network.modules() if isinstance(module, kind))
            for number, module in enumerate(alike, start=1):
                stored = layers[f"{word}_{number}"][f"{word}_{number}"]
                arrays = {key.partition(":")[0]: torch.from_numpy(np.asarray(value)) for key, value in stored.items()}
                if kind is nn.BatchNorm2d:
                    found = {_KERAS_NORM[key]: array for key, array in arrays.items()}
                    found["num_batches_tracked"] = torch.tensor(0)
                else:
                    kernel = arrays["kernel"]
                    turned = kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T  # (H, W, in, out) there
                    found = {"weight": turned.contiguous(), "bias": arrays["bias"]}
                module.load_state_dict(found)
