"""A small network of "your own", trained in seconds on the digits: the default of notebooks/adapt_your_model.ipynb."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .. import data


def network(*, epochs: int = 12, seed: int = 0) -> nn.Module:
    """Three convolutions, trained on scikit-learn's 8 x 8 digits as bytes in [0, 1].

    Args:
        epochs: passes over the 1,197 training images.
        seed: of weights and order.
    """
    train = data.load("digits").train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential()
        for name, layer in (
            ("conv1", nn.Conv2d(1, 16, 3, padding=1)),
            ("relu1", nn.ReLU()),
            ("conv2", nn.Conv2d(16, 32, 3, padding=1, stride=2)),
            ("relu2", nn.ReLU()),
            ("conv3", nn.Conv2d(32, 32, 3, padding=1)),
            ("relu3", nn.ReLU()),
            ("flatten", nn.Flatten()),
            ("dense", nn.Linear(512, 10)),
        ):
            model.add_module(name, layer)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(train)).split(64):
                loss = F.cross_entropy(model(train.images[rows].float() / 255), train.labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
    return model.eval()
