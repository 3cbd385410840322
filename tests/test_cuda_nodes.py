"""The graph that a GPU makes, without one: whole calls on fake CUDA tensors, which have shapes and nodes but no values.

Where the engine looks at values it is told what they would say, and PyTorch's engine, which needs the device, zeros;
all else is the engine's own code on the nodes of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import influence
import networks
from influence import checks, independence, inputs, memory, metric, pixels
from influence.grams import parameters, reverse, rules
from influence.kernels import contraction


class Seen:
    """Nodes that the reverse pass went through, sites that rules were used at, and what autograd was left with."""

    def __init__(self) -> None:
        self.nodes: set[str] = set()
        self.refused: dict[str, str] = {}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Inside, tensors are on a GPU that is not there."""
    seen, vjp = Seen(), reverse.vjp

    def listening(node: Any, *arguments: Any, **options: Any) -> Any:
        seen.nodes.add(node.name())
        return vjp(node, *arguments, **options)

    def zeros(output: Tensor, leaves: Any, seed: Tensor) -> list[Tensor]:
        return [torch.zeros_like(leaf) for leaf in leaves]

    # It draws until the values suit it.
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor)
    monkeypatch.setattr(reverse, "vjp", listening)
    for module in (checks, inputs, metric):
        monkeypatch.setattr(module, "require_finite", lambda *_, **__: None)
    monkeypatch.setattr(checks, "_look_like_probabilities", lambda logits: False)
    monkeypatch.setattr(independence, "_apart", lambda given: [torch.arange(len(given))])
    for module in (parameters, pixels):
        monkeypatch.setattr(module, "gradients", zeros)
        monkeypatch.setattr(module, "require_finite_gradients", lambda grads: None)
        monkeypatch.setattr(module, "require_doubled", lambda *_: None)
    monkeypatch.setattr(parameters, "_largest", lambda found: {0})
    monkeypatch.setattr(parameters, "require_additive", lambda *_: None)
    monkeypatch.setattr(parameters, "require_differentiable", lambda *_: None)
    monkeypatch.setattr(pixels, "require_same_gradient", lambda *_: None)
    monkeypatch.setattr(independence, "_random_state", lambda device: [])
    monkeypatch.setattr(independence, "_agree", lambda *_: True)
    monkeypatch.setattr(independence.Weighting, "reached", lambda self, *_, **__: torch.ones(len(self.weights)))
    for module in (parameters, pixels):
        monkeypatch.setattr(module, "unreached", lambda reached: None)
    monkeypatch.setattr(contraction, "root", lambda gram: gram)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**34)
    monkeypatch.setattr(
        parameters,
        "_pytorch_gradients",
        lambda graph, seed: {node: torch.zeros(site.shape) for node, site in graph.sites.items()},
    )
    monkeypatch.setattr(parameters.ParameterGrams, "_refuse_what_differs", lambda *_: False)
    monkeypatch.setattr(parameters.ParameterGrams, "_announce", lambda self: seen.refused.update(self.refused))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        yield seen


def measured(net: nn.Module, x: Tensor, wrt: str = "layers") -> influence.MetricTensor:
    metric = influence.metric_tensor(net.eval(), x, wrt=wrt, backend="torch")
    assert metric.gram.device.type == "cuda"
    assert metric.gram.shape[:2] == (len(x), len(metric.blocks))
    return metric


SHAPES: dict[str, tuple[int, ...]] = {
    "resnet18": (2, 3, 32, 32),
    "mobilenet_v3_small": (2, 3, 32, 32),
    "convnext": (2, 3, 16, 16),
    "vit": (2, 3, 16, 16),
    "swin": (2, 3, 16, 16),
    "bert": (2, 7),
    "gpt": (2, 7),
    "encoder": (2, 8, 5),
    "tied": (2, 7),
    "functional": (2, 3, 4, 4),
}
BY_AUTOGRAD = {
    "functional": {"mixer", "normed.parametrizations.weight.original0", "normed.parametrizations.weight.original1"},
    "tied": {"embed.weight", "twice.weight", "twice.bias"},
}


