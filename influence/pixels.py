"""Perturbations of the input: all of it, or each k x k patch of an image."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence.contrasts import Classes, LogitRows, Rows
from influence.grams.graph import read_graph
from influence.independence import (
    Weighting,
    alone,
    darkness,
    gradients,
    may_be_linear,
    random_weights,
    refuse_dependent,
    require_doubled,
    require_finite_gradients,
    require_independent,
    require_same,
    require_same_gradient,
    unreached,
)
from influence.inputs import Inputs, forward
from influence.kernels.gram import products
from influence.last_layer import NarrowLayer
from influence.memory import copies_at_once, is_out_of_memory, require_room


@dataclass(frozen=True)
class Patches:
    """Every k x k patch of an image is a perturbation of its own (Shu & Zhu 2019, setup 4).

    A patch is centred on a pixel and clipped at the border; for an even size the centre is the pixel above and left of
    its middle. The blocks are named after what they are, such as "3x3 patch, channel 0, row 4, column 7", in the order
    of sizes, channels, rows and columns.

    Attributes:
        size: k, or several, which share the Jacobian.
        per_channel: Whether each colour channel has patches of its own; else one patch covers all channels.
        stride: Pixels from one centre to the next, along rows and columns.
    """

    size: int | Sequence[int] = 3
    per_channel: bool = True
    stride: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes and strides below 1."""
        if not self.sizes or any(
            isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1 for k in self.sizes
        ):
            raise ValueError(f"size must be a whole number >= 1 or several of them, got {self.size!r}.")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"size must list each size once, got {self.size!r}.")
        if isinstance(self.stride, bool) or not isinstance(self.stride, int | np.integer) or self.stride < 1:
            raise ValueError(f"stride must be a whole number >= 1, got {self.stride!r}.")

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes."""
        return tuple(self.size) if isinstance(self.size, Sequence) else (self.size,)

    def blocks(self, shape: Sequence[int]) -> dict[str, int]:
        """Names and numbers of entries of all patches of an image ``(C, H, W)``.

        Raises:
            ValueError: If the shape is not that of an image.
        """
        if len(shape) != 3:
            raise ValueError(
                f"Patches need images x of shape (N, C, H, W), got {len(shape) + 1} dimensions. Use x[:, None] for "
                "images without a channel dimension."
            )
        channels, *sides = shape
        named = [f"channel {c}" for c in range(channels)] if self.per_channel else ["all channels"]
        depth = 1 if self.per_channel else channels
        result = {}
        for k in self.sizes:
            rows, columns = (_covered(k, side, self.stride) for side in sides)
            for channel, (r, tall), (c, wide) in itertools.product(named, rows.items(), columns.items()):
                result[f"{k}x{k} patch, {channel}, row {r}, column {c}"] = depth * tall * wide
        return result

    def grams(self, jacobian: Tensor) -> Tensor:
        """Gram of each patch, ``(N, B, m, m)`` float64, by box filters, from the rows' Jacobian ``(N, m, C, H, W)``."""
        classes = jacobian.shape[1]
        upper = torch.triu_indices(classes, classes, device=jacobian.device)
        full = jacobian.new_zeros(classes, classes, dtype=torch.int64)
        full[upper[0], upper[1]] = full[upper[1], upper[0]] = torch.arange(upper.shape[1], device=jacobian.device)
        blocks = []
        for example in jacobian:
            # A pair of classes is an image, and a patch of it a sum: never a difference, which would lose digits.
            wide = example.double()
            pairs = wide[upper[0]] * wide[upper[1]]
            if not self.per_channel:
                pairs = pairs.sum(dim=1, keepdim=True)
            sums = torch.cat([_box(pairs, k, self.stride).flatten(1) for k in self.sizes], dim=1)
            blocks.append(sums.T[:, full])
        return torch.stack(blocks)


