"""Examples of the reader's own: a torchvision set, a folder of images, an .npz file, or what a function returns."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ..images import data
from ..ledger import paths

_HELD_OUT = 0.2  # of each class
# How folders of training and of test images are called, in any case; the first that is there is taken.
_PARTS = (("train", "training"), ("test", "testing", "val", "valid", "validation"))
_FORMS = f"{', '.join(n for n in data.NAMES if n != 'imagefolder')}, torchvision:NAME, an image folder, an .npz file"


class AdaptError(ValueError):
    """A model or data that cannot be used as they are; the message is one line for the reader."""


@contextlib.contextmanager
def refused(
    before: str = "",
    after: str = "",
    *,
    errors: tuple[type[Exception], ...] = (Exception,),
) -> Iterator[None]:
    """The first line of an error of another library as one of ours, amid our text."""
    try:
        yield
    except AdaptError:
        raise
    except errors as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AdaptError(f"{before}{reason}{after}") from None


@dataclass(frozen=True)
class Examples(Dataset):
    """Labelled examples, read one by one when they are asked for."""

    labels: Tensor  # ``(N,)`` int64
    read: Callable[[int], Tensor]  # number -> one example as it is stored: bytes (uint8), floats, or tokens (int64)
    numbers: Sequence[int]  # of the N examples in the data as they were given, from 0; a part keeps its numbers
    files: Sequence[str] = ()  # number -> file that holds it, where each has one

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        return self.read(self.numbers[position]), self.labels[position]

    def stored(self, rows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Inputs as they are stored ``(n, ...)``, and labels ``(n,)``; an AdaptError where examples differ in shape."""
        positions = [int(row) for row in rows]
        parts = [self[row][0] for row in positions]
        shapes = sorted({tuple(part.shape) for part in parts})
        if len(shapes) > 1:
            raise AdaptError(f"the examples differ in shape ({shapes[0]}, {shapes[1]}): set size to give all one size")
        return torch.stack(parts), self.labels[positions]

    def batch(self, rows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Inputs as a model takes them, bytes as floats 0..255, and labels."""
        inputs, labels = self.stored(rows)
        return as_input(inputs), labels

    def take(self, rows: Iterable[int]) -> Examples:
        """These examples alone, in this order."""
        chosen = [int(row) for row in rows]
        return replace(self, labels=self.labels[chosen], numbers=[self.numbers[row] for row in chosen])

    def sample(self, count: int, *, seed: int = 0) -> Examples:
        """At most `count` of them, drawn without replacement, in stored order; 0 for all."""
        if not 0 < count < len(self):
            return self
        return self.take(sorted(np.random.default_rng(seed).choice(len(self), count, replace=False)))

    def hold_out(self) -> tuple[Examples, Examples] | None:
        """All but a fifth of each class, and that fifth, drawn at random; None where no class has enough."""
        generator = np.random.default_rng(0)
        labels = self.labels.numpy()
        held = np.zeros(len(labels), dtype=bool)
        for k in np.unique(labels):
            members = np.flatnonzero(labels == k)
            held[generator.choice(members, round(_HELD_OUT * len(members)), replace=False)] = True
        if not held.any():
            return None
        return self.take(np.flatnonzero(~held)), self.take(np.flatnonzero(held))


@dataclass(frozen=True)
class Material:
    """What a word for data stands for."""

    classes: tuple[str, ...]  # their names
    train: Examples  # or all where the data have no parts
    test: Examples | None = None

    @property
    def parts(self) -> dict[str, Examples]:
        """The parts that the data have: "train" and "test", or "all"."""
        return {"all": self.train} if self.test is None else {"train": self.train, "test": self.test}

    @property
    def measured(self) -> Examples:
        """The test examples, or all where the data have no parts."""
        return self.train if self.test is None else self.test


def as_input(inputs: Tensor) -> Tensor:
    """Bytes as floats 0..255; all else as it is."""
    return inputs.float() if inputs.dtype == torch.uint8 else inputs


def collate(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch of examples, bytes as floats 0..255."""
    inputs, labels = default_collate(rows)
    return as_input(inputs), labels


def load_data(spec: str, *, size: int = 0, root: Path | None = None) -> Material:
    """The data that a word names.

    Args:
        spec: ``digits``, ``photos``, ``mnist`` or ``cifar10``, as the companion splits them; ``torchvision:NAME`` of a
            set with a ``train`` option, below `root`; a folder ``train/CLASS/*`` with ``test/`` or ``val/`` beside it
            (in any case; also training, testing, valid, validation), or of ``CLASS/*`` alone; an .npz file with images
            and labels (and test_images and test_labels, and classes); ``package.module:function`` of the reader's that
            returns (inputs, labels), or a pair of these for training and test. Data that come without parts are left
            whole.
        size: height and width for the images of a folder (shorter side resized, then centre-cropped) and the crops of
            ``photos``; 0 for 224 in a folder and 32 for photos.
        root: folder of the data sets; None for INFLUENCE_DATA, else torchvision downloads into build/data.

    Raises:
        AdaptError: with one line that says what is wrong and what to do.
    """
    root = root or paths.data_dir()
    path = Path(spec).expanduser()
    prefix, _, rest = spec.partition(":")
    if spec in data.NAMES and spec != "imagefolder":
        with refused(errors=(data.DataError,)):
            found = data.load(spec, root, **({"size": size} if size else {}))
        return Material(
            found.classes, *(_tensors(part.images, part.labels, spec) for part in (found.train, found.test))
        )
    if prefix == "torchvision" and rest:
        return _torchvision(spec, rest, root)
    if spec and path.is_dir():
        return _folder(spec, path, size or 224)
    if path.is_file():
        if path.suffix.lower() != ".npz":
            raise AdaptError(f"{spec}: expected an .npz file with images and labels, or a folder")
        return _npz(spec, path)
    if rest and os.sep not in spec:
        return _returned(spec)
    raise AdaptError(f"data {spec!r}: no such file or folder; expected {_FORMS} or MODULE:FUNCTION")


def _tensors(inputs: Tensor, labels: Tensor, where: str) -> Examples:
    if inputs.ndim < 2 or len(inputs) == 0:
        raise AdaptError(f"{where}: inputs must be (N, ...) with N >= 1, got shape {tuple(inputs.shape)}")
    if labels.shape != (len(inputs),):
        raise AdaptError(f"{where}: labels must be ({len(inputs)},), one for each example, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise AdaptError(f"{where}: labels must be whole numbers 0..K-1, got {labels.dtype}")
    if bool((labels < 0).any()):
        raise AdaptError(f"{where}: labels must be 0..K-1, got {int(labels.min())}")
    if inputs.is_floating_point() and len(bad := (~torch.isfinite(inputs.flatten(1)).all(1)).nonzero()):
        raise AdaptError(f"{where}: the inputs hold NaN or infinity, first in example {int(bad[0])}")
    if inputs.dtype == torch.float64:
        inputs = inputs.float()
    return Examples(labels.long(), inputs.__getitem__, range(len(inputs)))


def _numbered(*parts: Examples) -> tuple[str, ...]:
    return tuple(str(k) for k in range(max(int(part.labels.max()) for part in parts) + 1))


# -- an .npz file -----------------------------------------------------------------------------------------------------


def _npz(spec: str, path: Path) -> Material:
    unreadable = refused(f"{spec}: cannot be read as .npz without pickles (", ")")
    with unreadable, np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for name in ("images", "labels"):
        if name not in arrays:
            raise AdaptError(f"{spec}: has no array {name!r}, but {', '.join(arrays) or 'nothing'}")
    if ("test_images" in arrays) != ("test_labels" in arrays):
        raise AdaptError(f"{spec}: test_images and test_labels go together, got one of them")
    parts = [
        _tensors(_images(spec, arrays[f"{part}images"]), _labels(spec, arrays[f"{part}labels"]), spec)
        for part in ("", "test_")
        if f"{part}images" in arrays
    ]
    numbered = _numbered(*parts)
    names = tuple(map(str, arrays.get("classes", numbered)))
    if len(names) < len(numbered):
        raise AdaptError(f"{spec}: classes must name all of 0..{len(numbered) - 1}, got {len(names)} names")
    return Material(names, *parts)


def _images(spec: str, array: np.ndarray) -> Tensor:
    """Channels first, one grey channel where there is none."""
    if array.dtype.kind not in "uif":
        raise AdaptError(f"{spec}: images must be numbers, got {array.dtype}")
    if array.dtype.kind in "ui" and array.dtype != np.uint8 and array.ndim < 3:
        array = array.astype(np.int64)  # a table of token numbers
    elif array.dtype.kind in "ui" and array.dtype != np.uint8:
        if array.size and (array.min() < 0 or array.max() > 255):
            raise AdaptError(f"{spec}: whole-numbered images must lie in 0..255, got {array.min()}..{array.max()}")
        array = array.astype(np.uint8)
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(array))


def _labels(spec: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "uif" or array.dtype == np.uint64:
        raise AdaptError(f"{spec}: labels must be whole numbers 0..K-1, got {array.dtype}")
    return torch.from_numpy(array.astype(np.float64 if array.dtype.kind == "f" else np.int64))


# -- a folder of images -----------------------------------------------------------------------------------------------


def _folder(spec: str, path: Path, size: int) -> Material:
    there = {entry.name.lower(): entry for entry in path.iterdir() if entry.is_dir()}
    parts = [[there[name] for name in names if name in there][:1] for names in _PARTS]
    folders = [*parts[0], *parts[1]] if parts[0] else [path]
    classes, found = zip(*(_one_folder(spec, folder, size) for folder in folders), strict=True)
    if len(set(classes)) > 1:
        raise AdaptError(f"{spec}: {folders[0].name} and {folders[1].name} hold folders of different classes")
    return Material(classes[0], *found)


def _one_folder(spec: str, path: Path, size: int) -> tuple[tuple[str, ...], Examples]:
    with refused(f"{spec}: expected one folder of images for each class below {path}: ", errors=(FileNotFoundError,)):
        found = data.image_folder(path, size)

    def read(position: int) -> Tensor:
        with refused(errors=(data.DataError,)):
            image: Tensor = found[position][0]
        return image

    files = [file for file, _ in found.samples]
    return tuple(found.classes), Examples(torch.tensor(found.targets), read, range(len(found)), files)


# -- torchvision's sets, and functions --------------------------------------------------------------------------------


def _torchvision(spec: str, name: str, root: Path | None) -> Material:
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if not isinstance(kind, type):
        raise AdaptError(f"torchvision has no data set {name!r} (names are as in torchvision.datasets, CIFAR100)")
    parts: list[Examples] = []
    names: Sequence[str] | None = None
    for train in (True, False):
        with refused(f"{spec}: "):  # torchvision raises whatever urllib, hashlib or tarfile raise
            try:
                found: Any = kind(str(root or paths.BUILD / "data"), train=train, download=root is None)
            except RuntimeError as error:
                if root is None or "download=True" not in str(error):
                    raise
                remedy = "--root or INFLUENCE_DATA names its folder; without one, torchvision downloads it"
                raise AdaptError(f"{spec}: not found in {root}: {remedy}") from None
            except TypeError:
                reason = "has no train and test parts that torchvision knows: use an image folder"
                raise AdaptError(f"{spec}: {reason}") from None
        names = getattr(found, "classes", None)
        images = found.data if isinstance(found.data, Tensor) else torch.as_tensor(np.asarray(found.data))
        labels = getattr(found, "targets", getattr(found, "labels", None))
        parts.append(_tensors(_images(spec, images.numpy()), torch.as_tensor(labels), spec))
    return Material(tuple(names) if names else _numbered(*parts), *parts)


def _returned(spec: str) -> Material:
    value = call(spec)
    pairs: Sequence[Any] = []
    if isinstance(value, list | tuple) and len(value) == 2:
        pairs = value if isinstance(value[0], list | tuple) else [value]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise AdaptError(f"{spec}() must return (inputs, labels), or a pair of these for training and test")
    parts = [_tensors(_numbers(spec, x), _numbers(spec, labels), f"{spec}()") for x, labels in pairs]
    return Material(_numbered(*parts), *parts)


def _numbers(spec: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    with refused(f"{spec}() must return tensors, arrays or lists of numbers, got {type(value).__name__} (", ")"):
        array = np.require(np.asarray(value), requirements="W")
        return torch.as_tensor(array.astype(np.int64) if array.dtype.kind == "u" and array.itemsize > 1 else array)


def described(error: Exception) -> str:
    """Kind and first line of an error, and the line of the reader's own code where it arose."""
    reason = (str(error).strip().splitlines() or [""])[0]
    place = own_line(error)
    return f"{type(error).__name__}: {reason}{f', at {place}' if place else ''}"


def own_line(error: Exception) -> str:
    """File and line of the last code in an error's traceback that is neither a library's nor ours; else empty."""
    libraries = (str(paths.PACKAGE), sysconfig.get_path("stdlib"), "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    own = [f"{frame.filename}:{frame.lineno}" for frame in frames if not frame.filename.startswith(libraries)]
    return own[-1] if own else ""


def call(spec: str) -> Any:
    """What ``package.module:function`` returns, modules of the current folder first; an AdaptError where it fails."""
    module_name, _, function_name = spec.partition(":")
    if sys.path[0] != os.getcwd():
        sys.path.insert(0, os.getcwd())  # and stays, for what function and forward import
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the reader's module raises
        raise AdaptError(f"{spec}: cannot import {module_name} ({described(error)})") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise AdaptError(f"{spec}: {module_name} has no function {function_name!r}")
    try:
        return function()
    except Exception as error:
        raise AdaptError(f"{spec}() failed: {described(error)}") from error