@pytest.mark.parametrize("name", SHAPES)
def test_networks(name: str, gpu: Seen) -> None:
    shape = SHAPES[name]
    x = torch.empty(shape) if len(shape) > 2 else torch.zeros(shape, dtype=torch.int64)
    measured(networks.NETWORKS[name][0](5), x)
    assert set(gpu.refused) == BY_AUTOGRAD.get(name, set()), gpu.refused
    assert ("CudnnBatchNormBackward0" in gpu.nodes) == (name in ("resnet18", "mobilenet_v3_small"))
    assert ("NativeBatchNormBackward0" in gpu.nodes) is False


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    """Fake modules are made in their type: they cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


class Attention(nn.Module):
    """One of the fused kernels, called by name: without a device PyTorch chooses none of them itself."""

    def __init__(self, kernel: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.kernel, self.qkv, self.head = kernel, nn.Linear(64, 3 * 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (1, 64)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.head(self.kernel(q, k, v)[0].transpose(1, 2).flatten(2).mean(dim=1)).float()


aten = torch.ops.aten
ATTENTION: dict[str, Callable[..., Any]] = {
    "ScaledDotProductFlashAttentionBackward0": aten._scaled_dot_product_flash_attention,
    "ScaledDotProductEfficientAttentionBackward0": lambda q, k, v: aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True
    ),
    "ScaledDotProductCudnnAttentionBackward0": lambda q, k, v: aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True
    ),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_fused_attention(kind: str, gpu: Seen) -> None:
    """Its own formula carries the gradients on, class by class where ``vmap`` has no rule for it."""
    with default(torch.bfloat16):
        net, x = Attention(ATTENTION[kind]), torch.empty(2, 16, 64)
    metric = measured(net, x)
    assert kind in gpu.nodes and not gpu.refused
    assert metric.dtype == torch.bfloat16


class Head(nn.Module):
    """Some layers, and a linear layer on the mean over an image's pixels or on all values of anything else."""

    def __init__(self, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return self.head(y.mean(dim=(2, 3)) if y.ndim == 4 else y.flatten(1)).float()


class Steps(nn.Module):
    """An LSTM; cuDNN's own has no backward pass in evaluation mode, so it is unrolled."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner = kind(4, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, set[str]]] = {
    "batch norm 1d": (lambda: Head(nn.BatchNorm1d(8), width=8), (2, 8), "", set()),
    "batch norm 3d": (
        lambda: Head(nn.Conv3d(2, 3, 1), nn.BatchNorm3d(3), nn.Flatten(), width=3 * 8),
        (2, 2, 2, 2, 2),
        "CudnnBatchNormBackward0",
        set(),
    ),
    "batch norm, bf16": (
        lambda: Head(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), width=4),
        (2, 2, 6, 6),
        "NativeBatchNormBackward0",
        set(),
    ),
    "channels last": (
        lambda: Head(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), width=4),
        (2, 2, 6, 6),
        "CudnnBatchNormBackward0",
        set(),
    ),
    "convolutions": (
        lambda: Head(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
            nn.Conv2d(4, 4, 3, dilation=2, padding=2, groups=4),
            nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
            nn.Conv2d(6, 4, 1, stride=2),
            width=4,
        ),
        (2, 2, 8, 8),
        "ConvolutionBackward0",
        set(),
    ),
    "layer norm": (
        lambda: Head(nn.Linear(4, 6), nn.LayerNorm(6), width=18),
        (2, 3, 4),
        "NativeLayerNormBackward0",
        set(),
    ),
    "layer norm, bf16": (
        lambda: Head(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), width=18),
        (2, 3, 4),
        "NativeLayerNormBackward0",
        set(),
    ),
    "rms norm": (lambda: Head(nn.Linear(4, 6), nn.RMSNorm(6), width=18), (2, 3, 4), "", set()),
    "group norm": (lambda: Head(nn.GroupNorm(2, 4), width=12), (2, 4, 3), "", set()),
    "LSTM": (lambda: Head(Steps(nn.LSTM), width=18), (2, 3, 4), "", {"hh", "ih"}),
    "attention": (
        lambda: Head(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), width=24),
        (2, 3, 8),
        "NativeLayerNormBackward0",
        set(),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, gpu: Seen) -> None:
    build, shape, kind, recurrent = LAYERS[name]
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    with default(dtype):
        net, x = build(), torch.empty(shape)
    if name == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    metric = measured(net, x)
    assert metric.dtype == dtype
    assert not kind or kind in gpu.nodes
    # The recurrent layers' parameters are used in every step, or have biases inside a fused cell.
    assert all(any(f"_{part}_" in parameter for part in recurrent) for parameter in gpu.refused), gpu.refused
    measured(net, x, wrt="input")


def test_attributes_of_every_rule_exist_on_the_nodes_of_a_gpu(gpu: Seen) -> None:
    """Evaluation-mode batch normalisation calls its epsilon otherwise there, on AMD's devices too."""
    for name in ("CudnnBatchNormBackward0", "MiopenBatchNormBackward0"):
        node = getattr(torch._C._functions, name, None)
        if node is not None:
            assert hasattr(node, "_saved_epsilon") and not hasattr(node, "_saved_eps")
            needed = {"_saved_training", "_saved_running_mean", "_saved_running_var", "_saved_input", "_saved_weight"}
            assert needed <= set(dir(node))
        assert rules.RULES[name].entries is not None
