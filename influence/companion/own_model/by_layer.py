"""Which layers of a model of the reader's own are sensitive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import influence

from .material import Examples
from .study import DRAWS, Subject, estimated_trace

# Draws for all examples together, beyond 64 classes: their mean over examples is what is reported.
_DRAWS_IN_ALL = 512
_FEWEST_DRAWS = 4


def layers(subject: Subject, *, images: int, relative: float = 0.01, seed: int = 0) -> pd.DataFrame:
    """How far noise in each layer moves the output, in a unit that layers share.

    The noise has a standard deviation of `relative` times the root mean square of the layer's own parameters, so the
    mean divergence is (relative * rms)^2 / 2 * tr G to second order.

    Returns:
        One row per layer, in the order of the network: layer, kind, parameters (their number), divergence (nats, mean
        over examples), alignment (mean FI / ceiling; NaN where K > 64), share (of the sum over layers), error (standard
        error of the share, over examples and random signs; NaN for one example), examples, samples (random sums of the
        classes for each example; 0 where the trace is exact).
    """
    examples = subject.material.measured.sample(images, seed=seed)
    rows: list[dict[str, Any]] = []
    for name, module in subject.model.named_modules():
        owned = [p.detach().double().flatten() for p in module.parameters(recurse=False)]
        if owned:
            names = {"layer": name.removeprefix("model.") or "(model)", "kind": type(module).__name__}
            flat = torch.cat(owned)
            rows.append({**names, "parameters": len(flat), "square": float(flat.square().mean())})
    frame = pd.DataFrame(rows)
    samples = 0
    if subject.many_classes:
        samples = min(DRAWS, max(_FEWEST_DRAWS, -(-_DRAWS_IN_ALL // len(examples))))
        batches = enumerate(subject.batches(examples))
        drawn = [estimated_trace(subject, x, wrt="layers", draws=samples, seed=n).cpu() for n, (x, _) in batches]
        traces, alignment = torch.cat(drawn), np.full(len(frame), np.nan)
    else:
        traces, alignment = _exact(subject, examples)
    each = traces.numpy() * (0.5 * relative**2 * frame.pop("square").to_numpy())
    divergence, largest = each.mean(0), max(each.sum(1).mean(), 1e-300)
    share = divergence / largest
    # Of a ratio of two means: what all layers of an example have in common cancels.
    spread = (
        (each - share * each.sum(1, keepdims=True)).std(0, ddof=1) if len(each) > 1 else np.full(len(frame), np.nan)
    )
    frame = frame.assign(divergence=divergence, alignment=alignment, share=share)
    return frame.assign(error=spread / (largest * len(each) ** 0.5), examples=len(each), samples=samples)


def _exact(subject: Subject, examples: Examples) -> tuple[Tensor, np.ndarray]:
    traces, alignments = [], []
    for x, labels in subject.batches(examples):
        metric = influence.metric_tensor(subject.model, x, wrt="layers")
        traces.append(metric.trace().cpu())
        alignments.append(influence.first_order_influence(metric, labels).alignment.cpu())
    return torch.cat(traces), torch.cat(alignments).mean(0).numpy()
