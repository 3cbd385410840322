"""A batch as models take it: one tensor, a tuple of them, or a mapping of keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from influence.checks import require_finite, require_logits
from influence.grams.graph import topological

Batch = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
# Name of a tensor that is the whole batch.
_ALONE = ("x",)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a batch, in each of which the first dimension counts the examples.

    Attributes:
        tensors: Each ``(N, ...)``.
        names: Of the tensors; those of a tuple are called "0", "1", ...
        by_keyword: Whether the model takes them by name, in place of by position.
        perturbed: Which of them is perturbed.
        autocast: The precision of the autocast that the batch was given under: the model is called in it, and
            nothing else. None where there was none.
    """

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    by_keyword: bool = False
    perturbed: int = 0
    autocast: torch.dtype | None = None

    @classmethod
    def of(cls, x: Batch, numbers: Sequence[int] | None = None) -> Inputs:
        """Read a batch, of whose examples the ``numbers`` are told where one is not finite; None: their places.

        Raises:
            TypeError: If it is neither a tensor nor a tuple or a mapping of tensors, dense ones with values.
            ValueError: If there is no example, the tensors have different numbers of them, or one is not finite.
        """
        if isinstance(x, Tensor):
            batch = cls((x,), _ALONE)
        elif isinstance(x, Mapping):
            batch = cls(tuple(x.values()), tuple(map(str, x)), by_keyword=True)
        elif isinstance(x, tuple | list):
            batch = cls(tuple(x), tuple(map(str, range(len(x)))))
        else:
            raise TypeError(
                f"x must be a tensor (N, ...), or a tuple or a mapping of such tensors, got {type(x).__name__}. Use "
                "torch.as_tensor(x)."
            )
        if not batch.tensors:
            raise ValueError("x must hold at least one tensor (N, ...), got none.")
        for name, tensor in zip(batch.names, batch.tensors, strict=True):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"x must hold tensors (N, ...), got {type(tensor).__name__} as {name!r}.")
            if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
                kind = "nested" if tensor.is_nested else "meta" if tensor.is_meta else str(tensor.layout)
                raise TypeError(f"x must hold dense tensors with values, got a {kind} one as {name!r}. Use to_dense().")
            if tensor.ndim == 0 or tensor.shape[0] == 0:
                raise ValueError(f"x must hold at least one example, (N, ...), got shape {tuple(tensor.shape)}.")
            require_finite(tensor, name=name, hint="Check the data.", numbers=numbers or range(len(tensor)))
        if len({len(tensor) for tensor in batch.tensors}) > 1:
            counts = dict(zip(batch.names, map(len, batch.tensors), strict=True))
            raise ValueError(f"all tensors of x must have the examples as first dimension, got lengths {counts}.")
        kind = batch.device.type
        lowered = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return replace(batch, autocast=lowered)

    def perturbing(self, name: str | None) -> Inputs:
        """The same with the perturbed tensor chosen: by name, or None for the only floating one.

        Raises:
            TypeError: If it is not floating.
            ValueError: If there is no such tensor, or several floating ones to choose from.
        """
        by_name = dict(zip(self.names, self.tensors, strict=True))
        floating = [n for n, tensor in by_name.items() if tensor.is_floating_point()]
        if name is None:
            if len(floating) > 1:
                raise ValueError(f"x holds several floating tensors, {floating}: say which with wrt='input:NAME'.")
            name = floating[0] if floating else self.names[0]
        if name not in self.names:
            raise ValueError(f"unknown input {name!r}: x holds {list(self.names)}.")
        if name not in floating:
            raise TypeError(
                f"x must be floating for wrt='input', got {by_name[name].dtype}: integers cannot be perturbed. Convert "
                "images with x.float(); for tokens perturb the parameters or a layer."
            )
        if not by_name[name].numel():
            raise ValueError(f"x must hold at least one value to perturb, got shape {tuple(by_name[name].shape)}.")
        return replace(self, perturbed=self.names.index(name))

    def __len__(self) -> int:
        """N."""
        return len(self.tensors[0])

    def __getitem__(self, examples: slice | Tensor) -> Inputs:
        return self.each(lambda tensor: tensor[examples])

    @property
    def x(self) -> Tensor:
        """The perturbed tensor."""
        return self.tensors[self.perturbed]

    @property
    def device(self) -> torch.device:
        """Where the batch is."""
        return self.tensors[0].device

    @property
    def batch(self) -> Batch:
        """What ``of`` reads as the same."""
        if self.by_keyword:
            return dict(zip(self.names, self.tensors, strict=True))
        return self.tensors[0] if self.names == _ALONE else self.tensors

    def each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with every tensor changed."""
        return replace(self, tensors=tuple(map(change, self.tensors)))

    def copies(self, count: int) -> Inputs:
        """The whole batch so many times."""
        return self.each(lambda tensor: tensor.repeat(count, *[1] * (tensor.ndim - 1)))

    def with_leaf(self) -> Inputs:
        """The same with the perturbed tensor as a leaf that takes a gradient."""
        tensors = list(self.tensors)
        tensors[self.perturbed] = self.x.detach().clone().requires_grad_()
        return replace(self, tensors=tuple(tensors))

    def logits(self, model: Callable[..., object]) -> Tensor:
        """Call a model with copies of the tensors, which it may spoil; logits ``(N, K)``, checked."""
        copies = [tensor.clone() for tensor in self.tensors]
        with torch.autocast(self.device.type, self.autocast, cache_enabled=False) if self.autocast else nullcontext():
            output = model(**dict(zip(self.names, copies, strict=True))) if self.by_keyword else model(*copies)
        logits = getattr(output, "logits", output)
        if len(self) == 1 and isinstance(logits, Tensor) and logits.ndim == 1 and len(logits) > 1:
            # A model that ends in squeeze() drops the dimension of a single example.
            output = logits[None]
        return require_logits(output, examples=len(self))


def forward(model: Callable[..., object], x: Inputs | Batch) -> Tensor:
    """Logits ``(N, K)`` with a graph; a RuntimeError if they carry no gradient."""
    logits = (x if isinstance(x, Inputs) else Inputs.of(x)).logits(model)
    if not logits.requires_grad:
        raise RuntimeError(
            "the logits carry no gradient: the model detaches them, runs under no_grad, or does not use what is "
            "perturbed. Remove the detach or the decorator, or perturb something the logits depend on."
        )
    _mend_batch_norm(logits)
    return logits


def _mend_batch_norm(logits: Tensor) -> None:
    """Keep batch and instance normalisation on a CPU from gradients that PyTorch (2.14) gets wrong without a word.

    Where a dimension has one entry, as that of a single example, its kernel may take channels-last memory of the
    gradient for that of the input, or the other way round. A gradient that is contiguous in neither order takes a loop
    that heeds strides.
    """

    def strided(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None or grad.device.type != "cpu" or grad.ndim < 4 or 1 not in (len(grad), *grad.shape[2:]):
            return grads
        return (F.pad(grad, (0, 1))[..., :-1], *grads[1:])

    for node in topological(logits.grad_fn):
        if node.name() == "NativeBatchNormBackward0":
            node.register_prehook(strided)
