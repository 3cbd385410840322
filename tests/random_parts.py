"""The parts that random networks are made of, of every kind that people build and some that they should not.

Here: how parts are registered and composed, those that hold others, and those that must be refused. The layers are in
``random_layers``. A part is built for an ``x`` of the shape that it will get: a vector ``(N, D)``, a sequence
``(N, T, D)`` or an image ``(N, C, H, W)``. All sizes are small, so that they coincide often.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

# What the engine owes a model. Where several parts ask for different things, the last of these counts.
RIGHT, RIGHT_OR_REFUSED, REFUSED = "right", "right or refused", "refused"
FATES = (RIGHT, RIGHT_OR_REFUSED, REFUSED)
_KINDS = {2: "vector", 3: "sequence", 4: "image"}


class Draw(random.Random):
    """Random choices, and what they have brought into the network so far."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.parts: list[str] = []
        self.changes: list[Callable[[], object]] = []
        self.in_training: list[nn.Module] = []
        self.depth = 0

    def maybe(self, probability: float) -> bool:
        return self.random() < probability

    def mark(self) -> tuple[int, int, int]:
        return len(self.parts), len(self.changes), len(self.in_training)

    def forget(self, mark: tuple[int, int, int]) -> None:
        """Take back what came into the network since then."""
        for listed, count in zip((self.parts, self.changes, self.in_training), mark, strict=True):
            del listed[count:]


@dataclass(frozen=True)
class Part:
    build: Callable[[Draw, Tensor], nn.Module | None]
    kinds: tuple[str, ...]
    weight: float
    fate: str


PARTS: dict[str, Part] = {}
_PLAIN = False


@contextmanager
def plainly() -> Iterator[None]:
    """Within it, checkpoints and compiled modules call what they hold: brute force looks at the function alone."""
    global _PLAIN
    _PLAIN = True
    try:
        yield
    finally:
        _PLAIN = False


class Op(nn.Module):
    """A function with the modules and parameters that it uses."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def part(kinds: str, *, weight: float = 1.0, fate: str = RIGHT) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(build: Callable[[Draw, Tensor], nn.Module | None]) -> Callable[[Draw, Tensor], nn.Module | None]:
        PARTS[build.__name__] = Part(build, tuple(kinds.split()), weight, fate)
        return build

    return register


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / max(1, shape[-1]) ** 0.5)


def activation(d: Draw) -> Callable[[Tensor], Tensor]:
    return d.choice([torch.tanh, torch.tanh, F.gelu, F.silu, F.softplus, lambda y: F.leaky_relu(y, 0.2)])


def kept(x: Tensor) -> Tensor:
    """Which tokens are no padding, ``(N, T)``: more or fewer, as an example's own values have it; never none."""
    keep = x.detach()[..., 0] > -0.1
    keep[:, 0] = True
    return keep


def lengths(x: Tensor) -> Tensor:
    return kept(x).sum(dim=1)


# -- parts that hold others -------------------------------------------------------------------------------------------


def inner(d: Draw, x: Tensor, *, same_shape: bool = True) -> nn.Module | None:
    """One or two parts; None where none of the right shape turns up."""
    if d.depth == 2:
        return None
    d.depth += 1
    mark, found = d.mark(), None
    for _ in range(6):
        module, y = chain(d, x, d.randint(1, 2))
        if (y.shape == x.shape) if same_shape else (y.ndim == x.ndim and y.shape[2:] == x.shape[2:]):
            found = module
            break
        d.forget(mark)
    d.depth -= 1
    return found


def holding(kinds: str, **options: Any) -> Callable[[Callable[..., nn.Module]], Callable[..., Any]]:
    """A part round an inner module of the same shape, if one can be had."""

    def register(build: Callable[[Draw, nn.Module], nn.Module]) -> Callable[..., Any]:
        def with_inner(d: Draw, x: Tensor) -> nn.Module | None:
            module = inner(d, x)
            return None if module is None else build(d, module)

        with_inner.__name__ = build.__name__
        return part(kinds, **options)(with_inner)

    return register


ANY = "vector sequence image"


@holding(ANY, weight=2)
def residual(d: Draw, module: nn.Module) -> nn.Module:
    return Op(lambda m, x: x + m.f(x), f=module)


@part(ANY)
def dense(d: Draw, x: Tensor) -> nn.Module | None:
    module = inner(d, x, same_shape=False) if x.ndim != 3 else inner(d, x)
    return None if module is None else Op(lambda m, x: torch.cat([x, m.f(x)], dim=-1 if x.ndim == 3 else 1), f=module)


@holding(ANY)
def zero_scale(d: Draw, module: nn.Module) -> nn.Module:
    scale = nn.Parameter(torch.zeros(1))
    d.changes.append(lambda: nn.init.constant_(scale, 0.7))
    return Op(lambda m, x: x + m.scale * m.f(x), f=module, scale=scale)


@holding(ANY, weight=0.4)
def checkpointed(d: Draw, module: nn.Module) -> nn.Module:
    return Op(lambda m, x: m.f(x) if _PLAIN else checkpoint(m.f, x, use_reentrant=False), f=module)


