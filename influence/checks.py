"""Errors at the door: what was expected, what was got, what to do."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def require_count(**values: object) -> None:
    """Refuse with ValueError what is neither None nor a whole number >= 1."""
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}. Use None for the default.")


def require_rtol(rtol: float | None) -> None:
    """Refuse with ValueError a relative tolerance outside [0, 1); None is the default."""
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"rtol must lie in [0, 1), got {rtol}. Use None for the default.")


def require_finite(tensor: Tensor, *, name: str, hint: str, numbers: Sequence[int] | None = None) -> None:
    """Refuse NaN and infinity in a floating tensor with ValueError: where the first one is.

    That is told as one of the examples ``(N, ...)`` where these have ``numbers``, else as an index.
    """
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return
    bad = (~torch.isfinite(tensor)).nonzero()
    first = tuple(bad[0].tolist())
    found = f"{len(bad)} NaN or infinite entries of {tensor.numel()}, the first at index {first}"
    if numbers is not None:
        found = f"NaN or infinity in example {numbers[first[0]]}"
    raise ValueError(f"{name} must be finite, got {found}. {hint}")


def require_logits(
    output: Any, *, examples: int | None = None, name: str = "the model's output", values: bool = True
) -> Tensor:
    """Unwrap and check logits: a tensor ``(N, K)``, or an object with such ``.logits``.

    N is ``examples`` where it is known. The messages call it ``name``. Without ``values`` the entries are not looked
    at, for which a GPU's work would be waited for.

    Raises:
        TypeError: If there is no floating tensor of logits.
        ValueError: If the shape is not ``(N, K)``, K < 2, or an entry is not finite.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{name} must be a tensor of logits (N, K) or an object with a tensor .logits, got "
            f"{type(output).__name__}. Wrap the model in a module that returns its logits."
        )
    if not logits.is_floating_point():
        raise TypeError(f"{name} must be floating logits, got {logits.dtype}. Return scores, not classes.")
    if logits.ndim != 2 or (examples is not None and logits.shape[0] != examples):
        expected = "(N, K)" if examples is None else f"(N, K) with N = {examples}"
        raise ValueError(
            f"{name} must have shape {expected}, got {tuple(logits.shape)}. "
            "Return one row of K class logits for each example."
        )
    if logits.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one example, got shape {tuple(logits.shape)}.")
    if logits.shape[1] < 2:
        raise ValueError(
            f"{name} must have K >= 2 classes, got K = {logits.shape[1]}. "
            "For a single binary logit z return torch.stack([zeros_like(z), z], dim=1)."
        )
    if values:
        require_finite(logits, name=name, hint="Check the inputs and the weights.")
        if _look_like_probabilities(logits):
            _warn_of_probabilities()
    return logits


def _look_like_probabilities(logits: Tensor) -> bool:
    return bool((logits >= 0).all()) and bool(((logits.sum(dim=1) - 1).abs() < 1e-4).all())


@cache
def _warn_of_probabilities() -> None:
    logging.getLogger("influence").warning(
        "the model's outputs look like probabilities: they are taken for logits. Return their logarithm."
    )


def require_labels(
    labels: Tensor | Sequence[int], *, examples: int, classes: int, device: torch.device, values: bool = True
) -> Tensor:
    """Check class labels, and with ``values`` their range, and return them as int64, ``(N,)``, on ``device``.

    Raises:
        TypeError: If the labels are not integers.
        ValueError: If there are not N of them or one is outside ``0..K-1``.
    """
    try:
        labels = labels if isinstance(labels, Tensor) else torch.as_tensor(np.asarray(labels))
    except (TypeError, ValueError):
        raise TypeError(f"labels must be integer classes, got {type(labels).__name__} of other things.") from None
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integer classes, got {labels.dtype}. Convert with labels.long().")
    if labels.shape != (examples,):
        raise ValueError(
            f"labels must have shape ({examples},), one class for each example, got {tuple(labels.shape)}."
        )
    labels = labels.to(device=device, dtype=torch.int64)
    if values and bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(
            f"labels must lie in 0..{classes - 1} for K = {classes} classes, got values from "
            f"{int(labels.min())} to {int(labels.max())}. Relabel the data or use a model with more outputs."
        )
    return labels


def require_deterministic(model: nn.Module) -> None:
    """Refuse with RuntimeError a model whose examples influence each other or whose output is random.

    That is BatchNorm or Dropout (also inside attention and recurrent layers) in training mode, and in any mode
    BatchNorm without running statistics. So is one whose parameters can take no gradient. What is no module is a
    TypeError.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise RuntimeError(
                f"parameter {name!r} was made under torch.inference_mode() and can take no gradient. Make or load the "
                "model outside of it."
            )
    for name, module in model.named_modules():
        where = f"{type(module).__name__} at {name or 'the model itself'!r}"
        batch_norm = nn.modules.batchnorm._BatchNorm
        changes = isinstance(module, batch_norm | nn.modules.dropout._DropoutNd | nn.RReLU) or (
            isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0
        )
        if getattr(module, "training", False) and changes:  # a frozen script has no such flag
            raise RuntimeError(
                f"expected a model in evaluation mode, got {where} in training mode: its output is random or depends "
                "on the other examples. Call model.eval() first."
            )
        if isinstance(module, batch_norm) and module.running_mean is None:
            raise RuntimeError(
                f"{where} has no running statistics: it mixes the examples of a batch even in evaluation mode, so no "
                "example has a Jacobian of its own. Use track_running_stats=True."
            )
