"""The rules of all layers against brute force, on the networks people use."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import influence
import networks
import truth
from influence.grams import parameters
from influence.inputs import Inputs

# Parameters without a rule; every other one must have found its own.
BY_AUTOGRAD = {
    "functional": {
        "mixer",
        "normed.parametrizations.weight.original0",
        "normed.parametrizations.weight.original1",
    },
    "lstm": {f"lstm.{kind}_hh_l{i}" for kind in ("weight", "bias") for i in (0, 1)},
    "tied": {"embed.weight", "twice.weight", "twice.bias"},
}
# Brute force takes long: only these many layers of the large networks are compared.
SAMPLED = {"resnet50": 12, "densenet121": 12, "resnet18": 6, "mobilenet_v3_small": 10, "inception_v3": 4}
CASES = [(name, 10) for name in networks.NETWORKS]
CASES += [(name, k) for name in ("bert", "gpt", "convolutions", "functional", "tied", "swin") for k in (2, 100)]


def owners(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    owned = {name: list(m.parameters(recurse=False)) for name, m in model.named_modules()}
    return {name: group for name, group in owned.items() if group}


def sampled(name: str, model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """First and last layer, and some between."""
    groups = list(owners(model).items())
    count = SAMPLED.get(name, len(groups))
    return dict(groups[round(i * (len(groups) - 1) / max(1, count - 1))] for i in range(count))


def contrast_grams(model: nn.Module, x: Tensor, groups: dict[str, list[nn.Parameter]]) -> Tensor:
    """Brute force for one example, ``(B, K, K)``: every class, every parameter, float64."""
    output = model(x[None])
    logits = getattr(output, "logits", output)[0]
    parameters = [p for group in groups.values() for p in group]
    rows = []
    for z in logits:
        grads = torch.autograd.grad(z, parameters, retain_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)])
    grams, start = [], 0
    for group in groups.values():
        jacobian = torch.stack([torch.cat([g.flatten() for g in row[start : start + len(group)]]) for row in rows])
        start += len(group)
        jacobian = jacobian - jacobian[logits.argmax()]
        grams.append(jacobian @ jacobian.T)
    return torch.stack(grams)


def relative(ours: Tensor, other: Tensor) -> float:
    scale = other.abs().amax(dim=(-1, -2), keepdim=True)
    assert (scale > 0).sum() >= 0.8 * scale.numel()  # layers that nothing depends on would show nothing
    return float(((ours - other).abs() / scale.clamp(min=1e-300)).max())


@pytest.mark.parametrize(("name", "classes"), CASES)
def test_layers_against_brute_force(name: str, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[dict[str, str]] = []
    announce = parameters.ParameterGrams._announce
    monkeypatch.setattr(
        parameters.ParameterGrams, "_announce", lambda self: (announce(self), refused.append(self.refused))
    )
    model = networks.build(name, classes)
    # Chunks of four and of one; brute force on one example of each.
    x, places = networks.inputs(name, 5, torch.float32), [3, 4]
    if name == "inception_v3":
        x, places = x[:2], [1]
    single = influence.metric_tensor(model.float(), x, wrt="layers", chunk_size=4)
    model.double()
    x = x.double() if x.is_floating_point() else x
    metric = influence.metric_tensor(model, x, wrt="layers", chunk_size=4)
    assert metric.blocks == tuple(owners(model))
    assert set(refused[-1]) == BY_AUTOGRAD.get(name, set())

    groups = sampled(name, model)
    blocks = [metric.blocks.index(block) for block in groups]
    for n in places:
        expected = contrast_grams(model, x[n], groups)
        assert relative(metric.gram[n, blocks], expected) < 1e-10
        assert relative(single.gram[n, blocks], expected) < 1e-4


@pytest.mark.parametrize("name", ["bert", "vit", "convolutions", "tied"])
def test_parameters_are_the_sum_of_the_layers(name: str) -> None:
    model, x = networks.build(name, 10), networks.inputs(name, 3, torch.float64)
    everything = influence.metric_tensor(model, x, wrt="parameters", chunk_size=2)
    expected = torch.stack([contrast_grams(model, image, {"all": list(model.parameters())}) for image in x])
    assert relative(everything.gram, expected) < 1e-10


@pytest.mark.parametrize("name", ["bert", "swin", "convolutions", "functional"])
def test_what_follows_from_the_grams(name: str) -> None:
    classes = 4
    model, x = networks.build(name, classes), networks.inputs(name, 2, torch.float64)
    metric = influence.metric_tensor(model, x, wrt="layers")
    labels = [1, 2]
    result = influence.first_order_influence(metric, labels)
    groups = owners(model)
    for n, label in enumerate(labels):
        for b, group in enumerate(groups.values()):
            output = model(x[n : n + 1])
            logits = getattr(output, "logits", output)[0]
            rows = [
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).flatten()
                        for g, p in zip(
                            torch.autograd.grad(z, group, retain_graph=True, allow_unused=True), group, strict=True
                        )
                    ]
                )
                for z in logits
            ]
            logits, jacobian = logits.detach(), torch.stack(rows)
            singular = torch.linalg.svdvals(truth.root_matrix(logits, jacobian))
            value, rank = truth.influence(logits, jacobian, label, rtol=1e-7)
            assert metric.trace()[n, b].item() == pytest.approx(singular.square().sum().item(), rel=1e-9, abs=0)
            assert metric.lambda_max()[n, b].item() == pytest.approx(singular[0].square().item(), rel=1e-9, abs=0)
            assert result.rank[n, b] == rank
            assert result.fi[n, b].item() == pytest.approx(value, rel=1e-6, abs=0)
            assert result.alignment[n, b].item() == pytest.approx(value / result.ceiling[n].item(), rel=1e-6, abs=0)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(3, 4, 5, padding=2), (300,)),
        (nn.Conv2d(3, 4, 1), (20, 17)),
        (nn.Conv2d(3, 4, 1, stride=2), (20, 17)),
        (nn.Conv2d(3, 4, 3), (20, 17)),
        (nn.Conv2d(3, 4, (3, 2), padding=(1, 0), dilation=(2, 3)), (24, 21)),
        (nn.Conv2d(3, 4, 3, padding=4), (20, 17)),
        (nn.Conv3d(3, 4, 3, padding=1), (8, 7, 6)),
    ],
    ids=str,
)
def test_convolutions_of_many_pixels(layer: nn.Module, size: tuple[int, ...]) -> None:
    first = type(layer)(3, 3, 3, padding=1)
    model = nn.Sequential(first, nn.Tanh(), layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double().eval()
    x = torch.randn(3, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model(x)
    owned = owners(model)
    expected = torch.stack([contrast_grams(model, image, owned) for image in x])
    assert relative(influence.metric_tensor(model, x, wrt="layers").gram, expected) < 1e-10


class Words(nn.Module):
    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.word, self.head = nn.Embedding(6, 4, padding_idx=padding), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.word(ids)).mean(dim=1))


@pytest.mark.parametrize("padding", [2, 5, -1])
def test_padding_is_no_parameter(padding: int) -> None:
    torch.manual_seed(0)
    model, other = Words(padding).double().eval(), Words(None).double().eval()
    with torch.no_grad():
        model.word.weight.normal_()
    other.load_state_dict(model.state_dict())
    ids = torch.tensor([[1, 2, 5, 5, 2], [5, 0, 2, 2, 2], [2, 2, 5, 5, 5]])
    gram = influence.metric_tensor(model, ids, wrt="layers").gram
    assert relative(gram, torch.stack([contrast_grams(model, row, owners(model)) for row in ids])) < 1e-10
    # Without padding the same weights have another Gram.
    assert relative(gram[:, :1], influence.metric_tensor(other, ids, wrt=["word"]).gram) > 1e-2


def test_chunks_do_not_matter() -> None:
    for name in ("convolutions", "encoder", "bert", "functional"):
        model, x = networks.build(name, 3), networks.inputs(name, 7, torch.float64)
        whole = influence.metric_tensor(model, x, wrt="layers", chunk_size=7).gram
        for size in (1, 2, 3, 6, None):
            ours = influence.metric_tensor(model, x, wrt="layers", chunk_size=size).gram
            torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-13)


def test_the_slower_path_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    class OnlyHere(networks.Tied):
        pass

    model, x = OnlyHere(4).eval(), networks.inputs("tied", 2, torch.float32)
    with caplog.at_level(logging.WARNING, logger="influence"):
        for _ in range(3):
            influence.metric_tensor(model, x, wrt="layers")
    assert len(caplog.records) == 1
    assert "embed.weight: used 2 times" in caplog.text
    assert "3 of 6 parameters" in caplog.text


class Hooked(nn.Module):
    """Its gradient is changed by a hook that only PyTorch's own backward pass runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        if y.requires_grad:
            y.register_hook(lambda grad: 2 * grad)
        return self.last(y)


