"""Random small networks against brute force: right, or refused in words, never wrong in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import brute_force
import influence
import random_models
import random_parts

# After the first: networks that an engine once had wrong; one whose gradients are rounding, which a judge once held
# against it.
SEEDS = [*range(250), 1703, 1707, 1750, 50031]
random_case = cache(random_models.random_case)


@cache
def judged(seed: int) -> brute_force.Verdict:
    return brute_force.judge(random_case(seed))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.compiler.reset()


@pytest.mark.parametrize("seed", SEEDS)
def test_random_network(seed: int) -> None:
    verdict = judged(seed)
    assert verdict.good, f"{verdict.kind}: {verdict.detail}\n{random_case(seed)}"


def test_no_part_is_left_out() -> None:
    cases = [random_case(seed) for seed in SEEDS]
    assert set(random_parts.PARTS) <= {name for case in cases for name in case.parts}
    assert {type(case.wrt) for case in cases} == {str, list, influence.Patches}
    assert any(case.change for case in cases) and any(case.labels.max() > 64 for case in cases)


def test_the_same_seed_gives_the_same_network() -> None:
    one, other = random_models.random_case(7), random_models.random_case(7)
    assert str(one) == str(other) and torch.equal(one.x, other.x)
    for mine, same in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(mine, same)


# -- the judge itself -------------------------------------------------------------------------------------------------


@cache
def ordinary() -> random_models.Case:
    """A case that an engine can get right in one way only."""
    return next(
        case
        for case in map(random_case, SEEDS)
        if case.fate == random_parts.RIGHT
        and brute_force.coarsest(case) == torch.float64
        and case.change is None
        and case.wrt == "layers"
        and len(case.x) > 3
        and brute_force.logits_of(case.model, case.x).shape[1] > 2
        and judged(case.seed).kind == brute_force.RIGHT
    )


def raising(error: Exception) -> Any:
    raise error


FAULTS: dict[str, tuple[Callable[[influence.MetricTensor], influence.MetricTensor], str]] = {
    "a Gram": (lambda m: replace(m, gram=1.00001 * m.gram), brute_force.SILENT),
    "one example": (lambda m: replace(m, gram=torch.cat([m.gram[:-1], 1.00001 * m.gram[-1:]])), brute_force.SILENT),
    "examples": (lambda m: replace(m, gram=m.gram.roll(1, dims=0)), brute_force.SILENT),
    "classes": (lambda m: replace(m, gram=m.gram.roll((1, 1), dims=(2, 3))), brute_force.SILENT),
    "log P": (lambda m: replace(m, log_probs=m.log_probs.roll(1, dims=1)), brute_force.SILENT),
    "dims": (lambda m: replace(m, dims=m.dims + 1), brute_force.SILENT),
    "dtype": (lambda m: replace(m, dtype=torch.bfloat16), brute_force.DTYPE),
    "PyTorch's words": (lambda m: replace(m, gram=m.gram @ torch.ones(1)), brute_force.CRASHED),
    "another type": (lambda m: raising(KeyError("no such parameter in the table of the engine")), brute_force.CRASHED),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, metric_tensor = ordinary(), influence.metric_tensor
    spoil, kind = FAULTS[fault]
    monkeypatch.setattr(influence, "metric_tensor", lambda *args, **options: spoil(metric_tensor(*args, **options)))
    assert brute_force.judge(case).kind == kind


def test_a_fault_in_some_chunks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right for the chunks of the case, wrong for others."""
    case, metric_tensor = ordinary(), influence.metric_tensor
    calls = iter([1.0, 1.00001])

    def spoiled(*args: Any, **options: Any) -> influence.MetricTensor:
        metric = metric_tensor(*args, **options)
        return replace(metric, gram=next(calls) * metric.gram)

    monkeypatch.setattr(influence, "metric_tensor", spoiled)
    assert brute_force.judge(case).kind == brute_force.SILENT


def test_a_refusal_needs_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of our own excuse a model that mixes its examples, not one that does nothing of the kind."""
    refuse = brute_force.REFUSED
    monkeypatch.setattr(brute_force, "refusal", lambda error: brute_force.Verdict(refuse, str(error)))
    monkeypatch.setattr(influence, "metric_tensor", lambda *_, **__: raising(RuntimeError("not this one")))
    hostile = next(case for case in map(random_case, SEEDS) if case.fate == random_parts.REFUSED)
    assert brute_force.judge(hostile).kind == refuse
    plain = next(case for case in map(random_case, SEEDS) if case.fate == random_parts.RIGHT)
    assert brute_force.judge(plain).kind == brute_force.NEEDLESS


@pytest.mark.parametrize("part", ["functional_dropout", "batch_statistics"])
def test_acceptance_of_what_has_no_value_is_found(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case for case in map(random_case, SEEDS) if part in case.parts and case.change is None]
    case = next(case for case in cases if brute_force.misbehaves(case))
    monkeypatch.setattr(influence, "metric_tensor", lambda *_, **__: None)
    assert brute_force.judge(case).kind == brute_force.SILENT


def test_gradients_that_change_from_call_to_call_have_no_value() -> None:
    """Random features under a head of zeros: the logits are the same in every call."""
    case = ordinary()
    head = torch.nn.Linear(case.x[0].numel(), 3).double()
    torch.nn.init.zeros_(head.weight)
    still = torch.nn.Sequential(torch.nn.Flatten(), head)
    shaken = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), head).train()
    assert brute_force.reproducible(replace(case, model=still))
    assert not brute_force.reproducible(replace(case, model=shaken))
