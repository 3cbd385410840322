"""Rankings of single weights, and of single pixels, and what taking the first of them away does to a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import influence
from influence.progress import progress_bar

from ..images.data import Split
from ..zoo import training
from .imagewise import chunks, score_gradient
from .layerwise import restored, rounded

TREATMENTS = ("set to 0", "4 bits")
_CHUNK = 16


def weight_rankings(model: nn.Module, split: Split, *, seed: int, device: torch.device) -> dict[str, Tensor]:
    """The `rankings` of all weights from raw images and their labels."""
    x = training.pixels(split.images, device)
    found = influence.weight_influence(model, x, split.labels, wrt=list(weights(model)))
    return rankings(model, found, seed=seed)


def rankings(model: nn.Module, found: influence.WeightInfluence, *, seed: int) -> dict[str, Tensor]:
    """Scores of all weights of convolutions and linear layers, one vector each, larger = first.

    FI of the weight alone and the trace are means over the examples; the gradient is that of the mean loss. With w the
    weight: SNIP (Lee et al. 2019) is |w gradient|, Fisher pruning (Theis et al. 2018) w^2 times the trace. `found` is
    of the model, for at least its `weights`.
    """
    flat = {
        number: torch.cat([getattr(found, number)[name].flatten() for name in weights(model)])
        for number in ("fi", "trace", "gradient")
    }
    size = torch.cat([w.detach().double().abs().flatten() for w in weights(model).values()])
    random = torch.rand(len(size), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(size.device)
    return {
        "exact": flat["fi"],
        "saliency": flat["gradient"].abs(),
        "snip": (size * flat["gradient"]).abs(),
        "trace": flat["trace"],
        "fisher": size.square() * flat["trace"],
        "size": size,
        "random": random,
    }


def ablations(
    model: nn.Module, scored: Split, tested: Split, shares: Sequence[float], *, seed: int, device: torch.device
) -> pd.DataFrame:
    """Rank the weights by the images `scored`, take shares of the first ones away, and test the network on `tested`.

    Returns:
        One row per ranking, treatment (`TREATMENTS`) and share, and one with share 0 for the network as it is: weights
        (how many), accuracy, loss (nats, the mean).
    """
    rows = [{"ranking": "none", "treatment": "none", "share": 0.0, "weights": 0, **_quality(model, tested, device)}]
    for ranking, score in progress_bar(
        weight_rankings(model, scored, seed=seed, device=device).items(), desc="rankings", leave=False
    ):
        order = score.argsort(descending=True)
        for treatment in TREATMENTS:
            for share in shares:
                count = max(1, round(share * len(order)))
                with without(model, order[:count], treatment):
                    quality = _quality(model, tested, device)
                rows.append({"ranking": ranking, "treatment": treatment, "share": share, "weights": count, **quality})
    return pd.DataFrame(rows)


def occlusions(
    model: nn.Module, split: Split, shares: Sequence[float], *, value: float, seed: int, device: torch.device
) -> pd.DataFrame:
    """Cover the first pixels (all channels) of each ranking of each image with one grey, and test the network.

    The rankings are for f = -log P of the predicted class: FI of the pixel, the length of its gradient, its trace.

    Returns:
        One row per ranking and share, and one with share 0: pixels (of an image), accuracy, loss (nats, the mean).
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = split.images[0, 0].numel()
    counts = {share: max(1, round(share * pixels)) for share in shares}
    sums: dict[tuple[str, float, int], Tensor] = {}
    for rows, x, _ in chunks(split, _CHUNK, device, "occlusion"):
        labels = split.labels[rows].to(device)
        sums["none", 0.0, 0] = sums.get(("none", 0.0, 0), 0) + _tested(model, x, labels)
        for ranking, score in pixel_rankings(model, x, generator=generator).items():
            order = score.argsort(dim=1, descending=True)
            for share, count in counts.items():
                hidden = torch.zeros_like(score, dtype=torch.bool).scatter(1, order[:, :count], True)
                covered = torch.where(hidden.view(len(x), 1, *x.shape[2:]), value, x)
                key = ranking, share, count
                sums[key] = sums.get(key, 0) + _tested(model, covered, labels)
    frame = pd.DataFrame(list(sums), columns=["ranking", "share", "pixels"])
    frame[["accuracy", "loss"]] = torch.stack(list(sums.values())).div(len(split)).cpu().numpy()
    return frame


def pixel_rankings(model: nn.Module, x: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
    """Scores ``(N, H W)`` of the pixels of images, all channels of one together."""
    metric = influence.metric_tensor(model, x, wrt=influence.Patches(size=1, per_channel=False))
    gradient, _ = score_gradient(model, x)
    return {
        "exact": influence.first_order_influence(metric).alignment,
        "saliency": gradient.double().norm(dim=1).flatten(1),
        "trace": metric.trace(),
        "random": torch.rand(len(x), x[0, 0].numel(), generator=generator, dtype=torch.float64).to(x.device),
    }


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is ranked, by name: the parameters of two or more dimensions, so no bias and no scale."""
    return {name: p for name, p in model.named_parameters() if p.ndim > 1}


@contextmanager
def without(model: nn.Module, chosen: Tensor, treatment: str) -> Iterator[None]:
    """The network without some entries of the vector of all its weights."""
    changing = list(weights(model).values())
    mask = torch.zeros(sum(w.numel() for w in changing), dtype=torch.bool, device=chosen.device)
    mask[chosen] = True
    parts = mask.split([w.numel() for w in changing])
    with restored(changing):
        with torch.no_grad():
            for w, part in zip(changing, parts, strict=True):
                changed = rounded(w, 4) if treatment == "4 bits" else torch.zeros_like(w)
                w.copy_(torch.where(part.view_as(w), changed, w))
        yield


@torch.no_grad()
def _tested(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """How many images are right, and the sum of their losses, ``(2,)`` float64."""
    logits = model(x).double()
    return torch.stack([(logits.argmax(1) == labels).sum().double(), F.cross_entropy(logits, labels, reduction="sum")])


def _quality(model: nn.Module, split: Split, device: torch.device) -> dict[str, float]:
    logits = training.predict(model, split.images, device=device).double()
    loss = F.cross_entropy(logits, split.labels)
    return {"accuracy": float((logits.argmax(1) == split.labels).double().mean()), "loss": float(loss)}
