"""A model of the reader's own, named by a word on the command line or in a notebook, checked at the door."""

from __future__ import annotations

import contextlib
import difflib
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence.checks import require_logits

from ..images import data
from ..ledger import paths
from ..zoo import recipes, training
from .material import AdaptError, Examples, call, described, refused

_WEIGHTS = (".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors")
# What wrappers put before the names of a network's own parameters.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
_FORMS = "torchvision:NAME, companion:NAME, MODULE:FUNCTION or the path of a checkpoint"


class Prepared(nn.Module):
    """A model with its preprocessing inside, so that perturbations are in the unit of the data.

    The data are multiplied by `scale` first, 1 / 255 for bytes that the model wants in [0, 1]; mean and std, ``(C,)``,
    are of the scaled channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, *, scale: float, mean: Sequence[float] = (), std: Sequence[float] = ()
    ) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise AdaptError(f"mean and std must have one number per channel each, got {len(mean)} and {len(std)}")
        if any(not value > 0 for value in std):
            raise AdaptError(f"std must be positive, got {list(std)}")
        self.model, self.scale = model, scale
        self.register_buffer("mean", torch.tensor(list(mean)), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or whatever the model returns."""
        x = x * self.scale
        if self.mean.numel():
            channels = (-1, *[1] * (x.ndim - 2))
            x = (x - self.mean.view(channels)) / self.std.view(channels)
        logits: Tensor = self.model(x)
        return logits

    def extra_repr(self) -> str:
        """The settings, by which two of these are told apart."""
        return f"scale={self.scale!r}"


