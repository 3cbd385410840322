"""Gram of the rows of many Jacobians, <J_k, J_l>, added up in float64 whatever their precision.

What the kernel is for, on an H100 (3.35 TB/s; 67 TFLOP/s on the tensor cores in float64): m rows of p float32 entries.
PyTorch writes a float64 copy and reads it back, 4 + 8 + 8 bytes an entry; the kernel reads 4 and does 2 R FLOPs, R the
rows padded to 16, 32 or 64. All weights of a ResNet50 (m = 9, p = 23.5 M) are 4.2 GB, 1.3 ms, an example against
0.85 GB, 0.25 ms (0.18 ms of multiplying); the ten passes, 29 GFLOP, take 0.43 ms in float32. At R = 64 multiplying
takes longer than reading (120 against 75 ps a column, PyTorch 380); with more rows the library's product is as good.
"""
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor

from influence.kernels.backend import HAS_TRITON, takes_triton

# Entries of a float64 copy made at once on the way through PyTorch.
_PIECE = 2**23
# Entries of a row that one program takes, and at once. Fixed, so that sums have one order whatever N and the device.
SPAN, BLOCK = 4096, 64
# Warps of a program by its rows.
WARPS = {16: 4, 32: 4, 64: 8}


def products(rows: Tensor) -> Tensor:
    """Gram of the rows of each Jacobian ``(N, m, p)``, ``(N, m, m)`` float64 whatever their precision."""
    examples, classes, width = rows.shape
    if rows.dtype == torch.float32 and 0 < classes <= max(WARPS) and examples * width > 0:
        kind = (_padded(classes), width.bit_length(), (examples * width).bit_length())
        if takes_triton(kind, gram_triton, gram_torch, rows):
            return gram_triton(rows)
    return gram_torch(rows)


def gram_torch(rows: Tensor) -> Tensor:
    """The reference: a float64 copy, in pieces, and its products."""
    examples, classes, width = rows.shape
    gram = rows.new_zeros(examples, classes, classes, dtype=torch.float64)
    step = max(1, _PIECE // max(1, classes * width))
    for start in range(0, examples, step):
        wide = rows[start : start + step].double()
        gram[start : start + step] = wide @ wide.mT
    return gram


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def gram_kernel(
        rows, out, classes, width, stride_n, stride_m, splits, span, ROWS: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One program: one example and one span of its entries; offsets are int64, as N m p may pass 2^31."""
        program = tl.program_id(0).to(tl.int64)
        n, split = program // splits, program % splits
        k = tl.arange(0, ROWS).to(tl.int64)[:, None]
        row = rows + n * stride_n + k * stride_m
        first = split * span
        last = tl.minimum(first + span, width)
        gram = tl.zeros((ROWS, ROWS), dtype=tl.float64)
        for start in range(0, span, BLOCK):
            entry = first + start + tl.arange(0, BLOCK).to(tl.int64)[None, :]
            tile = tl.load(row + entry, mask=(k < classes) & (entry < last), other=0.0).to(tl.float64)
            gram = tl.dot(tile, tl.trans(tile), gram, input_precision="ieee", out_dtype=tl.float64)
        i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
        tl.store(out + program * ROWS * ROWS + i * ROWS + j, gram)


def gram_triton(rows: Tensor) -> Tensor:
    """The same in one kernel: float32 is read once, and only sums over spans of entries leave it."""
    examples, classes, width = rows.shape
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    padded, splits, span = _padded(classes), -(-width // SPAN), min(SPAN, width)
    out = torch.empty(examples, splits, padded, padded, dtype=torch.float64, device=rows.device)
    sizes = (classes, width, *rows.stride()[:2], splits, span)
    gram_kernel[(examples * splits,)](rows, out, *sizes, ROWS=padded, BLOCK=BLOCK, num_warps=WARPS[padded])
    return out.sum(dim=1)[:, :classes, :classes]


def _padded(classes: int) -> int:
    return next(rows for rows in WARPS if classes <= rows)
