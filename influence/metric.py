"""The metric tensor of a classifier in class space: for each example the K x K Gram of its logit Jacobian.

A layer's Gram is made in ``grams/parameters.py`` (a chunk of examples, and what is verified), ``grams/reverse.py``,
the layer's rule, as in ``grams/linear.py``, ``grams/gradients.py`` and ``kernels/contraction.py``; that of the input in
``pixels.py``.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from influence.checks import require_count, require_deterministic, require_finite, require_rtol
from influence.grams.parameters import ParameterGrams, ParameterPasses
from influence.inputs import Batch, Inputs
from influence.kernels.backend import using
from influence.kernels.elimination import pivoted_cholesky
from influence.memory import examples_that_fit, in_chunks
from influence.pixels import InputGrams, Patches

Engine = InputGrams | ParameterGrams
Part = TypeVar("Part")
_WRT = ("input", "parameters", "layers")
_TENSORS = ("log_probs", "gram", "dims")


@dataclass(frozen=True, repr=False, eq=False)
class MetricTensor:
    r"""Everything about G = sum_k P_k (d log P_k / d omega)(d log P_k / d omega)^T that a measure needs.

    G is p x p and is never formed (Shu & Zhu 2019, section 2; arXiv 1901.07152): all its invariants follow from P and
    the K x K Gram A A^T of the Jacobian A (K x p) of the logits, of which a common row changes nothing. ``gram`` is
    that of the contrasts z_k - z_r with the predicted class r, whose row and column are therefore zero; a Gram of plain
    logits is understood too. The contrast of any two classes has ``gram[k, k] - gram[k, l] - gram[l, k] + gram[l, l]``.

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
        examples, classes = self.log_probs.shape
        expected = (examples, len(self.blocks), classes, classes)
        if tuple(self.gram.shape) != expected:
            raise ValueError(f"gram must have shape (N, B, K, K) = {expected}, got {tuple(self.gram.shape)}.")
        if tuple(self.dims.shape) != (len(self.blocks),):
            raise ValueError(f"dims must have shape (B,) = ({len(self.blocks)},), got {tuple(self.dims.shape)}.")

    def __repr__(self) -> str:
        examples, blocks, classes, _ = self.gram.shape
        shown = ", ".join(self.blocks[:3]) + (", ..." if blocks > 3 else "")
        return f"MetricTensor(N={examples}, B={blocks} [{shown}], K={classes}, {self.dtype}, {self.gram.device})"

    def __getitem__(self, blocks: str | Sequence[str]) -> MetricTensor:
        """The same for one block, or some, by name; KeyError for a name that is no block."""
        chosen = list(blocks) if isinstance(blocks, Iterable) and not isinstance(blocks, str) else [blocks]
        for name in chosen:
            if name not in self.blocks:
                raise KeyError(f"unknown block {name!r}: there are {list(self.blocks[:20])}.")
        places = [self.blocks.index(name) for name in chosen]
        return replace(self, gram=self.gram[:, places], blocks=tuple(chosen), dims=self.dims[places])

    def to(self, device: torch.device | str) -> MetricTensor:
        """The same on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; needs that package."""
        from safetensors.torch import save_file

        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        save_file(tensors, path, metadata={"blocks": json.dumps(self.blocks), "dtype": str(self.dtype)})

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu") -> MetricTensor:
        """Read what ``save`` has written; ValueError for another file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device=device) as file:
                found, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is no metric tensor: {error}.") from None
        if set(found) != set(_TENSORS) or not {"blocks", "dtype"} <= set(metadata):
            raise ValueError(f"{path} is no metric tensor: it holds {sorted(found)[:10]}.")
        dtype = getattr(torch, metadata["dtype"].removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{path} is no metric tensor: it holds the precision {metadata['dtype']!r}.")
        return cls(**found, blocks=tuple(json.loads(metadata["blocks"])), dtype=dtype)

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

    def root_gram(self) -> Tensor:
        """Gram of the columns sqrt(P_k) s_k of L0, ``(N, B, K, K)``: its eigenvalues are those of G that are not 0."""
        root = (0.5 * self.log_probs).exp()[:, None, :, None]
        return root * self.score_gram() * root.mT

    def trace(self) -> Tensor:
        """Trace of G, ``(N, B)``, in (unit of omega)^-2; sigma^2 / 2 times it is the mean KL under N(0, sigma^2 I)."""
        return (self.log_probs.exp()[:, None] * self.score_gram().diagonal(dim1=-2, dim2=-1)).sum(dim=-1)

    def lambda_max(self) -> Tensor:
        """Largest eigenvalue of G, ``(N, B)``, in (unit of omega)^-2: the worst unit perturbation."""
        # Not eigvalsh, which CUDA's library runs matrix by matrix; of a semi-definite matrix they are the same.
        return torch.linalg.svdvals(self.root_gram())[..., 0]

    def rank(self, *, rtol: float | None = None) -> Tensor:
        """Rank of G, ``(N, B)`` int64, at most K - 1.

        Decided on the contrasts of the logits: it depends neither on the unit of omega nor on how sure the network is.
        ``rtol`` is the tolerance on their pivots (squared lengths), relative to the largest; None: ``default_rtol``.
        """
        examples, blocks, classes, _ = self.gram.shape
        require_rtol(rtol)
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
    x: Batch,
    *,
    wrt: str | Sequence[str] | Patches = "input",
    trainable_only: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> MetricTensor:
    """Compute the metric tensor of each example for a perturbation of its input or of the model's parameters.

    One forward and K - 1 backward passes of the activations alone, or as many as a last linear layer has inputs where
    these are fewer, for all examples of a chunk at once; the Gram of a layer's parameters follows from its input and
    the gradients of its output. A parameter without such a rule, or used twice, takes the autograd path, slower and
    just as exact; the logger "influence" says so once. Relative to the largest entry, a Gram is exact to 1e-4 for a
    float32 network and to 1e-10 for a float64 one.

    The model must treat the examples of a batch independently, as any network in evaluation mode does. Each chunk is
    called again: up to eight examples one by one, more of them in two halves and eight of them one by one. A dependence
    that shows in none of these calls is not seen; ``chunk_size=8`` looks at every example. The model's mode, hooks,
    ``requires_grad`` and ``.grad`` are left as they were.

    Args:
        model: Maps ``x`` to logits ``(N, K)``, or to an object with such ``.logits``.
        x: ``(N, ...)`` inputs, or a tuple or a mapping of such tensors, which the model gets by position or by name.
        wrt: What is perturbed. ``"input"``: all values of the only floating input, or of the one named, as in
            ``"input:pixel_values"``; one block. ``Patches``: one block for each patch of an image; for many classes see
            ``patch_influence``. ``"parameters"``: all parameters, one block. ``"layers"``: one block for each module
            that owns parameters, in ``named_modules()`` order, holding those it owns itself. A list of names: one block
            for each module, holding all parameters inside it, or single parameter. Parameters count whether or not they
            require a gradient; one used in two places is one.
        trainable_only: Whether to leave out parameters that require no gradient, and blocks of these alone.
        chunk_size: Examples computed at once. None: from the memory that is free, and half of it again each time that
            was too much.
        backend: Kernels for the products of gradients: "auto", "torch" or "triton", see ``kernels.backend.using``.

    Returns:
        The metric tensor, detached, on the device of the logits.

    Raises:
        TypeError: For an ``x`` that is not a tensor (or not floating, where it is perturbed), an output that is not
            floating logits, or a ``wrt`` of another type.
        ValueError: For an empty or non-finite ``x``, an output that is not finite or not ``(N, K)`` with K >= 2, an
            unknown ``wrt`` or module name, a module without parameters or with some on the meta device, patches of
            what is no image or whose Grams do not fit, a chunk size below 1, or an unknown backend.
        RuntimeError: For a model with BatchNorm or Dropout in training mode, logits that carry no gradient, or none of
            a parameter that they depend on, or examples whose logits or gradients depend on their batch.

    Example:
        >>> model = nn.Linear(5, 3)
        >>> metric_tensor(model, torch.zeros(2, 5), wrt="parameters").rank()
        tensor([[2],
                [2]])
    """
    require_count(chunk_size=chunk_size)
    inputs, dims, engine = computation(model, x, wrt, trainable_only=trainable_only)
    with using(backend):
        parts = in_parts(lambda chosen: engine(inputs[chosen]), model, inputs, engine, chunk_size=chunk_size)
    log_probs, grams, dtypes = zip(*parts, strict=True)
    gram = torch.cat(grams)
    require_finite(gram, name="the Gram", hint="Gradients overflow when squared: scale the input or the parameters.")
    return MetricTensor(
        log_probs=torch.cat(log_probs),
        gram=gram,
        blocks=tuple(dims),
        dims=torch.tensor(list(dims.values()), device=gram.device),
        dtype=max(dtypes, key=lambda dtype: torch.finfo(dtype).eps),
    )


def computation(
    model: nn.Module, x: Batch, wrt: str | Sequence[str] | Patches, *, trainable_only: bool
) -> tuple[Inputs, dict[str, int], Engine]:
    """The batch, the blocks with their sizes p, and what computes a chunk; raises as ``metric_tensor`` says."""
    require_deterministic(model)
    inputs = Inputs.of(x)
    engine: Engine
    if isinstance(wrt, Patches):
        inputs = inputs.perturbing(None)
        dims, engine = wrt.blocks(inputs.x.shape[1:]), InputGrams(model, wrt)
    elif isinstance(wrt, str) and wrt.partition(":")[0] == "input":
        inputs = inputs.perturbing(wrt.partition(":")[2] or None)
        dims, engine = {wrt: inputs.x[0].numel()}, InputGrams(model)
    else:
        groups, parameters = parameter_blocks(model, wrt, trainable_only=trainable_only)
        dims = {block: sum(parameters[name].numel() for name in names) for block, names in groups.items()}
        engine = ParameterGrams(model, groups, parameters)
    return inputs, dims, engine


def in_parts(
    compute: Callable[[slice], Part],
    model: nn.Module,
    inputs: Inputs,
    engine: InputGrams | ParameterPasses,
    *,
    passes: int | None = None,
    chunk_size: int | None,
) -> list[Part]:
    """``compute`` for all examples, so many at a time as ``engine`` has memory for in so many passes."""
    with exact_autograd(model, engine.perturbed):
        # A size that is given needs no count; but of rows other than the contrasts the engine hears only here.
        needed = 0 if chunk_size and passes is None else engine.bytes_per_example(inputs, passes)
        size = chunk_size or examples_that_fit(needed, inputs.device)
        return list(in_chunks(compute, len(inputs), size, may_halve=chunk_size is None))


def parameter_blocks(
    model: nn.Module, wrt: str | Sequence[str], *, trainable_only: bool
) -> tuple[dict[str, list[str]], dict[str, nn.Parameter]]:
    """Names of the parameters in each block, and the parameters by name; a shared one has one name."""
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point() or p.is_complex()}
    parameters = {name: p for name, p in parameters.items() if p.requires_grad or not trainable_only}
    canonical = {id(p): name for name, p in parameters.items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    single = dict(model.named_parameters(remove_duplicate=False))
    kind = "parameters that require a gradient" if trainable_only else "parameters"

    def names(members: Iterable[nn.Parameter]) -> list[str]:
        return [canonical[id(p)] for p in members if id(p) in canonical]

    expected = f"wrt must be one of {_WRT}, 'input:NAME', Patches(...) or a list of modules or parameters, got {wrt!r}."
    if isinstance(wrt, str):
        if wrt not in _WRT:
            hint = f" To perturb it pass the list [{wrt!r}]." if wrt in modules or wrt in single else ""
            raise ValueError(expected + hint)
        if not parameters:
            raise ValueError(f"wrt={wrt!r} needs a model with {kind}, got one without. Use wrt='input'.")
        owned = {name: names(module.parameters(recurse=False)) for name, module in model.named_modules()}
        layers = {name: group for name, group in owned.items() if group}
        groups = layers if wrt == "layers" else {"parameters": list(parameters)}
    elif not isinstance(wrt, Sequence) or not all(isinstance(name, str) for name in wrt):
        raise TypeError(expected)
    elif not wrt or len(set(wrt)) < len(wrt):
        raise ValueError(f"wrt must list at least one module, each once, got {list(wrt)}.")
    else:
        unknown = [name for name in wrt if name not in modules and name not in single]
        if unknown:
            known = list(modules)[1:]  # without the model itself
            raise ValueError(
                f"unknown module {unknown[0]!r}: the model has {known[:20]}{' ...' if len(known) > 20 else ''}. "
                "Take names from model.named_modules() or model.named_parameters()."
            )
        groups = {name: names(modules[name].parameters() if name in modules else [single[name]]) for name in wrt}
    for name, group in groups.items():
        if not group:
            what = f"module {name!r} ({type(modules[name]).__name__})" if name in modules else f"parameter {name!r}"
            raise ValueError(f"{what} has no {kind} to perturb. Name one that has.")
    for name in chain.from_iterable(groups.values()):
        if parameters[name].is_meta:
            raise ValueError(
                f"parameter {name!r} is on the meta device, where it has no values to perturb. Load the whole model, "
                "without offloading, or perturb its input."
            )
        if parameters[name].is_complex():  # a step along one has two real directions, and a Gram two definitions
            raise ValueError(
                f"parameter {name!r} is complex ({parameters[name].dtype}): the metric tensor needs real ones. "
                "Keep it as its real view, torch.view_as_real(parameter), or list the modules that are real."
            )
    return groups, parameters


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def exact_autograd(model: nn.Module, perturbed: Sequence[nn.Parameter]) -> Iterator[None]:
    """Record all that autograd needs, in full precision, for these parameters only; afterwards all is as before.

    One thread at a time: what is changed in PyTorch and in the model, others would see and restore.
    """
    with _ONE_AT_A_TIME, _changed(model, perturbed):
        yield


@contextmanager
def _changed(model: nn.Module, perturbed: Sequence[nn.Parameter]) -> Iterator[None]:
    everything = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    before, wanted = [p.requires_grad for p in everything], {id(p) for p in perturbed}
    cudnn: Any = torch.backends.cudnn
    enabled = cudnn.enabled
    # TF32, cuDNN's default, keeps 10 bits: too few to tell a rank.
    precision = {backend: backend.fp32_precision for backend in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)}
    try:
        for p in everything:
            p.requires_grad_(id(p) in wanted)
        for backend in precision:
            backend.fp32_precision = "ieee"
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # cuDNN's recurrent layers have no backward pass in evaluation mode.
            cudnn.enabled = False
        # A compiled graph goes backward once; its own code gives the same numbers. A reentrant checkpoint hides the
        # parameters inside it from the graph: what it holds is called as it is. Autocast is for the model alone
        # (``Inputs.logits``): our own products keep their digits.
        with (
            torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext(),
            patch.object(CheckpointFunction, "apply", lambda function, preserve_rng_state, *args: function(*args)),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        cudnn.enabled = enabled
        for backend, value in precision.items():
            backend.fp32_precision = value
        for p, flag in zip(everything, before, strict=True):
            p.requires_grad_(flag)
