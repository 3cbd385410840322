"""Linear combinations of the logits whose gradients are the rows of a Jacobian: contrasts, or sums of scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Classes:
    """The K - 1 contrasts of the logits of N examples with the predicted class.

    Attributes:
        log_probs: ``(N, K)`` float64, log P.
        order: ``(N, K)``, each example's classes in the order that ends with the predicted one.
    """

    log_probs: Tensor
    order: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Classes:
        """Read off logits ``(N, K)``."""
        log_probs = torch.log_softmax(logits.detach().double(), dim=1)
        classes = logits.shape[1]
        steps = torch.arange(1, classes + 1, device=logits.device)
        return cls(log_probs, (log_probs.argmax(dim=1, keepdim=True) + steps) % classes)

    def seeds(self, dtype: torch.dtype) -> Tensor:
        """What the backward passes start from, ``(m, N, K)``: gradients of z_k - z_r, in ``order``."""
        examples, classes = self.order.shape
        seeds = torch.zeros(classes - 1, examples, classes, dtype=dtype, device=self.order.device)
        seeds.scatter_(2, self.order[:, -1:].expand(classes - 1, -1, -1), -1.0)
        return seeds.scatter_(2, self.order[:, :-1].T[..., None], 1.0)

    def embed(self, small: Tensor) -> Tensor:
        """Put ``(N, B, m, m)`` Grams at their classes: ``(N, B, K, K)`` with zeros for the predicted class."""
        padded = torch.nn.functional.pad(small, (0, 1, 0, 1))
        back = self.order.argsort(dim=1)
        example = torch.arange(len(back), device=back.device)[:, None, None]
        # Two indices round a slice put the blocks last.
        return padded[example, :, back[:, :, None], back[:, None, :]].permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class ScoreSums:
    """Sums over the classes of a_k log P_k, m for each example.

    Attributes:
        log_probs: ``(N, K)`` float64, log P.
        unit: ``(N, m, K)`` float64, gradients of the sums by the logits, divided by their largest entry, so that no
            precision underflows where the network is sure.
        scale: ``(N, m)`` float64, these largest entries.
    """

    log_probs: Tensor
    unit: Tensor
    scale: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, coefficients: Tensor) -> ScoreSums:
        """From the coefficients a, ``(N, m, K)``, held constant."""
        gradient = coefficients - log_probs.exp()[:, None] * coefficients.sum(dim=2, keepdim=True)
        # They add up to zero. Where P_r is near 1, its own entry is all rounding: it is taken from the others.
        predicted = log_probs.argmax(dim=1)[:, None, None].expand(-1, gradient.shape[1], 1)
        gradient = gradient.scatter(2, predicted, 0.0)
        gradient = gradient.scatter(2, predicted, -gradient.sum(dim=2, keepdim=True))
        scale = gradient.abs().amax(dim=2)
        return cls(log_probs, gradient / scale.clamp(min=torch.finfo(scale.dtype).tiny)[..., None], scale)

    def seeds(self, dtype: torch.dtype) -> Tensor:
        """What the backward passes start from, ``(m, N, K)``."""
        return self.unit.transpose(0, 1).to(dtype)

    def embed(self, small: Tensor) -> Tensor:
        """``(N, B, m, m)`` Grams in their own scale."""
        return small * self.scale[:, None, :, None] * self.scale[:, None, None, :]


def random_signs(log_probs: Tensor, seeds: Sequence[int], samples: int) -> Tensor:
    """Coefficients a_k = +-sqrt(P_k), ``(N, m, K)`` float64, of m random sums (Sun 2025): E[grad h grad h^T] = G.

    Each example has a seed of its own, so that its signs do not depend on the others of its chunk.
    """
    roots, shape = (0.5 * log_probs).exp()[:, None], (samples, log_probs.shape[1])
    drawn = [torch.randint(2, shape, generator=torch.Generator().manual_seed(seed), device="cpu") for seed in seeds]
    return (2 * torch.stack(drawn) - 1).to(roots) * roots


def draw_seeds(count: int, generator: torch.Generator | None) -> list[int]:
    """A seed for each example; None draws from PyTorch's default generator."""
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randint(2**62, (count,), generator=generator, device=device).tolist()


LogitRows = Classes | ScoreSums
Rows = TypeVar("Rows", bound=LogitRows)
