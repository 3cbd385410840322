"""The one training loop of the companion, resumable epoch by epoch, and how its classifiers are trained with it.

Everything that trains calls `train`: `fit` (the classifier of a recipe), `learn` (it continued on added images), the
arms of Zheng et al. (2016) in `finetuning` and `embedding`, the continuation of the reader's own model.

A trained network is known by its recipe and the digest of its data. Code is not a part of that: an edit of a docstring,
or of a function, never trains a network again; the record beside the weights says which code made them.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache as remember
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from influence.progress import progress_bar

from ..images.data import Dataset, Split
from ..ledger import cache, paths
from .recipes import Recipe


class Batches(Protocol):
    """The batches of an epoch: drawn anew, from PyTorch's global generator, each time they are gone through."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


# What a step minimises: one number, or numbers whose sum it is, each sent back before the next is computed, so that a
# batch of large images need not fit at once.
Loss = Callable[[nn.Module, Any], Tensor | Iterable[Tensor]]
Record = tuple[list[dict[str, Any]], float]  # history, seconds


class TrainingError(RuntimeError):
    """A training that cannot begin or go on; the message is one line for the reader."""


@dataclass(frozen=True)
class Trained:
    """A network in evaluation mode, on the device asked for, with the key of its checkpoint."""

    model: nn.Module
    key: str  # sha256 of what made it
    history: list[dict[str, Any]]  # one row per epoch
    seconds: float  # that the training took, when it was done


def train(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    rate: float | Callable[[float], float],
    seed: Sequence[int],
    title: str,
    training_mode: bool = True,
    precision: str = "float32",
    clip: float = math.inf,
    measure: Callable[[], dict[str, float]] | None = None,
    best_from: int | None = None,
    resume: Path | None = None,
) -> Record:
    """Train `model` in place, on its device; it ends in evaluation mode.

    Every epoch draws its randomness from a seed of its own, so that a training that was killed goes on from the last
    finished epoch and ends with the same weights, bit for bit on one machine.

    Args:
        model: the network.
        batches: of one epoch; the last epoch stops where `steps` are done.
        loss: of the model on a batch.
        optimizer: of the parameters to change.
        steps: in all.
        rate: learning rate, or a function that gives it from the share of all steps done, in [0, 1).
        seed: numbers that name this training's stream of randomness.
        title: of the progress bar.
        training_mode: False leaves batch-normalisation statistics as they are and drops nothing.
        precision: "bfloat16" computes in bfloat16 (weights stay float32) where the processor has instructions for it.
        clip: largest norm of the gradient of all parameters; a longer one is shortened.
        measure: called after each epoch for more columns of the history, such as "valid_accuracy".
        best_from: keep the weights of best "valid_accuracy" from this epoch on (0-based), instead of the last ones.
        resume: file in which the state is kept after each epoch; removed by whoever has stored the weights.

    Returns:
        History (epoch, steps, lr, loss, precision, and what `measure` returns) and seconds.

    Raises:
        TrainingError: the loss is not finite, or the resume file is not of this training.
    """
    _keep_freed_memory()
    device = next(model.parameters()).device
    epochs = math.ceil(steps / len(batches))
    lowered = precision == "bfloat16" and computes_in_bfloat16(device.type)
    state: dict[str, Any] = {"epoch": 0, "best": None, "best_accuracy": -1.0, "history": [], "seconds": 0.0}
    if resume is not None and resume.exists():
        state = _resumed(resume, model, optimizer, device)
    bar = progress_bar(range(epochs), desc=title, unit="epoch", initial=state["epoch"], leave=False)
    torch.backends.cudnn.deterministic = device.type == "cuda"  # by default its sums come in any order
    for epoch in range(state["epoch"], epochs):
        start, done = time.perf_counter(), epoch * len(batches)
        model.train(training_mode)
        total = torch.zeros((), device=device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(mixed_seed(*seed, epoch))
            for step, batch in enumerate(itertools.islice(batches, steps - done), start=done):
                for group in optimizer.param_groups:
                    group["lr"] = rate(step / steps) if callable(rate) else rate
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=lowered):
                    terms = loss(model, batch)
                    for term in [terms] if isinstance(terms, Tensor) else terms:
                        term.backward()
                        total += term.detach()
                if math.isfinite(clip):
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
        model.eval()
        row = {"epoch": epoch + 1, "steps": step + 1, "lr": optimizer.param_groups[0]["lr"]}
        row |= {"loss": float(total) / (step + 1 - done), "precision": "bfloat16" if lowered else "float32"}
        if not math.isfinite(row["loss"]):
            raise TrainingError(f"{title}: the loss of epoch {epoch + 1} is not finite: lower the learning rate")
        row |= measure() if measure else {}
        state["history"].append(row)
        if best_from is not None and epoch >= best_from and row["valid_accuracy"] > state["best_accuracy"]:
            state["best_accuracy"] = row["valid_accuracy"]
            state["best"] = {key: value.clone() for key, value in model.state_dict().items()}
        state["epoch"] = epoch + 1
        state["seconds"] += time.perf_counter() - start
        if resume is not None:
            whole = state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            cache.atomic_write(resume, partial(torch.save, whole))
        bar.update()
        bar.set_postfix({key: f"{value:.4g}" for key, value in row.items() if isinstance(value, float)})
    bar.close()
    if state["best"] is not None:
        model.load_state_dict(state["best"])
    model.eval()
    return state["history"], state["seconds"]


