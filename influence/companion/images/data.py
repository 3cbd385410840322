"""Image sets of the companion: two that come with scikit-learn, MNIST, CIFAR-10 and any image folder.

All images stay what the released code of Shu & Zhu (2019) feeds its networks: raw pixels in 0..255, without
normalisation. They are kept as uint8 and become floats batch by batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# md5 of the extracted files, which torchvision (it checks MNIST's archives only while downloading) does not look at.
_MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_SPLIT_SEED = 0
_DIGITS = tuple("0123456789")
NAMES = ("digits", "photos", "mnist", "cifar10", "imagefolder")


class DataError(RuntimeError):
    """A data set is missing, incomplete or corrupt; the message says how to get it."""


@dataclass(frozen=True)
class Split:
    """One part of a data set."""

    images: Tensor  # (N, C, H, W) uint8, raw pixels 0..255
    labels: Tensor  # (N,) int64
    index: Tensor  # (N,) int64, position of each image in the set's own published order

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """Sha256 over pixels, labels and positions."""
        return _digest(self)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and index."""
        return self.images, self.labels, self.index

    def with_(self, other: Split) -> Split:
        """The images of both, those of `other` last."""
        return Split(*(torch.cat(pair) for pair in zip(self.tensors(), other.tensors(), strict=True)))

    def where(self, chosen: Tensor) -> Split:
        """The images for which `chosen`, (N,) bool, holds."""
        return Split(*(tensor[chosen] for tensor in self.tensors()))

    def take(self, positions: Sequence[int] | np.ndarray) -> Split:
        """The images at `positions`, in that order."""
        return self.where(torch.as_tensor(np.asarray(positions, dtype=np.int64)))

    def sample(self, count: int | None, *, seed: int = 0) -> Split:
        """A random sample of at most `count` images without replacement, in stored order."""
        if count is None or count >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False)))


@dataclass(frozen=True)
class Dataset:
    """A data set with its three parts."""

    name: str  # one of `NAMES`
    classes: tuple[str, ...]  # K names
    train: Split
    valid: Split  # held out of the published training images, class by class
    test: Split

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, c, h, w = self.train.images.shape
        return c, h, w

    @cached_property
    def digest(self) -> str:
        """Sha256 over pixels, labels and positions of the three parts; hashed once, since every key asks for it."""
        return _digest(self.train, self.valid, self.test)


def _digest(*parts: Split) -> str:
    sha = hashlib.sha256()
    for tensor in (tensor for part in parts for tensor in part.tensors()):
        sha.update(str(tuple(tensor.shape)).encode())
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def load(name: str, data_dir: str | Path | None = None, *, size: int = 32) -> Dataset:
    """Load a data set with the splits of Shu & Zhu (2019), section "Data" of the released code.

    Args:
        name: "digits" (1,797 handwritten digits, 8x8) and "photos" (crops of two photographs) come with scikit-learn;
            "mnist" and "cifar10" are read through torchvision from `data_dir`; "imagefolder" reads
            `data_dir/photos/{train,val}/CLASS/*`, or `data_dir/{train,val}/CLASS/*`.
        data_dir: folder in torchvision's layout. None: torchvision downloads into `build/data` of the checkout.
        size: height and width that "photos" crops and "imagefolder" images get, in pixels.

    Raises:
        DataError: unknown name, or files missing or corrupt.
    """
    root = _root(name, data_dir)
    if root is not None:
        return _imagefolder(root, size) if name == "imagefolder" else _torchvision(name, root)
    return _digits() if name == "digits" else _photos(size)


def require(names: Iterable[str], data_dir: str | Path | None = None) -> None:
    """Check that every named data set is there and intact, and download what torchvision can; else a DataError."""
    for name in dict.fromkeys(names):
        _root(name, data_dir)


def _root(name: str, data_dir: str | Path | None) -> Path | None:
    """The folder that holds a set, verified; None for those of scikit-learn."""
    if name not in NAMES:
        raise DataError(f"unknown data set {name!r}: expected one of {', '.join(NAMES)}")
    if name == "imagefolder":
        return _folder(data_dir)
    return _downloaded(name, data_dir) if name in ("mnist", "cifar10") else None


