from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import influence
from influence.companion.scores.definition import influence_by_definition
from influence.companion.zoo import models
from truth import released


@pytest.mark.parametrize(("name", "layers"), [("resnet50", 107), ("densenet121", 242)])
def test_trainable_layers_of_the_paper(name: str, layers: int) -> None:
    model = models.build(name, shape=(3, 32, 32), n_classes=10)
    assert len(models.trainable_layers(model)) == layers
    assert all(module.bias is not None for module in model.modules() if isinstance(module, nn.Conv2d))


def test_resnet50_full_width_has_the_shapes_of_the_paper() -> None:
    model = models.build("resnet50", shape=(3, 32, 32), n_classes=10)
    assert model.conv1.weight.shape == (64, 3, 3, 3) and model.conv1.stride == (1, 1)
    assert model.head.in_features == 8192
    stages = [model.stage2, model.stage3, model.stage4, model.stage5]
    assert [len(stage) for stage in stages] == [3, 4, 6, 3]
    assert [stage[0].conv1.stride[0] for stage in stages] == [1, 2, 2, 2]
    assert [stage[0].conv2.stride[0] for stage in stages] == [1, 1, 1, 1]
    assert [stage[-1].conv3.out_channels for stage in stages] == [256, 512, 1024, 2048]
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.2}
    assert {module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}


def test_densenet121_full_width_has_the_shapes_of_the_paper() -> None:
    model = models.build("densenet121", shape=(3, 32, 32), n_classes=10)
    blocks = [model.block2, model.block3, model.block4, model.block5]
    assert [len(block) for block in blocks] == [6, 12, 24, 16]
    assert {layer.conv1.out_channels for block in blocks for layer in block} == {128}
    assert {layer.conv2.out_channels for block in blocks for layer in block} == {32}
    assert [pool.conv.out_channels for pool in (model.pool2, model.pool3, model.pool4)] == [128, 256, 512]
    assert model.head.in_features == 1024


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 33, 17)])
def test_any_size_from_8_by_8(name: str, shape: tuple[int, int, int]) -> None:
    model = models.build(name, shape=shape, n_classes=7, width=0.05).eval()
    assert model(torch.zeros(2, *shape)).shape == (2, 7)


def test_seed_decides_the_weights_and_nothing_else_moves() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = (models.build("resnet50", shape=(1, 8, 8), n_classes=3, width=0.05, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.conv1.weight, same.conv1.weight) and not torch.equal(
        first.conv1.weight, other.conv1.weight
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "vgg"}, "unknown model 'vgg'"),
        ({"shape": (1, 7, 8)}, "at least 8x8 pixels, got 7x8"),
        ({"n_classes": 1}, "at least 2 classes, got 1"),
        ({"width": 0.0}, "width must be positive, got 0.0"),
    ],
)
def test_errors(change: dict, words: str) -> None:
    arguments = {"name": "resnet50", "shape": (1, 8, 8), "n_classes": 10} | change
    with pytest.raises(ValueError, match=words):
        models.build(arguments.pop("name"), **arguments)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dropout_drops_a_fifth_scales_the_rest_and_obeys_the_seed(memory_format: torch.memory_format) -> None:
    dropout = models.Dropout(0.2)
    x = torch.randn(16, 32, 24, 24).contiguous(memory_format=memory_format).requires_grad_()
    torch.manual_seed(0)
    first = dropout(x)
    torch.manual_seed(0)
    again = dropout(x)
    assert torch.equal(first, again) and not torch.equal(first, dropout(x))
    kept = first != 0
    assert abs(kept.double().mean() - 0.8) < 5 * (0.16 / x.numel()) ** 0.5
    torch.testing.assert_close(first[kept], 1.25 * x[kept])
    per_channel = kept.double().mean(dim=(0, 2, 3))
    assert (per_channel - 0.8).abs().max() < 6 * (0.16 / (x.numel() / 32)) ** 0.5
    first.sum().backward()
    torch.testing.assert_close(x.grad, 1.25 * kept.float())
    assert dropout.eval()(x) is x


class MasksOfTwoOrders(TorchDispatchMode):
    """How many backward passes of a ReLU, all rows at once, met gradients and results in two memory orders."""

    found, all = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.threshold_backward and args[0].ndim == args[1].ndim + 1:
            self.all += 1
            self.found += args[0].stride()[1:] != args[1].stride()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["resnet50", "densenet121"])
def test_channels_last_have_the_same_grams_and_no_operator_meets_two_memory_orders(name: str) -> None:
    model = models.build(name, shape=(3, 32, 32), n_classes=4, width=0.0625, dropout=0.0, seed=0).double().eval()
    x = 255 * torch.rand(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = influence.metric_tensor(model, x, wrt="layers").gram
    model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    with MasksOfTwoOrders() as masks:
        last = influence.metric_tensor(model, x, wrt="layers").gram
    torch.testing.assert_close(last, plain, rtol=1e-9, atol=1e-12 * float(plain.abs().max()))
    assert masks.all > 40 and masks.found == 0


def calibrated(name: str, *, seed: int = 0) -> nn.Module:
    """A narrow network whose batch-normalisation statistics fit its inputs, in float64 and evaluation mode."""
    model = models.build(name, shape=(1, 8, 8), n_classes=10, width=0.0625, dropout=0.0, seed=seed).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # cumulative average
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(pixels(64))
    return model.eval()


def pixels(count: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("wrt", ["input", "parameters"])
def test_exact_fi_is_the_ceiling_on_both_networks(name: str, wrt: str) -> None:
    model, x = calibrated(name), pixels(2)
    label = torch.full((len(x),), 3)
    with torch.no_grad():
        model.head.weight.mul_(0.2)
        logits = model(x)
    for p_label in (1e-12, 0.5, 1 - 1e-9):
        with torch.no_grad():  # shift the label's logit so that the mean example has this probability
            others = torch.cat([logits[:, :3], logits[:, 4:]], dim=1).logsumexp(1)
            shift = torch.logit(torch.tensor(p_label, dtype=torch.float64)) - (logits[:, 3] - others).mean()
            model.head.bias[3] += shift
            logits = model(x)
        metric = influence.metric_tensor(model, x, wrt=wrt)
        result = influence.first_order_influence(metric, label)
        assert (result.rank == 9).all()
        log_p = metric.log_probs[:, 3]
        others = torch.cat([metric.log_probs[:, :3], metric.log_probs[:, 4:]], dim=1).logsumexp(1)
        torch.testing.assert_close(result.fi[:, 0], (others - log_p).exp(), rtol=1e-6, atol=0)
        if wrt == "input":
            torch.testing.assert_close(influence_by_definition(model, x, label), result.fi[:, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-2])
def test_released_fi_is_its_definition_on_200_images(epsilon: float) -> None:
    model, x = calibrated("resnet50"), pixels(200, seed=1)
    with torch.no_grad():
        model.head.weight.mul_(4)
    metric = influence.metric_tensor(model, x)
    label = torch.arange(len(x)) % 10
    ours = influence.first_order_influence(metric, label, estimator=influence.Released(epsilon=epsilon)).fi[:, 0]
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    rows = [torch.autograd.grad(logits[:, k].sum(), leaf, retain_graph=True)[0].flatten(1) for k in range(10)]
    jacobian = torch.stack(rows, dim=1)
    definition = [released(logits[n].detach(), jacobian[n], int(label[n]), epsilon=epsilon) for n in range(len(x))]
    expected = torch.tensor([value for value, _, _ in definition], dtype=torch.float64)
    ranks = {rank for _, rank, _ in definition}
    assert len(ranks) >= 4, "the cut must matter here"
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-12)
