"""The K - 1 contrasts of the logits with the predicted class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class LogitRows(Protocol):
    """m linear combinations of the logits of each of N examples; the gradients of each make a row of a Jacobian."""

    @property
    def log_probs(self) -> Tensor:
        """``(N, K)`` float64, log P."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""

    @property
    def count(self) -> int:
        """How many, m."""

    def __getitem__(self, example: int) -> LogitRows:
        """Those of one example."""

    def seeds(self, dtype: torch.dtype) -> Tensor:
        """The combinations, ``(m, N, K)``: what a backward pass starts from."""

    def embed(self, small: Tensor) -> Tensor:
        """The form in which ``(N, B, m, m)`` Grams are handed out."""


@dataclass(frozen=True)
class Classes:
    """What the logits of N examples say.

    Attributes:
        log_probs: ``(N, K)`` float64, log P.
        order: ``(N, K)``, each example's classes in the order that ends with the predicted one.
        dtype: Of the logits.
    """

    log_probs: Tensor
    order: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, logits: Tensor) -> Classes:
        """Read off logits ``(N, K)``."""
        log_probs = torch.log_softmax(logits.detach().double(), dim=1)
        classes = logits.shape[1]
        steps = torch.arange(1, classes + 1, device=logits.device)
        return cls(log_probs, (log_probs.argmax(dim=1, keepdim=True) + steps) % classes, logits.dtype)

    @property
    def count(self) -> int:
        """The K - 1 contrasts."""
        return self.order.shape[1] - 1

    def __getitem__(self, example: int) -> Classes:
        chosen = slice(example, example + 1)
        return Classes(self.log_probs[chosen], self.order[chosen], self.dtype)

    def seeds(self, dtype: torch.dtype) -> Tensor:
        """Gradients of z_k - z_r for each of the K - 1 places k in ``order``, ``(K - 1, N, K)``."""
        examples, classes = self.order.shape
        seeds = torch.zeros(classes - 1, examples, classes, dtype=dtype, device=self.order.device)
        seeds.scatter_(2, self.order[:, -1:].expand(classes - 1, -1, -1), -1.0)
        return seeds.scatter_(2, self.order[:, :-1].T[..., None], 1.0)

    def embed(self, small: Tensor) -> Tensor:
        """Put ``(N, B, K-1, K-1)`` Grams at their classes: ``(N, B, K, K)`` with zeros for the predicted class."""
        padded = torch.nn.functional.pad(small, (0, 1, 0, 1))
        back = self.order.argsort(dim=1)
        example = torch.arange(len(back), device=back.device)[:, None, None]
        # Two indices round a slice put the blocks last.
        return padded[example, :, back[:, :, None], back[:, None, :]].permute(0, 3, 1, 2).contiguous()
