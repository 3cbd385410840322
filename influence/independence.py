"""Every example must have logits of its own, the same in any batch and in every call: checked here, never assumed.

Each chunk is called again without a graph: in two halves, and its shortest examples and some others one by one, as all
are of a small chunk; the gradients must keep the examples apart. In the first chunk those of the first example,
of the input those of the last one too, must be what they are alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from influence.inputs import Inputs, forward
from influence.kernels.tolerances import REVERSE
from influence.memory import is_out_of_memory

# Calls of a model that draws random numbers, of which none may differ.
_REPEATS = 8
# Examples of every chunk that are called one by one: all of a small one, else beside the two halves of it the shortest,
# which a model may have cut to the longest of the batch, and as many others.
_ALONE = 8
# Entries of a gradient below this share of the example's largest may be rounding.
_NOISE = {torch.float64: 1e-10, torch.float32: 1e-4}
_NOISE_OF_HALF = 5e-2
# How far the gradient of an example alone may be from that in a batch, relative to its length: a ReLU at its kink may
# be open in one of them.
_KINK = {torch.float64: 1e-6, torch.float32: 0.1}
_KINK_OF_HALF = 0.5


def alone(model: nn.Module, inputs: Inputs) -> Tensor:
    """Logits ``(1, K)`` of the first example, computed alone, with their graph; a RuntimeError if they are random."""
    before = _random_state(inputs.device)
    logits = forward(model, inputs[:1])
    if all(torch.equal(*pair) for pair in zip(before, _random_state(inputs.device), strict=True)):
        # Some models change from call to call without a random number. A CPU gives the same digits twice.
        if inputs.device.type == "cpu":
            again = inputs[:1].logits(model).detach()
            if (again - logits).abs().max() > 8 * torch.finfo(logits.dtype).eps * logits.abs().max():
                _refuse_random()
        return logits
    # Some models draw a number for each layer that only training uses.
    training = [name for name, module in model.named_modules() if module.training and not list(module.children())]
    if training:
        raise RuntimeError(
            f"the model draws random numbers while {training[0] or 'the model itself'!r} is in training mode: its "
            "logits change from call to call. Call model.eval() first."
        )
    with torch.no_grad(), _Drawn() as drawn:
        agree = all(_agree(inputs[:1].logits(model), logits, logits.dtype) for _ in range(_REPEATS))
    if drawn.most > 1 or not agree:
        _refuse_random()
    return logits


class _Drawn(TorchDispatchMode):
    """How many random numbers were drawn at once, at most."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            sizes = [t.numel() for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
            self.most = max([self.most, *sizes])
        return result


def require_same(model: nn.Module, inputs: Inputs, single: Tensor, batched: Tensor, dtype: torch.dtype) -> None:
    """Refuse examples whose logits ``(n, K)`` are others by themselves (``single``) than beside others (``batched``).

    Raises:
        RuntimeError: If they differ by more than rounding of ``dtype``.
    """
    if _agree(batched, single, dtype):
        return
    if not _agree(inputs.logits(model), single, dtype):
        _refuse_random()
    raise RuntimeError(
        "the logits of an example depend on the other examples of its batch (statistics of the batch, attention or "
        f"sorting across it): alone it gets others, by up to {float((batched - single).abs().max()):.3g}. No example "
        "has a Jacobian of its own. Use fixed statistics, or chunk_size=1 if each example is meant to be alone."
    )


def require_independent(model: nn.Module, inputs: Inputs, batched: Tensor, dtype: torch.dtype) -> None:
    """Refuse a batch of which some examples have other logits by themselves than in it, or without a graph.

    Raises:
        RuntimeError: If they differ by more than rounding of ``dtype``.
    """
    for chosen in _apart(inputs):
        few, together = inputs[chosen], batched[chosen]
        try:
            with torch.no_grad():
                plain = few.logits(model)
        except RuntimeError as error:  # a model may look for a graph, such as one that registers hooks
            if is_out_of_memory(error):
                raise
            plain = few.logits(model).detach()
        if _agree(together, plain, dtype):
            continue
        require_same(model, few, few.logits(model).detach(), together, dtype)
        raise RuntimeError(
            "the model gives other logits under torch.no_grad(), as it is called in practice, than with gradients, by "
            f"up to {float((plain - together).abs().max()):.3g}. Where a TransformerEncoder is in it, its output at "
            "padded positions is used: mask it, or call torch.backends.mha.set_fastpath_enabled(False)."
        )