class Windows(nn.Module):
    """Folds windows into the batch, behind the examples or before them."""

    def __init__(self, *, examples_first: bool) -> None:
        super().__init__()
        self.examples_first = examples_first
        self.inner, self.norm, self.conv = nn.Linear(3, 6), nn.LayerNorm(6), nn.Conv1d(2, 4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.view(len(x), 4, 2, 3)
        windows = windows if self.examples_first else windows.transpose(0, 1)
        folded = windows.reshape(-1, 2, 3)
        y = torch.tanh(self.conv(torch.tanh(self.norm(self.inner(folded)))))
        y = y.mean(dim=2)
        y = y.view(len(x), 4, 4) if self.examples_first else y.view(4, len(x), 4).transpose(0, 1)
        return self.head(y[:, 1:].square().sum(dim=1))


def fresh(kind: type[nn.Module], **options: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**options)


@pytest.mark.parametrize(
    ("model", "refused"),
    [
        (fresh(Hooked), {"first.weight", "first.bias"}),
        (fresh(Windows, examples_first=True), set()),
        (fresh(Windows, examples_first=False), None),
    ],
    ids=["hooked", "windows", "windows-first"],
)
def test_what_cannot_be_trusted_goes_the_slower_way(model: nn.Module, refused: set[str] | None) -> None:
    model = model.eval().double()
    x = torch.randn(5, 24 if isinstance(model, Windows) else 4, generator=torch.Generator().manual_seed(0)).double()
    groups, named = {k: [k] for k, _ in model.named_parameters()}, dict(model.named_parameters())
    ours = parameters.ParameterGrams(model, groups, named)
    _, gram, _ = ours(Inputs.of(x))
    if refused is not None:
        assert set(ours.refused) == refused
    owned = {name: [p] for name, p in model.named_parameters()}
    expected = torch.stack([contrast_grams(model, row, owned) for row in x])
    assert relative(gram, expected) < 1e-10


def test_memory_that_runs_out_halves_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = networks.build("bert", 3), networks.inputs("bert", 9, torch.float64)
    expected = influence.metric_tensor(model, x, wrt="layers").gram
    sizes: list[int] = []
    forward, most = model.forward, 2

    def limited(ids: Tensor) -> object:
        sizes.append(len(ids))
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(ids)

    monkeypatch.setattr(model, "forward", limited)
    # One example alone, twice, tells what fits and is compared with autograd, the tokens of each chunk by themselves.
    for most, seen in ((2, [1, 1, 9, 4, 2, 1, 1, 2, 1, 1]), (1, [1, 1, 9, 4, 2, 1, 1, 1])):  # noqa: B007 (read by limited)
        sizes.clear()
        ours = influence.metric_tensor(model, x, wrt="layers").gram
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-13)
        assert sizes[: len(seen)] == seen
    most = 2
    x, model = networks.inputs("vit", 9, torch.float64), networks.build("vit", 3)
    whole = influence.metric_tensor(model, x).gram
    forward = model.forward
    sizes.clear()
    monkeypatch.setattr(model, "forward", limited)
    torch.testing.assert_close(influence.metric_tensor(model, x).gram, whole, rtol=1e-10, atol=1e-13)
    assert sizes[:5] == [1, 1, 9, 4, 2]
    with pytest.raises(torch.OutOfMemoryError):
        influence.metric_tensor(model, x, chunk_size=9)
    assert all(p.requires_grad for p in model.parameters())