def load_model(
    spec: str,
    examples: Examples,
    *,
    classes: int,
    dataset: str,
    architecture: str | None = None,
    profile: str = "smoke",
    device: torch.device | str = "cpu",
    scale: float = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> tuple[nn.Module, int]:
    """The model that a word names, in evaluation mode, taking the examples as they are stored; and its K.

    Args:
        spec: ``torchvision:resnet18`` (random weights) or ``torchvision:resnet18@DEFAULT`` (trained ones, downloaded);
            ``package.module:function`` of the reader's, called without arguments in the current folder; the path of a
            checkpoint, with `architecture`; ``companion:resnet50`` or ``companion:densenet121``, which the companion
            trains on `dataset`.
        examples: what it is to take.
        classes: K, for a torchvision network without weights.
        dataset: the word for the data; the companion's own networks are trained on it, or on digits.
        architecture: for a checkpoint, what its weights belong to, named in one of the other ways.
        profile: for the companion's own networks, whose size it decides.
        device: where the model goes.
        scale: factor for the data; 0 chooses: 1 / 255 for bytes, 1 for floats and token numbers. The companion's own
            networks take bytes as they are.
        mean: of each scaled channel, as in training; empty for no normalisation.
        std: of each scaled channel.

    Raises:
        AdaptError: with one line that says what is wrong and what to do.
    """
    dataset = dataset if dataset in data.NAMES else "digits"
    made = _named(spec, classes, architecture, profile, dataset, device).to(device).eval()
    if spec.startswith("companion:"):
        scale = 1.0
    model = prepare(made, examples, scale=scale, mean=mean, std=std)
    outputs = check(model, examples)
    if classes > outputs:
        raise AdaptError(f"the data have {classes} classes, the model has K = {outputs}: give it more outputs")
    return model, outputs


def _named(
    spec: str, classes: int, architecture: str | None, profile: str, dataset: str, device: torch.device | str
) -> nn.Module:
    prefix, _, rest = spec.partition(":")
    path = Path(spec).expanduser()
    if path.is_file():
        if not architecture:
            raise AdaptError(
                f"{spec}: a checkpoint holds numbers alone; name the network that they belong to as architecture "
                "(--architecture), such as torchvision:resnet18 or my_package.my_module:my_function"
            )
        made = _named(architecture, classes, None, profile, dataset, "cpu")
        load_weights(made, path)
        return made
    if prefix == "torchvision" and rest:
        return _torchvision(rest, classes)
    if prefix == "companion" and rest:
        with refused(errors=(ValueError, RuntimeError, OSError)):
            recipe = recipes.recipe(profile, dataset, rest, seed=0)
            return training.fit(recipe, data.load(dataset, paths.data_dir()), device=device).model
    if rest:
        made = call(spec)
        if not isinstance(made, nn.Module):
            raise AdaptError(f"{spec}() must return a torch.nn.Module, got {type(made).__name__}")
        return made
    hint = "no such file" if spec.lower().endswith(_WEIGHTS) or os.sep in spec else f"expected {_FORMS}"
    raise AdaptError(f"model {spec!r}: {hint}")


def load_weights(model: nn.Module, path: Path) -> None:
    """Put a checkpoint's weights into a model, never executing what it holds; an AdaptError where they do not fit."""
    remedy = "save them with torch.save(model.state_dict(), path)"
    with refused(f"{path}: cannot be read as weights alone (", f"); {remedy}"):
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(str(path))
        else:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:  # torch says at length how to trust it
                found = re.search(r"GLOBAL (\S+)", str(error))
                raise ValueError(f"it holds {found[1]}" if found else "it is no file of torch.save") from None
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise AdaptError(f"{path}: holds no state_dict (a mapping from names to tensors)")
    wanted = set(model.state_dict())
    # A wrapper's prefix is on all names or on none; one wrapper may hold another.
    while not wanted & set(state) and (common := [p for p in _PREFIXES if all(name.startswith(p) for name in state)]):
        state = {name.removeprefix(common[0]): value for name, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(" ".join(str(error).split()).partition(": ")[2].split()[:40])
        raise AdaptError(f"{path}: these weights are not those of {type(model).__name__}: {first}") from None


def prepare(
    model: nn.Module, examples: Examples, *, scale: float = 0, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> nn.Module:
    """A model that takes the examples as they are stored (bytes as 0..255); `load_model` says what the numbers are."""
    first = examples[0][0]
    scale = scale or (1 / 255 if first.dtype == torch.uint8 else 1.0)
    if len(mean) not in (0, 1, len(first)):
        raise AdaptError(f"mean and std must have 1 or {len(first)} numbers, one for each channel, got {len(mean)}")
    if scale == 1 and not len(mean) and not len(std):
        return model
    return Prepared(model, scale=scale, mean=mean, std=std).to(device_of(model)).eval()


def check(model: nn.Module, examples: Examples) -> int:
    """K, after two examples went through the model; an AdaptError where they, what it returns or labels do not fit."""
    x, _ = examples.batch(range(min(2, len(examples))))
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is not None and x.is_floating_point():
        x = x.to(parameter.dtype)
    try:
        with torch.no_grad():
            output = model(x.to(device_of(model)))
    except Exception as error:  # whatever the reader's code raises
        remedy = (
            "check size and channels" if x.is_floating_point() else "whole numbers are tokens: give a table as floats"
        )
        taken = f"a batch of shape {tuple(x.shape)}, {x.dtype}"
        raise AdaptError(f"the model does not take {taken}: {described(error)}; {remedy}") from error
    with refused(errors=(TypeError, ValueError)):
        logits = require_logits(output, examples=len(x))
    classes, largest = logits.shape[1], int(examples.labels.max())
    if largest >= classes:
        raise AdaptError(
            f"labels must lie in 0..{classes - 1} for the model's K = {classes} classes, got {largest}: relabel the "
            "data or give the model more outputs"
        )
    return classes


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _torchvision(name: str, classes: int) -> nn.Module:
    import torchvision

    name, _, weights = name.partition("@")
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3) or known[:3]
        raise AdaptError(f"torchvision has no classifier {name!r}; did you mean {', '.join(close)}?")
    with refused(errors=(ValueError, RuntimeError, OSError)), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if weights:
            there = torchvision.models.get_model_weights(name).__members__
            if weights not in there:
                raise AdaptError(f"torchvision has no weights {weights!r} of {name}: there are {', '.join(there)}")
            return torchvision.models.get_model(name, weights=weights)
        with contextlib.suppress(TypeError):
            # GoogLeNet and Inception would return training outputs and warn about their initialisation.
            return torchvision.models.get_model(name, weights=None, num_classes=classes, init_weights=True)
        return torchvision.models.get_model(name, weights=None, num_classes=classes)
