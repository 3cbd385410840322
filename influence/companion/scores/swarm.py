"""Particle swarm: a minimum in a box from values alone, without gradients (Kennedy & Eberhart 1995)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Of mFI-PSO's released code: inertia, pull to a particle's own best and to the swarm's, largest step of the box's side.
INERTIA, COGNITIVE, SOCIAL, LARGEST_STEP = 0.6, 2.0, 2.0, 0.05


def minimise(
    objective: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    *,
    particles: int,
    steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    r"""The best place that a swarm finds in each of N boxes, all swarms at once.

    .. math:: v \leftarrow w v + c_1 r_1 (p - x) + c_2 r_2 (g - x), \qquad x \leftarrow x + v,

    with r_1 and r_2 uniform in [0, 1] for every coordinate, p the best place of the particle so far and g that of its
    swarm; v at most `LARGEST_STEP` of the side, x clipped to the box. Particles start uniform in the box, at rest. A
    side of length 0 holds its coordinate where it is. Of the boxes' ends (N, D) and an objective from the places of S
    particles, (S, N, D), to (S, N), which is looked at steps + 1 times.

    Returns:
        The places (N, D) and their values (N,).

    Raises:
        ValueError: no particles, steps below 0, or a box whose lower end lies above its upper one.
    """
    if particles < 1 or steps < 0:
        raise ValueError(f"expected particles >= 1 and steps >= 0, got {particles} and {steps}")
    if bool((low > high).any()):
        raise ValueError("expected boxes with low <= high")
    shape = (particles, *low.shape)

    def drawn() -> Tensor:
        return torch.rand(shape, generator=generator, device=low.device, dtype=low.dtype)

    side = high - low
    place, speed = low + side * drawn(), torch.zeros(shape, device=low.device, dtype=low.dtype)
    own, least = place, objective(place)
    for _ in range(steps):
        best = own.gather(0, least.argmin(0)[None, :, None].expand(1, *low.shape))
        speed = INERTIA * speed + COGNITIVE * drawn() * (own - place) + SOCIAL * drawn() * (best - place)
        speed = torch.minimum(torch.maximum(speed, -LARGEST_STEP * side), LARGEST_STEP * side)
        place = torch.minimum(torch.maximum(place + speed, low), high)
        value = objective(place)
        own = torch.where((value < least)[..., None], place, own)
        least = torch.minimum(value, least)
    chosen = least.argmin(0)[None]
    return own.gather(0, chosen[..., None].expand(1, *low.shape))[0], least.gather(0, chosen)[0]
