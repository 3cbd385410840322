"""ReLU mask, BatchNorm scale and the sum at a residual connection, for the gradients of all classes in one pass.

Going back through ``relu(norm(z) + identity)`` the gradient ``(m, N, C, H, W)`` of the output is a sum of two where
the next block branches, is masked by the ReLU, goes on as it is to ``identity`` (and to the Gram of the norm's shift),
and times the scale of the norm to z.

What the kernel is for, on an H100 (3.35 TB/s; the arithmetic is nothing): with E entries a class PyTorch moves 3 E m
for the sum, 3 E m for the mask (the ReLU's output is read again for each class) and 2 E m for the scale, each 4 bytes;
the kernel moves 4 E m + E, half of it. A ResNet50 at 32x32 has E = 2.7 M at its ReLUs: with m = 9 about 0.6 GB (no sum
at two of three), 0.2 ms, an example against 0.3 GB, 0.1 ms, beside 0.43 ms for the ten passes at full speed in float32;
in TF32, where the products take less, it weighs more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from influence.kernels.backend import HAS_TRITON, takes_triton

BLOCK, WARPS = 1024, 4


def relu_norm_backward(
    grad: Tensor, result: Tensor, scale: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Back through a ReLU and the evaluation-mode BatchNorm before it.

    .. math:: g = (grad + residual) [result > 0], \qquad g' = scale_c \, g

    Args:
        grad: ``(m, N, C, ...)`` gradient of the ReLU's output for m classes.
        result: ``(N, C, ...)`` the ReLU's output.
        scale: ``(C,)`` weight / sqrt(running_var + eps) of the BatchNorm.
        residual: A second gradient of the ReLU's output, as ``grad``. None: there is none.

    Returns:
        g, the gradient of the BatchNorm's output and of what was added to it, and g', that of its input; both as
        ``grad``.

    Raises:
        ValueError: For shapes, dtypes or devices that do not fit.
    """
    fits = grad.ndim >= 3 and grad.shape[1:] == result.shape and scale.shape == result.shape[1:2]
    if not fits or (residual is not None and residual.shape != grad.shape):
        found = [t if t is None else tuple(t.shape) for t in (grad, result, scale, residual)]
        raise ValueError(
            f"grad, result, scale, residual must be (m, N, C, ...), (N, C, ...), (C,), (m, N, C, ...), got {found}."
        )
    given = [grad, result, scale] if residual is None else [grad, result, scale, residual]
    if len({(t.dtype, t.device) for t in given}) > 1:
        kinds = [f"{t.dtype} on {t.device}" for t in given]
        raise ValueError(f"all tensors must have one dtype and lie on one device, got {kinds}.")
    if grad.numel() and grad.dtype in (torch.float32, torch.float64):
        kind = (grad.dtype, residual is None, grad.shape[0].bit_length(), grad.numel().bit_length())
        arguments = (grad, result, scale, residual)
        if takes_triton(
            "relu_norm_backward",
            kind,
            grad.device,
            triton=lambda: relu_norm_backward_triton(*arguments),
            torch=lambda: relu_norm_backward_torch(*arguments),
        ):
            return relu_norm_backward_triton(*arguments)
    return relu_norm_backward_torch(grad, result, scale, residual)


def relu_norm_backward_torch(
    grad: Tensor, result: Tensor, scale: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The reference, operation by operation."""
    total = grad if residual is None else grad + residual
    masked = torch.ops.aten.threshold_backward(total, result.expand_as(total), 0)
    return masked, masked * scale.view(-1, *(1,) * (result.ndim - 2))


if TYPE_CHECKING or not HAS_TRITON:
    relu_norm_kernel: Any = None
else:
    import triton
    import triton.language as tl

    @triton.jit
    def relu_norm_kernel(
        grad,
        residual,
        result,
        scale,
        masked,
        scaled,
        classes,
        entries,
        inner,
        channels,
        RESIDUAL: tl.constexpr,  # noqa: N803
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        """One program: some entries of all classes, so that mask and scale are read once; offsets are int64."""
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < entries
        shut = tl.load(result + place, mask=inside, other=0.0) <= 0
        factor = tl.load(scale + (place // inner) % channels, mask=inside, other=0.0)
        for _ in range(classes):
            total = tl.load(grad + place, mask=inside, other=0.0)
            if RESIDUAL:
                total += tl.load(residual + place, mask=inside, other=0.0)
            total = tl.where(shut, 0.0, total)
            tl.store(masked + place, total, mask=inside)
            tl.store(scaled + place, total * factor, mask=inside)
            place += entries


def relu_norm_backward_triton(
    grad: Tensor, result: Tensor, scale: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same in one pass; contiguous and channels-last memory as they are, any other is copied."""
    last = result.ndim == 4 and result.is_contiguous(memory_format=torch.channels_last) and not result.is_contiguous()
    order = torch.channels_last if last else torch.contiguous_format
    flat = [None if t is None else t.flatten(0, 1).contiguous(memory_format=order) for t in (grad, residual)]
    assert flat[0] is not None
    result = result.contiguous(memory_format=order)
    masked, scaled = torch.empty_like(flat[0]), torch.empty_like(flat[0])
    inner = 1 if last else result[0, 0].numel()
    grid = (-(-result.numel() // BLOCK),)
    relu_norm_kernel[grid](
        flat[0],
        flat[0] if flat[1] is None else flat[1],
        result,
        scale.contiguous(),
        masked,
        scaled,
        grad.shape[0],
        result.numel(),
        inner,
        result.shape[1],
        RESIDUAL=residual is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return masked.unflatten(0, grad.shape[:2]), scaled.unflatten(0, grad.shape[:2])
