"""Small random networks of every kind that people build, for the engine to be held against brute force on.

``random_case(seed)`` composes the parts of ``random_parts`` and ``random_layers`` by a random grammar: a few on
vectors, sequences or images, each of which may hold others, then a head. The same seed gives the same network, weights,
inputs and call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import influence
import random_layers  # noqa: F401 (registers its parts)
from random_parts import FATES, PARTS, REFUSED, Draw, Op, chain, parameter


@dataclass(frozen=True)
class Case:
    """A network and a call of ``metric_tensor``.

    Attributes:
        seed: It was made from.
        model: In evaluation mode.
        x: ``(N, ...)``.
        wrt: See ``metric_tensor``, as is ``chunk_size``.
        labels: ``(N,)``.
        change: Done to the model between a first call and the one that counts.
        fate: What the engine owes it.
        parts: What it is made of.
    """

    seed: int
    model: nn.Module
    x: Tensor
    wrt: str | list[str] | influence.Patches
    chunk_size: int | None
    labels: Tensor
    change: Callable[[], object] | None
    fate: str
    parts: tuple[str, ...]

    def __str__(self) -> str:
        call = f"wrt={self.wrt!r}, chunk_size={self.chunk_size}, change={self.change is not None}"
        return f"seed {self.seed}: x {tuple(self.x.shape)} {self.x.dtype}, {' '.join(self.parts)}; {call}\n{self.model}"


def embedding(d: Draw, classes: int) -> nn.Embedding | nn.EmbeddingBag:
    """Tokens to vectors; as many words as classes, so that the head can share the table."""
    words, width = max(classes, 4), d.randint(2, 5)
    if d.maybe(0.15):
        return nn.EmbeddingBag(words, width, mode=d.choice(["sum", "mean", "max"]))
    options: dict[str, Any] = d.choice([{}, {}, {"padding_idx": 0}, {"padding_idx": 0}, {"sparse": True}])
    # PyTorch has no gradient for both.
    by_frequency = d.maybe(0.1) and "sparse" not in options
    return nn.Embedding(words, width, **options, scale_grad_by_freq=by_frequency)


def head(d: Draw, x: Tensor, classes: int, table: nn.Embedding | nn.EmbeddingBag | None) -> nn.Module:
    """From vectors to logits."""
    width = x.shape[1]
    kind = d.choice(["plain", "plain", "plain", "narrow", "narrow", "zero", "cosine", "tied", "bfloat16", "ensemble"])
    if kind == "tied" and table is None:
        kind = "plain"
    d.parts.append(f"{kind}_head")
    if kind == "narrow":
        few = d.randint(1, max(1, classes - 2))
        return nn.Sequential(nn.Linear(width, few), *([nn.Tanh()] if d.maybe(0.5) else []), nn.Linear(few, classes))
    if kind == "cosine":
        return Op(lambda m, x: 5 * F.linear(F.normalize(x), F.normalize(m.w)), w=parameter(classes, width))
    if kind == "ensemble":
        a, b = nn.Linear(width, classes), nn.Linear(width, classes, bias=False)
        return Op(lambda m, x: (m.a(x).log_softmax(dim=1) + m.b(x)) / 2, a=a, b=b)
    if kind == "tied":
        a = nn.Linear(width, table.embedding_dim)
        return Op(lambda m, x: F.linear(m.a(x), m.table)[:, :classes], a=a, table=table.weight)
    layer = nn.Linear(width, classes, bias=d.maybe(0.7))
    if kind == "zero":
        nn.init.zeros_(layer.weight)
        d.changes.append(lambda: nn.init.normal_(layer.weight))
    if kind == "bfloat16":
        return Op(lambda m, x: m.a(x.bfloat16()).float().to(x.dtype), a=layer.bfloat16())
    return layer


def random_case(seed: int) -> Case:
    """The network and the call that belong to a seed."""
    d, default = Draw(seed), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        torch.set_default_dtype(d.choice([torch.float64] * 5 + [torch.float32]))
        try:
            return _case(d, seed)
        finally:
            torch.set_default_dtype(default)


def _case(d: Draw, seed: int) -> Case:
    examples, classes = d.randint(1, 9), d.choice([2, 3, 4, 5, 6, 8, 10, 12, 3, 5, 4, 70])
    form = d.choice(["vector", "sequence", "tokens", "image", "image"])
    table: nn.Embedding | nn.EmbeddingBag | None = None
    if form == "tokens":
        table = embedding(d, classes)
        x = torch.randint(0, table.num_embeddings, (examples, d.randint(2, 6)))
    elif form == "image":
        x = torch.randn(examples, d.randint(1, 3), d.randint(3, 6), d.randint(3, 6))
    else:
        x = torch.randn(examples, *[d.randint(2, 6) for _ in range(1 if form == "vector" else 2)])
    if d.maybe(0.2):
        x = x.expand(2, *x.shape).movedim(0, -1)[..., 0]  # not contiguous
    body, y = chain(d, x if table is None else table(x), d.randint(1, 4))
    pool = nn.Identity()
    if y.ndim > 2:
        name = "pooled_sequence" if y.ndim == 3 else "pooled_image"
        pool = PARTS[name].build(d, y)
    last = head(d, pool(y), classes, table)
    scale, wrapped = d.choice([1.0, 1.0, 1.0, 8.0, 50.0]), d.maybe(0.2)

    def whole(m: Any, x: Tensor) -> Any:
        y = scale * m.head(m.pool(m.body(x if m.table is None else m.table(x))))
        return SimpleNamespace(logits=y) if wrapped else y

    model = Op(whole, table=table, body=body, pool=pool, head=last).eval()
    for module in d.in_training:
        module.train()
    fate = max((PARTS[name].fate for name in d.parts if name in PARTS), key=FATES.index)
    named = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    options: list[Any] = ["layers", "layers", "parameters", sorted(d.sample(named, min(len(named), d.randint(1, 3))))]
    if table is None:
        options += ["input", "input"]
    if form == "image":
        options.append(influence.Patches(d.randint(1, 3), per_channel=d.maybe(0.5), stride=d.randint(1, 2)))
    if d.maybe(0.2):
        for p in model.parameters():
            p.requires_grad_(d.maybe(0.5))
    return Case(
        seed=seed,
        model=model,
        x=x,
        wrt=d.choice(options),
        chunk_size=d.choice([None, None, *range(1 if fate is not REFUSED else 2, max(3, examples + 1))]),
        labels=torch.randint(0, classes, (examples,)),
        change=(lambda: [change() for change in d.changes]) if d.changes and d.maybe(0.6) else None,
        fate=fate,
        parts=tuple(d.parts),
    )
