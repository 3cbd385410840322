"""ReLU mask and BatchNorm scale for the gradients of all classes in one pass.

What the kernel is for, on an H100 (3.35 TB/s; the arithmetic is nothing): with E entries a class PyTorch moves 3 E m
for the mask (it reads the ReLU's output again for each class) and 2 E m for the scale, each 4 bytes; the kernel moves
3 E m + E. A ResNet50 at 32x32 has E = 2.7 M at its ReLUs: with m = 9 about 0.49 GB, 0.15 ms, an example against
0.30 GB, 0.09 ms, beside 0.43 ms for the ten passes at full speed in float32; in TF32, which multiplies faster, it
weighs more.
"""
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor

from influence.kernels.backend import HAS_TRITON, takes_triton

BLOCK, WARPS = 1024, 4


def fused(grad: Tensor, result: Tensor, scale: Tensor) -> bool:
    """Whether the kernel runs for these arguments; where it does not, two operations in place are as good."""
    if not grad.numel() or grad.dtype not in (torch.float32, torch.float64):
        return False
    kind = (grad.dtype, grad.shape[0].bit_length(), grad.numel().bit_length())
    return takes_triton(kind, relu_norm_backward_triton, relu_norm_backward_torch, grad, result, scale)


def relu_norm_backward_torch(grad: Tensor, result: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    r"""The reference: back through a ReLU and the evaluation-mode BatchNorm before it.

    .. math:: g = grad\,[result > 0], \qquad g' = scale_c \, g

    ``grad`` is the gradient ``(m, N, C, ...)`` of the ReLU's output for m classes, ``result`` this output, ``scale``
    weight / sqrt(running_var + eps) of the BatchNorm, ``(C,)``. Returned are g, the gradient of the BatchNorm's output
    and of what was added to it, and g', that of its input.
    """
    masked = torch.ops.aten.threshold_backward(grad, result.expand_as(grad), 0)
    return masked, masked * scale.view(-1, *(1,) * (result.ndim - 2))


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def relu_norm_kernel(grad, result, scale, masked, scaled, classes, entries, inner, channels, BLOCK: tl.constexpr):
        """One program: some entries of all classes, so that mask and scale are read once; offsets are int64."""
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < entries
        shut = tl.load(result + place, mask=inside, other=0.0) <= 0
        factor = tl.load(scale + (place // inner) % channels, mask=inside, other=0.0)
        for _ in range(classes):
            passed = tl.where(shut, 0.0, tl.load(grad + place, mask=inside, other=0.0))
            tl.store(masked + place, passed, mask=inside)
            tl.store(scaled + place, passed * factor, mask=inside)
            place += entries


def relu_norm_backward_triton(grad: Tensor, result: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same in one pass; contiguous and channels-last memory as they are, any other is copied."""
    last = result.ndim == 4 and result.is_contiguous(memory_format=torch.channels_last) and not result.is_contiguous()
    order = torch.channels_last if last else torch.contiguous_format
    flat, result = grad.flatten(0, 1).contiguous(memory_format=order), result.contiguous(memory_format=order)
    masked, scaled = torch.empty_like(flat), torch.empty_like(flat)
    inner = 1 if last else result[0, 0].numel()
    sizes = (len(grad), result.numel(), inner, result.shape[1])
    grid = (-(-result.numel() // BLOCK),)
    relu_norm_kernel[grid](flat, result, scale.contiguous(), masked, scaled, *sizes, BLOCK=BLOCK, num_warps=WARPS)
    return masked.unflatten(0, grad.shape[:2]), scaled.unflatten(0, grad.shape[:2])
