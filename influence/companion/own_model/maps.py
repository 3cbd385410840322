"""Where images are vulnerable, on a model and data of the reader's own."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import influence
from influence.measures import log_ceiling

from .material import as_input
from .study import Subject, input_trace, log_probs_of, picture

# Float64 numbers, 2 GiB with what is alive beside them: products of two gradients, one for each pair of classes and
# value of the image, and the Grams of all patches. Beyond the first each patch has a factorisation of its own.
_MOST_PRODUCTS = 2**26
_MOST_IN_GRAMS = 2**24
_MOST_FACTORS = 2**12


def maps(subject: Subject, table: pd.DataFrame, *, images: int, size: int = 3) -> pd.DataFrame:
    """Where an image is vulnerable, for the images of the last part of the scores whose prediction is least sure.

    Returns:
        One row per image: example, label_name, predicted_name, ceiling (of the predicted class), pixels (H, W, C),
        trace (H, W; summed over channels), single (H, W; FI of one value, the largest of its channels), patch (FI of a
        `size` x `size` patch on a grid of rows and columns, the largest of the channels).
    """
    if not subject.image:
        return pd.DataFrame()
    rows = []
    for chosen in table[table["part"] == table["part"].iloc[-1]].nlargest(images, "fi_predicted").to_dict("records"):
        example = int(chosen["example"])
        stored = subject.material.measured.read(example)
        x = as_input(stored)[None].to(subject.device)
        trace = input_trace(subject, x)[0]
        leaf = x.clone().requires_grad_()
        log_probs = log_probs_of(subject, leaf)
        (slope,) = torch.autograd.grad(log_probs.amax(), leaf)
        single = slope[0].double().square() / trace.clamp(min=torch.finfo(torch.float64).tiny)
        rows.append(
            {
                "example": example,
                "label_name": subject.class_name(int(chosen["label"])),
                "predicted_name": subject.class_name(int(chosen["predicted"])),
                "ceiling": float(log_ceiling(log_probs.detach(), log_probs.argmax(1)).exp()),
                "pixels": picture(stored),
                "trace": trace.sum(0).cpu().numpy(),
                "single": single.amax(0).cpu().numpy(),
                "patch": _patch_map(subject, x, log_probs.argmax(1), size),
                "size": size,
            }
        )
    return pd.DataFrame(rows)


def _patch_map(subject: Subject, x: Tensor, labels: Tensor, size: int) -> np.ndarray:
    _, channels, height, width = x.shape
    classes = subject.classes
    many = classes * (classes - 1) // 2 * x[0].numel() > _MOST_PRODUCTS
    weight, most = (1, _MOST_FACTORS) if many else (classes**2, _MOST_IN_GRAMS)
    stride = 1
    while channels * -(-height // stride) * -(-width // stride) * weight > most:
        stride += 1
    patches = influence.Patches(size=size, stride=stride)
    if many:
        result = influence.patch_influence(subject.model, x, labels, patches=patches)
    else:
        result = influence.first_order_influence(influence.metric_tensor(subject.model, x, wrt=patches), labels)
    fi = result.fi[0].view(channels, -(-height // stride), -(-width // stride))
    return np.asarray(fi.amax(0).cpu())
