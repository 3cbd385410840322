"""The metric tensor of a classifier in class space: for each example the K x K Gram of its logit Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from influence.checks import require_deterministic, require_finite, require_logits
from influence.kernels.backend import using
from influence.kernels.elimination import pivoted_cholesky
from influence.kernels.jacobi import jacobi_eigvals
from influence.memory import in_chunks
from influence.pixels import Patches, input_grams
from influence.rules.engine import ParameterGrams, differentiable

_WRT = ("input", "parameters", "layers")
_BATCH = 64
# Input values in one backward pass: bounds the activations of large images, 64 CIFAR images fit.
_BATCH_VALUES = 2**20
# Entries of the Jacobians of one chunk; below so many classes it is not asked how many there are.
_JACOBIAN_VALUES = 2**26
_MANY_CLASSES = 64
# Patches at once: 10 images of 32 x 32 pixels in three channels.
_BATCH_BLOCKS = 2**15


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
        if not bool(column.any()):
            return self.gram
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
        weighted = root * self.score_gram() * root.mT
        if weighted.device.type == "cpu":
            return torch.linalg.eigvalsh(weighted)[..., -1].clamp(min=0)
        return jacobi_eigvals(weighted.flatten(0, 1)).amax(dim=1).view(weighted.shape[:2])

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
        decided = pivoted_cholesky(self.contrast_gram().flatten(0, 1), rtol=rtol, max_rank=classes - 1)
        return decided.rank.view(examples, blocks)


def default_rtol(dtype: torch.dtype, *, classes: int) -> float:
    """Tolerance on the pivots of a contrast Gram whose Jacobian was computed in ``dtype``.

    Rounding moves a row of the Jacobian by about 32 sqrt(K) eps of the largest, a pivot by the square of that. The
    Gram itself is float64, which bounds from below what a pivot can tell.
    """
    eps, eps_gram = torch.finfo(dtype).eps, torch.finfo(torch.float64).eps
    return min(max(1024 * classes * eps**2, 32 * classes * eps_gram), 1e-2)


def metric_tensor(
    model: nn.Module,
    x: Tensor,
    *,
    wrt: str | Sequence[str] | Patches = "input",
    chunk_size: int | None = None,
    backend: str = "auto",
) -> MetricTensor:
    """Compute the metric tensor of each example for a perturbation of its input or of the model's parameters.

    One forward and K - 1 backward passes of the activations alone, or as many as a last linear layer has inputs where
    these are fewer, for all examples of a chunk at once; the Gram of a layer's parameters follows from its input and
    the gradients of its output. A parameter without such a rule, or used twice, takes the autograd path, slower and
    just as exact; the logger "influence" says so once.

    The model must treat the examples of a batch independently, as any network in evaluation mode does. It is left as
    it was: mode, hooks, ``requires_grad`` and ``.grad`` are not touched.

    Relative to the largest entry, a Gram is exact to 1e-4 for a float32 network and to 1e-10 for a float64 one.

    Args:
        model: Maps ``x`` to logits ``(N, K)``, or to an object with such ``.logits``.
        x: ``(N, ...)`` inputs; floating for ``wrt="input"`` and ``Patches``.
        wrt: What is perturbed. ``"input"``: all values of the input, one block. ``Patches``: one block for each patch
            of an image; for many classes see ``patch_influence``. ``"parameters"``: all parameters, one block.
            ``"layers"``: one block for each module that owns parameters, in ``named_modules()`` order, holding those it
            owns itself. A list of module names: one block for each, holding all parameters inside it. Parameters count
            whether or not they require a gradient; one used in two places is one parameter.
        chunk_size: Examples computed at once. None: from the memory that is free, and half of it again each time that
            was too much.
        backend: Kernels for the products of gradients: "auto", "torch" or "triton", see ``kernels.backend.using``.

    Returns:
        The metric tensor, detached, on the device of the logits.

    Raises:
        TypeError: For an ``x`` that is not a tensor (or not floating, where it is perturbed), an output that is not
            floating logits, or a ``wrt`` of another type.
        ValueError: For an empty or non-finite ``x``, an output that is not finite or not ``(N, K)`` with K >= 2, an
            unknown ``wrt`` or module name, a module without parameters, patches of what is no image or whose
            Grams do not fit, a chunk size below 1, or an unknown backend.
        RuntimeError: For a model with BatchNorm or Dropout in training mode, or logits that carry no gradient.

    Example:
        >>> model = nn.Linear(5, 3)
        >>> metric_tensor(model, torch.zeros(2, 5), wrt="parameters").rank()
        tensor([[2],
                [2]])
    """
    perturbs_input = isinstance(wrt, Patches) or (isinstance(wrt, str) and wrt == "input")
    require_input(model, x, floating=perturbs_input)
    if chunk_size is not None and (isinstance(chunk_size, bool) or chunk_size < 1):
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}. Use None for the default.")
    if perturbs_input:
        dims, compute, size = _of_the_input(model, x, wrt if isinstance(wrt, Patches) else None)
    else:
        assert not isinstance(wrt, Patches)
        dims, compute, size = _of_the_parameters(model, wrt)
    require_deterministic(model)
    with full_precision(), using(backend):
        parts = list(in_chunks(compute, x, chunk_size or size(x), may_halve=chunk_size is None))
    gram = torch.cat([part[1] for part in parts])
    return MetricTensor(
        log_probs=torch.cat([part[0] for part in parts]),
        gram=gram,
        blocks=tuple(dims),
        dims=torch.tensor(list(dims.values()), device=gram.device),
        dtype=parts[0][2],
    )


# log P, Grams, and the precision of the Jacobian.
Part = tuple[Tensor, Tensor, torch.dtype]
Computation = tuple[dict[str, int], Callable[[Tensor], Part], Callable[[Tensor], int]]


def _of_the_input(model: nn.Module, x: Tensor, patches: Patches | None) -> Computation:
    """Blocks with their sizes, what computes a chunk, and how large a chunk should be."""
    dims = {"input": x[0].numel()} if patches is None else patches.blocks(x.shape[1:])

    def compute(x: Tensor) -> Part:
        with differentiable(model, []):
            log_probs, gram, dtype = input_grams(model, x, patches)
        return log_probs, gram, coarser(dtype, x.dtype)

    def size(x: Tensor) -> int:
        values = max(1, x[0].numel())
        most = max(1, min(_BATCH, _BATCH_VALUES // values))
        if most * values > _JACOBIAN_VALUES // _MANY_CLASSES:
            # How many classes there are decides how large a Jacobian is.
            with torch.no_grad():
                classes = require_logits(model(x[:1].clone()), examples=1).shape[1]
            most = max(1, min(most, _JACOBIAN_VALUES // (values * classes)))
        return most if patches is None else max(1, min(most, _BATCH_BLOCKS // len(dims)))

    return dims, compute, size


def _of_the_parameters(model: nn.Module, wrt: str | Sequence[str]) -> Computation:
    groups, parameters = _parameter_blocks(model, wrt)
    dims = {block: sum(parameters[name].numel() for name in names) for block, names in groups.items()}
    engine = ParameterGrams(model, groups, parameters)

    def compute(x: Tensor) -> Part:
        log_probs, gram, dtype = engine(x)
        return log_probs, gram, coarser(dtype, *engine.dtypes)

    return dims, compute, engine.chunk_size


def require_input(model: nn.Module, x: Tensor, *, floating: bool) -> None:
    """Refuse what is no model or no batch of finite inputs; raises as ``metric_tensor`` says."""
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
            raise ValueError(f"wrt must be one of {_WRT}, Patches(...) or a list of module names, got {wrt!r}.{hint}")
        if not parameters:
            raise ValueError(f"wrt={wrt!r} needs a model with parameters, got one without. Use wrt='input'.")
        if wrt == "parameters":
            return {"parameters": list(parameters)}, parameters
        owned = {name: names(module, recurse=False) for name, module in modules.items()}
        return {name: group for name, group in owned.items() if group}, parameters
    if not isinstance(wrt, Sequence) or not all(isinstance(name, str) for name in wrt):
        raise TypeError(f"wrt must be one of {_WRT}, Patches(...) or a list of module names, got {wrt!r}.")
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


def coarser(*dtypes: torch.dtype) -> torch.dtype:
    """The least precise of floating types."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@contextmanager
def full_precision() -> Iterator[None]:
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
