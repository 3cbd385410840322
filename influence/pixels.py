"""Perturbations of the input: all of it, or each k x k patch of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence.contrasts import Classes, LogitRows
from influence.grams.graph import read_graph
from influence.independence import Weighting, alone, darkness, gradients, refuse_dependent, require_same
from influence.inputs import Inputs, forward
from influence.kernels.gram import products
from influence.last_layer import NarrowLayer
from influence.memory import copies_at_once, free_bytes, is_out_of_memory

Rows = TypeVar("Rows", bound=LogitRows)


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
        if not self.sizes or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in self.sizes):
            raise ValueError(f"size must be a whole number >= 1 or several of them, got {self.size!r}.")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"size must list each size once, got {self.size!r}.")
        if isinstance(self.stride, bool) or not isinstance(self.stride, int) or self.stride < 1:
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
        channels, height, width = shape
        named = [f"channel {c}" for c in range(channels)] if self.per_channel else ["all channels"]
        depth = 1 if self.per_channel else channels
        result = {}
        for k in self.sizes:
            rows, columns = (_covered(k, side, self.stride) for side in (height, width))
            result.update(
                {
                    f"{k}x{k} patch, {channel}, row {r}, column {c}": depth * tall * wide
                    for channel in named
                    for r, tall in rows
                    for c, wide in columns
                }
            )
        return result

    def count(self, shape: Sequence[int]) -> int:
        """How many patches an image ``(C, H, W)`` has: the length of ``blocks``, without the names."""
        channels, height, width = shape
        centres = len(range(0, height, self.stride)) * len(range(0, width, self.stride))
        return len(self.sizes) * (channels if self.per_channel else 1) * centres

    def grams(self, jacobian: Tensor) -> Tensor:
        """Gram of each patch by box filters over the pixels' own Grams.

        Args:
            jacobian: ``(N, m, C, H, W)`` rows of the contrasts.

        Returns:
            ``(N, B, m, m)`` float64.
        """
        examples, classes = jacobian.shape[:2]
        upper = torch.triu_indices(classes, classes, device=jacobian.device)
        full = jacobian.new_zeros(classes, classes, dtype=torch.int64)
        full[upper[0], upper[1]] = torch.arange(upper.shape[1], device=jacobian.device)
        full = torch.maximum(full, full.T)
        blocks = []
        for example in jacobian:
            # A pair of classes is an image, and a patch of it a sum: never a difference, which would lose digits.
            wide = example.double()
            pairs = wide[upper[0]] * wide[upper[1]]
            if not self.per_channel:
                pairs = pairs.sum(dim=1, keepdim=True)
            sums = torch.cat([_box(pairs, k, self.stride).flatten(1) for k in self.sizes], dim=1)
            blocks.append(sums.T[:, full])
        return torch.stack(blocks).view(examples, -1, classes, classes)

    def entries(self, shape: Sequence[int], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """For each size the flat places in an image ``(C, H, W)`` of its patches' entries, and which lie inside.

        Returns:
            ``(B, p)`` int64 and ``(B, p)`` bool for each size; the blocks are in the order of ``blocks``.
        """
        channels, height, width = shape
        found = []
        for k in self.sizes:
            rows, row_inside = _window(k, height, self.stride, device)
            columns, column_inside = _window(k, width, self.stride, device)
            flat = rows[:, None, :, None] * width + columns[None, :, None, :]
            inside = row_inside[:, None, :, None] & column_inside[None, :, None, :]
            first = torch.arange(channels, device=device) * (height * width)
            if self.per_channel:
                places = (first[:, None, None, None] + flat.flatten(2)[None]).flatten(0, 2)
                within = inside.flatten(2)[None].expand(channels, -1, -1, -1).flatten(0, 2)
            else:
                places = (first[:, None] + flat.flatten(2)[:, :, None]).flatten(0, 1).flatten(1)
                within = inside.flatten(2)[:, :, None].expand(-1, -1, channels, -1).flatten(0, 1).flatten(1)
            found.append((places, within))
        return found


def _window(size: int, side: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places along a side that each window covers, kept inside, and which of them are; both ``(centres, size)``."""
    centres = torch.arange(0, side, stride, device=device)
    places = centres[:, None] + torch.arange(-((size - 1) // 2), size // 2 + 1, device=device)
    return places.clamp(0, side - 1), (places >= 0) & (places < side)


def _covered(size: int, side: int, stride: int) -> list[tuple[int, int]]:
    """Centres along a side, each with the pixels that its patch covers."""
    before, after = (size - 1) // 2, size // 2
    return [(c, min(side, c + after + 1) - max(0, c - before)) for c in range(0, side, stride)]


def _box(images: Tensor, size: int, stride: int) -> Tensor:
    """Sums over clipped windows, rows first, then columns: ``(..., H, W)`` to ``(..., rows, columns)``."""
    for axis in (-2, -1):
        side = images.shape[axis]
        before, after = (size - 1) // 2, size // 2
        padding = (before, after) if axis == -1 else (0, 0, before, after)
        padded = F.pad(images, padding)
        index = torch.arange(0, side, stride, device=images.device)
        images = padded.index_select(axis, index)
        for shift in range(1, size):
            images += padded.index_select(axis, index + shift)
    return images


class InputGrams:
    """Contrast Grams of the input, or of its patches, chunk by chunk.

    Args:
        model: The model.
        patches: None for all of the input.
    """

    # Parameters that must require a gradient.
    perturbed: Sequence[nn.Parameter] = ()

    def __init__(self, model: nn.Module, patches: Patches | None = None) -> None:
        self._model, self._patches = model, patches
        self._generator = torch.Generator().manual_seed(0)
        # The first example alone, with its logits, until they have been compared.
        self._first: tuple[Inputs, Tensor] | None = None
        self._bytes: int | None = None

    def bytes_per_example(self, inputs: Inputs, passes: int | None = None) -> int:
        """Memory that an example takes for so many rows: its graph, its Jacobian and, of patches, the Grams.

        Args:
            inputs: The examples.
            passes: How many rows; None: those that the classes need.

        Raises:
            ValueError: If the Grams of its patches do not fit.
        """
        if self._bytes is None:
            logits = alone(self._model, inputs[:1].with_leaf())
            narrow, values = NarrowLayer.of(logits), inputs[:1].x.numel()
            classes = logits.shape[1] if passes is None else passes
            rows = classes if narrow is None or passes is not None else narrow.width
            self._bytes = 2 * read_graph(logits, {}).bytes_per_example(passes=1) + 24 * rows * values
            if self._patches is not None:
                self._bytes += _bytes_of_grams(self._patches, inputs.x, classes=classes)
            self._first = inputs[:1], logits.detach()
        return self._bytes

    def __call__(
        self, inputs: Inputs, rows: Callable[[Tensor], LogitRows] = Classes.of
    ) -> tuple[Tensor, Tensor, torch.dtype]:
        """Compute a chunk.

        Args:
            inputs: N examples.
            rows: As for ``ParameterGrams``.

        Returns:
            log P ``(N, K)``, the contrast Grams ``(N, B, K, K)``, or ``(N, B, m, m)`` for other rows, and the coarsest
            dtype that occurred.
        """
        chosen, narrow, jacobian, dtype = self._few_rows(inputs, rows)
        if self._patches is not None:
            gram = self._patches.grams(_spread(jacobian, narrow, chosen))
        else:
            gram = products(jacobian.flatten(2))
            if narrow is not None and isinstance(chosen, Classes):
                gram = narrow.spread(gram, narrow.contrasts(chosen))
            gram = gram[:, None]
        return chosen.log_probs, chosen.embed(gram), dtype

    def jacobian(self, inputs: Inputs, rows: Callable[[Tensor], Rows]) -> tuple[Rows, Tensor, torch.dtype]:
        """Jacobian of combinations of the logits.

        Args:
            inputs: N examples.
            rows: Chooses m combinations from the logits, such as ``Classes.of``.

        Returns:
            The combinations, their Jacobian ``(N, m, ...)``, and the coarsest dtype that occurred.
        """
        chosen, narrow, jacobian, dtype = self._few_rows(inputs, rows)
        return chosen, _spread(jacobian, narrow, chosen), dtype

    def _few_rows(
        self, inputs: Inputs, rows: Callable[[Tensor], Rows]
    ) -> tuple[Rows, NarrowLayer | None, Tensor, torch.dtype]:
        """Jacobian ``(N, m, ...)`` of the rows, or of the features before a narrow last layer for the contrasts."""
        self.bytes_per_example(inputs)
        inputs = inputs.with_leaf()
        logits = forward(self._model, inputs)
        dtype, chosen = read_graph(logits, {}).coarsest_dtype(), rows(logits)
        narrow = NarrowLayer.of(logits) if isinstance(chosen, Classes) else None
        if self._first is not None:
            require_same(self._model, *self._first, logits[:1].detach(), dtype)
            self._first = None
        count = chosen.count if narrow is None else narrow.width
        copies = copies_at_once(count, examples=len(inputs), values=inputs.x.numel())
        jacobian = None
        if copies > 1:
            try:
                more = inputs.copies(copies).with_leaf()
                jacobian = self._jacobian(more, forward(self._model, more), chosen, copies, dtype)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
        if jacobian is None:
            jacobian = self._jacobian(inputs, logits, chosen, 1, dtype)
        return chosen, narrow, jacobian, dtype

    def _jacobian(self, inputs: Inputs, logits: Tensor, chosen: LogitRows, copies: int, dtype: torch.dtype) -> Tensor:
        """Jacobian of N examples, with some copies of them in the batch.

        Examples are independent: one backward pass of a sum gives every example its own row, and with copies so many
        rows. A batch of one or two keeps no processor busy.
        """
        narrow = NarrowLayer.of(logits) if isinstance(chosen, Classes) else None
        examples = len(logits) // copies
        seeds = chosen.seeds(logits.dtype) if narrow is None else narrow.seeds(examples)
        parts = list(seeds.split(copies))

        def rows(part: Tensor, *, last: bool = False) -> Tensor:
            """Gradients ``(copies, N, ...)`` of so many seeds."""
            if len(part) < copies:
                part = torch.cat([part, part.new_zeros(copies - len(part), *part.shape[1:])])
            output = logits if narrow is None else narrow.edge
            (grad,) = gradients(output, [inputs.x], part.flatten(0, 1), retain=not last)
            return grad.unflatten(0, (copies, examples))

        if len(logits) == 1:
            return torch.cat([rows(part, last=i == len(parts) - 1) for i, part in enumerate(parts)]).transpose(0, 1)
        repeated = seeds.repeat(1, copies, 1)
        weighting = Weighting.draw(repeated, dtype, self._generator)
        weighted = rows(weighting.row(repeated).unflatten(1, (copies, examples))[0]).flatten(0, 1)
        jacobian = torch.cat([rows(part)[: len(part)] for part in parts])
        if not weighting.holds(jacobian.repeat(1, copies, *[1] * (jacobian.ndim - 2)), weighted, outer=1):
            # It may be rounding of what is zero: an example whose logits get no gradient must have exactly none.
            for lit in darkness(len(logits)).to(logits.device):
                seed = weighting.row(repeated)[0] * lit[:, None]
                if rows(seed.unflatten(0, (copies, examples))).flatten(0, 1)[~lit].any():
                    refuse_dependent()
        return jacobian.transpose(0, 1)


def _bytes_of_grams(patches: Patches, x: Tensor, *, classes: int) -> int:
    """Memory for the Grams of an example's patches, which are made, put at their classes and kept.

    Raises:
        ValueError: If it is more than is free.
    """
    blocks = patches.count(x.shape[1:])
    needed, free = 3 * 8 * blocks * classes**2, free_bytes(x.device)
    if needed > free:
        raise ValueError(
            f"the Grams of {blocks:,} patches with K = {classes:,} classes need {needed / 2**30:,.0f} GiB for an "
            f"example, {free / 2**30:,.0f} are free. influence.patch_influence gives FI without them; a larger stride "
            "makes them fewer."
        )
    return needed


def _spread(jacobian: Tensor, narrow: NarrowLayer | None, chosen: LogitRows) -> Tensor:
    """Jacobian of the rows."""
    if narrow is None or not isinstance(chosen, Classes):
        return jacobian
    contrasts = narrow.contrasts(chosen).to(jacobian.dtype)
    return (contrasts @ jacobian.flatten(2)).unflatten(2, jacobian.shape[2:])
