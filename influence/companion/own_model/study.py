"""A model and data of the reader's own: what is studied, and what the analyses of it share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import influence

from ..ledger import cache
from ..ledger.results import Run
from ..scores.detection import columns, share_interval
from . import loading
from .material import Examples, Material, load_data

# From here on the traces of many examples are estimated: a backward pass for each class would take too long.
MANY_CLASSES = 64
DRAWS = 32  # random signs for one example: a relative standard deviation of at most 25%
# Input values in one batch: what bounds the activations of large images; 32 small images fit.
BATCH_VALUES = 2**20


@dataclass(frozen=True)
class Subject:
    """What is studied."""

    model: nn.Module  # takes the examples as they are stored, bytes as 0..255
    material: Material  # its examples
    classes: int  # K
    device: torch.device  # where the model is
    image: bool  # whether an example is an image ``(C, H, W)``

    @property
    def many_classes(self) -> bool:
        """Whether there are too many classes for a backward pass each, beyond a few examples."""
        return self.classes > MANY_CLASSES

    def at_once(self, size: int) -> int:
        """`size` examples, or fewer where they are large."""
        return max(1, min(size, BATCH_VALUES // max(1, self.material.train[0][0].numel())))

    def batches(self, examples: Examples, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels on the device of the model, at most `size` at once."""
        size = self.at_once(size)
        for start in range(0, len(examples), size):
            x, labels = examples.batch(range(start, min(start + size, len(examples))))
            yield x.to(self.device), labels.to(self.device)

    def class_name(self, k: int) -> str:
        """Name of a class, its number where the data have none."""
        return self.material.classes[k] if k < len(self.material.classes) else str(k)


def load(run: Run, model: str, dataset: str, *, size: int = 0, **options: Any) -> Subject:
    """The model and the data that two words name, checked with two examples; the run notes the labels as an input.

    The words are those of `loading.load_model`, with its `options`, and of `material.load_data`, with `size`; both
    raise an AdaptError where one cannot be used.
    """
    material = load_data(dataset, size=size)
    network, classes = loading.load_model(
        model,
        material.train,
        classes=len(material.classes),
        dataset=dataset,
        profile=run.profile,
        device=run.device,
        **options,
    )
    loading.check(network, material.measured)
    run.add_input(dataset, cache.fingerprint([part.labels.tolist() for part in material.parts.values()]))
    shape = material.train[0][0].shape
    image = len(shape) == 3 and shape[0] in (1, 3)
    return Subject(network, material, classes, loading.device_of(network), image)


def log_probs_of(subject: Subject, x: Tensor) -> Tensor:
    """Log P ``(N, K)`` in float64, with a graph where there is one."""
    return influence.checks.require_logits(subject.model(x)).double().log_softmax(1)


@torch.no_grad()
def quality(subject: Subject, examples: Examples) -> dict[str, float]:
    """Of the model on some examples: accuracy with its 95% Wilson interval low and high, loss (nats, mean)."""
    right, loss = 0, 0.0
    for x, labels in subject.batches(examples):
        log_probs = log_probs_of(subject, x)
        right += int((log_probs.argmax(1) == labels).sum())
        loss += float(F.nll_loss(log_probs, labels, reduction="sum"))
    return columns("accuracy", share_interval(right, len(examples)), "") | {"loss": loss / len(examples)}


def estimated_trace(subject: Subject, x: Tensor, *, wrt: str, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Traces ``(N, B)`` from random signs of the classes, a backward pass for each draw."""
    return influence.trace(subject.model, x, wrt=wrt, samples=draws, generator=torch.Generator().manual_seed(seed))


def input_trace(subject: Subject, x: Tensor) -> Tensor:
    """Trace of the metric tensor of each single value of the input, the shape of ``x``; a backward pass a class."""
    leaf = x.detach().clone().requires_grad_()
    total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    log_probs = log_probs_of(subject, leaf)
    for k in range(subject.classes):
        (score,) = torch.autograd.grad(log_probs[:, k].sum(), leaf, retain_graph=k < subject.classes - 1)
        total += log_probs[:, k].detach().exp().view(-1, *[1] * (x.ndim - 1)) * score.double().square()
    return total


def picture(example: Tensor) -> np.ndarray:
    """An image as (H, W, C) numbers in 0..1, for display alone."""
    image = example.permute(1, 2, 0).double().numpy()
    if example.dtype == torch.uint8:
        return image / 255
    low, high = float(image.min()), float(image.max())
    return image if 0 <= low and high <= 1 else (image - low) / max(high - low, 1e-12)
