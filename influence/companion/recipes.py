"""How each network is trained in each profile: the paper's schedule, and what fits a smaller machine."""

from __future__ import annotations

from typing import Literal

from .models import NAMES
from .training import Recipe, phases

PROFILES = ("smoke", "cpu", "paper")
_EVEN = (1, 1, 1, 1)  # four phases of equal length, as for MNIST in the paper; CIFAR-10 has 2:1:1:1

# profile -> data set -> model -> (width, training images per class, phases, batch size, dropout, precision)
# Dropout 0.2 after every ReLU, also on the residual stream, leaves nothing to learn from in a network of an eighth of
# the paper's channels (10% accuracy on the digits): only the full-width networks have it.
_Row = tuple[float, int | None, tuple[tuple[int, float], ...], int, float, Literal["float32", "bfloat16"]]
_DIGITS = phases(8, parts=_EVEN, peak=3e-3)
_MNIST = phases(4, parts=_EVEN, peak=2e-3)
_CIFAR10 = phases(12, peak=2e-3)
_TABLE: dict[str, dict[str, dict[str, _Row]]] = {
    "smoke": {
        "digits": {
            "resnet50": (0.25, None, _DIGITS, 64, 0.0, "float32"),
            "densenet121": (0.125, None, _DIGITS, 64, 0.0, "float32"),
        },
    },
    "cpu": {
        "mnist": dict.fromkeys(NAMES, (0.125, 1000, _MNIST, 64, 0.0, "bfloat16")),
        "cifar10": dict.fromkeys(NAMES, (0.125, 1000, _CIFAR10, 64, 0.0, "bfloat16")),
    },
    "paper": {
        "mnist": dict.fromkeys(NAMES, (1.0, None, phases(200, parts=_EVEN), 128, 0.2, "float32")),
        "cifar10": dict.fromkeys(NAMES, (1.0, None, phases(500), 128, 0.2, "float32")),
    },
}


def recipe(profile: str, dataset: str, model: str, *, seed: int = 0) -> Recipe:
    """The recipe for a network on a data set in a profile.

    Raises:
        ValueError: nothing is set down for that profile and data set.
    """
    try:
        width, train_per_class, schedule, batch_size, dropout, precision = _TABLE[profile][dataset][model]
    except KeyError:
        known = "; ".join(f"{name}: {', '.join(sets)}" for name, sets in _TABLE.items())
        raise ValueError(
            f"no recipe for {model!r} on {dataset!r} in profile {profile!r}; there are {', '.join(NAMES)} on {known}"
        ) from None
    return Recipe(
        model=model,
        width=width,
        train_per_class=train_per_class,
        phases=schedule,
        batch_size=batch_size,
        dropout=dropout,
        precision=precision,
        seed=seed,
    )
