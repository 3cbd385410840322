"""Which single weights of a model of the reader's own matter, by what setting them to 0 does."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor

import influence

from ..scores import weightwise
from .study import Subject, quality

# Of all weights; the second is what the words and the places of the first weights are about.
SHARES = (0.001, 0.01, 0.05)
JUDGED = SHARES[1]
RANKINGS = ("size", "fisher", "snip", "exact", "random")
PLACED = "fisher"  # the ranking whose first weights are sought in the layers
SAMPLES = 8  # random sums over the classes for each example, beyond 64 classes
# Entries of the Jacobians of all weights, each made once and dropped: some minutes on two cores.
_MOST_ENTRIES = 2**32
_FEWEST = 4


def weights(subject: Subject, *, images: int, tested: int, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Rank the weights by examples of the first part, set the first ones to 0, and test on the last part.

    Influence of single weights takes K - 1 backward passes for each example, beyond 64 classes those of `SAMPLES`
    random sums and one more. Where the network is large, so many examples are left out that the rest takes a bounded
    time. The weights are ranked from `images` examples, the model, which is as it was afterwards, is tested on `tested`
    (0 for all).

    Returns:
        "weights": a row for the model as it is (ranking "none") and for each ranking and share: share, weights (how
        many were set to 0), accuracy with its 95% Wilson interval low and high, loss (nats, mean), n (examples tested),
        total (number of all weights ranked), examples (ranked from), asked (as many were to be), samples (0: exact).
        "places": a row for each layer: layer, kind, weights, first (how many of the first `JUDGED` by `PLACED` lie
        there). Both are empty where a model has no parameter of two or more dimensions.
    """
    named = weightwise.weights(subject.model)
    if not named:
        return {"weights": pd.DataFrame(), "places": pd.DataFrame()}
    total = sum(w.numel() for w in named.values())
    samples = SAMPLES if subject.many_classes else None
    rows = subject.classes - 1 if samples is None else samples + 1
    asked = subject.material.train.sample(images, seed=seed)
    examples = asked.sample(max(_FEWEST, _MOST_ENTRIES // (rows * total)), seed=seed)
    x, labels = examples.batch(range(len(examples)))
    influences = influence.weight_influence(
        subject.model,
        x.to(subject.device),
        labels,
        wrt=list(named),
        samples=samples,
        generator=torch.Generator().manual_seed(seed),
    )
    scores = weightwise.rankings(subject.model, influences, seed=seed)
    part = subject.material.measured.sample(tested, seed=seed)
    lines: list[dict[str, Any]] = [{"ranking": "none", "share": 0.0, "weights": 0, **quality(subject, part)}]
    counts = {share: max(1, round(share * total)) for share in SHARES}
    for ranking in RANKINGS:
        order = scores[ranking].topk(max(counts.values())).indices
        for share, count in counts.items():
            with weightwise.without(subject.model, order[:count], weightwise.TREATMENTS[0]):
                found = quality(subject, part)
            lines.append({"ranking": ranking, "share": share, "weights": count, **found})
    first = torch.zeros(total, dtype=torch.bool)
    first[scores[PLACED].topk(counts[JUDGED]).indices.cpu()] = True
    of = {"n": len(part), "total": total, "examples": len(examples), "asked": len(asked), "samples": samples or 0}
    return {"weights": pd.DataFrame(lines).assign(**of), "places": _places(subject, first)}


def _places(subject: Subject, first: Tensor) -> pd.DataFrame:
    """How many of the chosen entries of the vector of all weights each layer holds, in the order of the network."""
    sizes = {name: weight.numel() for name, weight in weightwise.weights(subject.model).items()}
    frame = pd.DataFrame({"layer": [name.rpartition(".")[0] for name in sizes], "weights": list(sizes.values())})
    frame["first"] = [int(part.sum()) for part in first.split(list(sizes.values()))]
    frame = frame.groupby("layer", sort=False).sum().reset_index()
    frame.insert(1, "kind", [type(subject.model.get_submodule(layer)).__name__ for layer in frame["layer"]])
    return frame.assign(layer=[layer.removeprefix("model.") or "(model)" for layer in frame["layer"]])
