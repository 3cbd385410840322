"""How far a unit perturbation moves the output: the trace from a few backward passes, and the worst direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from influence.checks import require_count
from influence.contrasts import ScoreSums, draw_seeds, random_signs
from influence.inputs import Batch, Inputs
from influence.metric import computation, in_parts, metric_tensor
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
    each chunk, which proves that its examples are independent), with a relative standard deviation of at most
    sqrt(2 / m). From m = K - 1 on the exact trace costs no more.

    Takes and refuses what ``metric_tensor`` does; the blocks are in the same order. ``samples`` is m >= 1; None takes
    the exact trace of the metric tensor. ``generator`` (None: PyTorch's default one) gives one seed for each example,
    so that the signs do not depend on the chunks.

    Returns:
        ``(N, B)`` float64, in (unit of omega)^-2; sigma^2 / 2 times it is the mean KL under N(0, sigma^2 I).

    Example:
        >>> model = nn.Linear(5, 1000)
        >>> trace(model, torch.zeros(2, 5), wrt="layers", samples=8).shape
        torch.Size([2, 1])
    """
    if samples is None:
        return metric_tensor(model, x, wrt=wrt, trainable_only=trainable_only, chunk_size=chunk_size).trace()
    require_count(samples=samples, chunk_size=chunk_size)
    inputs, _, engine = computation(model, x, wrt, trainable_only=trainable_only)
    seeds = draw_seeds(len(inputs), generator)

    def compute(chosen: slice) -> Tensor:
        def rows(logits: Tensor) -> ScoreSums:
            log_probs = torch.log_softmax(logits.detach().double(), dim=1)
            return ScoreSums.of(log_probs, random_signs(log_probs, seeds[chosen], samples))

        return engine(inputs[chosen], rows)[1].diagonal(dim1=-2, dim2=-1).mean(dim=-1)

    return torch.cat(in_parts(compute, model, inputs, engine, passes=samples, chunk_size=chunk_size))


def worst_direction(
    model: nn.Module, x: Batch, *, wrt: str = "input", chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""The unit perturbation of each input that moves the output most, and how far.

    The first eigenvector v of G, from that of the K x K matrix :math:`L_0^T L_0` with columns
    :math:`\sqrt{P_k} \nabla \log P_k` of :math:`L_0` (Shu & Zhu 2019, section 2, arXiv 1901.07152):
    :math:`v = L_0 u / |L_0 u|` is one backward pass more than ``metric_tensor`` takes. To second order
    KL(p(x) || p(x + t v)) = t^2 / 2 times its eigenvalue, and no other unit vector has more.

    Of v and -v it is the one along which the loss -log P of the predicted class rises; where that is level along v,
    either one. Where the largest eigenvalue is not alone, it is one of its unit eigenvectors.

    Takes and refuses what ``metric_tensor`` does, but ``wrt`` is "input", or "input:NAME" where x holds several
    floating tensors; another is a ValueError.

    Returns:
        The direction, like the perturbed tensor, of unit Euclidean norm for each example (zero where no direction moves
        the output), and ``(N,)`` float64, the largest eigenvalue of G, in (unit of x)^-2.

    Example:
        >>> direction, value = worst_direction(nn.Linear(5, 3), torch.zeros(2, 5))
        >>> direction.shape, value.shape
        (torch.Size([2, 5]), torch.Size([2]))
    """
    if not isinstance(wrt, str) or wrt.partition(":")[0] != "input":
        raise ValueError(f"wrt must be 'input' or 'input:NAME', got {wrt!r}: the direction is one of the input.")
    metric = metric_tensor(model, x, wrt=wrt, chunk_size=chunk_size)
    values, vectors = torch.linalg.eigh(metric.root_gram()[:, 0])
    first = vectors[..., -1]
    # The derivative of -log P_r along v is -lambda^(1/2) u_r / P_r^(1/2).
    predicted = metric.log_probs.argmax(dim=1, keepdim=True)
    coefficients = (0.5 * metric.log_probs).exp() * torch.where(first.gather(1, predicted) > 0, -first, first)
    inputs, engine = Inputs.of(x).perturbing(wrt.partition(":")[2] or None), InputGrams(model)

    def compute(chosen: slice) -> Tensor:
        sums = ScoreSums.of(metric.log_probs[chosen], coefficients[chosen, None])
        row = engine.jacobian(inputs[chosen], lambda logits: sums)[1].squeeze(1).double()
        size = row.reshape(len(row), -1).norm(dim=1).view(-1, *[1] * (row.ndim - 1))
        moves = (size > 0) & (values[chosen, -1] > 0).view_as(size)
        return torch.where(moves, row / size, 0.0).to(inputs.x.dtype)

    direction = torch.cat(in_parts(compute, model, inputs, engine, passes=1, chunk_size=chunk_size))
    return direction, values[:, -1].clamp(min=0)
