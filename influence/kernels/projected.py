"""Gram of projected gradients, <Y_k, Y_l> with Y_k = g_k B, without writing any Y_k.

Both ways of a weight's Gram have this form: *materialise* with B = A^T (T x D), the input of the layer, so that Y_k is
the gradient W_k of the weight; the *shared ghost* with B a root of S = A A^T (T x T).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from influence.kernels.backend import HAS_TRITON, takes_triton
from influence.kernels.tolerances import KERNEL

# Entries of a float64 copy made at once.
_PIECE = 2**23
# The same where one buffer serves all: it stays in the cache.
_TILE = 2**20
# A sum over many entries goes to so many sums side by side, which use all cores.
_SEGMENTS = 4
_MOST_CLASSES = 16
# Multiplications for one class from which on a call of its own costs nothing.
_LARGE = 2**18


def projected_gram(grads: Tensor, shared: Tensor) -> Tensor:
    """Gram of g_k B.

    Args:
        grads: g, ``(N, m, P, T)``.
        shared: B, ``(N, T, J)``.

    Returns:
        ``(N, m, m)`` float64: products of single precision are added up in double.
    """
    # rows x rows x 16 products stand in registers: more classes than this do not fit there.
    small = grads.shape[1] <= _MOST_CLASSES and grads.dtype == torch.float32
    if small and takes_triton("projected_gram", grads.device, _check):
        return projected_gram_triton(grads, shared)
    return projected_gram_torch(grads, shared)


def projected_gram_torch(grads: Tensor, shared: Tensor) -> Tensor:
    """The reference: Y in pieces."""
    examples, classes, outputs, positions = grads.shape
    width = shared.shape[2]
    gram = grads.new_zeros(examples, classes, classes, dtype=torch.float64)
    if grads.device.type == "cpu" and outputs * positions * width >= _LARGE:
        for n in range(examples):
            _one_by_one(grads[n], shared[n], gram[n])
        return gram
    # Never more than a piece of all Y_k at once.
    tile = max(1, min(outputs, _PIECE // max(1, classes * width)))
    step = max(1, _PIECE // max(1, classes * width * tile))
    for start in range(0, examples, step):
        chunk = slice(start, start + step)
        right = shared[chunk]
        for first in range(0, outputs, tile):
            part = grads[chunk, :, first : first + tile]
            rows = part.reshape(len(part), -1, positions) @ right
            gram[chunk] += products(rows.reshape(len(part), classes, -1))
    return gram


def _one_by_one(grads: Tensor, shared: Tensor, gram: Tensor) -> None:
    """Add the Gram of one example, ``(m, P, T)`` and ``(T, J)``, to ``(m, m)``: in tiles that share their memory."""
    classes, outputs, positions = grads.shape
    width = shared.shape[1]
    tile = max(1, min(outputs, _TILE // max(1, classes * width)))
    rows = grads.new_empty(classes * tile * width)
    wide = grads.new_empty(classes * tile * width, dtype=torch.float64)
    # One product for all classes is faster, where a copy that lets them lie together is small beside it.
    together = width >= 4 * outputs
    for first in range(0, outputs, tile):
        part = grads[:, first : first + tile]
        entries = part.shape[:2].numel() * width
        made = rows[:entries].view(*part.shape[:2], width)
        if together:
            torch.mm(part.reshape(-1, positions), shared, out=made.view(-1, width))
        else:
            torch.bmm(part, shared.expand(classes, positions, width), out=made)
        copied = wide[:entries].view(classes, -1).copy_(made.flatten(1))
        gram += _sum_of_products(copied)


def _sum_of_products(wide: Tensor) -> Tensor:
    """Gram of the rows of a float64 matrix ``(m, p)``."""
    if wide.shape[1] % _SEGMENTS:
        return wide @ wide.T
    segments = wide.unflatten(1, (_SEGMENTS, -1)).transpose(0, 1)
    return torch.bmm(segments, segments.mT).sum(dim=0)


def products(rows: Tensor) -> Tensor:
    """Gram of the rows of each Jacobian ``(N, m, p)`` in float64 whatever its precision, ``(N, m, m)``."""
    examples, classes, width = rows.shape
    gram = rows.new_zeros(examples, classes, classes, dtype=torch.float64)
    step = max(1, _PIECE // max(1, classes * width))
    for start in range(0, examples, step):
        chunk = slice(start, start + step)
        wide = rows[chunk].double()
        gram[chunk] = wide @ wide.mT
    return gram


if TYPE_CHECKING or not HAS_TRITON:
    _kernel: Any = None
else:
    import triton
    import triton.language as tl

    @triton.jit
    def _kernel(
        grads,
        shared,
        out,
        classes,
        outputs,
        positions,
        width,
        stride_n,
        stride_m,
        stride_p,
        stride_t,
        blocks,
        ROWS: tl.constexpr,  # noqa: N803
        T_TILE: tl.constexpr,  # noqa: N803
        J_TILE: tl.constexpr,  # noqa: N803
        P_BLOCK: tl.constexpr,  # noqa: N803
    ):
        # One program: one example and a few outputs; g is read once for all classes, only m x m numbers go out.
        n = tl.program_id(0).to(tl.int64)
        block = tl.program_id(1)
        k = tl.arange(0, ROWS)
        gram = tl.zeros((ROWS, ROWS), dtype=tl.float64)
        for i in range(P_BLOCK):
            p = block * P_BLOCK + i
            live = p < outputs
            for j0 in range(0, width, J_TILE):
                j = j0 + tl.arange(0, J_TILE)
                rows = tl.zeros((ROWS, J_TILE), dtype=tl.float32)
                for t0 in range(0, positions, T_TILE):
                    t = t0 + tl.arange(0, T_TILE)
                    g = tl.load(
                        grads + n * stride_n + k[:, None] * stride_m + p * stride_p + t[None, :] * stride_t,
                        mask=live & (k[:, None] < classes) & (t[None, :] < positions),
                        other=0.0,
                    )
                    b = tl.load(
                        shared + n * positions * width + t[:, None] * width + j[None, :],
                        mask=(t[:, None] < positions) & (j[None, :] < width),
                        other=0.0,
                    )
                    rows += tl.dot(g, b, input_precision="ieee")
                wide = rows.to(tl.float64)
                gram += tl.sum(wide[:, None, :] * wide[None, :, :], axis=2)
        place = out + (n * blocks + block) * ROWS * ROWS
        tl.store(place + k[:, None] * ROWS + k[None, :], gram)


def projected_gram_triton(grads: Tensor, shared: Tensor) -> Tensor:
    """The same in one kernel: a tile of Y for all classes lives in registers, and only its products leave.

    The outputs are cut into blocks whose sums are added up afterwards, in a fixed order.
    """
    import triton

    examples, classes, outputs, positions = grads.shape
    shared = shared.to(grads.dtype).contiguous()
    rows = max(16, triton.next_power_of_2(classes))
    per_block = max(1, outputs // 64)
    blocks = triton.cdiv(outputs, per_block)
    out = torch.empty(examples, blocks, rows, rows, dtype=torch.float64, device=grads.device)
    _kernel[(examples, blocks)](
        grads,
        shared,
        out,
        classes,
        outputs,
        positions,
        shared.shape[2],
        *grads.stride(),
        blocks,
        ROWS=rows,
        T_TILE=32,
        J_TILE=16,
        P_BLOCK=per_block,
    )
    return out.sum(dim=1)[:, :classes, :classes]


def _check(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(3, 9, 5, 33, generator=generator).to(device)
    shared = torch.randn(3, 33, 20, generator=generator).to(device)
    ours, reference = projected_gram_triton(grads, shared), projected_gram_torch(grads, shared)
    tolerance = KERNEL[(torch.float32, device.type)]
    return bool((ours - reference).abs().max() <= tolerance * reference.abs().max())
