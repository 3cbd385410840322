"""The objective of stability training (Zheng et al. 2016, arXiv 1604.04326): task loss plus a stability term."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from influence.checks import require_finite, require_labels, require_logits
from influence.kernels import backend as kernels
from influence.kernels.stability_loss import FusedLoss, fused


def stability_loss(
    logits: Tensor,
    logits_perturbed: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.01,
    divergence: Literal["kl", "ce"] = "kl",
    stop_gradient: bool = False,
    backend: Literal["auto", "torch", "triton"] = "auto",
    validate: bool = True,
) -> Tensor:
    r"""Cross-entropy on the clean input plus alpha times the divergence between clean and perturbed output.

    .. math:: L = \frac1N \sum_n \bigl[ -\log p_{y} + \alpha\, D(p(x), p(x')) \bigr], \quad
        D_{kl} = \sum_k p_k \log (p_k / p'_k), \quad D_{ce} = -\sum_k p_k \log p'_k = D_{kl} + H(p)

    (Zheng et al. 2016, section 3). The task loss sees the clean input only. The paper writes the cross-entropy and
    calls it KL; with the gradient flowing through both branches the two differ (the cross-entropy also sharpens the
    clean prediction), with ``stop_gradient`` their gradients are equal. For x' = x + eps, eps ~ N(0, sigma^2 I),
    E D_kl = (sigma^2 / 2) tr G(x) + O(sigma^4), G the metric tensor of an input perturbation.

    Computed in float64 and returned in the logits' dtype (float32 for half precision): of the KL of two close
    distributions, a difference of second order, float32 would keep nothing.

    Args:
        logits: ``(N, K)`` of the clean inputs.
        logits_perturbed: ``(N, K)`` of the perturbed inputs.
        labels: ``(N,)`` integer classes.
        alpha: Weight of the stability term, >= 0; 0 is plain training.
        divergence: ``"kl"`` or ``"ce"``.
        stop_gradient: Treat the clean output as a constant in the stability term.
        backend: ``"triton"`` makes loss and gradients in one kernel (differentiable once), ``"torch"`` leaves them to
            autograd; ``"auto"`` takes the kernel on a GPU where it gives the reference's numbers in less time.
        validate: Look at the values of logits and labels, for which the host waits for a GPU. Without it NaN makes the
            loss NaN, and a label out of range either does too or is PyTorch's own error.

    Returns:
        The mean over the batch, a scalar.

    Raises:
        TypeError: For logits that are not floating or labels that are not integers.
        ValueError: For shapes that differ, K < 2, non-finite logits, labels out of range, alpha < 0 or not finite,
            or an unknown divergence or backend.
        RuntimeError: For ``backend="triton"`` without a GPU.

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(stability_loss(z, z, torch.tensor([0]), alpha=1.0).item(), 4)
        0.1269
    """
    _require_settings(divergence, alpha=alpha)
    logits = require_logits(logits, name="logits", values=validate)
    logits_perturbed = require_logits(logits_perturbed, name="logits_perturbed", values=validate)
    _require_same_shape(logits=logits, logits_perturbed=logits_perturbed)
    examples, classes = logits.shape
    labels = require_labels(labels, examples=examples, classes=classes, device=logits.device, values=validate)
    kl = divergence == "kl"
    with kernels.using(backend):
        if fused(logits.detach(), logits_perturbed.detach(), labels, alpha, kl=kl, stop=stop_gradient):
            loss = FusedLoss.apply(logits, logits_perturbed, labels, alpha, kl, stop_gradient)
            return loss.to(_result_dtype(logits))

    log_p = F.log_softmax(_widen(logits), dim=1)
    log_q = F.log_softmax(_widen(logits_perturbed), dim=1)
    # Not nll_loss, which leaves a label of -100 out of the mean.
    task = -log_p.gather(1, labels[:, None]).mean()
    target = log_p.detach() if stop_gradient else log_p
    gap = target - log_q if kl else -log_q
    stability = (target.exp() * gap).sum(dim=1).mean()
    return (task + alpha * stability).to(_result_dtype(logits))


def embedding_stability_loss(
    z: Tensor, z_perturbed: Tensor, *, distance: Literal["l2"] = "l2", validate: bool = True
) -> Tensor:
    r"""Mean distance between the embeddings of an input and of its perturbed copy.

    .. math:: L = \frac1N \sum_n \| f(x_n) - f(x'_n) \|_2

    (Zheng et al. 2016, section 3, feature embeddings) of ``(N, D)`` embeddings of both, in their unit: not squared, one
    norm for each example, with gradient 0 where the two agree. ``validate`` is that of ``stability_loss``.

    Raises:
        TypeError: If an embedding is not floating.
        ValueError: For shapes that differ or are not ``(N, D)``, non-finite embeddings, or an unknown distance.
    """
    if distance != "l2":
        raise ValueError(f"distance must be 'l2', got {distance!r}.")
    clean, perturbed = _embeddings(validate, z=z, z_perturbed=z_perturbed)
    return torch.linalg.vector_norm(clean - perturbed, dim=1).mean().to(_result_dtype(z))


def triplet_loss(
    query: Tensor, positive: Tensor, negative: Tensor, *, margin: float = 0.1, validate: bool = True
) -> Tensor:
    r"""Hinge on the distances of a query to a more and to a less similar image.

    .. math:: L_0 = \frac1N \sum_n \max\bigl(0,\; g + \|f(q) - f(p^+)\|_2 - \|f(q) - f(p^-)\|_2\bigr)

    (Zheng et al. 2016, section 3, similar-image ranking) of ``(N, D)`` embeddings, with margin g >= 0 in their unit:
    the task loss that the stability term stands beside. ``validate`` is that of ``stability_loss``.

    Raises:
        TypeError: If an embedding is not floating.
        ValueError: For shapes that differ or are not ``(N, D)``, non-finite embeddings, or margin < 0 or not finite.

    Example:
        >>> triplet_loss(torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.tensor([[3.0]]), margin=2.5)
        tensor(0.5000)
    """
    _require_settings(margin=margin)
    anchor, *others = _embeddings(validate, query=query, positive=positive, negative=negative)
    near, far = (torch.linalg.vector_norm(anchor - other, dim=1) for other in others)
    return (margin + (near - far)).clamp(min=0).mean().to(_result_dtype(query))


@dataclass(frozen=True, kw_only=True)
class StabilityObjective:
    """Stability training as one callable for a training loop: ``loss = objective(model, x, labels)``.

    Draws fresh noise, runs the model on the clean and on the noisy images in one pass (so that batch normalisation in
    training mode sees both together), and returns ``stability_loss``. Dropout in training mode gives the branches masks
    of their own; put the model into evaluation mode to have them differ by the noise alone.

    ``alpha``, ``divergence`` and ``stop_gradient`` are those of ``stability_loss``, ``sigma``, ``clip`` and
    ``generator`` those of ``gaussian_perturbation``; a bad one is a ValueError. ``validate`` looks at the values of
    images, logits and labels in every step, for which the host waits for a GPU each time. Without it what they refuse
    makes the loss NaN; look at the first batch, then leave it.

    Example:
        >>> objective = StabilityObjective(alpha=1.0, sigma=0.1)
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> objective(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1])).backward()
        >>> bool(model[1].weight.grad.abs().max() > 0)
        True
    """

    alpha: float = 0.01
    sigma: float = 0.04
    divergence: Literal["kl", "ce"] = "kl"
    stop_gradient: bool = False
    clip: tuple[float, float] | None = (0.0, 1.0)
    generator: torch.Generator | None = None
    validate: bool = True

    def __post_init__(self) -> None:
        _require_settings(self.divergence, alpha=self.alpha, sigma=self.sigma)

    def __call__(self, model: Callable[[Tensor], object], x: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of images ``(N, ...)`` and classes ``(N,)``; ``model`` maps images to logits ``(N, K)``.

        Refuses what ``gaussian_perturbation`` and ``stability_loss`` refuse.
        """
        noisy = gaussian_perturbation(
            x, sigma=self.sigma, generator=self.generator, clip=self.clip, validate=self.validate
        )
        both = require_logits(model(torch.cat([x, noisy])), examples=2 * len(x), values=False)
        clean, perturbed = both.chunk(2)
        loss = partial(stability_loss, alpha=self.alpha, divergence=self.divergence, stop_gradient=self.stop_gradient)
        return loss(clean, perturbed, labels, validate=self.validate)


def gaussian_perturbation(
    x: Tensor,
    *,
    sigma: float = 0.04,
    generator: torch.Generator | None = None,
    clip: tuple[float, float] | None = (0.0, 1.0),
    validate: bool = True,
) -> Tensor:
    """Add fresh Gaussian noise to images and clip: x' = clip(x + eps), eps ~ N(0, sigma^2 I).

    Zheng et al. 2016, section 3. The noise belongs in pixel space, before any normalisation, which is why images
    outside ``clip`` are refused. The result has the shape, dtype and device of the images.

    Args:
        x: Images, any shape, floating, within ``clip``.
        sigma: Standard deviation, in the unit of the pixels (of ``[0, 1]`` by default).
        generator: Source of the noise, on any device; None draws from PyTorch's global one.
        clip: Range of the pixels; None does not clip.
        validate: Look at the pixels, for which the host waits for a GPU. Without it those outside ``clip`` become NaN.

    Raises:
        TypeError: If the images are not floating.
        ValueError: For sigma < 0 or not finite, an empty range, or images that are not finite or lie outside it.

    Example:
        >>> gaussian_perturbation(torch.full((2,), 0.5), sigma=0.0)
        tensor([0.5000, 0.5000])
    """
    _require_settings(sigma=sigma)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be floating images, got {_kind(x)}. Convert 0..255 with x.float() / 255.")
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"clip must be (low, high) with low < high, got {clip}.")
    if validate:
        require_finite(x, name="x", hint="Check the images.")
        if clip is not None and x.numel() and (x.min() < clip[0] or x.max() > clip[1]):
            raise ValueError(
                f"x must lie within clip = {clip}, got values from {x.min().item():.6g} to {x.max().item():.6g}. "
                "Perturb pixels before normalising them, or state their range in clip."
            )
    device = x.device if generator is None else generator.device
    # Half precision would round the noise itself: draw in float32 at least.
    wide = torch.promote_types(x.dtype, torch.float32)
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=wide).to(x.device)
    noisy = x.to(wide) + sigma * noise
    if clip is not None:
        noisy = noisy.clamp(*clip)
        if not validate:
            noisy = noisy.masked_fill((x < clip[0]) | (x > clip[1]), torch.nan)
    return noisy.to(x.dtype)


def _embeddings(validate: bool, **embeddings: Tensor) -> list[Tensor]:
    """The embeddings, checked and widened."""
    for name, value in embeddings.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor (N, D), got {_kind(value)}.")
        if value.ndim != 2 or value.shape[0] == 0:
            raise ValueError(f"{name} must have shape (N, D) with N >= 1, got {tuple(value.shape)}. Flatten it first.")
        if validate:
            require_finite(value, name=name, hint="Check the inputs and the weights.")
    _require_same_shape(**embeddings)
    return [_widen(value) for value in embeddings.values()]


def _widen(tensor: Tensor) -> Tensor:
    # Apple's GPU has no float64.
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def _result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _require_settings(divergence: str = "kl", **numbers: float) -> None:
    for name, value in numbers.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and >= 0, got {value}. Use 0 for none.")
    if divergence not in ("kl", "ce"):
        raise ValueError(f"divergence must be 'kl' or 'ce', got {divergence!r}.")


def _require_same_shape(**tensors: Tensor) -> None:
    (first, reference), *rest = tensors.items()
    for name, value in rest:
        if value.shape != reference.shape:
            raise ValueError(
                f"{first} and {name} must have the same shape, got {tuple(reference.shape)} and "
                f"{tuple(value.shape)}. Pass the same examples, clean and perturbed, in the same order."
            )