def _resumed(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
    except Exception as error:  # pickle and zip have errors of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise TrainingError(f"{file}: no state of this training ({reason}): delete it to begin again") from None
    return state


@remember
def computes_in_bfloat16(device: str) -> bool:
    """Whether a device has instructions for products of bfloat16; elsewhere they are several times slower."""
    checks = (getattr(torch.cpu, f"_is_{name}_supported", lambda: False) for name in ("avx512_bf16", "amx_tile"))
    return device != "cpu" or any(bool(check()) for check in checks)


@remember
def _keep_freed_memory() -> None:
    """Let glibc keep freed tensors of over 32 MB: page faults of new ones take a quarter of a training step."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another system or C library
        return
    most_mapped, trim_threshold, top_pad = -4, -1, -2
    for option, value in ((most_mapped, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**26)):
        mallopt(option, value)


def mixed_seed(*numbers: int) -> int:
    """A seed that differs for any other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 2)


# -- batches of images ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shuffled:
    """Images and labels in a random order, `size` a batch; with `augment` each is cropped and flipped at random."""

    split: Split
    size: int
    augment: bool = False

    def __len__(self) -> int:
        """Batches; a last one of a single image, of which batch normalisation cannot take statistics, is left out."""
        return len(self.split) // self.size + (len(self.split) % self.size > 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.split)).split(self.size)[: len(self)]:
            images = self.split.images[rows]
            yield cropped_and_flipped(images) if self.augment else images, self.split.labels[rows]


def cropped_and_flipped(images: Tensor) -> Tensor:
    """Images (N, C, H, W), each moved by up to 4 pixels, its border reflected, and mirrored with probability 1/2.

    Where they lie, with the same random numbers on every device.
    """
    count, channels, height, width = images.shape

    def moved(side: int) -> Tensor:
        places = torch.arange(side) + torch.randint(-4, 5, (count, 1))
        return side - 1 - (side - 1 - places.abs()).abs()

    rows, columns = moved(height), moved(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, width - 1 - columns, columns)
    example, channel = torch.arange(count).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1)
    places = (example, channel, rows[:, None, :, None], columns[:, None, None, :])
    return images[tuple(index.to(images.device) for index in places)]


