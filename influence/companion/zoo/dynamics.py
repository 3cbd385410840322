"""What a training says of its own images: AUM (Pleiss et al. 2020) and EL2N early in it (Paul et al. 2021)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..images.data import Dataset, Split
from ..ledger import cache
from . import training
from .recipes import Recipe
from .training import Record, Shuffled

EARLY = 2  # epochs, a tenth of the recipe's, after which EL2N is taken


class Dynamics(nn.Module):
    """Of each image of a training set, (N,) float32; parameters, so that a training saves and resumes them.

    Attributes:
        margin: sum over the epochs of the logit of its label less the largest other one, each seen in training.
        el2n: |p - e_y| after `EARLY` epochs, of the image as it is.
        epochs: how many are done.
    """

    def __init__(self, images: int) -> None:
        super().__init__()
        self.margin, self.el2n, self.epochs = (
            nn.Parameter(torch.zeros(count), requires_grad=False) for count in (images, images, 1)
        )

    def aum(self) -> Tensor:
        """The area under the margin: its mean over the epochs."""
        return self.margin / self.epochs


def recorded(recipe: Recipe, dataset: Dataset, *, epochs: int, device: torch.device, publish: bool = False) -> Dynamics:
    """The first epochs of the training of `recipe`, with its schedule, on all images of both parts of `dataset`.

    Its schedule is that of all epochs of the recipe: AUM is taken before the learning rate has fallen, since a network
    learns wrong labels by heart after that.
    """
    images = dataset.train.with_(dataset.valid)
    made = Dynamics(len(images)).to(device)
    decides = {"recipe": recipe.decides(), "images": images.digest, "epochs": epochs, "early": EARLY}
    make = partial(_train, made, recipe, dataset, images, epochs)
    name, key = f"{recipe.name}-dynamics", cache.fingerprint(decides)
    training.made_once(name, key, made, make, recipe=recipe, publish=publish)
    return made


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of each label less the largest other one, (N,), of logits (N, K) and labels (N,)."""
    own = labels[:, None]
    return logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).amax(dim=1)


def _train(made: Dynamics, recipe: Recipe, dataset: Dataset, images: Split, epochs: int, resume: Path) -> Record:
    device = made.margin.device
    network = recipe.build(dataset).to(device)
    there = Split(*(tensor.to(device) for tensor in images.tensors()))
    # In the place of labels the batches have the rows of the images.
    numbered = replace(there, labels=torch.arange(len(there), device=device))
    batches = Shuffled(numbered, recipe.batch_size, recipe.augment)

    def loss(_: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        augmented, rows = batch
        labels, logits = there.labels[rows], network(training.pixels(augmented, device)).float()
        made.margin.index_add_(0, rows, margins(logits.detach(), labels))
        return F.cross_entropy(logits, labels)

    def measure() -> dict[str, float]:
        made.epochs.add_(1)
        if int(made.epochs) == EARLY:
            logits = training.predict(network, images.images, device=device)
            error = logits.softmax(dim=1) - F.one_hot(images.labels, logits.shape[1])
            made.el2n.copy_(error.norm(dim=1))
        return {}

    return training.train(
        nn.ModuleList([network, made]),
        batches,
        loss,
        recipe.optimize(network),
        steps=epochs * len(batches),
        rate=lambda done: recipe.rate(done * epochs / recipe.epochs),
        seed=(recipe.seed, 3),
        title=f"{recipe.name}, recorded",
        precision=recipe.precision,
        measure=measure,
        resume=resume,
    )
