"""The last layer of a trained classifier, continued alone: its features are computed once, so that a grid is cheap."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import influence

from ..images.data import Split
from . import models, training

_RATE = 1e-3  # of Adam, falling to 0


def layer(classifier: nn.Module) -> nn.Linear:
    """The dense layer that gives the logits; a TypeError where the last module with parameters is not one."""
    found = classifier.get_submodule(models.trainable_layers(classifier)[-1])
    if not isinstance(found, nn.Linear):
        raise TypeError(f"expected a network that ends in a Linear layer, got {type(found).__name__}")
    return found


def features(classifier: nn.Module, images: Tensor, *, device: torch.device | str = "cpu") -> Tensor:
    """What the last layer takes, (N, D) float32 on the CPU, for pixels 0..255 (N, C, H, W) of any type."""
    found: list[Tensor] = []
    with layer(classifier).register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].float().cpu())):
        training.predict(classifier, images, device=device)
    return torch.cat(found)


def with_noisy_copies(
    classifier: nn.Module, images: Tensor, *, sigma: float, copies: int, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Features of images and of `copies` noisy copies of each, (N, 1 + copies, D).

    The noise is Gaussian with standard deviation `sigma` on pixels in [0, 1], clipped to the range of pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    x = images.float()
    noisy = (
        influence.gaussian_perturbation(x, sigma=255 * sigma, clip=(0, 255), generator=generator) for _ in range(copies)
    )
    return torch.stack([features(classifier, one, device=device) for one in (x, *noisy)], dim=1)


def tune(
    start: nn.Linear, copies: Tensor, labels: Tensor, *, alpha: float, steps: int, seed: Sequence[int]
) -> nn.Linear:
    """The layer, continued on cross-entropy + alpha * KL between the outputs on an image and on a noisy copy of it.

    Adam, batches of 128, a copy of each image drawn anew at every step; alpha = 0 is the control, which draws the same.
    The copies are those of `with_noisy_copies`; the layer `start` is left as it is.
    """
    tuned = copy.deepcopy(start).cpu()
    batches = training.Shuffled(Split(copies, labels, torch.arange(len(labels))), 128)
    training.train(
        tuned,
        batches,
        partial(_loss, alpha),
        torch.optim.Adam(tuned.parameters(), _RATE),
        steps=steps,
        rate=lambda done: _RATE * (1 - done),
        seed=seed,
        title="last layer",
    )
    return tuned


def _loss(alpha: float, tuned: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    copies, labels = batch
    chosen = torch.randint(1, copies.shape[1], (len(copies),))
    clean, noisy = tuned(copies[:, 0]), tuned(copies[torch.arange(len(copies)), chosen])
    if alpha == 0:
        return F.cross_entropy(clean, labels)
    return influence.stability_loss(clean, noisy, labels, alpha=alpha)
