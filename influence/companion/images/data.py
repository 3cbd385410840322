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
NAMES = ("digits", "photos", "mnist", "cifar10", "imagefolder")


class DataError(RuntimeError):
    """A data set is missing, incomplete or corrupt; the message says how to get it."""


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Attributes:
        images: (N, C, H, W) uint8, raw pixels 0..255.
        labels: (N,) int64.
        index: (N,) int64, position of each image in the set's own published order.
    """

    images: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """Sha256 over pixels, labels and positions."""
        sha = hashlib.sha256()
        self._hash_into(sha)
        return sha.hexdigest()

    def _hash_into(self, sha: Any) -> None:
        for tensor in self.tensors():
            sha.update(str(tuple(tensor.shape)).encode())
            sha.update(tensor.contiguous().numpy().tobytes())

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
        rows = torch.as_tensor(np.asarray(positions, dtype=np.int64))
        return Split(self.images[rows], self.labels[rows], self.index[rows])

    def sample(self, count: int | None, *, seed: int = 0) -> Split:
        """A random sample of at most `count` images without replacement, in stored order."""
        if count is None or count >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False)))


@dataclass(frozen=True)
class Dataset:
    """A data set with its three parts.

    Attributes:
        name: one of `NAMES`.
        classes: K class names.
        train, valid, test: the parts; `valid` is held out of the published training images, class by class.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    valid: Split
    test: Split

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, c, h, w = self.train.images.shape
        return c, h, w

    @cached_property
    def digest(self) -> str:
        """Sha256 over pixels, labels and positions of the three parts; hashed once, since every key asks for it."""
        sha = hashlib.sha256()
        for part in (self.train, self.valid, self.test):
            part._hash_into(sha)
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
    if name == "digits":
        return _digits()
    if name == "photos":
        return _photos(size)
    if name == "mnist":
        return _mnist(_root(name, data_dir))
    if name == "cifar10":
        return _cifar10(_root(name, data_dir))
    if name == "imagefolder":
        return _imagefolder(data_dir, size)
    raise DataError(f"unknown data set {name!r}: expected one of {', '.join(NAMES)}")


def require(names: Iterable[str], data_dir: str | Path | None = None) -> None:
    """Check, before any work, that every named data set is there and intact; download what torchvision can.

    Raises:
        DataError: with one line that says what is missing and how to get it.
    """
    for name in dict.fromkeys(names):
        if name not in NAMES:
            raise DataError(f"unknown data set {name!r}: expected one of {', '.join(NAMES)}")
        if name in ("mnist", "cifar10"):
            _root(name, data_dir)
        elif name == "imagefolder":
            _folder(data_dir)


# -- torchvision's sets -----------------------------------------------------------------------------------------------


def _root(name: str, data_dir: str | Path | None) -> Path:
    """The folder that holds `name`, verified; downloads only when the reader named no folder."""
    from ..ledger import paths

    if data_dir is not None:
        root = Path(data_dir).expanduser()
        problem = _problem(name, root)
        if problem:
            raise DataError(f"{name}: {problem}; expected torchvision's layout, or run without --data to download it")
        return root
    root = paths.BUILD / "data"
    if not _problem(name, root):
        return root
    try:
        _download(name, root)
        problem = _problem(name, root)
    except Exception as error:  # torchvision raises whatever urllib, hashlib or tarfile raise
        problem = f"the download failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    if problem:
        raise DataError(
            f"{name}: {problem}; get it with torchvision on a machine with network access and pass its folder as "
            f"--data DIR or INFLUENCE_DATA=DIR"
        )
    return root


def _download(name: str, root: Path) -> None:
    from torchvision.datasets import CIFAR10, MNIST

    root.mkdir(parents=True, exist_ok=True)
    (MNIST if name == "mnist" else CIFAR10)(str(root), download=True)


def _problem(name: str, root: Path) -> str | None:
    """What is wrong with the files of `name` below `root`, or None."""
    from torchvision.datasets import CIFAR10

    if name == "mnist":
        expected = {root / "MNIST" / "raw" / file: md5 for file, md5 in _MNIST_MD5.items()}
    else:
        listed = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
        expected = {root / CIFAR10.base_folder / file: md5 for file, md5 in listed}
    for path, md5 in expected.items():
        if not path.is_file():
            return f"{path} is missing"
        if _md5(path) != md5:
            return f"{path} is corrupt (its md5 is not {md5})"
    return None


_MD5_SEEN: dict[tuple[str, int, int], str] = {}


