"""Influence of single weights, averaged over examples: one reverse pass, and no Jacobian of all weights.

Each node's Jacobian is made for a few examples at a time (``grams/gradients.py``), reduced to three numbers for each
weight and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from influence.checks import require_count, require_deterministic, require_labels
from influence.contrasts import ScoreSums, draw_seeds, random_signs
from influence.grams.gradients import AnyGradient, ProductGradient, below, sum_of_squares, through, within
from influence.grams.parameters import ParameterPasses, squared_lengths
from influence.grams.rules import Operand, shape_of
from influence.independence import require_reproducible
from influence.inputs import Batch, Inputs
from influence.kernels.tolerances import REVERSE
from influence.measures import given_labels, log_ceiling
from influence.metric import in_parts, parameter_blocks
from influence.pixels import Patches

# A ReLU at its kink may open in a batch and stay shut for the example alone, which moves a gradient in single precision
# by this many tolerances and leaves its length; another gradient is further off by orders.
_OTHER = 10.0
# What leaves less than so many eps of the length of its terms is rounding; or of a parameter's largest row of entries,
# where nobody saw terms: what cancels was there at most half an eps.
_CANCELLED = 16.0
_CANCELLED_ALONE = 4.0
# Entries of a node's Jacobian made at once: those of a CPU stay in its cache.
_PIECE = {"cpu": 2**20}
_PIECE_ELSEWHERE = 2**26


@dataclass(frozen=True)
class WeightInfluence:
    """Of every single weight, by the name of its parameter and in its shape: means over the examples, float64.

    Attributes:
        fi: FI of that weight alone (p = 1); no unit. 0 where no class depends on it.
        trace: G_jj = sum_k P_k (d_j log P_k)^2, in (unit of the weight)^-2.
        gradient: of the loss -log P_y.
        examples: How many the means are over.
    """

    fi: dict[str, Tensor]
    trace: dict[str, Tensor]
    gradient: dict[str, Tensor]
    examples: int


def weight_influence(
    model: nn.Module,
    x: Batch,
    labels: Tensor | Sequence[int] | Literal["predicted"] | None = None,
    *,
    wrt: str | Sequence[str] = "parameters",
    trainable_only: bool = False,
    samples: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> WeightInfluence:
    r"""FI of each weight by itself, the mean over the examples.

    .. math:: FI_j = \frac{(\partial_j \log P_y)^2}{\sum_k P_k (\partial_j \log P_k)^2} \le \frac{1 - P_y}{P_y}

    (Shu & Zhu 2019, section 2, with p = 1; averaged over examples as in Dai et al. 2025, arXiv 2504.03714). It is free
    of the size of the gradient, and not at its ceiling: a weight reaches one direction of the K - 1. A gradient that is
    a sum over positions and cancels to rounding, as that of the bias of an attention's keys does, counts as zero; on
    the autograd path, which sees no terms, so does one below four eps of the largest of its parameter.

    Args:
        model: As for ``metric_tensor``.
        x: As for ``metric_tensor``, N examples.
        labels: As for ``first_order_influence``.
        wrt: "parameters", or a list of names of modules or parameters.
        trainable_only: Whether parameters that require no gradient are left out.
        samples: None: exact, by K - 1 backward passes. m >= 1: the trace by m random sums over the classes, as in
            ``trace``, for many classes; FI, which it divides, is then an estimate, cut at its ceiling.
        generator: Of the signs of these sums; None: PyTorch's default one.
        chunk_size: As for ``metric_tensor``.

    Raises:
        TypeError, ValueError, RuntimeError: As ``metric_tensor`` and ``first_order_influence``.

    Example:
        >>> found = weight_influence(nn.Linear(5, 3), torch.ones(2, 5), [0, 1])
        >>> found.fi["weight"].shape, found.examples
        (torch.Size([3, 5]), 2)
    """
    require_count(chunk_size=chunk_size, samples=samples)
    require_deterministic(model)
    if isinstance(wrt, Patches) or (isinstance(wrt, str) and wrt.partition(":")[0] in ("input", "layers")):
        raise ValueError(f"wrt must be 'parameters' or a list of modules or parameters, got {wrt!r}.")
    inputs, given = Inputs.of(x), given_labels(labels)
    groups, parameters = parameter_blocks(model, wrt, trainable_only=trainable_only)
    wanted = {name for names in groups.values() for name in names}
    seeds = [] if samples is None else draw_seeds(len(inputs), generator)
    passes = _WeightPasses(model, {name: p for name, p in parameters.items() if name in wanted})

    def compute(chosen: slice) -> None:
        def rows(logits: Tensor) -> _LossRows:
            log_probs = torch.log_softmax(logits.detach().double(), dim=1)
            if given is None:
                y = logits.detach().argmax(dim=1)
            else:
                y = require_labels(given, examples=len(inputs), classes=logits.shape[1], device=logits.device)[chosen]
            if samples is None:
                return _LossRows.exact(log_probs, y)
            return _LossRows.sampled(log_probs, y, random_signs(log_probs, seeds[chosen], samples))

        passes.add(inputs[chosen], rows)

    in_parts(compute, model, inputs, passes, passes=None if samples is None else samples + 1, chunk_size=chunk_size)
    fi, trace, gradient = (
        {name: total[number] / len(inputs) for name, total in passes.totals.items()} for number in range(_NUMBERS)
    )
    return WeightInfluence(fi, trace, gradient, len(inputs))


_NUMBERS = 3  # FI, trace and gradient


class _WeightPasses(ParameterPasses):
    """Adds up the three numbers of every weight, ``totals``: ``(3, *shape)`` float64 for each parameter."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(model, parameters)
        self.totals = {
            name: torch.zeros(_NUMBERS, *p.shape, dtype=torch.float64, device=p.device)
            for name, p in parameters.items()
        }

    def add(self, inputs: Inputs, rows: Callable[[Tensor], _LossRows]) -> None:
        """Add a chunk of examples, with what ``rows`` chooses from their logits."""
        made = self._forward(inputs, rows)
        score, dtype, probes = made.rows, made.dtype, made.probes
        logits, initial = made.logits.detach(), made.probe_seeds()
        truth = [self._by_pytorch(inputs, logits, n, seed, dtype) for n, seed in enumerate(initial)]
        found: dict[str, Tensor] = {}
        differ: set[str] = set()

        def take(parts: list[AnyGradient]) -> None:
            if truth:
                largest = torch.stack([_lengths(part, probes) for part in parts]).amax(dim=0)
                for part in parts:
                    name = part.operand.name
                    pairs = zip(_combined(part, probes), truth, strict=True)
                    gaps = torch.stack([(ours - theirs[name]).double().norm() for ours, theirs in pairs])
                    if not bool((gaps <= _OTHER * REVERSE[dtype] * largest).all()):
                        differ.add(name)
            found.update({part.operand.name: _reduced(part, score) for part in parts})

        self._collect_all(made.graph, made.seeds, dtype, take)
        del made
        lost = {name for one in truth for name, grad in one.items() if name not in found and bool(grad.any())}
        self._compared = True
        differs = self._refuse(differ | lost, "its gradient is not autograd's")
        if differs:
            again = self._by_pytorch(inputs, logits, 0, initial[0], dtype)
            require_reproducible(squared_lengths(truth[0].values()), squared_lengths(again.values()), dtype)
        if differs or self._refuse_what_is_missed(inputs, logits, score, dtype):
            self.add(inputs, rows)
            return
        self._announce()
        for name in found.keys() - self.refused.keys():
            self.totals[name] += found[name]
        for n, name, jacobian in self._rows_of_refused(inputs, score, dtype):
            flat, unseen = jacobian.reshape(1, len(jacobian), -1), partial(_rounding_unseen, jacobian.dtype)
            values, factors = score.numbers(flat, slice(n, n + 1), unseen)
            self.totals[name] += (factors * torch.cat(values).double()).view_as(self.totals[name])