# -- torchvision's sets -----------------------------------------------------------------------------------------------


def _downloaded(name: str, data_dir: str | Path | None) -> Path:
    """Downloads only when the reader named no folder."""
    from ..ledger import paths

    root = paths.BUILD / "data" if data_dir is None else Path(data_dir).expanduser()
    problem = _problem(name, root)
    if problem and data_dir is not None:
        raise DataError(f"{name}: {problem}; expected torchvision's layout; where no folder is named, it is downloaded")
    if problem:
        try:
            _download(name, root)
            problem = _problem(name, root)
        except Exception as error:  # torchvision raises whatever urllib, hashlib or tarfile raise
            reason = (str(error).splitlines() or [""])[0]
            problem = f"the download failed ({type(error).__name__}: {reason})"
    if problem:
        raise DataError(
            f"{name}: {problem}; get it with torchvision on a machine with network access and pass its folder as "
            f"--data DIR or INFLUENCE_DATA=DIR"
        )
    return root


def _class(name: str) -> type[Any]:
    from torchvision.datasets import CIFAR10, MNIST

    return MNIST if name == "mnist" else CIFAR10


def _download(name: str, root: Path) -> None:
    _class(name)(str(root), download=True)


def _problem(name: str, root: Path) -> str | None:
    """What is wrong with the files of `name` below `root`, or None."""
    from torchvision.datasets.utils import check_integrity

    found = _class(name)
    if name == "mnist":
        folder, expected = root / "MNIST" / "raw", list(_MNIST_MD5.items())
    else:
        folder = root / found.base_folder
        expected = [*found.train_list, *found.test_list, (found.meta["filename"], found.meta["md5"])]
    for file, md5 in expected:
        path = folder / file
        if not path.is_file():
            return f"{path} is missing"
        if not check_integrity(str(path), md5):
            return f"{path} is corrupt (its md5 is not {md5})"
    return None


def _torchvision(name: str, root: Path) -> Dataset:
    train, test = (_class(name)(str(root), train=part) for part in (True, False))
    if name == "mnist":
        parts = [_whole(part.data.unsqueeze(1), part.targets) for part in (train, test)]
        return _split(name, _DIGITS, *parts, held_out=600)
    images = (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test))
    parts = [_whole(x, torch.tensor(part.targets)) for x, part in zip(images, (train, test), strict=True)]
    return _split(name, tuple(train.classes), *parts, held_out=500)


def _whole(images: Tensor, labels: Tensor) -> Split:
    return Split(images.to(torch.uint8), labels.to(torch.int64), torch.arange(len(labels)))


def _split(name: str, classes: tuple[str, ...], train: Split, test: Split, *, held_out: int) -> Dataset:
    """Hold `held_out` random training images of each class out for validation, as the released sampling scripts do."""
    generator = np.random.default_rng(_SPLIT_SEED)
    labels = train.labels.numpy()
    chosen = np.concatenate(
        [generator.choice(np.flatnonzero(labels == k), held_out, replace=False) for k in range(len(classes))]
    )
    valid = torch.from_numpy(np.isin(np.arange(len(labels)), chosen))
    return Dataset(name, classes, train.where(~valid), train.where(valid), test)


# -- sets that come with scikit-learn ---------------------------------------------------------------------------------


