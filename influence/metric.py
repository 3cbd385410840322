"""The metric tensor of a classifier in class space: for each example the K x K Gram of its logit Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from influence.checks import require_deterministic, require_finite, require_logits
from influence.kernels.cholesky import pivoted_cholesky

_WRT = ("input", "parameters", "layers")
_BATCH = 64
# Input values in one backward pass: bounds the activations of large images, 64 CIFAR images fit.
_BATCH_VALUES = 2**20


@dataclass(frozen=True)
class MetricTensor:
    r"""Everything about G = sum_k P_k (d log P_k / d omega)(d log P_k / d omega)^T that a measure needs.

    G is p x p and is never formed (Shu & Zhu 2019, section 2; arXiv 1901.07152). With A (K x p) the Jacobian of the
    logits, all its invariants follow from the K x K Gram A A^T and from P. Softmax does not change when a function of
    omega is added to all logits, so A matters up to a common row only: here it is that of the contrasts
    z_k - z_r with the predicted class r, whose row and column in ``gram`` are therefore zero. The contrast of any two
    classes is ``gram[k, k] - gram[k, l] - gram[l, k] + gram[l, l]``, whatever r is; a Gram of plain logits is
    understood too.

    Attributes:
        log_probs: ``(N, K)`` float64, log P.
        gram: ``(N, B, K, K)`` float64, for each block of the perturbation, in (unit of omega)^-2.
        blocks: B names.
        dims: ``(B,)`` int64, the number p of entries of each block.
        dtype: The precision in which the Jacobian was computed; it sets the default tolerance of ``rank``.
    """

    log_probs: Tensor
    gram: Tensor
    blocks: tuple[str, ...]
    dims: Tensor
    dtype: torch.dtype

    def __post_init__(self) -> None:
        """Refuse parts that do not belong together."""
        examples, classes = self.log_probs.shape
        expected = (examples, len(self.blocks), classes, classes)
        if tuple(self.gram.shape) != expected:
            raise ValueError(f"gram must have shape (N, B, K, K) = {expected}, got {tuple(self.gram.shape)}.")
        if tuple(self.dims.shape) != (len(self.blocks),):
            raise ValueError(f"dims must have shape (B,) = ({len(self.blocks)},), got {tuple(self.dims.shape)}.")

    def contrast_gram(self) -> Tensor:
        """Gram of the contrasts z_k - z_r with the predicted class r, ``(N, B, K, K)``; row and column r are zero."""
        reference = self.log_probs.argmax(dim=1)
        example = torch.arange(len(reference), device=self.gram.device)
        column = self.gram[example, :, :, reference]
        corner = column[example, :, reference]
        return self.gram - column[..., :, None] - column[..., None, :] + corner[..., None, None]

    def score_gram(self) -> Tensor:
        """Gram of the scores s_k = d log P_k / d omega, ``(N, B, K, K)``, in (unit of omega)^-2."""
        # From the contrasts, whose large terms vanish where the network is sure, not from the plain logits.
        contrast = self.contrast_gram()
        probs = self.log_probs.exp()[:, None, :, None]
        column = contrast @ probs
        return contrast - column - column.mT + probs.mT @ column

    def trace(self) -> Tensor:
        """Trace of G, ``(N, B)``, in (unit of omega)^-2; sigma^2 / 2 times it is the mean KL under N(0, sigma^2 I)."""
        return (self.log_probs.exp()[:, None] * self.score_gram().diagonal(dim1=-2, dim2=-1)).sum(dim=-1)

    def lambda_max(self) -> Tensor:
        """Largest eigenvalue of G, ``(N, B)``, in (unit of omega)^-2: the worst unit perturbation."""
        root = (0.5 * self.log_probs).exp()[:, None, :, None]
        return torch.linalg.eigvalsh(root * self.score_gram() * root.mT)[..., -1].clamp(min=0)

    def rank(self, *, rtol: float | None = None) -> Tensor:
        """Rank of G, ``(N, B)`` int64, at most K - 1.

        Decided on the contrasts of the logits, which no probability scales: it depends neither on the unit of omega
        nor on how sure the network is.

        Args:
            rtol: Tolerance on the pivots (squared lengths) of the contrast Gram relative to its largest; None takes
                ``default_rtol``.

        Returns:
            The rank of each example and block.
        """
        examples, blocks, classes, _ = self.gram.shape
        rtol = default_rtol(self.dtype, classes=classes) if rtol is None else rtol
        factor = pivoted_cholesky(self.contrast_gram().flatten(0, 1), rtol=rtol, max_rank=classes - 1)
        return factor.rank.view(examples, blocks)


def default_rtol(dtype: torch.dtype, *, classes: int) -> float:
    """Tolerance on the pivots of a contrast Gram whose Jacobian was computed in ``dtype``.

    Rounding moves a row of the Jacobian by about 32 sqrt(K) eps of the largest, a pivot by the square of that. The
    Gram itself is float64, which bounds from below what a pivot can tell.
    """
    eps, eps_gram = torch.finfo(dtype).eps, torch.finfo(torch.float64).eps
    return min(max(1024 * classes * eps**2, 32 * classes * eps_gram), 1e-2)


def metric_tensor(
    model: nn.Module, x: Tensor, *, wrt: str | Sequence[str] = "input", chunk_size: int | None = None
) -> MetricTensor:
    """Compute the metric tensor of each example for a perturbation of its input or of the model's parameters.

    The model must treat the examples of a batch independently, as any network in evaluation mode does. It is left as
    it was: mode, hooks, ``requires_grad`` and ``.grad`` are not touched.

    Args:
        model: Maps ``x`` to logits ``(N, K)``, or to an object with such ``.logits``.
        x: ``(N, ...)`` inputs; floating for ``wrt="input"``.
        wrt: What is perturbed. ``"input"``: all values of the input, one block. ``"parameters"``: all parameters, one
            block. ``"layers"``: one block for each module that owns parameters, in ``named_modules()`` order, holding
            those it owns itself. A list of module names: one block for each, holding all parameters inside it.
            Parameters count whether or not they require a gradient; one used in two places is one parameter.
        chunk_size: Examples in one backward pass, for ``wrt="input"``. None: 64, fewer for large inputs.

    Returns:
        The metric tensor, detached, on the device of the logits.

    Raises:
        TypeError: For an ``x`` that is not a tensor (or not floating, for ``wrt="input"``), an output that is not
            floating logits, or a ``wrt`` of another type.
        ValueError: For an empty or non-finite ``x``, an output that is not finite or not ``(N, K)`` with K >= 2, an
            unknown ``wrt`` or module name, a module without parameters, or a chunk size below 1.
        RuntimeError: For a model with BatchNorm or Dropout in training mode, or logits that carry no gradient.

    Example:
        >>> model = nn.Linear(5, 3)
        >>> metric_tensor(model, torch.zeros(2, 5), wrt="parameters").rank()
        tensor([[2],
                [2]])
    """
    _require_input(model, x, floating=isinstance(wrt, str) and wrt == "input")
    if chunk_size is not None and (isinstance(chunk_size, bool) or chunk_size < 1):
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}. Use None for the default.")
    if isinstance(wrt, str) and wrt == "input":
        size = chunk_size or max(1, min(_BATCH, _BATCH_VALUES // max(1, x[0].numel())))
        dims = {"input": x[0].numel()}
        compute = _input_gram
    else:
        groups, parameters = _parameter_blocks(model, wrt)
        size = 1
        dims = {block: sum(parameters[name].numel() for name in names) for block, names in groups.items()}

        def compute(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
            return _parameter_gram(model, x, groups, parameters)

    require_deterministic(model)
    with _full_precision():
        parts = [compute(model, chunk) for chunk in x.split(size)]
    gram = torch.cat([part[1] for part in parts])
    return MetricTensor(
        log_probs=torch.cat([part[0] for part in parts]),
        gram=gram,
        blocks=tuple(dims),
        dims=torch.tensor(list(dims.values()), device=gram.device),
        dtype=parts[0][2],
    )


def _require_input(model: nn.Module, x: Tensor, *, floating: bool) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor (N, ...), got {type(x).__name__}. Use torch.as_tensor(x).")
    if floating and not x.is_floating_point():
        raise TypeError(
            f"x must be floating for wrt='input', got {x.dtype}: integers cannot be perturbed. Convert images with "
            "x.float(); for tokens perturb the parameters or a layer."
        )
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(f"x must hold at least one example, (N, ...), got shape {tuple(x.shape)}.")
    require_finite(x, name="x", hint="Check the data.")


def _parameter_blocks(
    model: nn.Module, wrt: str | Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, nn.Parameter]]:
    """Names of the parameters in each block, and the parameters by name; a shared one has one name."""
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    canonical = {id(p): name for name, p in parameters.items()}
    modules = dict(model.named_modules())

    def names(module: nn.Module, *, recurse: bool) -> list[str]:
        return [canonical[id(p)] for p in module.parameters(recurse=recurse) if id(p) in canonical]

    if isinstance(wrt, str):
        if wrt not in _WRT:
            hint = f" To perturb that module pass the list [{wrt!r}]." if wrt in modules else ""
            raise ValueError(f"wrt must be one of {_WRT} or a list of module names, got {wrt!r}.{hint}")
        if not parameters:
            raise ValueError(f"wrt={wrt!r} needs a model with parameters, got one without. Use wrt='input'.")
        if wrt == "parameters":
            return {"parameters": list(parameters)}, parameters
        owned = {name: names(module, recurse=False) for name, module in modules.items()}
        return {name: group for name, group in owned.items() if group}, parameters
    if not isinstance(wrt, Sequence) or not all(isinstance(name, str) for name in wrt):
        raise TypeError(f"wrt must be one of {_WRT} or a list of module names, got {wrt!r}.")
    if not wrt or len(set(wrt)) < len(wrt):
        raise ValueError(f"wrt must list at least one module, each once, got {list(wrt)}.")
    groups = {}
    for name in wrt:
        if name not in modules:
            known = [known for known in modules if known]
            raise ValueError(
                f"unknown module {name!r}: the model has {known[:20]}{' ...' if len(known) > 20 else ''}. "
                "Take names from model.named_modules()."
            )
        groups[name] = names(modules[name], recurse=True)
        if not groups[name]:
            kind = type(modules[name]).__name__
            raise ValueError(f"module {name!r} ({kind}) has no parameters to perturb. Name one that has.")
    return groups, parameters


def _input_gram(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    # Examples are independent: one backward of the summed contrasts gives every example its own row.
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        # A copy, so that a model that works in place spoils neither the caller's tensor nor the leaf.
        logits = _forward(model, leaf.clone())
    log_probs, order = _classes(logits)

    rows = torch.stack([grads[0].flatten(1) for grads in _contrasts(logits, order, [leaf])], dim=1)
    # Example by example, so that the float64 copy stays that of one Jacobian.
    gram = _embed(torch.stack([_products(row) for row in rows]), order)
    return log_probs, gram[:, None], _coarser(logits.dtype, x.dtype)


def _parameter_gram(
    model: nn.Module, x: Tensor, groups: dict[str, list[str]], parameters: dict[str, nn.Parameter]
) -> tuple[Tensor, Tensor, torch.dtype]:
    # Leaves of our own that share the storage: the model's requires_grad and .grad stay out of it.
    used = list(dict.fromkeys(name for names in groups.values() for name in names))
    leaves = {name: parameters[name].detach().requires_grad_() for name in used}
    with torch.inference_mode(False), torch.enable_grad():
        logits = _forward(lambda x: functional_call(model, leaves, (x,)), x.clone())
    log_probs, order = _classes(logits)

    jacobian = [[g.flatten() for g in grads] for grads in _contrasts(logits, order, list(leaves.values()))]
    small = {name: _products(torch.stack([grads[i] for grads in jacobian])) for i, name in enumerate(used)}
    gram = torch.stack([torch.stack([small[name] for name in names]).sum(dim=0) for names in groups.values()])
    dtypes = [leaf.dtype for leaf in leaves.values()]
    return log_probs, _embed(gram, order.expand(len(groups), -1))[None], _coarser(logits.dtype, *dtypes)


def _forward(model: Callable[[Tensor], object], x: Tensor) -> Tensor:
    logits = require_logits(model(x), examples=x.shape[0])
    if not logits.requires_grad:
        raise RuntimeError(
            "the logits carry no gradient: the model detaches them, runs under no_grad, or does not use what is "
            "perturbed. Remove the detach or the decorator, or perturb something the logits depend on."
        )
    return logits


def _classes(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Give log P in float64, and each example's classes in the order that ends with the predicted one."""
    log_probs = torch.log_softmax(logits.detach().double(), dim=1)
    classes = logits.shape[1]
    steps = torch.arange(1, classes + 1, device=logits.device)
    return log_probs, (log_probs.argmax(dim=1, keepdim=True) + steps) % classes


