"""Train the companion's networks: deterministic, resumable epoch by epoch, cached by the hash of what made them.

`fit` trains a classifier as Shu & Zhu (2019) do; `finetuning` continues one as Zheng et al. (2016) do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from influence.progress import progress_bar

from . import cache, models, paths
from .data import Dataset, Split

_L2 = 1e-4  # Keras' regularizers.l2(1e-4) adds 1e-4 |w|^2 to the loss, hence a weight decay of twice that.


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a trained classifier, besides the data and the code.

    Attributes:
        model: a name of `models.NAMES`.
        width: channel multiplier.
        train_per_class: training images of each class; None for all.
        phases: (epochs, learning rate) one after the other; the best validation accuracy of the last one is kept.
        batch_size: images a step.
        dropout: probability of dropping an activation.
        precision: "float32" or "bfloat16" (autocast; the weights stay float32).
        seed: of weights, order and dropout.
    """

    model: str
    width: float
    train_per_class: int | None
    phases: tuple[tuple[int, float], ...]
    batch_size: int = 128
    dropout: float = 0.2
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A network in evaluation mode with the key of its checkpoint.

    Attributes:
        model: the network, on the device asked for.
        key: sha256 of what made it.
        history: one row per epoch (`fit`) or per step (`finetune`).
        seconds: the training took, when it was done.
    """

    model: nn.Module
    key: str
    history: list[dict[str, float]]
    seconds: float


def fit(recipe: Recipe, dataset: Dataset, *, device: torch.device | str = "cpu") -> Trained:
    """Train the classifier of `recipe`, or load it when the same recipe, data and code made it before.

    Interrupted, it goes on from the last finished epoch and ends with the same weights.
    """
    key = cache.fingerprint({"recipe": asdict(recipe), "data": dataset.digest, "code": code()})
    name = f"{dataset.name}-{recipe.model}-{recipe.seed}-{key[:16]}"
    model = fresh(recipe, dataset).to(device)
    record = stored(name, model, device) or _train(recipe, dataset, model, torch.device(device), name)
    return Trained(model.eval(), key, *record)


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, *, device: torch.device | str = "cpu", batch_size: int = 256) -> Tensor:
    """Logits (N, K) float32 on the CPU for raw uint8 images (N, C, H, W)."""
    return torch.cat([model(pixels(chunk, device)).float().cpu() for chunk in images.split(batch_size)])


def pixels(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Raw uint8 images as the float32 pixels 0..255 that the networks take, channels last."""
    return images.to(device).float().contiguous(memory_format=torch.channels_last)


# -- what one call does -----------------------------------------------------------------------------------------------


Record = tuple[list[dict[str, float]], float]  # history, seconds


def _train(recipe: Recipe, dataset: Dataset, model: nn.Module, device: torch.device, name: str) -> Record:
    train = dataset.train.per_class(recipe.train_per_class)
    optimizer = adam(model, recipe.phases[0][1])
    last = len(recipe.phases) - 1
    schedule = [(phase, rate) for phase, (epochs, rate) in enumerate(recipe.phases) for _ in range(epochs)]
    state_file = folder() / f"{name}.resume.pt"
    state: dict[str, Any] = {"epoch": 0, "best": None, "best_accuracy": -1.0, "history": [], "seconds": 0.0}
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    bar = progress_bar(schedule, desc=name.rsplit("-", 1)[0], unit="epoch", initial=state["epoch"], leave=False)
    for epoch, (phase, rate) in enumerate(schedule):
        if epoch < state["epoch"]:
            continue
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = train_epoch(recipe, train, model, optimizer, device, epoch)
        accuracy = _accuracy(model, dataset.valid, device)
        state["history"].append({"epoch": epoch + 1, "lr": rate, "loss": loss, "valid_accuracy": accuracy})
        if phase == last and accuracy > state["best_accuracy"]:
            state["best_accuracy"] = accuracy
            state["best"] = {key: value.clone() for key, value in model.state_dict().items()}
        state["seconds"] += time.perf_counter() - start
        state |= {"epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        cache.atomic_write(state_file, partial(torch.save, state))
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", valid=f"{accuracy:.4f}")
    bar.close()
    model.load_state_dict(state["best"])
    record = state["history"], state["seconds"]
    store(name, model, record, {"recipe": asdict(recipe), "data": dataset.digest})
    state_file.unlink(missing_ok=True)
    return record


def train_epoch(
    recipe: Recipe, train: Split, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, epoch: int
) -> float:
    """One pass over `train` in the order of this seed and epoch; returns the mean loss."""
    model.train()
    total = 0.0
    with _seeded(recipe.seed, epoch, device):
        for images, labels in batches(train, recipe.batch_size, recipe.seed, epoch):
            x, y = pixels(images, device), labels.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(labels)
    model.eval()
    return total / len(train)


def adam(model: nn.Module, rate: float) -> torch.optim.Adam:
    """Adam with the L2 penalty of the released code on the convolution kernels."""
    kernels: list[Tensor] = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    chosen = {id(weight) for weight in kernels}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    groups: list[dict[str, Any]] = [{"params": kernels, "weight_decay": 2 * _L2}, {"params": rest}]
    return torch.optim.Adam(groups, lr=rate, eps=1e-7)  # Keras' epsilon


def _accuracy(model: nn.Module, part: Split, device: torch.device) -> float:
    return float((predict(model, part.images, device=device).argmax(1) == part.labels).double().mean())


# -- order and randomness ---------------------------------------------------------------------------------------------


def mixed_seed(*numbers: int) -> int:
    """A seed that differs for any other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 2)


def batches(train: Split, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch, in an order that seed and epoch decide."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(mixed_seed(seed, epoch)))
    for rows in order.split(size):
        if len(rows) > 1:  # batch normalisation needs two
            yield train.images[rows], train.labels[rows]


@contextmanager
def _seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch for one epoch and give the caller's random state back: resuming needs no stored state."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(mixed_seed(seed, epoch))
        yield


# -- checkpoints ------------------------------------------------------------------------------------------------------


def code() -> str:
    """Hash of the code that decides a trained classifier."""
    return cache.source_hash(models, __name__)


def folder() -> Path:
    """Where checkpoints are kept."""
    return paths.cache_dir() / "checkpoints"


def fresh(recipe: Recipe, dataset: Dataset) -> nn.Module:
    """The recipe's network before training."""
    model = models.build(
        recipe.model,
        shape=dataset.shape,
        n_classes=len(dataset.classes),
        width=recipe.width,
        dropout=recipe.dropout,
        seed=recipe.seed,
    )
    return model.to(memory_format=torch.channels_last)


def stored(name: str, model: nn.Module, device: torch.device | str) -> Record | None:
    """Load a checkpoint into `model` and return its record; None where there is none."""
    weights, notes = folder() / f"{name}.safetensors", folder() / f"{name}.json"
    if not (weights.exists() and notes.exists()):
        return None
    model.load_state_dict(load_file(weights, device=str(device)))
    record = json.loads(notes.read_text())
    return record["history"], record["seconds"]


def store(name: str, model: nn.Module, record: Record, notes: dict[str, Any]) -> None:
    """Write the weights and, last, what made them."""
    history, seconds = record
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    cache.atomic_write(folder() / f"{name}.safetensors", lambda temporary: save_file(weights, temporary))
    text = json.dumps({**notes, "seconds": seconds, "history": history}, indent=1)
    cache.atomic_write(folder() / f"{name}.json", lambda temporary: temporary.write_text(text))