def _apart(inputs: Inputs) -> list[Tensor]:
    """Which examples are called together, without the others: an index ``(n,)`` for each call."""
    examples = len(inputs)
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(examples), device="cpu").to(inputs.device)
    if examples <= _ALONE:
        return list(order.split(1))
    # Padding repeats one value: the examples that change least along their length are the shortest. One value alone
    # repeats nothing, but is 0 in most data.
    discrete = [tensor for tensor in inputs.tensors if not (tensor.is_floating_point() or tensor.is_complex())]
    rows = [tensor.reshape(examples, -1) for tensor in discrete or inputs.tensors]
    lengths = torch.stack([(row[:, 1:] != row[:, :-1]).sum(dim=1) + (row != 0).sum(dim=1) for row in rows]).sum(dim=0)
    shortest = lengths.argsort(stable=True)[: _ALONE // 2]
    others = order[~torch.isin(order, shortest)][: _ALONE // 2]
    return [*order.tensor_split(2), *shortest.split(1), *others.split(1)]


def require_reproducible(first: Tensor, again: Tensor, dtype: torch.dtype) -> None:
    """Refuse a model whose gradients, here their squared lengths ``(P,)``, differ between two calls.

    Under an output layer of zeros such a model still has the same logits in every call.

    Raises:
        RuntimeError: If they differ by more than rounding of ``dtype``.
    """
    if bool(((first - again).abs() > 2 * REVERSE[dtype] * torch.maximum(first, again)).any()):
        raise RuntimeError(
            "two calls of the model with the same input give the same logits with different gradients: something in it "
            "is random, or changes with every call. Call model.eval() and switch the rest off."
        )


def may_be_linear(dtype: torch.dtype) -> bool:
    """Whether a backward pass can be linear where ``dtype`` is the coarsest: eight bits round small gradients to 0."""
    return torch.finfo(dtype).bits >= 16


def require_doubled(grads: Tensor, doubled: Tensor, dtype: torch.dtype) -> None:
    """Refuse a backward pass that gives other gradients for seeds than a half of its own for -2 times the seeds.

    A factor of -2 changes no digit of rounding, so that gradients which are nothing but rounding pass too.

    Raises:
        RuntimeError: If ``doubled`` is not -2 times ``grads``, both of any shape.
    """
    if bool((doubled + 2 * grads).abs().max() > 8 * _NOISE.get(dtype, _NOISE_OF_HALF) * grads.abs().max()):
        _refuse_nonlinear()


def require_additive(
    leaves: Sequence[Tensor],
    rows: Sequence[Tensor],
    mixed: Sequence[Tensor],
    weights: Tensor,
    moved: Tensor,
    dtype: torch.dtype,
) -> None:
    """Refuse a backward pass that gives another gradient for a weighted sum of seeds than the sum of their gradients.

    ``rows`` are gradients ``(m, *shape)`` of each leaf, ``mixed`` those of the sum, ``weights`` are ``(m,)``. What
    cancels in one leaf is rounding of the size of the others; ``moved`` is as of ``require_same_gradient``.

    Raises:
        RuntimeError: If they differ, as behind a function that keeps the largest entries of a gradient.
    """
    tolerance, rounding = 8 * _NOISE.get(dtype, _NOISE_OF_HALF), _rounding(dtype) * moved.detach().abs().sum()
    largest = max(float(made.abs().max()) for made in rows)
    for leaf, made, one in zip(leaves, rows, mixed, strict=True):
        weight = weights.to(made.device, torch.promote_types(made.dtype, torch.float32))
        wide = made.to(weight.dtype)
        gap = (torch.tensordot(weight, wide, dims=1) - one).norm()
        size = torch.tensordot(weight.abs(), wide.abs(), dims=1).norm() + largest
        if bool((gap > tolerance * size) & (gap * leaf.detach().norm().to(gap) > rounding.to(gap.device))):
            _refuse_nonlinear()


def random_weights(count: int, generator: torch.Generator) -> Tensor:
    """Weights ``(m,)`` float64 of both signs that add up to 1 in size: no sum of seeds overflows where they do not."""
    drawn = torch.randn(count, generator=generator, dtype=torch.float64, device="cpu")
    return drawn / drawn.abs().sum()


def require_same_gradient(x: Tensor, moved: Tensor, single: Tensor, batched: Tensor, dtype: torch.dtype) -> None:
    """Refuse an example x whose gradient by itself (``single``) is another than in its batch, all of one shape.

    A gradient by which x as a whole moves less than the rounding of ``moved``, the sum that it is of, is rounding too.

    Raises:
        RuntimeError: If they differ, as by a hook that divides by the number of examples.
    """
    x, moved, single, batched = (values.detach().double() for values in (x, moved, single, batched))
    size = torch.maximum(single.norm(), batched.norm())
    differs = (single - batched).norm() > _KINK.get(dtype, _KINK_OF_HALF) * size
    if bool(differs & (size * x.norm() > _rounding(dtype) * moved.abs().sum())):
        raise RuntimeError(
            "the gradient of an example's logits is another alone than in its batch: something in the model's backward "
            "pass, such as a hook or an autograd.Function, depends on the batch. Remove it, or use chunk_size=1 if "
            "each example is meant to be alone."
        )


def unreached(reached: Tensor) -> int | None:
    """The example that no gradient reaches in most places ``(places, N)`` where one reaches others; None: none.

    A model may detach a part of its batch: alone such an example has a gradient.
    """
    count = (reached.any(dim=1, keepdim=True) & ~reached).sum(dim=0)
    example = int(count.argmax())
    return example if bool(count[example]) else None


def require_differentiable(
    model: nn.Module, inputs: Inputs, cut: Mapping[str, nn.Parameter], logits: Tensor, dtype: torch.dtype
) -> None:
    """Refuse parameters, of which the graph of logits ``(N, K)`` holds none, where these change smoothly with them.

    A choice that they make, as of an expert by argmax, jumps instead: its derivative is 0.

    Raises:
        RuntimeError: If they do, as where a model calls its frozen part under torch.no_grad().
    """

    def moved(names: Sequence[str], step: float) -> Tensor:
        held = {name: cut[name].data for name in names}
        try:
            for seed, (name, data) in enumerate(held.items()):
                generator = torch.Generator(data.device).manual_seed(seed)
                noise = torch.randn(data.shape, generator=generator, dtype=torch.float32, device=data.device)
                cut[name].data = data + (step * data.abs().amax().clamp(min=0.1) * noise).to(data.dtype)
            with torch.no_grad():
                return (inputs.logits(model) - logits).double().abs().max()
        finally:
            for name, data in held.items():
                cut[name].data = data

    def matter(names: Sequence[str]) -> bool:
        step = 1e-3 if dtype in _NOISE else 2e-2
        little, more = moved(names, step), moved(names, 10 * step)
        return bool((little > torch.finfo(dtype).eps * logits.abs().max()) & (little < more / 2))

    names = [name for name, parameter in cut.items() if parameter.numel()]
    if names and matter(names):
        first = next((name for name in names if matter([name])), names[0])
        raise RuntimeError(
            f"the logits depend on {first!r} and carry no gradient of it: the model calls that part under "
            "torch.no_grad(), or detaches what it makes. Remove that, name the other modules in wrt, or take "
            "trainable_only=True if it is frozen."
        )


def refuse_dependent() -> None:
    """Refuse a batch in which a gradient of one example's logits reaches another example."""
    raise RuntimeError(
        "the gradient of an example's logits reaches other examples of its batch (statistics of the batch, attention "
        "or sorting across it), or a hook changes it: no example has a Jacobian of its own. Use fixed statistics, or "
        "chunk_size=1 if each example is meant to be alone."
    )


def _rounding(dtype: torch.dtype) -> float:
    """How far rounding may move a sum, relative to the size of its terms."""
    return (1e3 if dtype in _NOISE else 16) * torch.finfo(dtype).eps


def _refuse_nonlinear() -> None:
    raise RuntimeError(
        "the model's backward pass is not linear: something in it, such as a hook that clips gradients, makes its "
        "derivatives depend on their own size. Remove it."
    )


def _refuse_random() -> None:
    raise RuntimeError(
        "two calls of the model with the same input give different logits: something in it is random, such as "
        "F.dropout(x) without training=self.training. Call model.eval() and switch the rest off."
    )


def _agree(ours: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    # A GPU may take another algorithm for another batch, with fewer digits.
    tolerance = REVERSE[dtype] if ours.device.type != "cpu" else _NOISE.get(dtype, _NOISE_OF_HALF)
    ours, other = ours.detach().double(), other.detach().double()
    return bool((ours - other).abs().max() <= tolerance * other.abs().max())


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def darkness(examples: int) -> Tensor:
    """Choices of half the examples, ``(c, N)`` bool, such that of any two each is once chosen without the other."""
    digits = torch.arange(max(1, (examples - 1).bit_length()), device="cpu")[:, None]
    chosen = (torch.arange(examples, device="cpu") >> digits) % 2 == 1
    return torch.cat([chosen, ~chosen])


@dataclass(frozen=True)
class Weighting:
    """One row of seeds in which each example has a weight of its own: does every gradient lie where we think?

    The row is w_n sum_k c_k seed[k, n]. A gradient is linear in the seeds, so the entries of it that belong to example
    n are w_n times the same sum of the other rows; entries of another example show that one's weight. Weights are
    powers of two, which change no digit.

    Attributes:
        weights: w, ``(N,)``.
        mixture: c, ``(m,)``.
        noise: Share of the largest entry of an example that counts as rounding.
    """

    weights: Tensor
    mixture: Tensor
    noise: float

    @classmethod
    def draw(cls, seeds: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Weighting:
        """Draw it anew for seeds ``(m, N, ...)`` of a computation in ``dtype``."""
        span = 2 if dtype == torch.float16 else 16
        powers = torch.exp2(torch.arange(-span, span, device="cpu").double())
        values = torch.cat([powers, -powers])
        classes, examples = seeds.shape[:2]
        rounds = -(-examples // len(values))
        drawn = [torch.randperm(len(values), generator=generator, device="cpu") for _ in range(rounds)]
        places = torch.cat(drawn)[:examples]
        # Few digits, which any floating type holds.
        sizes = 1 + torch.randint(16, (classes,), generator=generator, device="cpu") / 16
        signs = 2.0 * torch.randint(2, (classes,), generator=generator, device="cpu") - 1
        noise = _NOISE.get(dtype, _NOISE_OF_HALF)
        return cls(values[places].to(seeds.device), (sizes * signs).to(seeds.device), noise)

    def row(self, seeds: Tensor) -> Tensor:
        """The row, ``(1, N, ...)``."""
        weights = self.weights.view(1, -1, *(1,) * (seeds.ndim - 2))
        return (torch.tensordot(self.mixture.to(seeds), seeds, dims=1)[None] * weights).to(seeds.dtype)

    def reached(self, grads: Tensor, row: Tensor, dim: int) -> Tensor | None:
        """Which examples have a gradient other than 0, ``(N,)``, where they lie along ``dim`` of the row; else None.

        ``grads``, ``(m, ...)``, are the gradients of the seeds, ``row``, ``(...)``, is that of the row.
        A dimension may have several entries of one example after another.
        """
        # In the order of memory nothing is copied.
        order = sorted(range(row.ndim), key=grads[0].stride, reverse=True)
        mixed = torch.tensordot(self.mixture.to(grads.dtype), grads.permute(0, *(d + 1 for d in order)), dims=1)
        mixed, row = (
            values.unflatten(dim, (len(self.weights), -1))
            for values in (mixed.permute([order.index(d) for d in range(row.ndim)]), row)
        )
        others = [d for d in range(row.ndim) if d != dim]
        weights = self.weights.to(row.dtype).view(-1, *(1,) * (row.ndim - dim - 1))
        largest, wrong = _largest(row, others), _largest(torch.addcmul(row, mixed, weights, value=-1), others)
        return largest > 0 if bool((wrong <= self.noise * largest).all()) else None


def _largest(values: Tensor, dims: list[int]) -> Tensor:
    """Largest size over some dimensions; sizes of all would have to be written first."""
    return values.amax(dim=dims).maximum(-values.amin(dim=dims))


def gradients(output: Tensor | GradientEdge, leaves: Sequence[Tensor], seed: Tensor) -> list[Tensor]:
    """Gradients of the leaves by autograd, dense, zero where there is none; a RuntimeError says if PyTorch cannot.

    Whether they are finite is for ``require_finite_gradients``, once for many passes.
    """
    try:
        # The graph is kept: a model may hold a part of it from call to call, such as a table of attention biases.
        grads = torch.autograd.grad(
            output, list(leaves), seed, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise RuntimeError(
            f"PyTorch cannot differentiate the model by torch.autograd.grad, so neither can the metric tensor: {error}"
        ) from error
    return [grad.detach().to_dense() if grad.is_sparse else grad.detach() for grad in grads]


def require_finite_gradients(grads: Sequence[Tensor]) -> None:
    """Refuse gradients with a NaN or infinite entry, with one look at the device for all of them; a ValueError."""
    # Gradients of several devices meet on the first one.
    finite = [torch.isfinite(grad).all().to(grads[0].device) for grad in grads]
    if finite and not bool(torch.stack(finite).all()):
        raise ValueError(
            "a gradient of the logits is NaN or infinite although they are finite, so there is no metric tensor: a "
            "square root, logarithm or division at 0, be it behind a torch.where, or overflow of "
            f"{grads[0].dtype}. Add a small constant inside it."
        )
