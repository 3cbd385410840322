"""The metric tensor against brute force, and what it refuses."""

from __future__ import annotations

import copy
from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import influence
import truth


class Residual(nn.Module):
    """Convolution, BatchNorm, a residual sum, a shared convolution, LayerNorm and a head: K = 5."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.shared = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.layer_norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.stem(x)))
        y = y + torch.tanh(self.shared(torch.tanh(self.shared(y))))
        return self.head(self.layer_norm(y.mean(dim=(2, 3))))


def network(dtype: torch.dtype = torch.float64, *, seed: int = 0) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    model = Residual().eval().to(dtype)
    for p in model.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype)
    model.norm.running_mean.copy_(torch.randn(4, generator=g, dtype=torch.float64))
    model.norm.running_var.copy_(0.5 + torch.rand(4, generator=g, dtype=torch.float64))
    return model


def images(count: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, 2, 6, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def blocks_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    owned = {name: list(m.parameters(recurse=False)) for name, m in model.named_modules()}
    return {name: group for name, group in owned.items() if group}


def contrasts(jacobian: Tensor, reference: int) -> Tensor:
    rows = jacobian - jacobian[reference]
    return rows @ rows.T


def test_input_gram() -> None:
    model, x = network(), images()
    metric = influence.metric_tensor(model, x)
    assert metric.blocks == ("input",)
    assert metric.dims.tolist() == [72]
    assert metric.gram.dtype == metric.log_probs.dtype == torch.float64
    assert metric.gram.shape == (3, 1, 5, 5)
    for n in range(3):
        logits, jacobian = truth.input_jacobian(model, x[n])
        torch.testing.assert_close(metric.log_probs[n], logits.log_softmax(0), rtol=1e-12, atol=0)
        expected = contrasts(jacobian, int(logits.argmax()))
        torch.testing.assert_close(metric.gram[n, 0], expected, rtol=1e-10, atol=1e-14)


def test_layers_parameters_and_named_modules() -> None:
    model, x = network(), images(2)
    layers = influence.metric_tensor(model, x, wrt="layers")
    everything = influence.metric_tensor(model, x, wrt="parameters")
    groups = blocks_of(model)
    assert layers.blocks == tuple(groups) == ("stem", "norm", "shared", "layer_norm", "head")
    assert layers.dims.tolist() == [sum(p.numel() for p in group) for group in groups.values()]
    assert everything.blocks == ("parameters",)
    assert everything.dims.tolist() == [sum(p.numel() for p in model.parameters())]
    for n in range(2):
        for b, group in enumerate(groups.values()):
            logits, jacobian = truth.parameter_jacobian(model, x[n], group)
            expected = contrasts(jacobian, int(logits.argmax()))
            torch.testing.assert_close(layers.gram[n, b], expected, rtol=1e-10, atol=1e-14)
    # The parameters are the layers together, so the Grams add up.
    torch.testing.assert_close(everything.gram[:, 0], layers.gram.sum(dim=1), rtol=1e-12, atol=1e-14)
    named = influence.metric_tensor(model, x, wrt=["head", "shared"])
    assert named.blocks == ("head", "shared")
    torch.testing.assert_close(named.gram, layers.gram[:, [4, 2]], rtol=1e-12, atol=1e-14)


def test_a_listed_module_includes_its_children_and_a_tied_parameter_counts_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(nn.Sequential(first, nn.Tanh(), second), nn.Linear(4, 3)).double().eval()
    x = torch.rand(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric = influence.metric_tensor(model, x, wrt=["0", "0.2"])
    assert metric.dims.tolist() == [16 + 4 + 4, 16 + 4]
    for n in range(2):
        for b, group in enumerate(([first.weight, first.bias, second.bias], [first.weight, second.bias])):
            logits, jacobian = truth.parameter_jacobian(model, x[n], group)
            expected = contrasts(jacobian, int(logits.argmax()))
            torch.testing.assert_close(metric.gram[n, b], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("wrt", ["input", "layers"])
def test_trace_lambda_max_and_rank_against_the_singular_values(wrt: str) -> None:
    model, x = network(), images(2)
    metric = influence.metric_tensor(model, x, wrt=wrt)
    groups = [None] if wrt == "input" else list(blocks_of(model).values())
    for n in range(2):
        for b, group in enumerate(groups):
            jacobian = (
                truth.input_jacobian(model, x[n]) if group is None else truth.parameter_jacobian(model, x[n], group)
            )
            singular = torch.linalg.svdvals(truth.root_matrix(*jacobian))
            assert metric.trace()[n, b].item() == pytest.approx(singular.square().sum().item(), rel=1e-10, abs=0)
            assert metric.lambda_max()[n, b].item() == pytest.approx(singular[0].square().item(), rel=1e-10, abs=0)
            assert metric.rank()[n, b] == int((singular > 1e-9 * singular[0]).sum())


def test_trace_keeps_its_digits_where_the_network_is_sure() -> None:
    # One class at 1 - 1e-12: tr G = sum_k P_k |s_k|^2 with every term far below the Gram's own size.
    logits = torch.tensor([[28.0, 0.0, -1.0]], dtype=torch.float64)
    jacobian = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric = influence.metric_tensor(Affine(jacobian, logits), torch.zeros(1, 4, dtype=torch.float64))
    rest = logits[0, 1:].exp() / logits[0].exp().sum()
    rows = jacobian[1:] - jacobian[0]
    mean = rest @ rows
    expected = (rest * rows.square().sum(dim=1)).sum() - mean @ mean
    assert metric.trace().item() == pytest.approx(expected.item(), rel=1e-13, abs=0)
    plain = influence.MetricTensor(
        metric.log_probs, (jacobian @ jacobian.T)[None, None], metric.blocks, metric.dims, metric.dtype
    )
    assert plain.trace().item() == pytest.approx(expected.item(), rel=1e-13, abs=0)


class Affine(nn.Module):
    """Logits z + A x with a given Jacobian A."""

    def __init__(self, jacobian: Tensor, logits: Tensor) -> None:
        super().__init__()
        self.jacobian, self.logits = jacobian, logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits + x @ self.jacobian.T


def test_a_gram_of_plain_logits_is_understood() -> None:
    model, x = network(), images(2)
    ours = influence.metric_tensor(model, x)
    plain = torch.stack([(j := truth.input_jacobian(model, image)[1]) @ j.T for image in x])[:, None]
    other = influence.MetricTensor(ours.log_probs, plain, ours.blocks, ours.dims, ours.dtype)
    torch.testing.assert_close(other.contrast_gram(), ours.gram, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(other.trace(), ours.trace())


def test_chunks_do_not_matter() -> None:
    model, x = network(), images(5)
    whole = influence.metric_tensor(model, x, chunk_size=5)
    for size in (1, 2, None):
        torch.testing.assert_close(influence.metric_tensor(model, x, chunk_size=size).gram, whole.gram)


def test_single_precision_is_close() -> None:
    full = influence.metric_tensor(network(), images())
    single = influence.metric_tensor(network(torch.float32), images(dtype=torch.float32))
    assert (single.dtype, full.dtype) == (torch.float32, torch.float64)
    scale = full.gram.abs().amax(dim=(-1, -2), keepdim=True)
    assert ((single.gram - full.gram).abs() / scale).max() < 1e-5


def test_dead_layer_and_bottleneck_have_their_rank() -> None:
    for dtype in (torch.float32, torch.float64):
        g = torch.Generator().manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 7)).eval().to(dtype)
        for p in model.parameters():
            p.data = torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype)
        x = torch.rand(4, 6, generator=g, dtype=torch.float64).to(dtype)
        assert influence.metric_tensor(model, x).rank().flatten().tolist() == [2] * 4
        assert influence.metric_tensor(model, x, wrt="layers").rank().tolist() == [[2, 6, 6]] * 4
        dead = nn.Sequential(model[0], nn.Hardtanh(5.0, 6.0), model[2]).eval()
        assert influence.metric_tensor(dead, x, wrt="layers").rank().tolist() == [[0, 7]] * 4


def test_output_object_token_input_and_inference_mode() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.head(torch.tanh(self.embedding(x)).mean(dim=1)))

    tokens, model = Tokens(), network()
    with torch.inference_mode():
        metric = influence.metric_tensor(tokens, torch.tensor([[1, 2], [3, 3]]), wrt="layers")
        image_metric = influence.metric_tensor(model, images())
    assert metric.rank().tolist() == [[2, 2], [2, 2]]
    # LayerNorm over four channels leaves three directions.
    assert image_metric.rank().tolist() == [[3]] * 3


def test_in_place_model_leaves_the_input_alone() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)).double()
    x = torch.tensor([[-1.0, 2.0, 3.0, -4.0]], dtype=torch.float64)
    kept = x.clone()
    for wrt in ("input", "parameters"):
        influence.metric_tensor(model, x, wrt=wrt)
    assert torch.equal(x, kept)


def state(model: nn.Module) -> list:
    return [
        {name: (t.detach().clone(), t.requires_grad, t.grad) for name, t in model.named_parameters()},
        {name: t.clone() for name, t in model.named_buffers()},
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
    ]


@pytest.mark.parametrize("wrt", ["input", "parameters", "layers", ["head"]])
def test_model_is_left_as_it_was(wrt: str | list[str]) -> None:
    model = network(torch.float32)
    model.stem.weight.requires_grad_(False)
    model.head.weight.grad = torch.full_like(model.head.weight, 3.0)
    model.stem.train()
    before, parameters = copy.deepcopy(state(model)), [id(p) for p in model.parameters()]
    random = torch.get_rng_state()

    def check() -> None:
        for ours, other in zip(state(model), before, strict=True):
            torch.testing.assert_close(ours, other, rtol=0, atol=0)
        assert [id(p) for p in model.parameters()] == parameters
        assert torch.equal(torch.get_rng_state(), random)

    influence.metric_tensor(model, images(dtype=torch.float32), wrt=wrt)
    check()
    handle = model.layer_norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(OSError("broken")))
    with pytest.raises(OSError, match="broken"):
        influence.metric_tensor(model, images(dtype=torch.float32), wrt=wrt)
    handle.remove()
    check()


def test_frozen_parameters_count() -> None:
    model = network()
    free = influence.metric_tensor(model, images(), wrt="layers").gram
    model.requires_grad_(False)
    torch.testing.assert_close(influence.metric_tensor(model, images(), wrt="layers").gram, free, rtol=0, atol=0)


class Returns(nn.Module):
    """A model whose output is given."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


X = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
NAN = torch.tensor([[0.0, float("nan")]])


@pytest.mark.parametrize(
    ("error", "words", "model", "x", "wrt"),
    [
        (ValueError, r"\(N, K\).*got \(1,\)", Returns(lambda x: x[:, 0]), X, "input"),
        (ValueError, r"\(N, K\) with N = 2", Returns(lambda x: x[:1]), X, "input"),
        (ValueError, r"\(N, K\)", Returns(lambda x: x[None]), X, "input"),
        (ValueError, "K >= 2", nn.Linear(4, 1), X, "input"),
        (ValueError, "x must be finite", nn.Linear(2, 3), NAN, "input"),
        (ValueError, "output must be finite", Returns(lambda x: x / 0), X, "input"),
        (TypeError, "logits", Returns(lambda x: [x]), X, "input"),
        (TypeError, "floating", Returns(lambda x: x.long()), X, "input"),
        (RuntimeError, "no gradient", Returns(lambda x: x.detach()), X, "input"),
        (
            RuntimeError,
            r"BatchNorm1d at '1'.*model.eval\(\)",
            nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
            X,
            "input",
        ),
        (RuntimeError, "Dropout", nn.Sequential(nn.Linear(4, 3), nn.Dropout()), X, "layers"),
        (RuntimeError, "running statistics", nn.BatchNorm1d(4, track_running_stats=False).eval(), X, "input"),
        (RuntimeError, "MultiheadAttention", nn.MultiheadAttention(4, 1, dropout=0.1), X, "input"),
        (ValueError, "unknown module 'body'.*head", network(torch.float32), X, ["body"]),
        (ValueError, "has no parameters", nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), X, ["0"]),
        (ValueError, "model with parameters", nn.Identity(), X, "parameters"),
        (ValueError, "wrt must be one of", nn.Linear(4, 3), X, "weights"),
        (ValueError, r"pass the list \['0'\]", nn.Sequential(nn.Linear(4, 3)), X, "0"),
        (ValueError, "at least one module", nn.Linear(4, 3), X, []),
        (ValueError, "each once", nn.Sequential(nn.Linear(4, 3)), X, ["0", "0"]),
        (TypeError, "wrt must be", nn.Linear(4, 3), X, 3),
        (TypeError, "floating", nn.Linear(4, 3), X.to(torch.uint8), "input"),
        (TypeError, "x must be a tensor", nn.Linear(4, 3), X.numpy(), "input"),
        (TypeError, "Module", lambda x: x, X, "input"),
        (ValueError, "at least one example", nn.Linear(4, 3), X[:0], "input"),
    ],
)
def test_errors(error: type[Exception], words: str, model, x, wrt) -> None:
    with pytest.raises(error, match=words):
        influence.metric_tensor(model, x, wrt=wrt)