def _covered(size: int, side: int, stride: int) -> dict[int, int]:
    """How many pixels the patch of each centre along a side covers."""
    return {c: min(side, c + size // 2 + 1) - max(0, c - (size - 1) // 2) for c in range(0, side, stride)}


def _box(images: Tensor, size: int, stride: int) -> Tensor:
    """Sums over clipped windows, rows first, then columns: ``(..., H, W)`` to ``(..., rows, columns)``."""
    border = ((size - 1) // 2, size // 2)
    images = F.pad(images, (0, 0, *border)).unfold(-2, size, stride).sum(dim=-1)
    return F.pad(images, border).unfold(-1, size, stride).sum(dim=-1)


class InputGrams:
    """Contrast Grams of the input, or of its patches, chunk by chunk."""

    # Parameters that must require a gradient.
    perturbed: Sequence[nn.Parameter] = ()

    def __init__(self, model: nn.Module, patches: Patches | None = None) -> None:
        self._model, self._patches = model, patches
        self._generator = torch.Generator().manual_seed(0)
        # The first example alone, with its logits and their graph, until they have been compared.
        self._first: tuple[Inputs, Tensor] | None = None
        self._bytes: int | None = None

    def bytes_per_example(self, inputs: Inputs, passes: int | None = None) -> int:
        """Memory that an example takes for so many rows, or those that the classes need: graph, Jacobian and Grams.

        Raises:
            ValueError: If the Grams of its patches do not fit.
        """
        if self._bytes is None:
            first = inputs[:1].with_leaf()
            logits = alone(self._model, first)
            self._first = first, logits
            classes, narrow = logits.shape[1] if passes is None else passes, NarrowLayer.of(logits)
            rows = classes if narrow is None or passes is not None else narrow.width
            self._bytes = read_graph(logits, {}).bytes_per_example(passes=1) + 24 * rows * inputs[:1].x.numel()
            if self._patches is not None:
                blocks = len(self._patches.blocks(inputs.x.shape[1:]))
                instead = "influence.patch_influence gives FI without them; a larger stride makes them fewer."
                self._bytes += require_room(blocks, classes, inputs.device, instead)
        return self._bytes

    def __call__(
        self, inputs: Inputs, rows: Callable[[Tensor], LogitRows] = Classes.of
    ) -> tuple[Tensor, Tensor, torch.dtype]:
        """Compute a chunk of examples; arguments and result as of ``ParameterGrams``."""
        if self._patches is not None:
            chosen, jacobian, dtype = self.jacobian(inputs, rows)
            return chosen.log_probs, chosen.embed(self._patches.grams(jacobian)), dtype
        chosen, narrow, jacobian, dtype = self._few_rows(inputs, rows)
        gram = products(jacobian.reshape(*jacobian.shape[:2], -1))
        gram = gram if narrow is None else narrow.spread(gram)
        return chosen.log_probs, chosen.embed(gram[:, None]), dtype

    def jacobian(self, inputs: Inputs, rows: Callable[[Tensor], Rows]) -> tuple[Rows, Tensor, torch.dtype]:
        """The m combinations that ``rows`` chooses, their Jacobian ``(N, m, ...)`` and the coarsest dtype."""
        chosen, narrow, jacobian, dtype = self._few_rows(inputs, rows)
        if narrow is not None:
            contrasts = narrow.contrasts.to(jacobian.dtype)
            flat = jacobian.reshape(*jacobian.shape[:2], -1)
            jacobian = (contrasts @ flat).reshape(*contrasts.shape[:-1], *jacobian.shape[2:])
        return chosen, jacobian, dtype

    def _few_rows(
        self, inputs: Inputs, rows: Callable[[Tensor], Rows]
    ) -> tuple[Rows, NarrowLayer | None, Tensor, torch.dtype]:
        """Jacobian ``(N, m, ...)`` of the rows, or of the features before a narrow last layer for the contrasts."""
        self.bytes_per_example(inputs)
        inputs = inputs.with_leaf()
        logits = forward(self._model, inputs)
        dtype, chosen = read_graph(logits, {}).coarsest_dtype(), rows(logits)
        narrow = NarrowLayer.of(logits, chosen)
        if self._first is not None:
            first, single = self._first
            require_same(self._model, first, single.detach(), logits[:1].detach(), dtype)
        require_independent(self._model, inputs, logits.detach(), dtype)
        seeds = chosen.seeds(logits.dtype) if narrow is None else narrow.seeds(len(inputs))
        jacobian = self._with_copies(inputs, logits, chosen, seeds, dtype)
        # Both ends of the first chunk are compared with autograd's, and one example that no gradient reached.
        compared = set() if self._first is None else {0, len(inputs) - 1}
        missed = unreached(jacobian.flatten(1).any(dim=1)[None])
        for n in sorted(compared if missed is None else {*compared, missed}):
            one, logits = self._first if n == 0 and self._first is not None else self._alone(inputs, n)
            # A random sum of the rows.
            rows_of_one = chosen.seeds(torch.float64)[:, n]
            v = random_weights(len(rows_of_one), self._generator).to(jacobian.device)
            seed = v @ rows_of_one
            (grad,) = gradients(logits, [one.x], seed[None].to(logits.dtype))
            weights = v if narrow is None else v @ narrow.contrasts[n]
            ours = torch.tensordot(weights, jacobian[n].double(), dims=1)
            require_same_gradient(one.x[0], seed * logits[0], grad[0], ours, dtype)
        self._first = None
        return chosen, narrow, jacobian, dtype

    def _alone(self, inputs: Inputs, example: int) -> tuple[Inputs, Tensor]:
        one = inputs[example : example + 1].with_leaf()
        return one, forward(self._model, one)

    def _with_copies(
        self, inputs: Inputs, logits: Tensor, chosen: LogitRows, seeds: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The Jacobian of ``_few_rows``, from as many copies of the examples as keep the processor busy."""
        copies = copies_at_once(len(seeds), examples=len(inputs), values=inputs.x.numel())
        if copies > 1:
            try:
                more = inputs.copies(copies).with_leaf()
                return self._jacobian(more, forward(self._model, more), chosen, seeds, dtype)
            except (RuntimeError, MemoryError) as error:
                # A single example may have been refused for its copies, of which it shall not have any: it goes on to
                # be looked at alone.
                if len(inputs) > 1 and not is_out_of_memory(error):
                    raise
        return self._jacobian(inputs, logits, chosen, seeds, dtype)

    def _jacobian(self, inputs: Inputs, logits: Tensor, chosen: LogitRows, seeds: Tensor, dtype: torch.dtype) -> Tensor:
        """Jacobian of N examples, with copies of them in the batch: one or two keep no processor busy.

        They are independent: one backward pass of a sum gives every example its own row, and so does every copy.
        """
        narrow = NarrowLayer.of(logits, chosen)
        output = logits if narrow is None else narrow.edge
        examples = seeds.shape[1]
        copies = len(logits) // examples

        def rows(part: Tensor) -> Tensor:
            """Gradients ``(copies, N, ...)`` of so many seeds."""
            missing = part.new_zeros(copies - len(part), *part.shape[1:])
            (grad,) = gradients(output, [inputs.x], torch.cat([part, missing]).flatten(0, 1))
            return grad.unflatten(0, (copies, examples))[: len(part)]

        jacobian = torch.cat([rows(part) for part in seeds.split(copies)])
        require_finite_gradients([jacobian])
        repeated = seeds.repeat(1, copies, 1)
        weighting = Weighting.draw(repeated, dtype, self._generator)
        mixed = weighting.row(repeated)[0]
        weighted = rows(mixed.unflatten(0, (copies, examples))).flatten(0, 1)
        if weighting.reached(jacobian.repeat(1, copies, *[1] * (jacobian.ndim - 2)), weighted, dim=0) is None:
            # It may be rounding of what is zero: an example whose logits get no gradient must have exactly none.
            for lit in darkness(len(logits)).to(logits.device):
                seed = (mixed * lit[:, None]).unflatten(0, (copies, examples))
                if rows(seed).flatten(0, 1)[~lit].any():
                    refuse_dependent()
            if may_be_linear(dtype):
                doubled = torch.cat([rows(-2 * part) for part in seeds.split(copies)])
                require_doubled(jacobian, doubled, dtype)
        return jacobian.transpose(0, 1)
