"""Which layers of a model of the reader's own are sensitive."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

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
        over examples), share (of the sum over layers), alignment (mean FI / ceiling; NaN where K > 64), examples.
    """
    examples = subject.material.measured.sample(images, seed=seed)
    modules = dict(subject.model.named_modules())
    owned = {name: list(module.parameters(recurse=False)) for name, module in modules.items()}
    owned = {name: parameters for name, parameters in owned.items() if parameters}
    if not subject.many_classes:
        trace, alignment = _exact_layers(subject, examples)
    else:
        trace, alignment = _drawn_layers(subject, examples), np.full(len(owned), np.nan)
    rows = []
    for name, mean_trace, aligned in zip(owned, trace, alignment, strict=True):
        flat = torch.cat([p.detach().double().flatten() for p in owned[name]])
        rows.append(
            {
                "layer": name.removeprefix("model.") or "(model)",
                "kind": type(modules[name]).__name__,
                "parameters": len(flat),
                "divergence": 0.5 * relative**2 * float(flat.square().mean()) * mean_trace,
                "alignment": aligned,
            }
        )
    frame = pd.DataFrame(rows)
    frame["share"] = frame["divergence"] / max(frame["divergence"].sum(), 1e-300)
    return frame.assign(examples=len(examples))


def _exact_layers(subject: Subject, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    traces, alignments = [], []
    for x, labels in subject.batches(examples):
        metric = influence.metric_tensor(subject.model, x, wrt="layers")
        traces.append(metric.trace().cpu())
        alignments.append(influence.first_order_influence(metric, labels).alignment.cpu())
    return torch.cat(traces).mean(0).numpy(), torch.cat(alignments).mean(0).numpy()


def _drawn_layers(subject: Subject, examples: Examples) -> np.ndarray:
    draws = min(DRAWS, max(_FEWEST_DRAWS, -(-_DRAWS_IN_ALL // len(examples))))
    batches = enumerate(subject.batches(examples))
    traces = [estimated_trace(subject, x, wrt="layers", draws=draws, seed=n).cpu() for n, (x, _) in batches]
    mean: np.ndarray = torch.cat(traces).mean(0).numpy()
    return mean
