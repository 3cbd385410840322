"""How each network is trained: `recipes.yaml`, read and checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache as remember
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn

from ..images.data import Dataset
from ..ledger import paths
from . import models
from .pretrained import CifarResNet

# The profile of a run names the families of its networks: the papers' own, and others to fine-tune.
_FAMILIES = {"smoke": ("smoke",), "cpu": ("paper", "base"), "paper": ("released", "base")}
_ELSEWHERE = ("smoke", "released")  # trained where a profile needs them
_DECIDES_NOTHING = ("name", "gate", "published")
_RISE = 0.2  # of a one-cycle schedule


class RecipeError(ValueError):
    """No such recipe, or one that makes no sense; the message is one line for the reader."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a trained classifier, besides its data; a RecipeError names a value that is wrong."""

    name: str  # that of `recipes.yaml`, "-" and the seed
    architecture: str  # of `ARCHITECTURES`
    data: str  # of `data.NAMES`
    epochs: int  # over all training images
    phases: tuple[tuple[int, float], ...] = ()  # (epochs, learning rate), one after the other; empty with `one_cycle`
    one_cycle: float = 0.0  # peak of the learning rate; 0 with `phases`
    optimizer: Literal["adam", "sgd"] = "adam"  # sgd: with Nesterov's momentum of .9
    keep: Literal["best", "last"] = "best"  # validation accuracy of the last phase, or the last epoch
    width: float = 1.0  # channel multiplier
    dropout: float = 0.0  # probability of dropping an activation
    normalise: bool = False  # take mean and standard deviation out of the pixels, inside the network
    batch_size: int = 128
    weight_decay: float = 2e-4  # of the weights in their own gradient; with Adam of convolutions alone, as released
    augment: bool = False  # crop and flip
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: where the processor has instructions for it
    labels: str | None = None  # of `outliers.HUMAN_LABELS`; None for those of the data set
    fold: tuple[int, int] | None = None  # (i, n): every n-th training image from the i-th on is held out, to validate
    seed: int = 0  # of weights, order and all else that is drawn
    gate: dict[str, float] = field(default_factory=dict)  # accuracies by part below which no verdict rests on it
    published: bool = False  # whether its weights belong to `results/zoo`

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise RecipeError(f"{self.name}: unknown architecture {self.architecture!r}: {', '.join(ARCHITECTURES)}")
        if bool(self.phases) == bool(self.one_cycle):
            raise RecipeError(f"{self.name}: needs phases or one_cycle, not both")
        if self.phases and self.epochs != sum(epochs for epochs, _ in self.phases):
            raise RecipeError(f"{self.name}: {self.epochs} epochs, but its phases have another sum")
        for value, allowed in ((self.optimizer, ("adam", "sgd")), (self.keep, ("best", "last"))):
            if value not in allowed:
                raise RecipeError(f"{self.name}: expected one of {', '.join(allowed)}, got {value!r}")

    def decides(self) -> dict[str, Any]:
        """The values that decide the weights, but for those at their default: a new field changes no identity."""
        values = {key: value for key, value in asdict(self).items() if key not in _DECIDES_NOTHING}
        return {key: value for key, value in values.items() if value != _DEFAULTS[key]}

    @property
    def best_from(self) -> int | None:
        """First epoch whose weights may be kept; None where the last ones are."""
        if self.keep == "last":
            return None
        return self.epochs - self.phases[-1][0] if self.phases else 0

    def rate(self, done: float) -> float:
        """Learning rate where a share `done` of all steps is done."""
        if self.one_cycle:
            return self.one_cycle * (done / _RISE if done < _RISE else (1 - done) / (1 - _RISE))
        ends = itertools.accumulate(epochs for epochs, _ in self.phases)
        return next(rate for end, (_, rate) in zip(ends, self.phases, strict=True) if done < end / self.epochs)

    def optimize(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of those parameters that require a gradient.

        Adam has the L2 penalty of the released code on the kernels of convolutions, and Keras' epsilon. Keras'
        regularizers.l2(1e-4) adds 1e-4 |w|^2 to the loss, hence a `weight_decay` of 2e-4.
        """
        if self.optimizer == "adam":
            decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d)}
        else:
            decayed = {id(parameter) for parameter in model.parameters() if parameter.ndim > 1}
        groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (self.weight_decay, 0.0)]
        for parameter in model.parameters():
            if parameter.requires_grad:
                groups[id(parameter) not in decayed]["params"].append(parameter)
        if self.optimizer == "adam":
            return torch.optim.Adam(groups, lr=self.rate(0), eps=1e-7)
        return torch.optim.SGD(groups, lr=self.rate(0), momentum=0.9, nesterov=True)

    def build(self, dataset: Dataset) -> nn.Module:
        """The network before training, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = ARCHITECTURES[self.architecture](self, dataset)
        return network.to(memory_format=torch.channels_last).eval()

    def dataset(self, data_dir: Path | None = None) -> Dataset:
        """What the network is trained, validated and tested on; raises a DataError as `data.load`."""
        return data_set(self.data, self.labels, self.fold, data_dir or paths.data_dir())


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Recipe)}


