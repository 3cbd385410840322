"""What a case of ``random_models`` is worth by brute force, and whether the engine agrees: the fuzzer's judge.

Everything here follows from autograd, one example and one class at a time, in the precision of the model itself.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import influence
import random_parts
import truth
from influence.grams import parameters
from random_models import Case

# Of a Gram, relative to its block's largest entry: what the engine must keep in a model's coarsest precision.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.3}
# Blocks smaller than this share of the largest are rounding of what is zero: keys' biases under a softmax, say. In
# bfloat16 every block is held against the largest.
_NOTHING = {torch.float64: 1e-13, torch.float32: 1e-7, torch.bfloat16: 1.0}
# So are Jacobians that move the logits by less than this share of them where the whole block is moved by its length.
_INSENSITIVE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 1e-2}
# Logits that differ by more than this share are not the same.
_OTHER_LOGITS = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.3}
# A rank is beyond doubt if no singular value, relative to the largest, lies between these.
_ABSENT, _PRESENT = 1e-9, 1e-4

RIGHT, ANNOUNCED, REFUSED = "right", "announced", "refused"
SILENT, CRASHED, NEEDLESS, DTYPE = "silent error", "crashed", "refused without need", "wrong dtype"
GOOD = (RIGHT, ANNOUNCED, REFUSED)


@dataclass(frozen=True)
class Verdict:
    """What the engine made of a case, and what is wrong with that."""

    kind: str
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.kind in GOOD


class Occurring(TorchDispatchMode):
    """The coarsest floating type of any intermediate result."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for y in out if isinstance(out, tuple | list) else [out]:
            if isinstance(y, Tensor) and (y.is_floating_point() or y.is_complex()):
                dtype = y.dtype.to_real()
                self.dtype = max(self.dtype, dtype, key=lambda one: torch.finfo(one).eps)
        return out


class Unambiguous(TorchDispatchMode):
    """Batch normalisation's gradients from contiguous memory alone: PyTorch (2.14) gets others wrong on a CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_batch_norm_backward.default:
            # contiguous() may leave the stride of a dimension of one entry as it is.
            args = (*(torch.empty(a.shape, dtype=a.dtype, device=a.device).copy_(a) for a in args[:2]), *args[2:])
        return func(*args, **(kwargs or {}))


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x.clone())
    return output if isinstance(output, Tensor) else output.logits


def coarsest(case: Case) -> torch.dtype:
    """Of anything that is computed."""
    with random_parts.plainly(), torch.no_grad(), Occurring() as occurring:
        case.model(case.x.clone())
    return occurring.dtype


def coarsest_of_gradients(case: Case) -> torch.dtype:
    """Of what the gradients go through: the Jacobian is that of a function which may round before."""
    leaves = list(case.model.parameters()) if not perturbs_input(case) else []
    before = [leaf.requires_grad for leaf in case.model.parameters()]
    x = case.x[:1].clone().requires_grad_(perturbs_input(case))
    case.model.requires_grad_(bool(leaves))
    with random_parts.plainly():
        node = logits_of(case.model, x).grad_fn
    for leaf, flag in zip(case.model.parameters(), before, strict=True):
        leaf.requires_grad_(flag)
    dtypes, seen, waiting = [torch.float64], {node}, [node]
    while waiting:
        found: Any = waiting.pop()
        dtypes += [meta.dtype.to_real() for meta in found._input_metadata]
        new = {source for source, _ in found.next_functions if source is not None} - seen
        seen |= new
        waiting += new
    return max((d for d in dtypes if d.is_floating_point), key=lambda one: torch.finfo(one).eps)


@torch.no_grad()
def misbehaves(case: Case) -> bool:
    """Whether an example's logits are random, or depend on its neighbours in a chunk, by more than rounding."""
    chunks = case.x.split(case.chunk_size or len(case.x))

    def logits() -> Tensor:
        return torch.cat([logits_of(case.model, chunk) for chunk in chunks])

    with random_parts.plainly():
        first, limit = logits(), _OTHER_LOGITS[coarsest(case)]
        again = [logits() for _ in range(5)] + [torch.cat([logits_of(case.model, row[None]) for row in case.x])]
    return any(bool((first - other).abs().max() > limit * first.abs().max()) for other in again)


def blocks_of(case: Case) -> dict[str, list[Tensor]]:
    """The parameters of each block."""
    if case.wrt == "parameters":
        return {"parameters": list(case.model.parameters())}
    modules = dict(case.model.named_modules())
    if case.wrt == "layers":
        owned = {name: list(module.parameters(recurse=False)) for name, module in modules.items()}
        return {name: group for name, group in owned.items() if group}
    return {name: list(modules[name].parameters()) for name in case.wrt}