def _md5(path: Path) -> str:
    state = path.stat()
    seen = (str(path), state.st_size, state.st_mtime_ns)
    if seen not in _MD5_SEEN:
        with path.open("rb") as file:
            _MD5_SEEN[seen] = hashlib.file_digest(file, "md5").hexdigest()
    return _MD5_SEEN[seen]


def _mnist(root: Path) -> Dataset:
    from torchvision.datasets import MNIST

    train, test = (MNIST(str(root), train=part) for part in (True, False))
    return _split(
        "mnist",
        tuple(str(digit) for digit in range(10)),
        _whole(train.data.unsqueeze(1), train.targets),
        _whole(test.data.unsqueeze(1), test.targets),
        held_out=600,
    )


def _cifar10(root: Path) -> Dataset:
    from torchvision.datasets import CIFAR10

    train, test = (CIFAR10(str(root), train=part) for part in (True, False))
    parts = [
        _whole(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    ]
    return _split("cifar10", tuple(train.classes), *parts, held_out=500)


def _whole(images: Tensor, labels: Tensor) -> Split:
    return Split(images.to(torch.uint8), labels.to(torch.int64), torch.arange(len(labels)))


def _split(name: str, classes: tuple[str, ...], train: Split, test: Split, *, held_out: int) -> Dataset:
    """Hold `held_out` random training images of each class out for validation, as the released sampling scripts do."""
    generator = np.random.default_rng(_SPLIT_SEED)
    labels = train.labels.numpy()
    chosen = np.concatenate(
        [generator.choice(np.flatnonzero(labels == k), held_out, replace=False) for k in range(len(classes))]
    )
    valid = np.zeros(len(labels), dtype=bool)
    valid[chosen] = True
    return Dataset(name, classes, train.take(np.flatnonzero(~valid)), train.take(np.flatnonzero(valid)), test)


# -- sets that come with scikit-learn ---------------------------------------------------------------------------------


def _digits() -> Dataset:
    """The UCI optical digits of scikit-learn, 8x8, 16 grey levels spread over 0..255; 40 test and 20 validation images
    of each class, which leaves 1,197 for training."""  # noqa: D205, D209
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    everything = _whole(torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(bunch.target))
    names = tuple(str(digit) for digit in range(10))
    # The same per-class draw twice: first the test images, then the validation images among what is left.
    outer = _split("digits", names, everything, everything, held_out=40)
    inner = _split("digits", names, outer.train, outer.valid, held_out=20)
    return inner


def _photos(size: int) -> Dataset:
    """Crops of scikit-learn's two sample photographs on a grid without overlap; the label is the photograph.

    Columns of the grid go to train, validation and test in the proportion 4:1:1, so that no pixel is in two parts.
    """
    from sklearn.datasets import load_sample_images

    crops, labels, columns = [], [], []
    bunch = load_sample_images()
    for photograph, picture in enumerate(bunch.images):
        height, width = picture.shape[:2]
        if size > min(height, width) // 2:
            raise DataError(f"photos: crops of {size} pixels do not fit the {height}x{width} sample photographs")
        for column, left in enumerate(range(0, width - size + 1, size)):
            for top in range(0, height - size + 1, size):
                crops.append(np.ascontiguousarray(picture[top : top + size, left : left + size].transpose(2, 0, 1)))
                labels.append(photograph)
                columns.append(column)
    everything = _whole(torch.from_numpy(np.stack(crops)), torch.tensor(labels))
    group = np.asarray(columns) % 6
    names = tuple(Path(file).stem for file in bunch.filenames)
    parts = [everything.take(np.flatnonzero(rows)) for rows in (group < 4, group == 4, group == 5)]
    return Dataset("photos", names, *parts)


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


def _imagefolder(data_dir: str | Path | None, size: int) -> Dataset:
    """Images resized so that the shorter side has `size` pixels, centre-cropped to size x size, RGB."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    root = _folder(data_dir)
    shape = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])
    parts = []
    for part in ("train", "val"):
        try:
            found = ImageFolder(str(root / part), transform=shape)
            images = [found[i][0] for i in range(len(found))]
        except (FileNotFoundError, OSError) as error:
            raise DataError(f"imagefolder: {root / part}: {error}") from error
        parts.append((found.classes, _whole(torch.stack(images), torch.tensor(found.targets))))
    (classes, train), (test_classes, test) = parts
    if classes != test_classes:
        raise DataError(f"imagefolder: {root}/train and /val hold different classes")
    smallest = int(torch.bincount(train.labels).min())
    if smallest < 2:
        raise DataError(f"imagefolder: every class of {root}/train needs at least 2 images, one has {smallest}")
    return _split("imagefolder", tuple(classes), train, test, held_out=max(1, smallest // 10))