@pytest.mark.parametrize("size", [0, True, 2.5])
def test_chunk_size_error(size: float) -> None:
    with pytest.raises(ValueError, match="chunk_size must be a whole number >= 1"):
        influence.metric_tensor(nn.Linear(4, 3), X, chunk_size=size)


def test_dropout_and_batch_norm_that_evaluate_are_fine_in_a_training_model() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout()).train()
    model[1].eval()
    model[2].eval()
    assert influence.metric_tensor(model, X).rank().tolist() == [[2], [2]]


# -- several inputs, parts of a model, and what can be done with the result --------------------------------------------


class Masked(nn.Module):
    """As a Hugging Face model: keywords, an attention mask, an output with logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, pixel_values: Tensor, attention_mask: Tensor, scale: Tensor | None = None) -> SimpleNamespace:
        y = torch.tanh(self.first(pixel_values)) * attention_mask[..., None]
        y = y.sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)
        return SimpleNamespace(logits=self.last(y if scale is None else y * scale))


class OfOne(nn.Module):
    """The same with everything but the pixels fixed, for brute force on one example."""

    def __init__(self, model: nn.Module, *rest: Tensor) -> None:
        super().__init__()
        self.model, self.rest = model, rest

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, *self.rest).logits


def masked_batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    mask = (torch.rand(5, 7, generator=g) > 0.4).long()
    mask[:, 0] = 1
    return {"pixel_values": torch.randn(5, 7, 4, generator=g, dtype=torch.float64), "attention_mask": mask}


@pytest.mark.parametrize("wrap", [dict, lambda batch: tuple(batch.values()), lambda batch: UserDict(batch)])
@pytest.mark.parametrize("wrt", ["input", "layers"])
def test_several_inputs(wrap, wrt: str) -> None:
    torch.manual_seed(0)
    model, batch = Masked().double().eval(), masked_batch()
    metric = influence.metric_tensor(model, wrap(batch), wrt=wrt, chunk_size=2)
    groups = blocks_of(model)
    for n in range(5):
        one = OfOne(model, batch["attention_mask"][n : n + 1])
        for b, block in enumerate(metric.blocks):
            if wrt == "input":
                logits, jacobian = truth.input_jacobian(one, batch["pixel_values"][n])
            else:
                logits, jacobian = truth.parameter_jacobian(one, batch["pixel_values"][n], groups[block])
            expected = contrasts(jacobian, int(logits.argmax()))
            torch.testing.assert_close(metric.gram[n, b], expected, rtol=1e-10, atol=1e-14)


def test_the_perturbed_input_is_named() -> None:
    torch.manual_seed(0)
    model, batch = Masked().double().eval(), masked_batch()
    batch["scale"] = torch.ones(5, 1, dtype=torch.float64)
    metric = influence.metric_tensor(model, batch, wrt="input:scale")
    assert (metric.blocks, metric.dims.tolist()) == (("input:scale",), [1])
    assert (metric.rank() == 1).all()
    for wrt, error, words in (
        ("input", ValueError, r"several floating tensors, \['pixel_values', 'scale'\]"),
        ("input:pixels", ValueError, "unknown input 'pixels'"),
        ("input:attention_mask", TypeError, "must be floating"),
    ):
        with pytest.raises(error, match=words):
            influence.metric_tensor(model, batch, wrt=wrt)
    for broken, error, words in (
        ({**batch, "scale": torch.ones(4, 1)}, ValueError, "lengths.*'scale': 4"),
        ({**batch, "scale": None}, TypeError, "NoneType as 'scale'"),
        ({}, ValueError, "at least one tensor"),
    ):
        with pytest.raises(error, match=words):
            influence.metric_tensor(model, broken, wrt="layers")


def test_single_parameters_and_trainable_ones() -> None:
    model, x = network(), images(2)
    model.stem.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    metric = influence.metric_tensor(model, x, wrt=["head.bias", "stem", "norm.weight"])
    assert metric.dims.tolist() == [5, 2 * 4 * 9 + 4, 4]
    for n in range(2):
        for b, group in enumerate(([model.head.bias], list(model.stem.parameters()), [model.norm.weight])):
            for p in group:
                p.requires_grad_()
            logits, jacobian = truth.parameter_jacobian(model, x[n], group)
            torch.testing.assert_close(metric.gram[n, b], contrasts(jacobian, int(logits.argmax())))
    model.stem.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    some = influence.metric_tensor(model, x, wrt="layers", trainable_only=True)
    assert some.blocks == ("norm", "shared", "layer_norm", "head")
    assert some.dims[0] == 4
    torch.testing.assert_close(some["head"].gram, influence.metric_tensor(model, x, wrt=["head"]).gram)
    with pytest.raises(ValueError, match=r"module 'stem'.*require a gradient"):
        influence.metric_tensor(model, x, wrt=["stem"], trainable_only=True)
    with pytest.raises(ValueError, match=r"pass the list \['head.bias'\]"):
        influence.metric_tensor(model, x, wrt="head.bias")


def test_blocks_files_devices_and_a_short_repr(tmp_path) -> None:
    metric = influence.metric_tensor(network(torch.float32), images(2, torch.float32), wrt="layers")
    part = metric["head"]
    assert part.blocks == ("head",) and torch.equal(part.gram, metric.gram[:, 4:]) and part.dims.tolist() == [25]
    for names in (["head", "stem"], np.array(["head", "stem"]), dict.fromkeys(["head", "stem"]).keys()):
        assert metric[names].blocks == ("head", "stem")
    with pytest.raises(KeyError, match="unknown block 'body'"):
        metric["body"]
    with pytest.raises(KeyError, match="unknown block 0"):
        metric[0]  # type: ignore[index]
    metric.save(tmp_path / "metric.safetensors")
    read = influence.MetricTensor.load(tmp_path / "metric.safetensors")
    assert (read.blocks, read.dtype) == (metric.blocks, torch.float32)
    for name in ("log_probs", "gram", "dims"):
        assert torch.equal(getattr(read, name), getattr(metric, name))
    assert torch.equal(metric.to("cpu").gram, metric.gram) and metric.to("meta").gram.device.type == "meta"
    assert repr(metric) == "MetricTensor(N=2, B=5 [stem, norm, shared, ...], K=5, torch.float32, cpu)"
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no metric tensor.*\['weight'\]"):
        influence.MetricTensor.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("rtol", [float("nan"), -1.0, 1.0, 2.0])
def test_rank_refuses_a_tolerance_that_is_none(rtol: float) -> None:
    metric = influence.metric_tensor(nn.Linear(5, 3), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"rtol must lie in \[0, 1\)"):
        metric.rank(rtol=rtol)


@pytest.mark.parametrize(
    "kind, x",
    [
        (r"sparse_coo", torch.eye(3, 5).to_sparse()),
        (r"meta", torch.zeros(3, 5, device="meta")),
        (r"nested", torch.nested.nested_tensor([torch.zeros(5), torch.zeros(5)])),
    ],
)
def test_a_tensor_without_plain_values_is_refused(kind: str, x: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=f"dense tensors with values, got a .*{kind} one as 'x'"):
        influence.metric_tensor(nn.Linear(5, 3), x)


def test_parameters_without_values_or_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3))
    model[1].to("meta")
    with pytest.raises(ValueError, match=r"'1.weight' is on the meta device"):
        influence.metric_tensor(model, torch.zeros(2, 5), wrt="layers")
    with torch.inference_mode():
        model = nn.Linear(5, 3)
    with pytest.raises(RuntimeError, match=r"'weight' was made under torch.inference_mode"):
        influence.metric_tensor(model, torch.zeros(2, 5))


def test_parameters_that_come_for_each_call_do_not_keep_the_input_from_its_metric() -> None:
    """Offloaded ones are on the meta device but for a call of their module."""
    whole = nn.Linear(5, 3)

    class Offloaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3, device="meta")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(self.layer, dict(whole.named_parameters()), x)

    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(influence.metric_tensor(Offloaded(), x).gram, influence.metric_tensor(whole, x).gram)
