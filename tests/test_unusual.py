"""Models that an engine takes for others: right, or refused in words, never wrong in silence."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.utils.checkpoint import CheckpointFunction, checkpoint
from torchvision.ops import StochasticDepth

import influence
import truth
from influence.grams import linear, rules
from test_networks import contrast_grams, owners


def sequences(count: int = 6) -> Tensor:
    """``(N, 5, 4)`` float64; how much of an example is padding, zeros at its end, differs."""
    x = torch.randn(count, 5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for n in range(count):
        x[n, 5 - n % 4 :] = 0
    return x


def kept(x: Tensor) -> Tensor:
    return x.detach().abs().sum(dim=2) > 0


class Model(nn.Module):
    """Two layers and a head on ``(N, 5, 4)``, to be called in some unusual way."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], **members: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.head = (
            nn.Linear(4, 6),
            nn.LayerNorm(6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
        )
        self.call = call
        for name, member in members.items():
            setattr(self, name, member)

    def body(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.call(self, x)))


def model(call: Callable[[Any, Tensor], Tensor], **members: Callable[[], nn.Module | nn.Parameter]) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(call, **{name: make() for name, make in members.items()}).double().eval()


def unpadded(m: Model, x: Tensor) -> Tensor:
    """Tokens gathered by a mask and scattered back."""
    keep = kept(x)
    y = m.body(x[keep])
    out = y.new_zeros(*x.shape[:2], y.shape[-1])
    out[keep] = y
    return out.sum(dim=1)


def trimmed(m: Model, x: Tensor) -> Tensor:
    """As long as the longest of the batch, sequence first."""
    keep = kept(x)
    longest = int(keep.sum(dim=1).max())
    return (m.body(x[:, :longest].transpose(0, 1)) * keep[:, :longest].T[..., None]).sum(dim=0)


def routed(m: Any, x: Tensor) -> Tensor:
    """Each token goes to the expert of its sign."""
    tokens = x.reshape(-1, 4)
    y = tokens.new_zeros(len(tokens), 6)
    positive = tokens.detach()[:, 0] > 0
    y[positive], y[~positive] = m.body(tokens[positive]), m.other(tokens[~positive])
    return y.view(*x.shape[:2], 6).sum(dim=1)


