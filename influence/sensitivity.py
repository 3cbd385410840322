"""How far a unit perturbation moves the output: the trace from a few backward passes, and the worst direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from influence.inputs import Batch, Inputs
from influence.memory import examples_that_fit, in_chunks
from influence.metric import computation, exact_autograd, metric_tensor
from influence.pixels import InputGrams, Patches


def trace(
    model: nn.Module,
    x: Batch,
    *,
    wrt: str | Sequence[str] | Patches = "input",
    trainable_only: bool = False,
    samples: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Trace of the metric tensor of each example and block: how far a unit perturbation moves the output.

    With samples, an unbiased estimate (Sun 2025, arXiv 2505.13614): for random signs :math:`\xi_k` and with
    :math:`\sqrt{P_k}` held constant,

    .. math:: h = \sum_k \xi_k \sqrt{P_k} \log P_k, \qquad E[\nabla h \nabla h^T] = G, \qquad
        E[|\nabla h|^2] = \operatorname{tr} G,

    so that m signs for each class and example cost m backward passes, whatever the number of classes (and one more for
    each chunk, which proves that its examples are independent). The mean of m such squares has a relative standard
    deviation of at most sqrt(2 / m). From m = K - 1 on the exact trace costs no more.

    Args:
        model: As for ``metric_tensor``.
        x: As for ``metric_tensor``.
        wrt: As for ``metric_tensor``; the blocks are in the same order.
        trainable_only: As for ``metric_tensor``.
        samples: m. None: the exact trace, from ``metric_tensor``.
        generator: Where the signs come from, one seed for each example, so that they do not depend on the chunks; None:
            PyTorch's default one.
        chunk_size: Examples computed at once. None: chosen, and half of it again each time memory runs out.

    Returns:
        ``(N, B)`` float64, in (unit of omega)^-2; sigma^2 / 2 times it is the mean KL under N(0, sigma^2 I).

    Raises:
        TypeError: As ``metric_tensor``.
        ValueError: As ``metric_tensor``, or for samples below 1.
        RuntimeError: As ``metric_tensor``.

    Example:
        >>> model = nn.Linear(5, 1000)
        >>> trace(model, torch.zeros(2, 5), wrt="layers", samples=8).shape
        torch.Size([2, 1])
    """
    if samples is None:
        return metric_tensor(model, x, wrt=wrt, trainable_only=trainable_only, chunk_size=chunk_size).trace()
    for name, value in (("samples", samples), ("chunk_size", chunk_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}. Use None for the default.")
    inputs, _, gram_of = computation(model, x, wrt, trainable_only=trainable_only)
    device = torch.device("cpu") if generator is None else generator.device
    seeds: list[int] = torch.randint(2**62, (len(inputs),), generator=generator, device=device).tolist()
    parts: list[Tensor] = []

    def compute(part: Inputs) -> Tensor:
        start = sum(map(len, parts))

        def rows(logits: Tensor) -> ScoreSums:
            log_probs = torch.log_softmax(logits.detach().double(), dim=1)
            signs = [_signs(seed, samples, logits.shape[1]) for seed in seeds[start : start + len(part)]]
            roots = (0.5 * log_probs).exp()[:, None]
            return ScoreSums.of(log_probs, torch.stack(signs).to(roots) * roots, logits.dtype)

        return gram_of(part, rows)[1].diagonal(dim1=-2, dim2=-1).mean(dim=-1)

    with exact_autograd(model, gram_of.perturbed):
        needed = gram_of.bytes_per_example(inputs, samples)
        size = chunk_size or examples_that_fit(needed, inputs.device)
        for part in in_chunks(compute, inputs, size, may_halve=chunk_size is None):
            parts.append(part)
    return torch.cat(parts)


def worst_direction(
    model: nn.Module, x: Batch, *, wrt: str = "input", chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""The unit perturbation of each input that moves the output most, and how far.

    The first eigenvector v of G, from that of the K x K matrix :math:`L_0^T L_0` with columns
    :math:`\sqrt{P_k} \nabla \log P_k` of :math:`L_0` (Shu & Zhu 2019, section 2, arXiv 1901.07152):
    :math:`v = L_0 u / |L_0 u|` is one backward pass more than ``metric_tensor`` takes. To second order
    KL(p(x) || p(x + t v)) = t^2 / 2 times its eigenvalue, and no other unit vector has more.

    An eigenvector has no sign. Of v and -v it is the one along which the loss -log P of the predicted class rises;
    where that loss is level along v, either one. Where the largest eigenvalue is not alone, it is one of its unit
    eigenvectors.

    Args:
        model: As for ``metric_tensor``.
        x: As for ``metric_tensor``.
        wrt: "input", or "input:NAME" where x holds several floating tensors.
        chunk_size: As for ``metric_tensor``.

    Returns:
        The direction, like the perturbed tensor, of unit Euclidean norm for each example (zero where no direction moves
        the output), and ``(N,)`` float64, the largest eigenvalue of G, in (unit of x)^-2.

    Raises:
        TypeError: As ``metric_tensor``.
        ValueError: As ``metric_tensor``, or for another ``wrt``.
        RuntimeError: As ``metric_tensor``.

    Example:
        >>> direction, value = worst_direction(nn.Linear(5, 3), torch.zeros(2, 5))
        >>> direction.shape, value.shape
        (torch.Size([2, 5]), torch.Size([2]))
    """
    if not isinstance(wrt, str) or wrt.partition(":")[0] != "input":
        raise ValueError(f"wrt must be 'input' or 'input:NAME', got {wrt!r}: the direction is one of the input.")
    metric = metric_tensor(model, x, wrt=wrt, chunk_size=chunk_size)
    root = (0.5 * metric.log_probs).exp()
    values, vectors = torch.linalg.eigh(root[:, :, None] * metric.score_gram()[:, 0] * root[:, None])
    first = vectors[..., -1]
    # The derivative of -log P_r along v is -lambda^(1/2) u_r / P_r^(1/2).
    predicted = metric.log_probs.argmax(dim=1, keepdim=True)
    coefficients = root * torch.where(first.gather(1, predicted) > 0, -first, first)
    inputs = Inputs.of(x).perturbing(wrt.partition(":")[2] or None)
    gram_of = InputGrams(model)
    parts: list[Tensor] = []

    def compute(part: Inputs) -> Tensor:
        start = sum(map(len, parts))
        chosen = slice(start, start + len(part))

        def rows(logits: Tensor) -> ScoreSums:
            return ScoreSums.of(metric.log_probs[chosen], coefficients[chosen, None], logits.dtype)

        row = gram_of.jacobian(part, rows)[1].squeeze(1).double()
        size = row.flatten(1).norm(dim=1).view(-1, *[1] * (row.ndim - 1))
        return torch.where(size > 0, row / size, 0.0).to(part.x.dtype)

    with exact_autograd(model, gram_of.perturbed):
        size = chunk_size or examples_that_fit(gram_of.bytes_per_example(inputs, 1), inputs.device)
        for part in in_chunks(compute, inputs, size, may_halve=chunk_size is None):
            parts.append(part)
    return torch.cat(parts), values[:, -1].clamp(min=0)


@dataclass(frozen=True)
class ScoreSums:
    """Sums over the classes of a_k log P_k, m for each example: rows for the engine in place of the contrasts.

    Attributes:
        log_probs: ``(N, K)`` float64, log P.
        unit: ``(N, m, K)`` float64, gradients of the sums by the logits, divided by their largest entry, so that no
            precision underflows where the network is sure.
        scale: ``(N, m)`` float64, these largest entries.
        dtype: Of the logits.
    """

    log_probs: Tensor
    unit: Tensor
    scale: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, log_probs: Tensor, coefficients: Tensor, dtype: torch.dtype) -> ScoreSums:
        """From the coefficients a, ``(N, m, K)``, held constant."""
        total = coefficients.sum(dim=2, keepdim=True)
        gradient = coefficients - log_probs.exp()[:, None] * total
        # They add up to zero. Where P_r is near 1, its own entry is all rounding: it is taken from the others.
        predicted = log_probs.argmax(dim=1)[:, None, None].expand(-1, gradient.shape[1], 1)
        gradient = gradient.scatter(2, predicted, 0.0)
        gradient = gradient.scatter(2, predicted, -gradient.sum(dim=2, keepdim=True))
        scale = gradient.abs().amax(dim=2)
        return cls(log_probs, gradient / scale.clamp(min=torch.finfo(scale.dtype).tiny)[..., None], scale, dtype)

    @property
    def count(self) -> int:
        """How many, m."""
        return self.unit.shape[1]

    def __getitem__(self, example: int) -> ScoreSums:
        chosen = slice(example, example + 1)
        return ScoreSums(self.log_probs[chosen], self.unit[chosen], self.scale[chosen], self.dtype)

    def seeds(self, dtype: torch.dtype) -> Tensor:
        """What the backward passes start from, ``(m, N, K)``."""
        return self.unit.transpose(0, 1).to(dtype)

    def embed(self, small: Tensor) -> Tensor:
        """``(N, B, m, m)`` Grams in their own scale."""
        return small * self.scale[:, None, :, None] * self.scale[:, None, None, :]


def _signs(seed: int, samples: int, classes: int) -> Tensor:
    """Random signs ``(m, K)`` of one example."""
    drawn = torch.randint(2, (samples, classes), generator=torch.Generator().manual_seed(seed))
    return 2 * drawn - 1