def _reduced(part: AnyGradient, score: _LossRows) -> Tensor:
    """The three numbers ``(3, *shape)`` of the entries of a parameter, summed over the examples."""
    most = _PIECE.get(part.rows.device.type, _PIECE_ELSEWHERE)
    # All examples of a few outputs at once: a sum over them is then written once for each weight.
    pieces = part.pieces(most) if isinstance(part, ProductGradient) else [part]
    total = torch.cat([_summed(piece, score, most) for piece in pieces], dim=1)
    return torch.stack([_arranged(number, part.operand) for number in total])


def _summed(part: AnyGradient, score: _LossRows, most: int) -> Tensor:
    """The same of a piece, as its node takes the parameter: a few examples at a time where all are too many."""
    examples, rows = part.rows.shape[:2]
    step = max(1, most // max(1, rows * part.width))
    total: Tensor | None = None
    for start in range(0, examples, step):
        chosen = slice(start, start + step)
        values, factors = score.numbers(part.entries(chosen), chosen, partial(_rounding, part, chosen))
        # Of the values in the precision of the network the factors are in float64: their ratios are taken first.
        largest = factors.amax(dim=1).clamp(min=torch.finfo(factors.dtype).tiny)
        weights = (factors / largest[:, None]).to(values[0].dtype)
        parts = torch.stack([part.to_parameter(v, w, chosen) for v, w in zip(values, weights, strict=True)]).double()
        parts.mul_(largest.view(-1, *(1,) * (parts.ndim - 1)))
        total = parts if total is None else total.add_(parts)
    assert total is not None
    return total


def _rounding(part: AnyGradient, chosen: slice, squares: Tensor) -> Tensor:
    """Which of the squares ``(n, p)`` of a few examples, flattened, are not 0 and may be rounding alone: ``(k,)``."""
    limit = (_CANCELLED * torch.finfo(part.rows.dtype).eps) ** 2
    if isinstance(part, ProductGradient):
        return part.cancelled(chosen, squares, limit)
    terms = part.terms(chosen, squares.dtype)
    if not bool(terms.amax() < math.inf):
        terms = part.terms(chosen, torch.float64)
    return below(squares, limit * terms)


def _rounding_unseen(dtype: torch.dtype, squares: Tensor) -> Tensor:
    """The same of a parameter whose terms nobody saw."""
    return below(squares, (_CANCELLED_ALONE * torch.finfo(dtype).eps) ** 2 * squares.amax())


def _combined(part: AnyGradient, probes: Tensor) -> list[Tensor]:
    """v^T J of the first examples, as the parameter lies, for v ``(R, m)``."""
    jacobian = part.entries(slice(len(probes)))
    jacobian = jacobian.to(torch.promote_types(jacobian.dtype, torch.float32))
    sums, one = probes.to(jacobian.dtype)[:, None] @ jacobian, jacobian.new_ones(1)
    return [_arranged(part.to_parameter(row, one, slice(n, n + 1)), part.operand) for n, row in enumerate(sums)]


def _lengths(part: AnyGradient, probes: Tensor) -> Tensor:
    """Bounds ``(R,)`` of what v^T J adds up: where it cancels, rounding has the size of that."""
    wide, chosen = torch.promote_types(part.rows.dtype, torch.float32), slice(len(probes))
    totals = part.terms(chosen, wide).double().sum(dim=1)
    if not bool(((totals > torch.finfo(wide).tiny) & (totals < math.inf)).all()):
        totals = part.terms(chosen, torch.float64).sum(dim=1)
    return totals.sqrt() * probes.norm(dim=1)


def _arranged(values: Tensor, operand: Operand) -> Tensor:
    """Values for what a node takes, or its picks leave, as the parameter itself lies."""
    nodes = [node for node in operand.rearranged if node.name() != "ToCopyBackward0"]  # which would round them
    return through(nodes, values.reshape(1, 1, *shape_of(nodes[0])))[0, 0] if nodes else values


@dataclass(frozen=True)
class _LossRows(ScoreSums):
    r"""Rows of a Jacobian from which the three numbers are sums of squares, nothing being subtracted.

    Exact: with contrasts t_k of the other classes with y, Q_k = P_k / (1 - P_y), a = sum_k Q_k t_k and
    v = sum_k Q_k (t_k - a)^2,

        d_j (-log P_y) = (1 - P_y) a,   G_jj = (1 - P_y) (v + P_y a^2),   FI_j = (1 - P_y) a^2 / (v + P_y a^2).

    The first row is a; of the K - 2 others v is the sum of squares: B with B^T B = diag(Q) - Q Q^T, the triangular one
    of a multinomial covariance.
    Sampled: the gradient of the loss, and m random sums h, of whose squares G_jj is the mean.

    ``scale``, ``(N, 1)``, is one for all rows of an example.

    Attributes:
        of_label: ``(N, 1)`` float64, P_y.
        of_rest: ``(N, 1)`` float64, 1 - P_y.
        samples: m; 0 where exact.
    """

    of_label: Tensor
    of_rest: Tensor
    samples: int

    @classmethod
    def exact(cls, log_probs: Tensor, labels: Tensor) -> _LossRows:
        """For log P ``(N, K)`` and labels ``(N,)``."""
        y = labels[:, None]
        others = log_probs.scatter(1, y, -torch.inf)
        log_rest = others.logsumexp(dim=1, keepdim=True)
        # The other classes, the most probable first.
        log_q, order = (others - log_rest).sort(dim=1, descending=True)
        log_q, order = log_q[:, :-1], order[:, :-1]
        q = log_q.exp()
        # c_i = Q_i + Q_{i + 1} + ...
        log_tail = log_q.flip(1).logcumsumexp(dim=1).flip(1)
        here, rest = log_tail[:, :-1], log_tail[:, 1:]
        on = (0.5 * (log_q[:, :-1] + rest - here)).exp()
        off = (0.5 * (log_q[:, :-1] - rest - here)).exp()
        rows = (-off[..., None] * q[:, None]).triu(1)
        rows.diagonal(dim1=1, dim2=2).copy_(on)
        rows = torch.cat([q[:, None], rows], dim=1)
        coefficients = torch.zeros(*rows.shape[:2], log_probs.shape[1], dtype=rows.dtype, device=rows.device)
        coefficients.scatter_(2, order[:, None].expand_as(rows), rows)
        coefficients[:, 0].scatter_(1, y, -1.0)
        one = torch.ones_like(log_rest)
        return cls(log_probs, coefficients, one, log_probs.gather(1, y).exp(), log_rest.exp(), 0)

    @classmethod
    def sampled(cls, log_probs: Tensor, labels: Tensor, signs: Tensor) -> _LossRows:
        """The same with the coefficients ``(N, m, K)`` of random sums of log P."""
        own = -nn.functional.one_hot(labels, log_probs.shape[1]).to(log_probs)[:, None]
        sums = ScoreSums.of(log_probs, torch.cat([own, signs], dim=1))
        largest = sums.scale.amax(dim=1, keepdim=True).clamp(min=torch.finfo(sums.scale.dtype).tiny)
        rest = log_ceiling(log_probs, labels)[:, None] + log_probs.gather(1, labels[:, None])
        unit, of_label = sums.unit * (sums.scale / largest)[..., None], log_probs.gather(1, labels[:, None]).exp()
        return cls(log_probs, unit, largest, of_label, rest.exp(), signs.shape[1])

    def numbers(
        self, jacobian: Tensor, chosen: slice, rounding: Callable[[Tensor], Tensor], unit: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """FI, trace and gradient of some examples from their rows ``(n, m, p)``: their values and factors ``(3, n)``.

        Values are ``(n, p)``, in the precision of the network, since wider entries would take longer than their
        products, or where squares do not fit it in float64, each weight in its own ``unit``; factors are float64.
        ``rounding`` says, of squares of all rows, which of them are no more than that: such a weight moves nothing.

        Each line is a pass over memory, or two, and so as long as a row of the Jacobian; a mask, or a norm over the
        rows, would be ten times as long on a CPU.
        """
        wide = torch.promote_types(jacobian.dtype, torch.float32)
        jacobian = jacobian.to(wide)
        first, others = jacobian[:, 0], jacobian[:, 1:].unbind(dim=1)
        squares = sum_of_squares(others) if others else torch.zeros_like(first)
        own = first.square()
        scale, of_label, of_rest = (part[chosen] for part in (self.scale, self.of_label, self.of_rest))
        if self.samples:
            whole = squares / self.samples
            factors = torch.ones_like(scale), scale.square(), scale
        else:
            whole = squares.addcmul(own, of_label.to(wide))
            factors = of_rest, of_rest, of_rest
        if unit is None and not _fits(first, own if self.samples else None, whole, of_label):
            wider = jacobian.double()
            unit = wider.abs().amax(dim=1)
            unit = unit.masked_fill(unit == 0, 1.0)
            return self.numbers(wider / unit[:, None], chosen, rounding, unit)
        total = squares.add_(own)
        lost = rounding(total if unit is None else total * unit.square())
        ratio, trace, gradient = own.div_(whole.clamp(min=torch.finfo(wide).tiny)), whole, first
        if self.samples:
            ratio.clamp_(max=(of_rest / of_label).to(wide))
        if unit is not None:
            trace, gradient = trace * unit.square(), gradient * unit
        if len(lost):
            ratio, trace, gradient = (
                values.flatten().index_fill(0, lost, 0.0).view_as(values) for values in (ratio, trace, gradient)
            )
        return [ratio, trace, gradient], torch.cat(factors, dim=1).T


def _fits(first: Tensor, own: Tensor | None, whole: Tensor, of_label: Tensor) -> bool:
    """Whether no square, of the ``first`` row or the ``whole``, left its precision.

    ``own`` are those of the first row; None: the whole holds P_y times them.
    """
    least = torch.finfo(whole.dtype).tiny / torch.finfo(whole.dtype).eps
    low, high = whole.aminmax()
    most = high / of_label.amin() if own is None else high.maximum(own.amax())
    if not bool((most <= 1 / least) & (of_label.amin() >= least)):
        return False
    if bool(low >= least):
        return True
    # Of the first row what has a smaller square than the least.
    low, high = within(first, whole, -1.0, least).aminmax()
    return bool((low == 0) & (high == 0))
