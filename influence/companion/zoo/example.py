"""A small network of "your own", trained in seconds on the digits: the default of notebooks/adapt_your_model.ipynb."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..images import data
from . import training
from .models import in_turn
from .training import Shuffled


def network(*, epochs: int = 12, seed: int = 0) -> nn.Module:
    """Three convolutions, trained on the bytes, as [0, 1], of scikit-learn's 1,197 8 x 8 training digits."""
    train = data.load("digits").train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = in_turn(
            conv1=nn.Conv2d(1, 16, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, 3, padding=1, stride=2),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(32, 32, 3, padding=1),
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            dense=nn.Linear(512, 10),
        )
    batches = Shuffled(train, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0].float() / 255), batch[1])

    training.train(
        model,
        batches,
        loss,
        optimizer,
        steps=epochs * len(batches),
        rate=2e-3,
        seed=(seed, 5),
        title="a network of your own",
    )
    return model