def perturbs_input(case: Case) -> bool:
    return case.wrt == "input" or isinstance(case.wrt, influence.Patches)


def floors(case: Case, logits: Tensor, grams: Tensor, dtype: torch.dtype) -> Tensor:
    """Entries of the Gram of each block ``(B,)`` below which there is nothing but rounding."""
    if perturbs_input(case):
        lengths = torch.full((len(grams),), float(case.x.double().norm() / len(case.x) ** 0.5))
    else:
        lengths = torch.tensor(
            [float(sum(real(p.detach()).square().sum() for p in g)) for g in blocks_of(case).values()]
        )
        lengths = lengths.sqrt()
    moved = _INSENSITIVE[dtype] * float(logits.abs().max()) / lengths.clamp(min=0.1).double()
    return torch.clamp(moved.square(), min=_NOTHING[dtype] * float(grams.abs().max()))


def patches_of(patches: influence.Patches, shape: tuple[int, ...]) -> list[Tensor]:
    """Which pixels belong to each patch."""
    channels, height, width = shape
    masks = []
    for size in patches.sizes:
        for channel in range(channels) if patches.per_channel else [slice(None)]:
            for row in range(0, height, patches.stride):
                for column in range(0, width, patches.stride):
                    mask = torch.zeros(shape, dtype=torch.bool)
                    top, left = max(0, row - (size - 1) // 2), max(0, column - (size - 1) // 2)
                    mask[channel, top : row + size // 2 + 1, left : column + size // 2 + 1] = True
                    masks.append(mask.flatten())
    return masks


def real(grad: Tensor) -> Tensor:
    """A complex parameter is two real ones."""
    dense = grad.to_dense()
    return (torch.view_as_real(dense) if dense.is_complex() else dense).flatten().double()


def contrast_jacobians(case: Case, example: int) -> tuple[Tensor, list[Tensor]]:
    """Logits of one example ``(K,)`` in float64, and each block's Jacobian of the contrasts ``(K, p)``."""
    x = case.x[example : example + 1].clone()
    groups = [[x.requires_grad_()]] if perturbs_input(case) else list(blocks_of(case).values())
    leaves = list({id(leaf): leaf for group in groups for leaf in group}.values())
    place = {id(leaf): i for i, leaf in enumerate(leaves)}
    before = [leaf.requires_grad for leaf in leaves]
    for leaf in leaves:
        leaf.requires_grad_()
    with random_parts.plainly():
        logits = logits_of(case.model, x)[0]
    predicted = int(logits.argmax())
    rows = []
    for k in range(len(logits)):
        if k == predicted:
            rows.append([torch.zeros_like(real(leaf)) for leaf in leaves])
            continue
        with Unambiguous():
            grads = torch.autograd.grad(
                logits[k] - logits[predicted], leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        rows.append([real(grad) for grad in grads])
    for leaf, flag in zip(leaves, before, strict=True):
        leaf.requires_grad_(flag)
    blocks = [torch.stack([torch.cat([row[place[id(leaf)]] for leaf in group]) for row in rows]) for group in groups]
    if isinstance(case.wrt, influence.Patches):
        blocks = [blocks[0][:, mask] for mask in patches_of(case.wrt, tuple(case.x.shape[1:]))]
    return logits.detach().double(), blocks


def exact_influence(logits: Tensor, jacobian: Tensor, label: int) -> tuple[int, float | None] | None:
    """Rank and FI by the paper's formula; None where the rank is in doubt, or FI takes too long."""
    _, singular, right = torch.linalg.svd(jacobian, full_matrices=False)
    relative = singular / singular[0]
    if bool(((relative > _ABSENT) & (relative < _PRESENT)).any()):
        return None
    rank = int((relative > _PRESENT).sum())
    log_probs = logits.log_softmax(0)
    if rank == len(logits) - 1:
        others = torch.cat([log_probs[:label], log_probs[label + 1 :]])
        return rank, float((others.logsumexp(0) - log_probs[label]).exp())
    directions = jacobian @ right[:rank].T
    if float(log_probs.min()) > -10:
        return rank, truth.influence(logits, directions, label)[0]
    if rank > 12:
        return rank, None
    return rank, truth.influence_in_many_digits(logits.tolist(), directions, label, digits=150)[0]


@contextmanager
def listening() -> Iterator[list[str]]:
    """What the engine announces meanwhile of slower paths."""
    heard: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "autograd path" in record.getMessage():
                heard.append(record.getMessage())

    log, handler = logging.getLogger("influence"), Handler()
    log.addHandler(handler)
    propagate, log.propagate = log.propagate, False
    parameters._ANNOUNCED.clear()  # it says each thing once
    try:
        yield heard
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


def refusal(error: Exception) -> Verdict:
    """An error of our own in words, or one that came through from below."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised = (last.line or "").startswith("raise ")
    ours = raised and Path(influence.__file__).parent in Path(last.filename).parents
    documented = type(error) in (TypeError, ValueError, RuntimeError) and len(str(error).split()) > 5
    where = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:300]}"
    return Verdict(REFUSED if ours and documented else CRASHED, where)


def measured(case: Case, x: Tensor) -> influence.MetricTensor:
    return influence.metric_tensor(case.model, x, wrt=case.wrt, chunk_size=case.chunk_size)


def judge(case: Case) -> Verdict:
    """Hold the engine against brute force on a case."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), listening() as heard:
        warnings.simplefilter("ignore")
        torch.manual_seed(case.seed)
        if case.change is not None:
            try:
                measured(case, case.x)
            except (TypeError, ValueError, RuntimeError):
                pass  # the second call counts
            case.change()
            heard.clear()
        hostile = case.fate == random_parts.REFUSED and misbehaves(case)
        try:
            metric = measured(case, case.x)
        except Exception as error:
            verdict = refusal(error)
            if verdict.kind == REFUSED and case.fate == random_parts.RIGHT and not insensitive(case):
                return Verdict(NEEDLESS, verdict.detail)
            return verdict
        announced = "; ".join(heard)
        # A model that changes with every call may have settled in those before: then its numbers count.
        if (hostile and misbehaves(case)) or (case.fate == random_parts.REFUSED and not reproducible(case)):
            return Verdict(SILENT, "accepted, though its examples have no logits or no gradients of their own")
        wrong = difference(case, metric) or variation(case, metric)
        return wrong or Verdict(ANNOUNCED if announced else RIGHT, announced)


def reproducible(case: Case) -> bool:
    """Whether the truth is: random features under a head of zeros have gradients that change from call to call.

    Those of logits that are constant, as of a normalisation of each channel before a mean over it, are rounding.
    """
    (logits, first), (_, again) = (contrast_jacobians(case, 0) for _ in range(2))
    dtype = coarsest(case)
    one, other = (torch.stack([jacobian @ jacobian.T for jacobian in blocks]) for blocks in (first, again))
    rounding = torch.maximum(one, other).amax(dim=(1, 2)) <= floors(case, logits, one, dtype)
    gaps = [(before - after).abs().max() for before, after in zip(first, again, strict=True)]
    limit = _OTHER_LOGITS[dtype] * max(jacobian.abs().max() for jacobian in first)
    return bool((rounding | (torch.stack(gaps) <= limit)).all())


def insensitive(case: Case) -> bool:
    """Whether nothing that is perturbed moves the logits of some example by more than rounding."""
    for n in range(len(case.x)):
        logits, jacobians = contrast_jacobians(case, n)
        grams = torch.stack([jacobian @ jacobian.T for jacobian in jacobians])
        if bool((grams.abs().amax(dim=(1, 2)) <= floors(case, logits, grams, coarsest(case))).all()):
            return True
    return False


def difference(case: Case, metric: influence.MetricTensor) -> Verdict | None:
    """Where the engine differs from brute force."""
    dtype = coarsest(case)
    if not isinstance(case.wrt, list) and metric.dtype not in (dtype, coarsest_of_gradients(case)):
        return Verdict(DTYPE, f"dtype is {metric.dtype}, the coarsest that occurs is {dtype}")
    tolerance = TOLERANCE[dtype]
    found = influence.first_order_influence(metric, case.labels)
    trace, worst = metric.trace(), metric.lambda_max()
    for n in range(len(case.x)):
        logits, jacobians = contrast_jacobians(case, n)
        log_probs = logits.log_softmax(0)
        if (metric.log_probs[n] - log_probs).abs().max() > tolerance * (1 + log_probs.abs().max()):
            return Verdict(SILENT, f"log P of example {n}: {metric.log_probs[n]} for {log_probs}")
        if metric.dims.tolist() != [jacobian.shape[1] for jacobian in jacobians]:
            return Verdict(SILENT, f"dims {metric.dims.tolist()}")
        grams = torch.stack([jacobian @ jacobian.T for jacobian in jacobians])
        lowest = floors(case, logits, grams, dtype)
        ours = metric.contrast_gram()[n]
        for b, (block, jacobian) in enumerate(zip(metric.blocks, jacobians, strict=True)):
            size, floor = float(grams[b].abs().max()), float(lowest[b])
            gap = float((ours[b] - grams[b]).abs().max())
            if not gap <= (tolerance * size if size > floor else 10 * floor):
                return Verdict(SILENT, f"Gram of example {n}, {block!r}: off by {gap:.3g} of {size:.3g}")
            if size <= floor or dtype != torch.float64:
                continue
            wrong = follows(
                logits,
                jacobian,
                int(case.labels[n]),
                {"trace": trace[n, b], "lambda_max": worst[n, b], "fi": found.fi[n, b], "rank": found.rank[n, b]},
                doubtful=bool(found.near_cut[n, b]),
            )
            if wrong:
                return Verdict(SILENT, f"example {n}, {block!r}: {wrong}")
    return None


def follows(logits: Tensor, jacobian: Tensor, label: int, ours: dict[str, Tensor], *, doubtful: bool) -> str:
    """What follows wrongly from a Gram that is right; empty where nothing does."""
    singular = torch.linalg.svdvals(truth.root_matrix(logits, jacobian))
    expected = {"trace": singular.square().sum(), "lambda_max": singular[0].square()}
    for name, value in expected.items():
        if abs(float(ours[name] - value)) > 1e-6 * float(expected["trace"]):
            return f"{name} {float(ours[name])} for {float(value)}"
    known = None if doubtful else exact_influence(logits, jacobian, label)
    if known is not None:
        rank, fi = known
        if int(ours["rank"]) != rank:
            return f"rank {int(ours['rank'])} for {rank}"
        if fi is not None and abs(float(ours["fi"]) - fi) > 1e-6 * fi:
            return f"FI {float(ours['fi'])} for {fi}"
    return ""


def kinked(case: Case) -> bool:
    """Whether an example lies where the logits have no derivative, so that PyTorch's is another beside others."""
    leaf = case.x.detach().clone().requires_grad_()
    with random_parts.plainly():
        logits = logits_of(case.model, leaf)
    for n in range(len(leaf)):
        alone = case.x[n : n + 1].detach().clone().requires_grad_()
        with random_parts.plainly():
            row = logits_of(case.model, alone)[0]
        for k in range(len(row)):
            with Unambiguous():
                (mine,) = torch.autograd.grad(row[k], alone, retain_graph=True)
                (beside,) = torch.autograd.grad(logits[n, k], leaf, retain_graph=True)
            if (beside[n] - mine[0]).abs().max() > TOLERANCE[coarsest(case)] * mine.abs().max():
                return True
    return False


class Rescaled(nn.Module):
    """The same network for inputs in another unit."""

    def __init__(self, model: nn.Module, unit: float) -> None:
        super().__init__()
        self.model, self.unit = model, unit

    def forward(self, x: Tensor) -> Any:
        return self.model(x / self.unit)


def variation(case: Case, metric: influence.MetricTensor) -> Verdict | None:
    """Where other chunks, another order of the examples or another unit of the input make a difference."""
    order = torch.randperm(len(case.x))
    chunk_size = int(torch.randint(1, len(case.x) + 2, ()))
    how = f"chunk_size={chunk_size} and order {order.tolist()}"
    x, model, unit = case.x[order], case.model, 1.0
    if x.is_floating_point() and not isinstance(case.wrt, list):
        unit = 4.0
        x, model = unit * x, Rescaled(model, unit)
    try:
        other = influence.metric_tensor(model, x, wrt=case.wrt, chunk_size=chunk_size)
    except Exception as error:
        verdict = refusal(error)
        if verdict.kind == REFUSED and (case.fate != random_parts.RIGHT or insensitive(case)):
            return None
        return Verdict(CRASHED, f"{how}: {verdict.detail}")
    expected = metric.contrast_gram()[order]
    found = other.contrast_gram() * (unit**2 if perturbs_input(case) else 1)
    size = expected.abs().amax(dim=(2, 3))
    lowest = torch.stack(
        [floors(case, log_probs, g, metric.dtype) for log_probs, g in zip(other.log_probs, expected, strict=True)]
    )
    gap = (found - expected).abs().amax(dim=(2, 3))
    if not bool((gap <= torch.where(size > lowest, TOLERANCE[metric.dtype] * size, 10 * lowest)).all()):
        if perturbs_input(case) and kinked(case):
            return None
        return Verdict(SILENT, f"{how}: off by {float((gap / size).nan_to_num().max()):.3g}")
    return None
