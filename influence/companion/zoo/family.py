"""Relatives of the stability loss of Zheng et al. (2016), each as an arm that continues a trained classifier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import influence

from .finetuning import Arm

Penalty = Literal["symmetric", "consistency", "jsd", "trades", "trace"]
PENALTIES: tuple[Penalty, ...] = ("symmetric", "consistency", "jsd", "trades", "trace")


@dataclass(frozen=True)
class FamilyArm(Arm):
    """Cross-entropy on clean images + alpha * a penalty.

    Every penalty but that of TRADES is scaled so that for small noise it tends to (sigma^2 / 2) tr G, as the KL of the
    stability loss does, G the metric tensor of the image: at one alpha all weigh the same there.

    * symmetric: (KL(p || q) + KL(q || p)) / 2 between the outputs on an image and on its noisy copy.
    * consistency: m / (m - 1) times the mean over m noisy copies of KL(mean output || output), the term of Jeong & Shin
      (2020, arXiv 2006.04062); their task loss is on noisy copies and has a term of entropy, which are left out here.
    * jsd: ((m + 1) / m)^2 times the Jensen-Shannon divergence of image and m noisy copies, the loss of AugMix
      (Hendrycks et al. 2020, arXiv 1912.02781, m = 2) on Gaussian copies in the place of its chains of augmentations.
    * trades: KL(p(x) || p(x')), x' from projected gradient ascent on it in an l_inf ball (Zhang et al. 2019, arXiv
      1901.08573). Its limit is no trace, and alpha is its 1 / lambda.
    * trace: sigma^2 / 2 times the trace of G by one random probe, `trace_probe`.

    Raises:
        ValueError: an unknown penalty, too few copies for it, no steps, or an arm without a stability loss.
    """

    penalty: Penalty = "symmetric"
    copies: int = 2  # m, of "consistency" and "jsd"
    epsilon: float = 2 / 255  # radius of the ball of "trades", pixels in [0, 1]
    ascents: int = 3  # steps of "trades", each of epsilon / 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective != "stability":
            raise ValueError(f"a penalty belongs to the objective stability, got {self.objective}")
        if self.penalty not in PENALTIES:
            raise ValueError(f"unknown penalty {self.penalty!r}: expected one of {', '.join(PENALTIES)}")
        if self.copies < (2 if self.penalty == "consistency" else 1) or self.ascents < 1:
            raise ValueError(f"{self.penalty}: got {self.copies} copies and {self.ascents} steps, too few")

    @property
    def name(self) -> str:
        """What files and progress bars call it."""
        return self.penalty

    def loss(self, model: nn.Module, x: Tensor, perturbed: Tensor, labels: Tensor) -> Tensor:
        """The objective on pixels 0..255, (N, C, H, W), and their noisy copies."""
        draw = _aside(x.device)
        if self.penalty == "trace":
            moving = x.detach().requires_grad_(True)
            logits = model(moving).float()
            # Pixels of 0..255 have a trace that is 255^2 times smaller than pixels of 0..1.
            penalty = (255 * self.sigma) ** 2 / 2 * trace_probe(logits, moving, generator=draw).mean()
        elif self.penalty == "trades":
            moved = ascended(model, x, epsilon=self.epsilon, steps=self.ascents, generator=draw)
            logits, other = model(torch.cat([x, moved])).float().chunk(2)
            penalty = kl(logits.log_softmax(1), other.log_softmax(1)).mean()
        else:
            sigma, more = 255 * self.sigma, 0 if self.penalty == "symmetric" else self.copies - 1
            extra = [
                influence.gaussian_perturbation(x, sigma=sigma, clip=(0, 255), generator=draw) for _ in range(more)
            ]
            outputs = model(torch.cat([x, perturbed, *extra])).float().reshape(2 + more, len(x), -1)
            logits = outputs[0]
            penalty = divergence(self.penalty, outputs.log_softmax(2)).mean()
        return self.task(logits, labels) + self.alpha * penalty


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) along the last dimension, of log-probabilities."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def divergence(penalty: Penalty, log_probs: Tensor) -> Tensor:
    """The scaled penalty "symmetric", "consistency" or "jsd" of each image, (N,), from (1 + m, N, K), m noisy."""
    clean, noisy, m = log_probs[0], log_probs[1:], len(log_probs) - 1
    if penalty == "symmetric":
        return (kl(clean, noisy[0]) + kl(noisy[0], clean)) / 2
    if penalty == "consistency":
        return m / (m - 1) * kl(_mixture(noisy), noisy).mean(dim=0)
    return ((m + 1) / m) ** 2 * kl(log_probs, _mixture(log_probs)).mean(dim=0)


def _mixture(log_probs: Tensor) -> Tensor:
    return log_probs.logsumexp(dim=0) - math.log(len(log_probs))


def trace_probe(logits: Tensor, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """An estimate of tr G of each image by one random probe, without bias, (N,), differentiable by the parameters.

    h = sum_k xi_k sqrt(P_k) log P_k with xi_k = +-1 and sqrt(P) held constant has E[grad h grad h^T] = G (Sun 2025,
    arXiv 2505.13614), so that |grad h|^2 has the mean tr G. The logits (N, K) were computed from x, (N, C, H, W), which
    requires a gradient, each row from its own image alone; the unit of x is that of the trace.
    """
    log_p = logits.log_softmax(dim=1)
    signs = torch.randint(0, 2, log_p.shape, generator=generator, device=log_p.device) * 2 - 1
    # What weighs the gradients is constant for the derivative by x, and is differentiated by the parameters.
    (slope,) = torch.autograd.grad(log_p, x, grad_outputs=signs * (log_p / 2).exp(), create_graph=True)
    return slope.flatten(1).square().sum(dim=1)


def ascended(
    model: nn.Module, x: Tensor, *, epsilon: float, steps: int, generator: torch.Generator | None = None
) -> Tensor:
    """Images of the l_inf ball with a large KL(p(x) || p(x')), by steps of epsilon / 2 along the gradient's sign.

    x is (N, C, H, W), pixels 0..255, as the model takes them; epsilon, the ball's radius, of pixels in [0, 1]. The
    start is x with noise of .001, as in the released code of TRADES: at x itself the gradient is 0.
    """
    radius = 255 * epsilon
    low, high = (x - radius).clamp(min=0), (x + radius).clamp(max=255)
    with torch.no_grad():
        clean = model(x).float().log_softmax(1)
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    moved = (x + 0.001 * 255 * noise).clamp(low, high)
    for _ in range(steps):
        moved.requires_grad_(True)
        far = kl(clean, model(moved).float().log_softmax(1)).sum()
        (gradient,) = torch.autograd.grad(far, moved)
        moved = (moved.detach() + radius / 2 * gradient.sign()).clamp(low, high)
    return moved.detach()


def _aside(device: torch.device) -> torch.Generator:
    """Random numbers beside the stream that all arms share, so that step n of each sees the same images and noise."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), device=device)))