def _digits() -> Dataset:
    """The UCI digits of scikit-learn, 16 greys spread over 0..255; 40 test and 20 validation images of each class."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    everything = _whole(torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(bunch.target))
    # The same per-class draw twice: first the test images, then the validation images among what is left.
    outer = _split("digits", _DIGITS, everything, everything, held_out=40)
    return _split("digits", _DIGITS, outer.train, outer.valid, held_out=20)


def _photos(size: int) -> Dataset:
    """Crops of scikit-learn's two photographs, the label; columns of a grid go 4:1:1 to train, validation and test."""
    from sklearn.datasets import load_sample_images

    bunch = load_sample_images()
    pictures = torch.from_numpy(np.stack(bunch.images)).permute(0, 3, 1, 2)
    height, width = pictures.shape[2:]
    if size > min(height, width) // 2:
        raise DataError(f"photos: crops of {size} pixels do not fit the {height}x{width} sample photographs")
    grid = pictures.unfold(2, size, size).unfold(3, size, size).permute(0, 3, 2, 1, 4, 5)
    number = torch.arange(grid.shape[:3].numel()).view(grid.shape[:3])
    everything = _whole(grid.flatten(0, 2), number.flatten() // number[0].numel())
    group = number.flatten() // number.shape[2] % number.shape[1] % 6  # of the crop's column
    names = tuple(Path(file).stem for file in bunch.filenames)
    return Dataset("photos", names, *(everything.where(rows) for rows in (group < 4, group == 4, group == 5)))


# -- a folder of images -----------------------------------------------------------------------------------------------


def _folder(data_dir: str | Path | None) -> Path:
    if data_dir is None:
        raise DataError(
            "imagefolder: name the folder with --data DIR or INFLUENCE_DATA=DIR (train/CLASS/*, val/CLASS/*)"
        )
    root = Path(data_dir).expanduser()
    for candidate in (root / "photos", root):
        if (candidate / "train").is_dir() and (candidate / "val").is_dir():
            return candidate
    raise DataError(f"imagefolder: {root} holds no train/ and val/ folders (nor photos/train and photos/val)")


def image_folder(root: Path, size: int) -> Any:
    """The images below a folder of classes, as torchvision reads them: the shorter side resized, centre-cropped, RGB.

    What is hidden, or left by an archive of macOS, is neither a class nor an image. An image that cannot be read, or
    that RGB would clip, is a DataError with its name.

    Raises:
        FileNotFoundError: no folder of a class, or one that holds no image itself.
    """
    from PIL import Image
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS
    from torchvision.transforms import v2

    def is_image(file: str | Path) -> bool:
        path = Path(file).relative_to(root)
        return path.suffix.lower() in IMG_EXTENSIONS and all(map(_visible, path.parts))

    def pixels(file: str) -> Image.Image:
        with Image.open(file) as image:
            if image.mode[0] in "IF":  # 16 or 32 bits
                remedy = "convert it to 8 bits, or give a function that returns floats"
                raise ValueError(f"16-bit or float image (mode {image.mode}): {remedy}")
            return image.convert("RGB")

    class Images(ImageFolder):
        def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
            folders = [path for path in sorted(Path(directory).iterdir()) if path.is_dir() and _visible(path.name)]
            for folder in folders:
                if not any(map(is_image, folder.iterdir())):
                    raise FileNotFoundError(f"{folder} holds no image itself ({', '.join(IMG_EXTENSIONS)})")
            if not folders:
                raise FileNotFoundError(f"{directory} holds no folder")
            names = [folder.name for folder in folders]
            return names, {name: k for k, name in enumerate(names)}

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            try:
                found: tuple[Tensor, int] = super().__getitem__(index)
            except Exception as error:  # the decoders raise all kinds
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise DataError(f"{self.samples[index][0]}: cannot be read as an image ({reason})") from error
            return found

    shape = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])
    return Images(str(root), transform=shape, loader=pixels, is_valid_file=is_image)


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _imagefolder(root: Path, size: int) -> Dataset:
    parts = []
    for part in ("train", "val"):
        try:
            found = image_folder(root / part, size)
            images = [found[i][0] for i in range(len(found))]
        except OSError as error:
            raise DataError(f"imagefolder: {root / part}: {error}") from error
        parts.append((found.classes, _whole(torch.stack(images), torch.tensor(found.targets))))
    (classes, train), (test_classes, test) = parts
    if classes != test_classes:
        raise DataError(f"imagefolder: {root}/train and /val hold different classes")
    smallest = int(torch.bincount(train.labels).min())
    if smallest < 2:
        raise DataError(f"imagefolder: every class of {root}/train needs at least 2 images, one has {smallest}")
    return _split("imagefolder", tuple(classes), train, test, held_out=max(1, smallest // 10))
