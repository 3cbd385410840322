"""The same numbers by other means: per-example Grams of every layer's logit Jacobian, each library as it documents it.

Each method takes a model and a batch and returns the plain Gram ``(N, B, K, K)`` of the logits, layers in
``named_modules()`` order; those in `SCORES` return scores ``(N, B, 1, 1)``. A peer that is not installed raises
ImportError.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, nn

import influence
from influence.contrasts import Classes

Method = Callable[[nn.Module, Tensor], Tensor]


def layers(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters that each module owns."""
    owned = {
        name: [f"{name}.{own}".lstrip(".") for own, _ in module.named_parameters(recurse=False)]
        for name, module in model.named_modules()
    }
    return {name: group for name, group in owned.items() if group}


def from_jacobian(rows: dict[str, Tensor], model: nn.Module) -> Tensor:
    """Gram of each layer from the Jacobian ``(N, K, *parameter)`` of each parameter."""
    grams = []
    for names in layers(model).values():
        jacobian = torch.cat([rows[name].flatten(2) for name in names], dim=2)
        grams.append(jacobian @ jacobian.mT)
    return torch.stack(grams, dim=1)


def ours(model: nn.Module, x: Tensor) -> Tensor:
    return influence.metric_tensor(model, x, wrt="layers").gram


def ours_parameters(model: nn.Module, x: Tensor) -> Tensor:
    """One block: all parameters."""
    return influence.metric_tensor(model, x, wrt="parameters").gram


def ours_input(model: nn.Module, x: Tensor) -> Tensor:
    """One block: the image."""
    return influence.metric_tensor(model, x, wrt="input").gram


def input_by_autograd(model: nn.Module, x: Tensor) -> Tensor:
    """The image's Gram, class by class."""
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    rows = [torch.autograd.grad(z.sum(), leaf, retain_graph=True)[0] for z in logits.T]
    jacobian = torch.stack([row.flatten(1) for row in rows], dim=1)
    return (jacobian @ jacobian.mT)[:, None]


def score_input(model: nn.Module, x: Tensor) -> Tensor:
    """FI of the predicted class, trace and largest eigenvalue of the image, as `influence score` writes them."""
    with tempfile.TemporaryDirectory() as folder:
        influence.score(model, [x], folder, wrt="input", labels="predicted", progress=False)
        table = influence.read_scores(folder)
    return torch.tensor(table[["fi", "trace", "lambda_max"]].to_numpy())[..., None, None]


def scores_by_autograd(model: nn.Module, x: Tensor) -> Tensor:
    """The same from the image's Gram class by class: M = L0^T L0, FI = e_y^T M^+ M e_y / P_y, and M's eigenvalues."""
    probs = model(x).detach().double().softmax(dim=1)
    gram = input_by_autograd(model, x)[:, 0].double()
    centred = torch.eye(probs.shape[1], dtype=gram.dtype, device=gram.device) - probs[:, None]
    root = probs.sqrt()
    m = root[:, :, None] * (centred @ gram @ centred.mT) * root[:, None]
    projector = torch.linalg.pinv(m, rtol=1e-12, hermitian=True) @ m
    label = probs.argmax(dim=1)
    example = torch.arange(len(x), device=x.device)
    fi = projector[example, label, label] / probs[example, label]
    eigenvalues = torch.linalg.eigvalsh(m)
    return torch.stack([fi, eigenvalues.sum(dim=1), eigenvalues[:, -1]], dim=1)[..., None, None]


def single_weights(model: nn.Module, x: Tensor) -> Tensor:
    """FI and trace of every weight for the predicted class, means over the examples, as sums over each layer."""
    found = influence.weight_influence(model, x, "predicted")
    sums = [torch.stack([one[name].sum() for name in found.fi]) for one in (found.fi, found.trace)]
    return torch.stack(sums)[..., None, None]


def single_weights_by_autograd(model: nn.Module, x: Tensor) -> Tensor:
    """The same from the contrasts z_k - z_y with the predicted class, one example and one class at a time."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=x.device)
    for image in x:
        logits = model(image[None])[0]
        probs, label = logits.detach().double().softmax(dim=0), int(logits.argmax())
        rows = [torch.autograd.grad(z - logits[label], parameters, retain_graph=True) for z in logits]
        for i, grads in enumerate(zip(*rows, strict=True)):
            contrasts = torch.stack(grads).double()
            mean = torch.tensordot(probs, contrasts, 1)
            trace = torch.tensordot(probs, (contrasts - mean).square(), 1)
            sums[:, i] += torch.stack([torch.where(trace > 0, mean.square() / trace, 0.0).sum(), trace.sum()]) / len(x)
    return sums[..., None, None]


def floor(model: nn.Module, x: Tensor) -> Tensor:
    """What nothing can beat: one forward and K - 1 backward passes to the input, no Gram at all."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    seeds = Classes.of(logits).seeds(logits.dtype)
    for k, seed in enumerate(seeds):
        torch.autograd.grad(logits, leaf, seed, retain_graph=k < len(seeds) - 1)
    for p in parameters:
        p.requires_grad_(True)
    return logits.detach()