class Normalised(nn.Module):
    """A network of pixels from which mean and standard deviation of each channel of `images` are taken out."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.network = network
        values = images.double()
        for name, statistic in (("mean", values.mean), ("std", values.std)):
            self.register_buffer(name, statistic(dim=(0, 2, 3), keepdim=True).float()[0])

    def forward(self, x: Tensor) -> Tensor:
        """Logits of raw pixels."""
        logits: Tensor = self.network((x - self.mean) / self.std)
        return logits


def _papers(recipe: Recipe, dataset: Dataset) -> nn.Module:
    network = models.build(
        recipe.architecture,
        shape=dataset.shape,
        n_classes=len(dataset.classes),
        width=recipe.width,
        dropout=recipe.dropout,
        seed=recipe.seed,
    )
    return Normalised(network, dataset.train.images) if recipe.normalise else network


def _resnet20(recipe: Recipe, dataset: Dataset) -> nn.Module:
    return CifarResNet(20, initialise=True)


def _inception(recipe: Recipe, dataset: Dataset) -> nn.Module:
    from .inception import SmallInception  # torchvision brings PyTorch's compiler with it: two seconds of every start

    return SmallInception(dataset.shape[0], min(dataset.shape[1:]), width=recipe.width, n_classes=len(dataset.classes))


ARCHITECTURES = {"resnet50": _papers, "densenet121": _papers, "resnet20": _resnet20, "inception": _inception}


# -- the file ---------------------------------------------------------------------------------------------------------


def recipe(profile: str, dataset: str, model: str, *, seed: int = 0) -> Recipe:
    """The recipe for a network on a data set in a profile; a RecipeError where none is set down."""
    rows, families = _rows(), _FAMILIES.get(profile, ())
    for stem in (f"{family}-{model}-{dataset}" for family in families):
        if stem in rows:
            return _recipe(stem, rows[stem], seed)
    known = ", ".join(name for name in rows if name.partition("-")[0] in families) or "none"
    raise RecipeError(f"no recipe for {model!r} on {dataset!r} in profile {profile!r}; there are: {known}")


def named(name: str) -> Recipe:
    """The recipe of a network such as "base-resnet20-cifar10-0"; a RecipeError where there is none of that name."""
    stem, _, seed = name.rpartition("-")
    row = _rows().get(stem)
    if row is not None and seed.isdecimal() and int(seed) in row["seeds"]:
        return _recipe(stem, row, int(seed))
    raise RecipeError(f"unknown network {name!r}: `influence zoo` lists them all")


def with_seeds(names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Names with a seed: one of a recipe without a seed becomes one for each of `seeds`, others stay as they are."""
    return [full for name in names for full in ([f"{name}-{s}" for s in seeds] if name in _rows() else [name])]


def everything() -> Iterator[Recipe]:
    """The networks of the zoo, each recipe with each of its seeds: all but those that a profile trains by itself."""
    for stem, row in _rows().items():
        yield from (_recipe(stem, row, seed) for seed in row["seeds"] if stem.partition("-")[0] not in _ELSEWHERE)


def _recipe(stem: str, row: dict[str, Any], seed: int) -> Recipe:
    values = {key: value for key, value in row.items() if key != "seeds"}
    if unknown := set(values) - {f.name for f in fields(Recipe)}:
        raise RecipeError(f"recipes.yaml: {stem} has unknown values {', '.join(sorted(unknown))}")
    if "phases" in values:
        values["phases"] = tuple((int(epochs), float(rate)) for epochs, rate in values["phases"])
        values["epochs"] = sum(epochs for epochs, _ in values["phases"])
    if values.get("fold"):
        values["fold"] = tuple(values["fold"])
    return Recipe(name=f"{stem}-{seed}", seed=seed, **values)


@remember
def _rows() -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return rows


@remember
def data_set(name: str, labels: str | None, fold: tuple[int, int] | None, data_dir: Path | None) -> Dataset:
    """A data set, loaded once; with labels and a fold of a recipe, all training images in two parts by these."""
    from ..images import data, outliers

    found = data.load(name, data_dir)
    if labels is None and fold is None:
        return found
    whole = found.train.with_(found.valid)
    if labels is not None:
        whole = replace(whole, labels=outliers.human_labels(labels, data_dir)[0][whole.index])
    held_out = whole.index % fold[1] == fold[0] if fold else torch.isin(whole.index, found.valid.index)
    return replace(found, train=whole.where(~held_out), valid=whole.where(held_out))
