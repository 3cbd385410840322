"""The features of a trained classifier as an embedding, and the arms of Zheng et al. (2016) for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import influence

from . import models
from .finetuning import Arm


class Embedding(nn.Module):
    """What the dense layer of a classifier takes, at unit length; the layer itself is given up."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        classifier.set_submodule(models.trainable_layers(classifier)[-1], nn.Identity())
        self.trunk = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Raw pixels (N, C, H, W) to unit vectors (N, D)."""
        return F.normalize(self.trunk(x).float(), dim=1)


@dataclass(frozen=True)
class EmbeddingArm(Arm):
    """An arm that continues the features of a classifier.

    The task is the ranking of triplets by class, of one batch. The stability loss is the mean distance between an image
    and its noisy copy.
    """

    margin: float = 0.2  # g of the hinge, a distance between unit vectors

    def network(self, classifier: nn.Module) -> nn.Module:
        """The features of the classifier."""
        return Embedding(classifier)

    def task(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The hinge of triplets."""
        query, positive, negative = triplets(labels.cpu()).to(outputs.device)
        return influence.triplet_loss(outputs[query], outputs[positive], outputs[negative], margin=self.margin)

    def stable(self, clean: Tensor, noisy: Tensor, labels: Tensor) -> Tensor:
        """The hinge of clean images + alpha * the mean distance to their noisy copies."""
        return self.task(clean, labels) + self.alpha * influence.embedding_stability_loss(clean, noisy)


def triplets(labels: Tensor) -> Tensor:
    """Positions (3, M) in a batch: each image with one of its class and one of another, drawn at random.

    An image that is alone in its class, or with no other class, is left out; a ValueError where all are.
    """
    same = labels[:, None] == labels
    draw = torch.rand(2, *same.shape)
    chosen = [same.fill_diagonal_(False), labels[:, None] != labels]
    whole = chosen[0].any(1) & chosen[1].any(1)
    if not whole.any():
        raise ValueError(f"no triplet in a batch of the classes {labels.unique().tolist()}")
    others = [numbers.masked_fill(~allowed, -1).argmax(1) for numbers, allowed in zip(draw, chosen, strict=True)]
    return torch.stack([torch.arange(len(labels)), *others])[:, whole]