def _contrasts(logits: Tensor, order: Tensor, leaves: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Gradients of sum_n (z_k - z_r), for each of the K - 1 places k in ``order``."""
    last = logits.shape[1] - 2
    for place in range(last + 1):
        seed = torch.zeros_like(logits)
        seed.scatter_(1, order[:, -1:], -1.0).scatter_(1, order[:, place : place + 1], 1.0)
        grads = torch.autograd.grad(
            logits, leaves, seed, retain_graph=place < last, allow_unused=True, materialize_grads=True
        )
        yield tuple(grad.detach() for grad in grads)


def _products(rows: Tensor) -> Tensor:
    """Gram of the rows of one ``(K-1, p)`` Jacobian, in float64 whatever its precision."""
    wide = rows.double()
    return wide @ wide.mT


def _embed(small: Tensor, order: Tensor) -> Tensor:
    """Put a ``(N, K-1, K-1)`` contrast Gram at its classes: ``(N, K, K)`` with zeros for the predicted class."""
    padded = torch.nn.functional.pad(small, (0, 1, 0, 1))
    back = order.argsort(dim=1)
    example = torch.arange(len(order), device=order.device)[:, None, None]
    return padded[example, back[:, :, None], back[:, None, :]]


def _coarser(*dtypes: torch.dtype) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Switch TF32 off: cuDNN's default keeps 10 bits, too few to tell a rank."""
    cudnn: Any = torch.backends.cudnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
