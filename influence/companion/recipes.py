"""How each network is trained in each profile: the paper's schedule, and what fits a smaller machine."""

from __future__ import annotations

from typing import Literal

from .models import NAMES
from .training import Recipe


def phases(epochs: int, *, parts: tuple[int, ...] = (2, 1, 1, 1), peak: float = 1e-3) -> tuple[tuple[int, float], ...]:
    """The paper's four phases over `epochs`, in the proportions `parts` (CIFAR-10: 2:1:1:1, MNIST: 1:1:1:1).

    The learning rates are 1, 1/2, 1/4 and 1/10 of `peak` (1e-3 in the paper).

    Raises:
        ValueError: fewer epochs than phases.
    """
    rates = tuple(peak * factor for factor in (1, 0.5, 0.25, 0.1))
    if epochs < len(rates):
        raise ValueError(f"the schedule has {len(rates)} phases and needs at least as many epochs, got {epochs}")
    ends = [0]
    for phase in range(len(rates)):
        share = round(epochs * sum(parts[: phase + 1]) / sum(parts))
        left = len(rates) - 1 - phase  # each later phase keeps at least one epoch
        ends.append(min(max(share, ends[-1] + 1), epochs - left))
    return tuple((end - start, rate) for start, end, rate in zip(ends[:-1], ends[1:], rates, strict=True))


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
