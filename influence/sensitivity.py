"""How far a unit perturbation moves the output: the trace from a few backward passes, and the worst direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from influence.checks import require_deterministic
from influence.contrasts import forward
from influence.memory import in_chunks
from influence.metric import _parameter_blocks, full_precision, metric_tensor, require_input
from influence.pixels import Patches
from influence.rules.engine import ParameterGrams, differentiable

# Examples, and input values, in one backward pass to the input: bounds the activations of large images.
_BATCH, _BATCH_VALUES = 64, 2**20


def trace(
    model: nn.Module,
    x: Tensor,
    *,
    wrt: str | Sequence[str] | Patches = "input",
    samples: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Trace of the metric tensor of each example and block: how far a unit perturbation moves the output.

    With samples, an unbiased estimate (Sun 2025, arXiv 2505.13614): for random signs :math:`\xi_k` and with
    :math:`\sqrt{P_k}` held constant,

    .. math:: h = \sum_k \xi_k \sqrt{P_k} \log P_k, \qquad E[\nabla h \nabla h^T] = G, \qquad
        E[|\nabla h|^2] = \operatorname{tr} G,

    so that m signs for each class and example cost m backward passes, whatever the number of classes. The mean of m
    such squares has a relative standard deviation of at most sqrt(2 / m). From m = K - 1 on the exact trace costs no
    more.

    Args:
        model: As for ``metric_tensor``.
        x: As for ``metric_tensor``.
        wrt: As for ``metric_tensor``; the blocks are in the same order.
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
        return metric_tensor(model, x, wrt=wrt, chunk_size=chunk_size).trace()
    for name, value in (("samples", samples), ("chunk_size", chunk_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}. Use None for the default.")
    engine, patches = None, None
    if isinstance(wrt, Patches) or (isinstance(wrt, str) and wrt == "input"):
        require_input(model, x, floating=True)
        if isinstance(wrt, Patches):
            wrt.blocks(x.shape[1:])  # refuses what is no image
            patches = wrt
    else:
        require_input(model, x, floating=False)
        engine = ParameterGrams(model, *_parameter_blocks(model, wrt))
    require_deterministic(model)
    device = torch.device("cpu") if generator is None else generator.device
    seeds: list[int] = torch.randint(2**62, (len(x),), generator=generator, device=device).tolist()
    parts: list[Tensor] = []

    def compute(part: Tensor) -> Tensor:
        start = sum(map(len, parts))
        mine = seeds[start : start + len(part)]

        def rows(logits: Tensor) -> ScoreSums:
            log_probs = torch.log_softmax(logits.detach().double(), dim=1)
            signs = torch.stack([_signs(seed, samples, logits.shape[1]) for seed in mine]).to(log_probs)
            return ScoreSums.of(log_probs, signs * (0.5 * log_probs).exp()[:, None], logits.dtype)

        if engine is None:
            return _input_squares(model, part, rows, patches).mean(dim=1)
        _, gram, _ = engine(part, rows)
        return gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)

    with full_precision():
        size = chunk_size or (_input_chunk(x) if engine is None else engine.chunk_size(x, samples))
        for part in in_chunks(compute, x, size, may_halve=chunk_size is None):
            parts.append(part)
    return torch.cat(parts)


def worst_direction(model: nn.Module, x: Tensor, *, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
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
        x: ``(N, ...)`` floating.
        chunk_size: As for ``metric_tensor``.

    Returns:
        The direction, like ``x``, of unit Euclidean norm for each example (zero where no direction moves the output),
        and ``(N,)`` float64, the largest eigenvalue of G, in (unit of x)^-2.

    Raises:
        TypeError: As ``metric_tensor``.
        ValueError: As ``metric_tensor``.
        RuntimeError: As ``metric_tensor``.

    Example:
        >>> direction, value = worst_direction(nn.Linear(5, 3), torch.zeros(2, 5))
        >>> direction.shape, value.shape
        (torch.Size([2, 5]), torch.Size([2]))
    """
    metric = metric_tensor(model, x, chunk_size=chunk_size)
    root = (0.5 * metric.log_probs).exp()
    values, vectors = torch.linalg.eigh(root[:, :, None] * metric.score_gram()[:, 0] * root[:, None])
    first = vectors[..., -1]
    # The derivative of -log P_r along v is -lambda^(1/2) u_r / P_r^(1/2).
    predicted = metric.log_probs.argmax(dim=1, keepdim=True)
    first = torch.where(first.gather(1, predicted) > 0, -first, first)
    coefficients = root * first
    parts: list[Tensor] = []

    def compute(part: Tensor) -> Tensor:
        start = sum(map(len, parts))
        chosen = slice(start, start + len(part))
        sums = ScoreSums.of(metric.log_probs[chosen], coefficients[chosen, None], metric.dtype)
        row = _input_rows(model, part, lambda logits: sums)[1][0].double()
        size = row.flatten(1).norm(dim=1).view(-1, *[1] * (row.ndim - 1))
        return torch.where(size > 0, row / size, 0.0).to(part.dtype)

    with full_precision():
        for part in in_chunks(compute, x, chunk_size or _input_chunk(x), may_halve=chunk_size is None):
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


def _input_chunk(x: Tensor) -> int:
    return max(1, min(_BATCH, _BATCH_VALUES // max(1, x[0].numel())))


def _input_rows(model: nn.Module, x: Tensor, rows: Callable[[Tensor], ScoreSums]) -> tuple[ScoreSums, list[Tensor]]:
    """The sums, and the gradients of each of them by the input, like ``x``, in units of their scale."""
    with differentiable(model, []):
        leaf = x.detach().clone().requires_grad_()
        logits = forward(model, leaf)
        sums = rows(logits)
        found = []
        for place, seed in enumerate(sums.seeds(logits.dtype)):
            more = place < sums.count - 1
            (grad,) = torch.autograd.grad(
                logits, leaf, seed, retain_graph=more, allow_unused=True, materialize_grads=True
            )
            found.append(grad.detach())
    return sums, found


def _input_squares(model: nn.Module, x: Tensor, rows: Callable[[Tensor], ScoreSums], patches: Patches | None) -> Tensor:
    """Squared norms of the gradients of m sums by each block of the input, ``(N, m, B)`` float64."""
    sums, gradients = _input_rows(model, x, rows)
    squares = []
    for row in gradients:
        if patches is None:
            squares.append(row.double().flatten(1).square().sum(dim=1, keepdim=True))
        else:
            squares.append(patches.grams(row[:, None])[:, :, 0, 0])
    return torch.stack(squares, dim=1) * sums.scale.square()[..., None]
