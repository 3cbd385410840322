"""The windows that a convolution looks at, without copies until a product needs them, and their Gram from pixels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def patches(
    x: Tensor,
    kernel: Sequence[int],
    *,
    out: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """What a convolution multiplies its weight with.

    Args:
        x: ``(N, C, *places)``, any number of dimensions.
        kernel: Size of the window.
        out: Positions of the window along each dimension.
        stride: Between them.
        padding: Zeros before and after.
        dilation: Between the entries of a window.

    Returns:
        ``(N, C * prod(kernel), T)`` with T the product of ``out``; a view of ``x`` for windows of one entry.
    """
    if all(size == 1 for size in kernel) and not any(padding):
        index = tuple(slice(0, (o - 1) * s + 1, s) for o, s in zip(out, stride, strict=True))
        return x[(slice(None), slice(None), *index)].flatten(2)
    x = _pad(x, padding)
    steps, places = x.stride(), x.stride()[2:]
    size = (*x.shape[:2], *kernel, *out)
    inside = [place * d for place, d in zip(places, dilation, strict=True)]
    across = [place * s for place, s in zip(places, stride, strict=True)]
    view = x.as_strided(size, (*steps[:2], *inside, *across), x.storage_offset())
    return view.reshape(x.shape[0], x.shape[1] * math.prod(kernel), math.prod(out))


def _pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    if not any(padding):
        return x
    return F.pad(x, [p for size in reversed(padding) for p in (size, size)])


def pixel_gram(
    x: Tensor,
    kernel: Sequence[int],
    *,
    out: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[float, Callable[[], Tensor]]:
    """Gram of the windows, S[t, t'] = sum over the window of <x[t + shift], x[t' + shift]>, from that of the pixels.

    Args:
        x: ``(N, C, *places)``.
        kernel: Size of the window.
        out: Positions along each dimension.
        stride: Between them.
        padding: Zeros before and after.
        dilation: Between the entries of a window.

    Returns:
        Multiplications and additions it takes, and what makes it: ``(N, T, T)`` float64.
    """
    padded = [size + 2 * p for size, p in zip(x.shape[2:], padding, strict=True)]
    cost = float(math.prod(x.shape[2:])) ** 2 * x.shape[1] + math.prod(kernel) * float(math.prod(out)) ** 2

    def make() -> Tensor:
        # Padding is zero in the Gram as well.
        flat = x.flatten(2).double()
        gram = (flat.mT @ flat).view(-1, *x.shape[2:], *x.shape[2:])
        gram = _pad(gram, (*padding, *padding))
        assert list(gram.shape[1:]) == [*padded, *padded]
        total = torch.zeros((), dtype=gram.dtype, device=gram.device)
        for shift in itertools.product(*(range(k) for k in kernel)):
            index = [
                slice(a * d, a * d + (o - 1) * s + 1, s)
                for a, d, o, s in zip(shift, dilation, out, stride, strict=True)
            ]
            total = total + gram[(slice(None), *index, *index)]
        return total.reshape(x.shape[0], math.prod(out), math.prod(out))

    return cost, make