def autograd_loop(model: nn.Module, x: Tensor) -> Tensor:
    """One example and one class at a time."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grams = []
    for image in x:
        logits = model(image[None])[0]
        rows = [torch.autograd.grad(z, parameters, retain_graph=True) for z in logits]
        jacobian = {name: torch.stack([row[i] for row in rows])[None] for i, name in enumerate(names)}
        grams.append(from_jacobian(jacobian, model))
    return torch.cat(grams)


def torchjd_autogram(model: nn.Module, x: Tensor) -> Tensor:
    """All parameters together: TorchJD's engine gives one Gram, of all outputs of all examples.

    It refuses batch normalisation, in evaluation mode too, where examples do not meet.
    """
    from torchjd.autogram import Engine

    copied = copy.deepcopy(model)
    engine = Engine(copied, batch_dim=0)
    logits = copied(x)
    gram = engine.compute_gramian(logits)
    return gram.view(*logits.shape, *logits.shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1)[:, None]


def parameters_by_autograd(model: nn.Module, x: Tensor) -> Tensor:
    """All parameters together, one example and one class at a time."""
    return autograd_loop(model, x).sum(dim=1, keepdim=True)


def vmap_jacrev(model: nn.Module, x: Tensor) -> Tensor:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def logits(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],))[0]

    return from_jacobian(torch.vmap(torch.func.jacrev(logits), in_dims=(None, 0))(parameters, x), model)


def backpack_batch_grad(model: nn.Module, x: Tensor) -> Tensor:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model = extend(copy.deepcopy(model)).eval()
    logits = model(x)
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for k in range(logits.shape[1]):
        with backpack(BatchGrad(), retain_graph=True):
            logits[:, k].sum().backward(retain_graph=True)
        for name, p in model.named_parameters():
            rows[name].append(p.grad_batch)
    return from_jacobian({name: torch.stack(row, dim=1) for name, row in rows.items()}, model)


class FixedNorm(nn.Module):
    """Batch normalisation in evaluation mode without buffers, which Opacus refuses."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.statistics = [norm.running_mean, norm.running_var]

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = (value.to(x.dtype)[:, None, None] for value in self.statistics)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight[:, None, None] + self.bias[:, None, None]


def without_buffers(model: nn.Module) -> nn.Module:
    for name, child in model.named_children():
        setattr(model, name, FixedNorm(child) if isinstance(child, nn.BatchNorm2d) else without_buffers(child))
    return model


def opacus_grad_sample(model: nn.Module, x: Tensor) -> Tensor:
    from opacus import GradSampleModule

    copied = without_buffers(copy.deepcopy(model))
    wrapped = GradSampleModule(copied, strict=False, loss_reduction="sum")
    # Opacus listens in training mode only; there is nothing left that would behave otherwise in it.
    wrapped.train()
    for module in copied.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in copied.named_parameters()}
    for k in range(model(x[:1]).shape[1]):
        wrapped.zero_grad()
        wrapped(x)[:, k].sum().backward()
        for name, p in copied.named_parameters():
            rows[name].append(p.grad_sample)
    return from_jacobian({name: torch.stack(row, dim=1) for name, row in rows.items()}, model)


def laplace_jacobians(model: nn.Module, x: Tensor) -> Tensor:
    from laplace.curvature import CurvlinopsEF

    jacobian, _ = CurvlinopsEF(copy.deepcopy(model), "classification").jacobians(x)
    sizes = [p.numel() for p in model.parameters()]
    parts = jacobian.detach().split(sizes, dim=2)
    return from_jacobian(dict(zip((name for name, _ in model.named_parameters()), parts, strict=True)), model)


def nngeometry_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    from nngeometry.jacobian import Jacobian
    from nngeometry.layercollection import LayerCollection
    from torch.utils.data import DataLoader, TensorDataset

    copied = copy.deepcopy(model)
    collection = LayerCollection.from_model(copied)
    loader = DataLoader(TensorDataset(x), batch_size=len(x))
    jacobian = Jacobian(copied, loader, layer_collection=collection).to_torch().transpose(0, 1)
    grams = []
    for name in layers(model):
        (key,) = [key for key in collection.layers if key.split(".")[: len(name.split("."))] == name.split(".")] or [
            key for key in collection.layers if key.startswith(name)
        ]
        start, size = collection.p_pos[key], collection.layers[key].numel()
        part = jacobian[:, :, start : start + size]
        grams.append(part @ part.mT)
    return torch.stack(grams, dim=1)


METHODS: dict[str, Method] = {
    "influence": ours,
    "influence, parameters": ours_parameters,
    "influence, input": ours_input,
    "influence.score, input": score_input,
    "influence, single weights": single_weights,
    "autograd loop": autograd_loop,
    "vmap(jacrev)": vmap_jacrev,
    "BackPACK BatchGrad": backpack_batch_grad,
    "Opacus GradSampleModule": opacus_grad_sample,
    "laplace-torch jacobians": laplace_jacobians,
    "nngeometry Jacobian": nngeometry_jacobian,
    "TorchJD autogram, parameters": torchjd_autogram,
}


SCORES = ("influence.score, input", "influence, single weights")


def truth(name: str) -> Method:
    """What the numbers of a method are checked against: ours, and autograd for ourselves."""
    by_autograd = {
        "influence": autograd_loop,
        "influence, parameters": parameters_by_autograd,
        "influence, input": input_by_autograd,
        "influence.score, input": scores_by_autograd,
        "influence, single weights": single_weights_by_autograd,
    }
    return by_autograd.get(name, ours_parameters if name.endswith(", parameters") else ours)