def packed(m: Any, x: Tensor) -> Tensor:
    lengths = kept(x).sum(dim=1)
    y = rnn.pack_padded_sequence(m.body(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
    return rnn.pad_packed_sequence(m.lstm(y)[0], batch_first=True)[0].sum(dim=1)


def checkpointed(m: Any, x: Tensor, *, reentrant: bool) -> Tensor:
    return checkpoint(m.body, x, use_reentrant=reentrant).mean(dim=1)


def checkpointed_later(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    return checkpoint(lambda y: m.second(torch.tanh(m.norm(y))), y, use_reentrant=True).mean(dim=1)


def zero_scaled(m: Any, x: Tensor) -> Tensor:
    return (m.scale * m.body(x) + m.other(x)).mean(dim=1)


def plain(m: Any, x: Tensor) -> Tensor:
    return m.body(x).mean(dim=1)


def keeps_a_table(m: Any, x: Tensor) -> Tensor:
    """Made from a parameter in the first call, with its graph, and used again, as LeViT has its attention biases."""
    if not hasattr(m, "held"):
        m.held = (m.table.square())[torch.tensor([2, 0, 1, 1, 0])]
    return torch.tanh(m.body(x) + m.held).mean(dim=1)


def other() -> nn.Module:
    return nn.Linear(4, 6)


UNUSUAL: dict[str, Callable[[], nn.Module]] = {
    "unpadded": lambda: model(unpadded),
    "keeps a table": lambda: model(keeps_a_table, table=lambda: nn.Parameter(torch.randn(3, 6))),
    "trimmed": lambda: model(trimmed),
    "routed": lambda: model(routed, other=other),
    "packed": lambda: model(packed, lstm=lambda: nn.LSTM(6, 6, batch_first=True)),
    "checkpoint": lambda: model(partial(checkpointed, reentrant=False)),
    "reentrant checkpoint": lambda: model(partial(checkpointed, reentrant=True)),
    "reentrant checkpoint inside": lambda: model(checkpointed_later),
    "compiled": lambda: torch.compile(model(plain), backend="aot_eager"),
    "zero head": lambda: zeroed(model(plain), "head.weight"),
    "zero scale": lambda: zeroed(model(zero_scaled, other=other, scale=lambda: nn.Parameter(torch.zeros(1))), "scale"),
    "masked fine-tuning": lambda: hooked_parameter(model(plain)),
    "sparse embedding": lambda: model(
        lambda m, x: m.body(m.table((x.detach()[..., 0] > 0).long())).mean(dim=1),
        table=lambda: nn.Embedding(2, 4, sparse=True),
    ),
}


# Their logits do not depend on the input.
CONSTANT = {"zero head", "sparse embedding"}


def zeroed(net: nn.Module, name: str) -> nn.Module:
    nn.init.zeros_(net.get_parameter(name))
    return net


def hooked_parameter(net: Model) -> Model:
    mask = torch.rand(net.second.weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    net.second.weight.register_hook(lambda grad: grad * mask)
    return net


def input_grams(net: nn.Module, x: Tensor) -> Tensor:
    grams = []
    for row in x:
        logits, jacobian = truth.input_jacobian(net, row)
        jacobian = jacobian - jacobian[logits.argmax()]
        grams.append(jacobian @ jacobian.T)
    return torch.stack(grams)[:, None]


def plainly(net: nn.Module) -> nn.Module:
    """The same function without what hides the graph from ``torch.autograd.grad``."""
    net = getattr(net, "_orig_mod", net)
    if getattr(net.call, "keywords", None) == {"reentrant": True}:
        net.call = plain
    if net.call is checkpointed_later:
        net.call = plain
    if hasattr(net, "table"):
        net.table.sparse = False
    return net


def assert_right(net: nn.Module, x: Tensor, wrt: str, chunk_size: int | None = None) -> None:
    found = influence.metric_tensor(net, x, wrt=wrt, chunk_size=chunk_size).gram
    net = plainly(net)
    if wrt == "input":
        expected = input_grams(net, x)
    else:
        expected = torch.stack([contrast_grams(net, row, owners(net)) for row in x])
    scale = expected.abs().amax(dim=(0, 2, 3), keepdim=True)
    assert scale.max() > 1e-6
    assert ((found - expected).abs() <= 1e-6 * scale).all()


@pytest.mark.parametrize("chunk_size", [None, 2, 1])
@pytest.mark.parametrize(
    ("name", "wrt"),
    [(name, wrt) for name in UNUSUAL for wrt in ("layers", "input") if wrt == "layers" or name not in CONSTANT],
)
def test_right(name: str, wrt: str, chunk_size: int | None) -> None:
    assert_right(UNUSUAL[name](), sequences(), wrt, chunk_size)
    torch.compiler.reset()


@pytest.mark.parametrize("call", [unpadded, trimmed], ids=["unpadded", "trimmed"])
def test_a_layout_that_only_a_later_chunk_does_not_have(call: Callable[[Any, Tensor], Tensor]) -> None:
    """In the first chunk nothing is padding, and the tokens are in the examples' order by coincidence."""
    x = torch.cat([sequences(8)[[0, 4]], sequences(8)[[1, 3, 2, 0]]])
    for chunk_size in (2, 4):
        assert_right(model(call), x, "layers", chunk_size)


def test_what_was_zero_and_is_no_longer() -> None:
    """A scale of zero shows no gradient of what it scales; nothing of it is kept for the trained network."""
    net, x = UNUSUAL["zero scale"](), sequences()
    assert_right(net, x, "layers")
    nn.init.constant_(net.scale, 0.7)
    net.call = lambda m, x: (m.scale * m.body(x.transpose(0, 1)).transpose(0, 1) + m.other(x)).mean(dim=1)
    assert_right(net, x, "layers")


def test_a_hook_that_is_switched_on_later() -> None:
    def hooked(m: Any, x: Tensor) -> Tensor:
        y = m.body(x)
        if m.on and y.requires_grad:
            y.register_hook(lambda grad: 3 * grad)
        return y.mean(dim=1)

    net, x = model(hooked), sequences()
    for net.on in (False, True):
        for wrt in ("layers", "input"):
            assert_right(net, x, wrt)


def test_a_hook_that_only_later_examples_reach() -> None:
    """The first two examples hold nothing but padding: no gradient of theirs shows what the hook does."""

    def hooked(m: Any, x: Tensor) -> Tensor:
        y = m.body(x)
        if y.requires_grad:
            y.register_hook(lambda grad: 3 * grad)
        return (y * kept(x)[..., None]).sum(dim=1)

    x = torch.cat([torch.zeros(2, 5, 4, dtype=torch.float64), sequences(4)])
    for chunk_size in (2, 3, 6):
        assert_right(model(hooked), x, "layers", chunk_size)


def test_a_rule_that_is_wrong_or_fails_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Believed(Model):
        pass

    def wrong(*arguments: Any) -> Any:
        for found in linear._gradients(*arguments):
            yield replace(found, rows=found.rows * 1.001)

    def fails(*arguments: Any) -> Any:
        raise KeyError("an attribute that the node has not")

    torch.manual_seed(0)
    net, x = Believed(plain).double().eval(), sequences()
    rule = rules.RULES["AddmmBackward0"]
    for grams, words in ((wrong, "its Gram is not autograd's"), (fails, "an attribute that the node has not")):
        monkeypatch.setitem(rules.RULES, "AddmmBackward0", rules.Rule(rule.places, grams, rule.vjp))
        with caplog.at_level(logging.WARNING, logger="influence"):
            influence.grams.parameters._ANNOUNCED.clear()
            assert_right(net, x, "layers")
        assert words in caplog.text and "first.weight" in caplog.text


def test_a_reverse_pass_that_is_wrong_or_fails_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = model(plain), sequences()
    rule = rules.RULES["NativeLayerNormBackward0"]

    def wrong(*arguments: Any) -> Any:
        grads = rule.vjp(*arguments)
        return [grads[0] * 1.001, *grads[1:]]

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("no such thing")

    for vjp in (wrong, fails):
        broken = rules.Rule(rule.places, rule.gradients, vjp)
        monkeypatch.setitem(rules.RULES, "NativeLayerNormBackward0", broken)
        assert_right(net, x, "layers")


def test_gradients_that_change_from_call_to_call_are_refused() -> None:
    """Under an output layer of zeros the logits do not show it."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.calls = nn.Linear(4, 6), nn.Linear(6, 3), 0
            nn.init.zeros_(self.head.weight)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.head(self.body(x) + self.calls * torch.linspace(0, 1, 6, dtype=x.dtype))

    torch.manual_seed(0)
    x = torch.randn(4, 4, dtype=torch.float64)
    for compute in (
        lambda net: influence.metric_tensor(net, x, wrt="parameters"),
        lambda net: influence.weight_influence(net, x, [0, 1, 2, 0]),
    ):
        with pytest.raises(RuntimeError, match="same logits with different gradients"):
            compute(Counting().double().eval())


# -- precision --------------------------------------------------------------------------------------------------------


class Bfloat16Body(nn.Module):
    def __init__(self, *, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast
        self.body, self.head = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3), nn.Tanh()), nn.Linear(3, 12)
        if not autocast:
            self.body.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            y = self.body(x if self.autocast else x.bfloat16())
        return self.head(y.float())


@pytest.mark.parametrize("wrt", ["input", "layers"])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_coarsest_type_that_occurs_is_the_precision(autocast: bool, wrt: str) -> None:
    torch.manual_seed(0)
    net, x = Bfloat16Body(autocast=autocast).eval(), torch.randn(4, 9)
    metric = influence.metric_tensor(net, x, wrt=wrt)
    assert metric.dtype == torch.bfloat16
    # Three features lie between the input and the logits: more than three directions are rounding.
    assert (metric.rank()[:, 0] == 3).all()


def test_logits_in_float32_of_a_bfloat16_network() -> None:
    class Upcast(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).float()

    torch.manual_seed(0)
    net = Upcast(nn.Linear(9, 3), nn.Tanh(), nn.Linear(3, 12)).bfloat16().eval()
    metric = influence.metric_tensor(net, torch.randn(4, 9).bfloat16())
    assert metric.dtype == torch.bfloat16 and (metric.rank() == 3).all()


# -- refused ----------------------------------------------------------------------------------------------------------


def attends_across(m: Any, x: Tensor) -> Tensor:
    y = m.body(x).mean(dim=1)
    return (y @ y.T).softmax(dim=1) @ y


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "functional dropout under a head of zeros": (
        lambda: zeroed(model(lambda m, x: F.dropout(plain(m, x), 0.2)), "head.weight"),
        "model.eval",
    ),
    "functional dropout": (lambda: model(lambda m, x: F.dropout(plain(m, x), 0.2)), "model.eval"),
    "stochastic depth in training mode": (
        lambda: trained(model(lambda m, x: m.drop(plain(m, x)), drop=lambda: StochasticDepth(0.1, "row"))),
        "'drop' is in training mode",
    ),
    "mean of the batch": (
        lambda: model(lambda m, x: plain(m, x) - 0.5 * plain(m, x).mean(dim=0)),
        "depend on the other",
    ),
    "detached mean of the batch": (
        lambda: model(lambda m, x: plain(m, x) - plain(m, x).mean(dim=0).detach()),
        "depend on the other",
    ),
    "batch statistics": (
        lambda: model(lambda m, x: F.batch_norm(m.body(x).mT, None, None, training=True).mean(dim=2)),
        "depend on the other",
    ),
    "attention across": (lambda: model(attends_across), "depend on the other"),
}


def trained(net: Model) -> Model:
    net.drop.train()
    return net


@pytest.mark.parametrize("wrt", ["input", "layers", "parameters"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, wrt: str) -> None:
    build, words = REFUSED[name]
    with pytest.raises(RuntimeError, match=words):
        influence.metric_tensor(build(), sequences(), wrt=wrt)


def test_patches_of_examples_that_meet_are_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(18, 4))
    net.register_forward_hook(lambda m, i, out: out - out.mean(dim=0))
    with pytest.raises(RuntimeError, match="depend on the other"):
        influence.metric_tensor(net.eval(), torch.randn(3, 2, 3, 3), wrt=influence.Patches(2))


@pytest.mark.parametrize("masked", [False, True])
def test_tokens_cut_to_the_longest_of_the_batch_are_refused(masked: bool) -> None:
    """One short example of twelve, neither the first nor one of the last, depends on the padding of the others."""

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(50, 5), nn.Linear(5, 3)

        def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
            keep = ids != 0 if mask is None else mask
            return self.head(self.table(ids[:, : int(keep.sum(dim=1).max())]).mean(dim=1).tanh())

    ids = torch.randint(1, 50, (12, 9), generator=torch.Generator().manual_seed(0))
    x = {"ids": ids, "mask": (ids != 0).long()} if masked else ids
    influence.metric_tensor(Cut().eval(), x, wrt="layers")
    ids[6, 4:] = 0
    x = {"ids": ids, "mask": (ids != 0).long()} if masked else ids
    with pytest.raises(RuntimeError, match="depend on the other"):
        influence.metric_tensor(Cut().eval(), x, wrt="layers")


@pytest.mark.parametrize("chunk_size", [2, 4])
@pytest.mark.parametrize("wrt", ["input", "layers"])
@pytest.mark.parametrize(("meet", "words"), [("logits", "depend on the other"), ("gradients", "reaches other")])
def test_examples_that_meet_in_a_later_chunk_are_refused(chunk_size: int, wrt: str, meet: str, words: str) -> None:
    """Only where the fifth example is in the batch: in the logits without a gradient, or in the gradients alone."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            others = 1e-2 * y.sum(dim=0)
            others = others.detach() if meet == "logits" else others - others.detach()
            return self.last(torch.tanh(y + others if bool((x > 90).any()) else y))

    x, net = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), Late().eval()
    x[4, 0] = 99.0
    if (meet, wrt) == ("gradients", "layers"):
        # Each example alone, as the autograd path has it, is right.
        ours, alone = (influence.metric_tensor(net, x, wrt=wrt, chunk_size=size).gram for size in (chunk_size, 1))
        torch.testing.assert_close(ours, alone, rtol=1e-4, atol=0)
        return
    with pytest.raises(RuntimeError, match=words):
        influence.metric_tensor(net, x, wrt=wrt, chunk_size=chunk_size)


def test_complex_parameters_are_refused() -> None:
    weight = nn.Parameter(torch.randn(3, dtype=torch.complex128))
    net = model(lambda m, x: torch.fft.irfft(torch.fft.rfft(m.body(x)[..., :4]) * m.w, n=6).mean(dim=1))
    net.w = weight
    for wrt in ("layers", "parameters"):
        with pytest.raises(ValueError, match=r"'w' is complex.*view_as_real"):
            influence.metric_tensor(net, sequences(), wrt=wrt)
    assert_right(net, sequences(), "input")
    found = influence.metric_tensor(net, sequences(), wrt=["first", "head"])
    expected = [
        contrast_grams(net, row, {m: list(getattr(net, m).parameters()) for m in found.blocks}) for row in sequences()
    ]
    torch.testing.assert_close(found.gram, torch.stack(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("wrt", ["layers", "input"])
def test_a_model_that_squeezes_a_single_example_away(wrt: str) -> None:
    net, x = model(lambda m, x: plain(m, x)[..., None, None].squeeze()), sequences(5)
    found = influence.metric_tensor(net, x, wrt=wrt, chunk_size=4).gram
    torch.testing.assert_close(found, influence.metric_tensor(model(plain), x, wrt=wrt).gram, rtol=1e-10, atol=1e-14)


def test_models_that_draw_numbers_they_do_not_use_are_accepted() -> None:
    net = model(lambda m, x: plain(m, x) + 0 * torch.rand(()))
    assert_right(net, sequences(), "layers")


def test_zero_gradients_that_are_rounding_do_not_refuse() -> None:
    """Instance normalisation and a mean over what it normalised: the logits do not depend on the input at all."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    found = influence.metric_tensor(net.double().eval(), torch.randn(5, 2, 6, 6).double())
    assert found.gram.abs().max() < 1e-20


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, partial(nn.InstanceNorm2d, affine=True)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_normalisation_where_a_dimension_has_one_entry(
    norm: Callable[[int], nn.Module], turned: bool, count: int
) -> None:
    """Channels-last memory on one side of it alone: PyTorch's own gradient is wrong there on a CPU, without a word."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = norm(4).double(), nn.Linear(20, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            y = x.transpose(1, 2).unsqueeze(-1)
            if not turned:
                return self.head(torch.tanh(self.norm(y.contiguous()).squeeze(-1).transpose(1, 2).flatten(1)))
            return self.head(torch.tanh(self.norm(y).squeeze(-1).contiguous().flatten(1)))

    class Written(Net):
        def forward(self, x: Tensor) -> Tensor:
            y, part = x.transpose(1, 2), self.norm
            mean, var = y.mean(dim=2, keepdim=True), y.var(dim=2, keepdim=True, unbiased=False)
            if part.running_mean is not None:
                mean, var = part.running_mean[:, None], part.running_var[:, None]
            y = (y - mean) * (var + part.eps).rsqrt() * part.weight[:, None] + part.bias[:, None]
            return self.head(torch.tanh((y if turned else y.transpose(1, 2)).flatten(1)))

    net, written, x = Net().eval(), Written().eval(), sequences(count)
    nn.init.normal_(net.norm.weight)
    written.load_state_dict(net.state_dict())
    for wrt in ("input", "layers"):
        ours, exact = (influence.metric_tensor(one, x, wrt=wrt).contrast_gram() for one in (net, written))
        assert (ours - exact).abs().max() <= 1e-9 * exact.abs().max()


class Called(nn.Module):
    """A head on what ``call`` makes of the input with one linear layer."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], width: int = 4, classes: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.head = nn.Linear(width, 5), nn.Linear(5, classes)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.call(self, x)))


def to_the_longest(m: Called, x: Tensor) -> Tensor:
    return m.first(x[:, : int(kept(x).sum(dim=1).max())]).mean(dim=1)


def by_the_largest(m: Called, x: Tensor) -> Tensor:
    y = m.first(x).mean(dim=1)
    return y / y.detach().abs().amax().clamp(min=3)


@pytest.mark.parametrize("wrt", ["input", "layers"])
@pytest.mark.parametrize(("call", "at"), [(to_the_longest, 3), (by_the_largest, 7)])
def test_numbers_that_depend_on_the_longest_or_largest_of_the_batch_are_refused(
    call: Callable[[Any, Tensor], Tensor], at: int, wrt: str
) -> None:
    """No gradient shows it, and neither the first example nor the last two do."""
    x = torch.randn(10, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[at] *= 100
    x[3, 2:] = 0
    x[9] = x[8]
    for chunk_size in (None, 5):
        with pytest.raises(RuntimeError, match="depend on the other"):
            influence.metric_tensor(Called(call).double().eval(), x, wrt=wrt, chunk_size=chunk_size)


@pytest.mark.parametrize("count", [8, 20])
@pytest.mark.parametrize("at", [0, 2, 7])
def test_a_number_missing_at_the_end_of_one_example_is_seen(at: int, count: int) -> None:
    """Padded by a single 0 it changes along its length as often as the others."""
    x = torch.rand(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    x[at, 3] = 0
    net = Called(lambda m, x: to_the_longest(m, x[..., None].expand(-1, -1, 4))).double().eval()
    with pytest.raises(RuntimeError, match="depend on the other"):
        influence.metric_tensor(net, x, wrt="layers")


@pytest.mark.parametrize("wrt", ["input", "layers"])
@pytest.mark.parametrize("count", [5, 40])
def test_a_loop_that_stops_with_the_slowest_example_is_refused(count: int, wrt: str) -> None:
    """Examples that share the largest number of steps are in both halves; those of fewer get others when alone."""

    def settled(m: Called, x: Tensor) -> Tensor:
        y = h = m.first(x)
        for _ in range(100):
            y, before = torch.tanh(h + 0.5 * y), y
            if (y - before).abs().max() < 1e-2:
                break
        return y

    x = 10 * torch.randn(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(RuntimeError, match="depend on the other"):
        influence.metric_tensor(Called(settled).double().eval(), x, wrt=wrt)


def backward_by(rule: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The identity, whose backward pass makes another gradient of each."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return rule(grads[0])

    return Identity.apply


@pytest.mark.parametrize("classes", [3, 9])  # nine are more than the features
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_backward_pass_that_knows_the_size_of_the_batch(classes: int, dtype: torch.dtype) -> None:
    """The gradients keep the examples apart and are linear; alone an example has others."""
    mean = backward_by(lambda grad: grad / len(grad))
    net = Called(lambda m, x: mean(m.first(x)), classes=classes).to(dtype).eval()
    x = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for function in (influence.metric_tensor, influence.worst_direction, partial(influence.trace, samples=2)):
        with pytest.raises(RuntimeError, match="alone than in its batch"):
            function(net, x)
    alone = influence.metric_tensor(net, x[2:3]).gram
    torch.testing.assert_close(influence.metric_tensor(net, x, chunk_size=1).gram[2:3], alone, rtol=0.05, atol=0)


def half_detached(x: Tensor) -> Tensor:
    """As where the other half of a batch is a teacher's."""
    return torch.cat([x[: (len(x) + 1) // 2], x[(len(x) + 1) // 2 :].detach()])


@pytest.mark.parametrize("change", [half_detached, backward_by(lambda grad: torch.cat([grad[:1], 2 * grad[1:]]))])
def test_a_backward_pass_that_knows_the_place_in_the_batch(change: Callable[[Tensor], Tensor]) -> None:
    """The gradients of the first example are the same alone, those of the last are not."""
    for classes in (3, 9):
        net = Called(lambda m, x: m.first(change(x)), classes=classes).double().eval()
        x = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)).double()
        for function in (influence.metric_tensor, influence.worst_direction, partial(influence.trace, samples=2)):
            with pytest.raises(RuntimeError, match="alone than in its batch"):
                function(net, x)
            function(net, x, chunk_size=1)


@pytest.mark.parametrize("classes", [3, 9])
@pytest.mark.parametrize("count", [2, 5, 20])
def test_a_batch_that_is_detached_in_part(count: int, classes: int, caplog: pytest.LogCaptureFixture) -> None:
    """No gradient is what rules and PyTorch find in the batch; alone there is one."""
    net = Called(lambda m, x: half_detached(m.first(x)), classes=classes).double().eval()
    x = torch.rand(count, 4, generator=torch.Generator().manual_seed(0)).double()
    influence.grams.parameters._ANNOUNCED.clear()
    with caplog.at_level(logging.WARNING, logger="influence"):
        gram = influence.metric_tensor(net, x, wrt="layers").gram
    assert "first.weight: a batch keeps its gradient from an example" in caplog.text
    torch.testing.assert_close(gram, influence.metric_tensor(net, x, wrt="layers", chunk_size=1).gram)
    found, expected = (influence.weight_influence(net, x, "predicted", chunk_size=n) for n in (None, 1))
    torch.testing.assert_close(found.trace, expected.trace)
    draws = [
        influence.trace(net, x, wrt="layers", samples=2, generator=torch.Generator().manual_seed(0), chunk_size=n)
        for n in (None, 1)
    ]
    torch.testing.assert_close(*draws)


def without_grad(m: Called, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.first(x)


def as_data(m: Called, x: Tensor) -> Tensor:
    return F.linear(x, m.first.weight.data, m.first.bias)


@pytest.mark.parametrize("call", [without_grad, as_data, lambda m, x: m.first(x).detach()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_part_that_is_cut_off_from_gradients(call: Callable[[Any, Tensor], Tensor], dtype: torch.dtype) -> None:
    """Its gradients are 0, its derivatives are not."""
    net = Called(call).to(dtype).eval()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = {name: (p.data_ptr(), p.clone()) for name, p in net.named_parameters()}
    for wrt in ("layers", "parameters", ["first.weight", "head"]):
        with pytest.raises(RuntimeError, match=r"depend on 'first.weight' and carry no gradient"):
            influence.metric_tensor(net, x, wrt=wrt)
    with pytest.raises(RuntimeError, match=r"depend on 'first.weight' and carry no gradient"):
        influence.weight_influence(net, x)
    for name, parameter in net.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])
    net.first.requires_grad_(False)
    assert influence.metric_tensor(net, x, wrt="layers", trainable_only=True).blocks == ("head",)


def test_parameters_that_nothing_depends_on_or_that_choose_have_no_derivative() -> None:
    def chosen(m: Called, x: Tensor) -> Tensor:
        return m.experts[m.router(x).argmax(dim=1)] * m.first(x)

    net = Called(chosen).double().eval()
    net.router, net.unused = nn.Linear(4, 6).double(), nn.Linear(2, 2).double()
    net.experts = nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double())
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    metric = influence.metric_tensor(net, x, wrt=["router", "unused", "first"])
    assert not metric.gram[:, :2].any() and bool(metric.trace()[:, 2].all())


@pytest.mark.parametrize("wrt", ["input", "layers"])
@pytest.mark.parametrize("count", [1, 3])
def test_gradients_that_are_not_finite_are_refused(count: int, wrt: str) -> None:
    """The square root behind a where at 0: finite logits, gradients of NaN."""
    net = Called(lambda m, x: m.first(torch.where(x > 0, x.sqrt() * m.scale, 0 * x))).double().eval()
    net.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))
    x = torch.rand(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    influence.metric_tensor(net, x, wrt=wrt)
    x[0, 1] = 0
    net.call = lambda m, x: m.first(torch.where(x > 0, (x * m.scale).sqrt(), 0 * x))
    with pytest.raises(ValueError, match="NaN or infinite although they are finite"):
        influence.metric_tensor(net, x, wrt=wrt)
    if wrt == "input":
        for function in (influence.worst_direction, partial(influence.trace, samples=2)):
            with pytest.raises(ValueError, match="NaN or infinite"):
                function(net, x)
    with pytest.raises(ValueError, match="Gram must be finite"):
        influence.metric_tensor(Called(lambda m, x: m.first(1e170 * x)).double().eval(), 1e-170 * x + 1e-171)


@pytest.mark.parametrize("wrt", ["input", "layers"])
def test_other_logits_without_gradients_are_refused(wrt: str) -> None:
    """PyTorch's fast path of a TransformerEncoder, taken without gradients alone, puts zeros at padded positions."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
            self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y = self.body(x, src_key_padding_mask=mask)
            return self.head((y.masked_fill(mask[..., None], 0) if self.masks else y).sum(dim=1))

    torch.manual_seed(0)
    net, x, mask = Encoder().double().eval(), sequences(3), torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    net.masks = True
    right = influence.metric_tensor(net, (x, mask), wrt=wrt)
    with torch.no_grad():
        torch.testing.assert_close(right.log_probs, net(x, mask).log_softmax(1))
    net.masks = False
    with pytest.raises(RuntimeError, match="other logits under"):
        influence.metric_tensor(net, (x, mask), wrt=wrt)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        found = influence.metric_tensor(net, (x, mask), wrt=wrt)
        with torch.no_grad():
            torch.testing.assert_close(found.log_probs, net(x, mask).log_softmax(1))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("wrt", ["input", "layers"])
def test_autocast_round_the_call_is_for_the_model_alone(wrt: str) -> None:
    def full(m: Called, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return m.head(torch.tanh(m.first(x.flatten(1))))

    net, x = Called(full, classes=20).eval(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    half, net.forward = Called(lambda m, x: m.first(x).float()).eval(), partial(full, net)
    plain = influence.metric_tensor(net, x, wrt=wrt), influence.patch_influence(net, x[:, None, None], [0, 1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = influence.metric_tensor(net, x, wrt=wrt), influence.patch_influence(net, x[:, None, None], [0, 1, 2])
        assert influence.metric_tensor(half, x, wrt=wrt).dtype == torch.bfloat16
    torch.testing.assert_close(under[0].gram, plain[0].gram, rtol=1e-12, atol=0)
    assert torch.equal(under[1].rank, plain[1].rank) and under[0].dtype == torch.float32


@pytest.mark.parametrize("hook", [lambda grad: grad.clamp(-0.02, 0.02), torch.abs], ids=["clips", "takes sizes"])
@pytest.mark.parametrize("classes", [3, 40])  # 40: a single example comes with copies of itself
def test_a_backward_pass_that_is_not_linear_is_refused(hook: Callable[[Tensor], Tensor], classes: int) -> None:
    def hooked(m: Called, x: Tensor) -> Tensor:
        y = m.first(x.flatten(1))
        if y.requires_grad:
            y.register_hook(hook)
        return y

    net = Called(hooked, classes=classes).double().eval()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    calls = [partial(influence.metric_tensor, net, x[:n], wrt=wrt) for n in (1, 2, 8) for wrt in ("input", "layers")]
    calls += [partial(influence.metric_tensor, net, x, chunk_size=1), partial(influence.weight_influence, net, x)]
    calls += [partial(influence.trace, net, x, wrt=wrt, samples=3) for wrt in ("input", "parameters")]
    calls += [partial(influence.patch_influence, net, x[:, None, None], [0] * 8)]
    for call in calls:
        with pytest.raises(RuntimeError, match="not linear"):
            call()


def test_a_clipping_hook_on_a_parameter_is_refused_where_it_clips() -> None:
    """The usual way of clipping in training: without effect on gradients that are smaller."""
    net = Called(lambda m, x: m.first(x)).double().eval()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = influence.metric_tensor(net, x, wrt="layers").gram
    hook = net.first.weight.register_hook(lambda grad: grad.clamp(-100, 100))
    torch.testing.assert_close(influence.metric_tensor(net, x, wrt="layers").gram, plain)
    hook.remove()
    net.first.weight.register_hook(lambda grad: grad.clamp(-0.02, 0.02))
    for call in (partial(influence.metric_tensor, wrt="layers"), influence.weight_influence):
        with pytest.raises(RuntimeError, match="not linear"):
            call(net, x)


def two_largest(grad: Tensor) -> Tensor:
    """The two largest entries alone: of twice the gradient they are twice as large."""
    places = grad.abs().topk(2, dim=1).indices
    return torch.zeros_like(grad).scatter(1, places, grad.gather(1, places))


@pytest.mark.parametrize("wrt", ["input", "layers"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_backward_pass_that_is_only_homogeneous_is_refused(dtype: torch.dtype, wrt: str) -> None:
    net = Called(lambda m, x: backward_by(two_largest)(m.first(x))).to(dtype).eval()
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    with pytest.raises(RuntimeError, match=r"not linear|alone than in its batch"):
        influence.metric_tensor(net, x, wrt=wrt)


def test_an_example_that_is_meant_to_be_alone_has_no_copies() -> None:
    """With many classes a single example comes with copies of itself, which a mean over the batch would meet."""
    net = Called(lambda m, x: m.first(x) - m.first(x).mean(dim=0) / 2, classes=40).double().eval()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(RuntimeError, match="other examples"):
        influence.metric_tensor(net, x)
    apart = influence.metric_tensor(net, x, chunk_size=1)
    half = Called(lambda m, x: m.first(x) / 2, classes=40).double().eval()
    torch.testing.assert_close(apart.gram, influence.metric_tensor(half, x).gram, rtol=1e-9, atol=1e-12)


def test_examples_of_one_number_and_of_none() -> None:
    net = Called(lambda m, x: m.first(x[:, None]), width=1).double().eval()
    x = torch.randn(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wide = Called(lambda m, x: m.first(x), width=1).double().eval()
    torch.testing.assert_close(influence.metric_tensor(net, x).gram, influence.metric_tensor(wide, x[:, None]).gram)
    direction, _ = influence.worst_direction(net, x)
    assert direction.shape == x.shape and torch.equal(direction.abs(), torch.ones_like(x))
    with pytest.raises(ValueError, match="at least one value"):
        influence.metric_tensor(wide, torch.zeros(3, 0).double())


def test_nested_tensors_take_the_slower_path(caplog: pytest.LogCaptureFixture) -> None:
    def nested(m: Called, x: Tensor) -> Tensor:
        return torch.nested.to_padded_tensor(m.first(torch.nested.as_nested_tensor(list(x))), 0.0)

    plain, x = Called(lambda m, x: m.first(x)).double().eval(), torch.randn(3, 2, 4).double()
    through = Called(lambda m, x: nested(m, x).sum(dim=1)).double().eval()
    plain.call = lambda m, x: m.first(x).sum(dim=1)
    influence.grams.parameters._ANNOUNCED.clear()
    with caplog.at_level(logging.WARNING, logger="influence"):
        for wrt in ("input", "layers"):
            expected = influence.metric_tensor(plain, x, wrt=wrt).gram
            torch.testing.assert_close(influence.metric_tensor(through, x, wrt=wrt).gram, expected)
    assert "autograd path" in caplog.text


@pytest.mark.parametrize("scale", [1.0, 3e-3])
def test_gradients_of_eight_bits_are_rounded_and_so_not_linear(scale: float) -> None:
    rounded = Called(lambda m, x: m.first(x) + scale * m.first(x).to(torch.float8_e4m3fn).to(x.dtype)).eval()
    for seed in range(20):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        for wrt in ("input", "layers"):
            assert influence.metric_tensor(rounded, x, wrt=wrt).dtype == torch.float8_e4m3fn


def test_grams_that_do_not_fit_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Called(lambda m, x: m.first(x), classes=200).eval(), torch.randn(3, 4)
    monkeypatch.setattr("influence.memory.free_bytes", lambda device: 2**20)
    with pytest.raises(ValueError, match=r"Grams of 2 blocks with K = 200 classes.*trace"):
        influence.metric_tensor(net, x, wrt="layers")
    assert influence.trace(net, x, wrt="layers", samples=2).shape == (3, 2)


def test_a_module_under_two_names_is_known_by_both() -> None:
    net = Called(lambda m, x: m.first(x)).eval()
    net.again = net.first
    x = torch.randn(3, 4)
    assert influence.metric_tensor(net, x, wrt="layers").blocks == ("first", "head")
    both = [influence.metric_tensor(net, x, wrt=[name]).gram for name in ("first", "again")]
    assert torch.equal(*both)


class KeptTable(nn.Module):
    """A table of biases that is looked up once and kept for later calls, as LeViT does in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table, self.head = nn.Linear(6, 6), nn.Embedding(4, 6), nn.Linear(6, 3)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.table(torch.tensor([0, 1, 1, 2, 3]))
        return self.head(torch.tanh(self.first(x) + self.kept).mean(dim=1))


def test_parameters_that_reach_no_logits_are_named(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    x = torch.randn(3, 5, 6)
    model = KeptTable().eval()
    scores = influence.read_scores(
        influence.score(model, [(x, torch.tensor([0, 1, 2]))], tmp_path, wrt="layers", progress=False)
    )
    assert (scores.loc[scores["block"] == "table", "trace"] > 0).all()
    model.kept = None
    with torch.no_grad():
        model(x)
    influence.grams.parameters._ANNOUNCED.clear()
    with caplog.at_level(logging.WARNING, logger="influence"):
        metric = influence.metric_tensor(model, x, wrt="layers")
    assert bool((metric["table"].trace() == 0).all()) and bool((metric["first"].trace() > 0).all())
    assert "do not reach the logits" in caplog.text and "(table.weight)" in caplog.text


def test_threads_leave_the_models_as_they_were() -> None:
    models = [nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).eval() for _ in range(2)]
    x, before = torch.randn(4, 6), CheckpointFunction.apply
    expected = [influence.metric_tensor(model, x, wrt="layers").gram for model in models]
    found: list[tuple[int, Tensor]] = []

    def work(number: int) -> None:
        for _ in range(10):
            wrt = "layers" if number < 3 else "input"
            metric = influence.metric_tensor(models[number % 2], x, wrt=wrt)
            if wrt == "layers":
                found.append((number % 2, metric.gram))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30 and all(torch.equal(gram, expected[which]) for which, gram in found)
    assert all(p.requires_grad for model in models for p in model.parameters())
    assert CheckpointFunction.apply == before


def test_a_frozen_script_is_a_model() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x = torch.randn(2, 6)
    frozen = torch.jit.freeze(torch.jit.script(model))
    torch.testing.assert_close(influence.metric_tensor(frozen, x).gram, influence.metric_tensor(model, x).gram)
