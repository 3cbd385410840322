"""What an artifact that computes reads from the reader's folder: whence each comes, on which terms, what is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def of(parameters: Mapping[str, Any]) -> list[str]:
    """Names of the data sets, labels and networks of others that a notebook reads; none where it only draws."""
    from ..images import corruptions, data, outliers
    from ..zoo import pretrained, recipes

    if not parameters.get("recompute", True):
        return []

    def named(*names: str) -> Iterator[str]:
        for name in names:
            value = parameters.get(name) or []
            yield from [value] if isinstance(value, str) else value

    found = [*named("dataset", "datasets"), *(name for name in named("data") if name in data.NAMES)]
    if any(name in outliers.HUMAN_LABELS for name in named("kinds", "labels")):
        found.append("cifar10n")
    found += [name for name in named("corruptions") if name == corruptions.FROST]
    others = [f"{model}-{name}" for model in named("models") for name in found]  # as the artifacts name them
    found += [name for name in others if name in pretrained.NAMES]
    for name in recipes.with_seeds(list(named("networks", "detectors")), parameters.get("seeds") or [0]):
        if name in pretrained.NAMES:
            found += [pretrained.SOURCES[name].data, name]
        else:
            with contextlib.suppress(recipes.RecipeError):  # the notebook says that there is no such network
                recipe = recipes.named(name)
                found += [recipe.data, *(["cifar10n"] if recipe.labels else [])]
    return [name for name in dict.fromkeys(found) if name not in ("digits", "photos")]


def described(name: str) -> str:
    """Where to get it, how it is checked, and its terms of use, in a line."""
    from torchvision.datasets import CIFAR10, MNIST

    from ..images import corruptions
    from ..zoo import pretrained

    if name in pretrained.SOURCES:
        source = pretrained.SOURCES[name]
        digits = source.file.partition(".")[0].rpartition("-")[2]
        return f"{name}: checkpoints/{source.file} from {source.address}, sha256 {digits}...; {source.licence}"
    if name == "mnist":
        sums = ", ".join(f"{file} {md5}" for file, md5 in MNIST.resources)
        return f"{name}: {MNIST.mirrors[0]}, md5 {sums}; CC BY-SA 3.0 as usually quoted"
    if name == "cifar10":
        return f"{name}: {CIFAR10.url}, md5 {CIFAR10.tgz_md5}; no licence stated, cite Krizhevsky 2009"
    if name == "cifar10n":
        check = "ours has md5 c8d9d1d8a95ac99d7959195e45c1f129"
        return f"{name}: the labels of http://noisylabels.com as cifar10n.npz, {check}; CC BY-NC 4.0"
    if name == corruptions.FROST:
        files = ", ".join(f"{file} {digest[:8]}..." for file, digest in corruptions.FROST_SHA256.items())
        return f"{name}: {corruptions.FROST_ADDRESS} as frost/, sha256 {files}; Apache-2.0"
    if name == "imagefolder":
        ours = "1,200 and 400 photographs of Imagenette, of 10 classes, were published"
        return f"{name}: images of yours in photos/{{train,val}}/CLASS/; {ours}; no checksum; ImageNet terms (research)"
    return f"{name}: unknown"


def problem(name: str, folder: Path | None) -> str:
    """Why it cannot be read from the folder of the data sets, in a line; empty where it can.

    What torchvision can download is downloaded where no folder is named.
    """
    from ..images import corruptions, data, outliers
    from ..zoo import pretrained

    try:
        if name == "cifar10n":
            outliers.human_labels(outliers.HUMAN_LABELS[0], folder)
        elif name == corruptions.FROST:
            corruptions.frost_photographs(folder)
        elif name in pretrained.NAMES:
            pretrained.load(name, folder)
        else:
            data.require([name], folder)
    except data.DataError as error:
        return str(error)
    return ""
