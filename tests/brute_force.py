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
import random_models
import truth
from random_models import Case

# Of a Gram, relative to its block's largest entry: what the engine must keep in a model's coarsest precision.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.3}
# Blocks smaller than this share of the largest are rounding of what is zero: keys' biases under a softmax, say.
_NOTHING = 1e-13
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


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x.clone())
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def misbehaves(model: nn.Module, x: Tensor) -> bool:
    """Whether an example's logits are random, or depend on its neighbours, by more than rounding."""
    whole = logits_of(model, x)
    again = [logits_of(model, x) for _ in range(5)]
    again.append(torch.cat([logits_of(model, row[None]) for row in x]))
    return any(bool((whole - other).abs().max() > 1e-3 * whole.abs().max()) for other in again)


def blocks_of(case: Case) -> dict[str, list[Tensor]]:
    """The parameters of each block."""
    if case.wrt == "parameters":
        return {"parameters": list(case.model.parameters())}
    modules = dict(case.model.named_modules())
    if case.wrt == "layers":
        owned = {name: list(module.parameters(recurse=False)) for name, module in modules.items()}
        return {name: group for name, group in owned.items() if group}
    return {name: list(modules[name].parameters()) for name in case.wrt}


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
    return (torch.view_as_real(grad) if grad.is_complex() else grad).flatten().double()


def contrast_jacobians(case: Case, example: int) -> tuple[Tensor, list[Tensor]]:
    """Logits of one example ``(K,)`` in float64, and each block's Jacobian of the contrasts ``(K, p)``."""
    x = case.x[example : example + 1].clone()
    if case.wrt == "input" or isinstance(case.wrt, influence.Patches):
        groups = [[x.requires_grad_()]]
    else:
        groups = list(blocks_of(case).values())
    leaves = list({id(leaf): leaf for group in groups for leaf in group}.values())
    place = {id(leaf): i for i, leaf in enumerate(leaves)}
    before = [leaf.requires_grad for leaf in leaves]
    for leaf in leaves:
        leaf.requires_grad_()
    with random_models.plainly():
        logits = logits_of(case.model, x)[0]
    predicted = int(logits.argmax())
    rows = []
    for k in range(len(logits)):
        if k == predicted:
            rows.append([torch.zeros_like(real(leaf)) for leaf in leaves])
            continue
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
    """What the engine announces meanwhile."""
    heard: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    log, handler = logging.getLogger("influence"), Handler()
    log.addHandler(handler)
    propagate, log.propagate = log.propagate, False
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


def measured(case: Case, x: Tensor, chunk_size: int | None) -> influence.MetricTensor:
    return influence.metric_tensor(case.model, x, wrt=case.wrt, chunk_size=chunk_size)


def judge(case: Case) -> Verdict:
    """Hold the engine against brute force on a case."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(case.seed)
        if case.change is not None:
            try:
                measured(case, case.x, case.chunk_size)
            except Exception:  # judged in the call that counts
                pass
            case.change()
        alone = len(case.x) == 1 or case.chunk_size == 1
        with random_models.plainly():
            hostile = case.fate == random_models.REFUSED and misbehaves(case.model, case.x)
        with listening() as heard:
            try:
                metric = measured(case, case.x, case.chunk_size)
            except Exception as error:
                verdict = refusal(error)
                if verdict.kind == REFUSED and case.fate == random_models.RIGHT:
                    return Verdict(NEEDLESS, verdict.detail)
                return verdict
        if hostile and not alone:
            return Verdict(SILENT, "accepted, though its examples have no logits of their own")
        if hostile and (logits_of(case.model, case.x) != logits_of(case.model, case.x)).any():
            return Verdict(SILENT, "accepted, though its logits are random")
        wrong = difference(case, metric) or variation(case, metric)
        if wrong:
            return wrong
        return Verdict(ANNOUNCED if heard else RIGHT, "; ".join(heard))


def difference(case: Case, metric: influence.MetricTensor) -> Verdict | None:
    """Where the engine differs from brute force."""
    with random_models.plainly(), torch.no_grad(), Occurring() as occurring:
        case.model(case.x.clone())
    everything = case.wrt in ("input", "layers", "parameters")
    if everything and metric.dtype != occurring.dtype:
        return Verdict(DTYPE, f"dtype is {metric.dtype}, the coarsest that occurs is {occurring.dtype}")
    tolerance = TOLERANCE[occurring.dtype]
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
        floor = _NOTHING * float(grams.abs().max())
        ours = metric.contrast_gram()[n]
        for b, (block, jacobian) in enumerate(zip(metric.blocks, jacobians, strict=True)):
            scale = max(float(grams[b].abs().max()), floor)
            gap = float((ours[b] - grams[b]).abs().max())
            if not gap <= tolerance * scale:
                return Verdict(SILENT, f"Gram of example {n}, {block!r}: off by {gap:.3g} of {scale:.3g}")
            if scale <= floor or scale == 0 or occurring.dtype != torch.float64:
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
    x, model, wrt, unit = case.x[order], case.model, case.wrt, 1.0
    if x.is_floating_point() and not isinstance(wrt, list):
        unit = 4.0
        x, model = unit * x, Rescaled(model, unit)
    perturbs_input = wrt == "input" or isinstance(wrt, influence.Patches)
    try:
        with listening():
            other = influence.metric_tensor(model, x, wrt=wrt, chunk_size=chunk_size)
    except Exception as error:
        return Verdict(CRASHED, f"with chunk_size={chunk_size} and other examples first: {refusal(error).detail}")
    expected = metric.contrast_gram()[order] / (unit**2 if perturbs_input else 1)
    tolerance = TOLERANCE[metric.dtype]
    scale = expected.abs().amax(dim=(2, 3), keepdim=True)
    scale = torch.maximum(scale, _NOTHING * scale.amax(dim=1, keepdim=True))
    gap = (other.contrast_gram() - expected).abs()
    if not bool((gap <= tolerance * scale).all()):
        share = float((gap / scale).nan_to_num().max())
        return Verdict(SILENT, f"chunk_size={chunk_size} and order {order.tolist()}: off by {share:.3g}")
    return None