@holding(ANY, weight=0.4)
def offloaded(d: Draw, module: nn.Module) -> nn.Module:
    """What the backward pass needs is put elsewhere meanwhile."""

    def run(m: Any, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.detach().clone(),), lambda held: held[0]):
            return m.f(x)

    return Op(run, f=module)


@holding(ANY, weight=0.4, fate=RIGHT_OR_REFUSED)
def reentrant_checkpoint(d: Draw, module: nn.Module) -> nn.Module:
    return Op(lambda m, x: m.f(x) if _PLAIN else checkpoint(m.f, x, use_reentrant=True), f=module)


@holding(ANY, weight=0.1, fate=RIGHT_OR_REFUSED)
def compiled(d: Draw, module: nn.Module) -> nn.Module:
    fast = torch.compile(module, backend="aot_eager")
    return Op(lambda m, x: (m.f if _PLAIN else fast)(x), f=module)


@holding(ANY, weight=0.4)
def bfloat16_body(d: Draw, module: nn.Module) -> nn.Module:
    return Op(lambda m, x: m.f(x.bfloat16()).to(x.dtype), f=module.bfloat16())


@holding(ANY, weight=0.4)
def autocast_body(d: Draw, module: nn.Module) -> nn.Module:
    """Leaves float64 alone."""

    def cast(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.f(x).to(x.dtype)

    return Op(cast, f=module)


# -- what has no value of its own for an example ----------------------------------------------------------------------


@part(ANY, weight=0.25, fate=REFUSED)
def functional_dropout(d: Draw, x: Tensor) -> nn.Module:
    return Op(lambda m, x: F.dropout(x, 0.5))


@part(ANY, weight=0.25, fate=REFUSED)
def stochastic_depth(d: Draw, x: Tensor) -> nn.Module:
    module = StochasticDepth(0.5, d.choice(["row", "batch"]))
    d.in_training.append(module)
    return Op(lambda m, x: x + m.drop(torch.tanh(m.scale * x)), drop=module, scale=parameter(1))


@part(ANY, weight=0.2, fate=REFUSED)
def batch_statistics(d: Draw, x: Tensor) -> nn.Module | None:
    if len(x) == 1:
        return None
    kinds: list[Callable[[Any, Tensor], Tensor]] = [
        lambda m, x: x - 0.5 * x.mean(dim=0),
        lambda m, x: F.batch_norm(x.unsqueeze(-1).expand(*x.shape, 2), None, None, training=True)[..., 0],
        lambda m, x: torch.einsum("nm,m...->n...", (x.flatten(1) @ x.flatten(1).T).softmax(dim=1), x),
        lambda m, x: x / x.detach().abs().max(),
        lambda m, x: x + 0.3 * torch.arange(len(x)).view(-1, *(1,) * (x.ndim - 1)).to(x.dtype),
    ]
    return Op(d.choice(kinds))


@part("sequence", weight=0.3, fate=REFUSED)
def unmasked_padding(d: Draw, x: Tensor) -> nn.Module:
    """The mean over as many tokens as the longest of the batch has."""
    return Op(lambda m, x: x + x[:, : int(lengths(x).max())].mean(dim=1, keepdim=True))


@part(ANY, weight=0.15, fate=REFUSED)
def counting(d: Draw, x: Tensor) -> nn.Module:
    """Changes with every call."""

    def count(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        return x + m.calls.to(x.dtype) * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)

    module = Op(count)
    module.register_buffer("calls", torch.zeros(()))
    return module


# -- one after another ------------------------------------------------------------------------------------------------


def chain(d: Draw, x: Tensor, count: int) -> tuple[nn.Module, Tensor]:
    """Some parts, one after another, and what becomes of ``x`` in them."""
    modules: list[nn.Module] = []
    while len(modules) < count:
        fitting = {name: p for name, p in PARTS.items() if _KINDS[x.ndim] in p.kinds}
        name = d.choices(list(fitting), [p.weight for p in fitting.values()])[0]
        mark = d.mark()
        d.parts.append(name)
        module = fitting[name].build(d, x)
        y = None if module is None else tried(settled(module), x)
        if module is None or y is None:
            d.forget(mark)
        else:
            modules.append(module)
            x = y
    return nn.Sequential(*modules), x


def tried(module: nn.Module, x: Tensor) -> Tensor | None:
    """What becomes of ``x``; None where PyTorch cannot do it."""
    try:
        with torch.enable_grad():
            y = module(x.detach().requires_grad_()).detach()
    except (RuntimeError, ValueError, IndexError):
        return None
    return y if 1 < y[0].numel() <= 200 and bool(y.isfinite().all()) else None


def settled(module: nn.Module) -> nn.Module:
    """In evaluation mode, with normalisation that does something."""
    for m in module.eval().modules():
        if "Norm" in type(m).__name__:
            for p in m.parameters(recurse=False):
                nn.init.normal_(p, mean=0.6, std=0.3)
            if getattr(m, "running_mean", None) is not None:
                nn.init.normal_(m.running_mean, std=0.3)
                nn.init.uniform_(m.running_var, 0.5, 1.5)
    return module