def pixels(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Raw uint8 images as the float32 pixels 0..255 that the networks take, channels last."""
    return images.to(device).float().contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, *, device: torch.device | str = "cpu") -> Tensor:
    """Logits (N, K) float32 on the CPU for raw uint8 images (N, C, H, W)."""
    return torch.cat([model(pixels(chunk, device)).float().cpu() for chunk in images.split(256)])


def accuracy(model: nn.Module, part: Split, *, device: torch.device | str = "cpu") -> float:
    """Share of the images of `part` whose label has the largest logit."""
    return float((predict(model, part.images, device=device).argmax(1) == part.labels).double().mean())


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy (nats) of raw uint8 images with their labels: the task loss."""
    device = next(model.parameters()).device
    return F.cross_entropy(model(pixels(batch[0], device)).float(), batch[1].to(device))


# -- classifiers ------------------------------------------------------------------------------------------------------


def fit(recipe: Recipe, dataset: Dataset, *, device: torch.device | str = "cpu") -> Trained:
    """The classifier of `recipe`: published with the results, or trained here before, else trained now.

    A TrainingError where stored weights are damaged.
    """
    from . import published

    key = identity(recipe, dataset)
    model = recipe.build(dataset).to(device)
    make = partial(fit_into, model, recipe, dataset)
    return published.load(key, model) or made_once(recipe.name, key, model, make, recipe=recipe, half=True)


def identity(recipe: Recipe, dataset: Dataset) -> str:
    """Sha256 of what decides a trained classifier: its recipe and the digest of its data."""
    return cache.fingerprint({"recipe": recipe.decides(), "data": dataset.digest})


def fit_into(model: nn.Module, recipe: Recipe, dataset: Dataset, resume: Path) -> Record:
    """Train a fresh `model` by its recipe; the state of an interrupted training is in the file `resume`."""
    device = next(model.parameters()).device

    def measure() -> dict[str, float]:
        return {"valid_accuracy": accuracy(model, dataset.valid, device=device)}

    options = {"rate": recipe.rate, "seed": (recipe.seed, 0), "title": recipe.name, "best_from": recipe.best_from}
    return _classify(model, recipe, dataset.train, recipe.epochs, resume, measure=measure, **options)


def _classify(model: nn.Module, recipe: Recipe, images: Split, epochs: int, resume: Path, **options: Any) -> Record:
    device = next(model.parameters()).device
    there = Split(*(tensor.to(device) for tensor in images.tensors()))
    batches = Shuffled(there, recipe.batch_size, recipe.augment)
    options |= {"steps": epochs * len(batches), "precision": recipe.precision, "resume": resume}
    return train(model, batches, cross_entropy, recipe.optimize(model), **options)


def learn(
    recipe: Recipe,
    dataset: Dataset,
    extra: Split,
    *,
    phases: Sequence[tuple[int, float]],
    device: torch.device | str = "cpu",
) -> list[Trained]:
    """The classifier of `recipe` after each phase of learning its own images together with `extra` (Setup 0).

    The recipe gives batch size, optimiser and seed; `phases` are (epochs, learning rate), one after the other. The
    digest of `extra`, such as made outliers, is a part of the key.
    """
    trained, images = fit(recipe, dataset, device=device), dataset.train.with_(extra)
    found = []
    for phase, (epochs, rate) in enumerate(phases):
        key = cache.fingerprint({"base": trained.key, "extra": extra.digest, "epochs": epochs, "rate": rate})
        model = copy.deepcopy(trained.model)
        stream, title = (recipe.seed, 1, phase), f"{recipe.name} with more images"
        make = partial(_classify, model, recipe, images, epochs, rate=rate, seed=stream, title=title)
        trained = made_once(f"{recipe.name}-learnt{phase + 1}", key, model, make, recipe=recipe)
        found.append(trained)
    return found


# -- checkpoints ------------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where networks that are not published are kept."""
    return paths.cache_dir() / "checkpoints"


def published_folder() -> Path:
    """Where the networks are that were continued for a published table, small enough to go with it."""
    return paths.ZOO / "continued"


def made_once(
    name: str,
    key: str,
    model: nn.Module,
    make: Callable[[Path], Record],
    *,
    recipe: Any,
    half: bool = False,
    publish: bool = False,
) -> Trained:
    """Load the checkpoint of `key` into `model`, or make it, store it and load it.

    `make` trains the model in place; it gets the file for the state of an interrupted training. `recipe`, a dataclass,
    is noted beside the weights; `half` rounds the parameters to float16: the rounded network is the network. What
    another process is making is waited for. `publish` stores it with the published networks; one that is there is
    loaded in any case. A TrainingError where weights are damaged.
    """
    name = f"{name}-{key[:16]}"
    home = published_folder() if publish or (published_folder() / f"{name}.json").exists() else folder()
    weights, notes, resume = home / f"{name}.safetensors", home / f"{name}.json", folder() / f"{name}.resume.pt"
    with FileLock(folder() / f"{name}.lock"):
        if not (weights.exists() and notes.exists()):
            history, seconds = make(resume)
            save_weights(weights, model, half=half)
            record = {"recipe": asdict(recipe), "seconds": seconds, "history": history, "sha256": cache.sha256(weights)}
            record |= provenance(next(model.parameters()).device)
            text = json.dumps(record, indent=1)
            cache.atomic_write(notes, lambda temporary: temporary.write_text(text))
            resume.unlink(missing_ok=True)
    record = json.loads(notes.read_text())
    if record.get("sha256") != cache.sha256(weights):
        raise TrainingError(f"{weights}: damaged (another checksum than in its .json): delete both, to train it again")
    load_weights(weights, model)
    return Trained(model.eval(), key, record["history"], record["seconds"])


def save_weights(path: Path, model: nn.Module, *, half: bool) -> None:
    """Write the weights: parameters as float16 where asked for and possible, everything else as it is."""
    parameters = dict(model.named_parameters())
    tensors = {}
    for key, value in model.state_dict().items():
        value = value.detach().cpu().contiguous()
        rounded = value.half() if half and key in parameters else value
        tensors[key] = rounded if bool(torch.isfinite(rounded).all()) else value
    cache.atomic_write(path, lambda temporary: save_file(tensors, temporary))


def load_weights(path: Path, model: nn.Module) -> None:
    """Put stored weights into `model`, in its own precision; a TrainingError where they are damaged or of another."""
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise TrainingError(f"{path}: damaged, or the weights of another network ({reason})") from None


def provenance(device: torch.device) -> dict[str, Any]:
    """What made a network, besides recipe and data: never a part of its identity."""
    code = {"commit": cache.commit(), "code": cache.computing_hash(__name__), "torch": torch.__version__}
    if device.type == "cuda":
        return code | {"device": torch.cuda.get_device_name(device)}
    return code | {"threads": torch.get_num_threads(), "device": f"CPU, {torch.backends.cpu.get_cpu_capability()}"}
