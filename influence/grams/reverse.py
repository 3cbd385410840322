"""One reverse pass for all classes at once, for gradients of activations only.

PyTorch's own batched backward (``is_grads_batched``) would do, but it copies the activations once for each class in
batch normalisation, and takes the gradients of the weights along: 1.9 times the floor for all layers of a ResNet50
instead of 1.5. The nodes that cost most have a VJP in their ``Rule``; every other one runs its own backward formula
under ``vmap``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence.grams.graph import Graph
from influence.grams.rules import RULES, Grads, Node, Operand, Site, shape_of
from influence.kernels.gram import products
from influence.kernels.relu_norm_backward import fused, relu_norm_backward_triton
from influence.memory import is_out_of_memory


def reverse(graph: Graph, seeds: Tensor, collect: Callable[[Site, Tensor], None]) -> None:
    """Send seeds back through the graph and hand over the gradient at each site.

    Args:
        graph: From ``read_graph``.
        seeds: ``(m, N, K)``, m gradients of the logits of N examples.
        collect: Called with each site, latest first, and the gradient ``(m, ...)`` of its output, which it must not
            change.
    """
    visited, further = graph.visited()
    if graph.root[0] not in visited:
        return
    pending: dict[Node, _Waiting] = {}
    ahead: dict[Node, tuple[Tensor, int, Tensor]] = {}
    _deliver(pending, graph.root, seeds, owned=False)
    with torch.no_grad():
        for node in graph.order:
            if node not in visited or node not in pending:
                continue
            waiting = pending.pop(node)
            if node in graph.sites and waiting.grads[0] is not None:
                collect(graph.sites[node], waiting.grads[0])
            made = _relu_norm(node, waiting.grads[0], ahead, visited) if node in further else None
            if made is not None:
                _deliver(pending, node.next_functions[0], made, owned=True)
            elif node in further:
                _pass_on(node, waiting, pending, [source in visited for source, _ in node.next_functions])
            del waiting


@dataclass
class _Waiting:
    """What a node waits for: the gradients of its outputs, and which of them nothing else looks at."""

    grads: Grads
    owned: list[bool]


def _deliver(pending: dict[Node, _Waiting], edge: tuple[Node, int], grad: Tensor, *, owned: bool) -> None:
    """Add to what a node waits for, in place where the sum is ours alone."""
    node, output = edge
    outputs = len(node._input_metadata)
    waiting = pending.setdefault(node, _Waiting([None] * outputs, [False] * outputs))
    before = waiting.grads[output]
    if before is None:
        waiting.grads[output], waiting.owned[output] = grad, owned
        return
    if waiting.owned[output]:
        before.add_(grad)
    else:
        waiting.grads[output] = grad.add_(before) if owned else before + grad
    waiting.owned[output] = True


def _pass_on(node: Node, waiting: _Waiting, pending: dict[Node, _Waiting], wanted: Sequence[bool]) -> None:
    """Deliver the gradients of a node's inputs, as far as they are wanted."""
    grads = waiting.grads
    below = vjp(node, grads, wanted, over=waiting.owned[0])
    alone = waiting.owned[0] and sum(grad is grads[0] for grad in below) == 1
    for edge, grad, want in zip(node.next_functions, below, wanted, strict=True):
        if want and grad is not None:
            fitted = _fit(grad, *edge)
            owned = node.name() in RULES and (alone if fitted is grads[0] else _is_new(fitted, grads))
            _deliver(pending, edge, fitted, owned=owned)


def _pass_on(node: Node, waiting: _Waiting, pending: dict[Node, _Waiting], wanted: Sequence[bool]) -> None:
    """Deliver the gradients of a node's inputs, as far as they are wanted."""
    grads = waiting.grads
    below = vjp(node, grads, wanted, over=waiting.owned[0])
    alone = waiting.owned[0] and sum(grad is grads[0] for grad in below) == 1
    for edge, grad, want in zip(node.next_functions, below, wanted, strict=True):
        if want and grad is not None:
            fitted = _fit(grad, *edge)
            owned = node.name() in RULES and (alone if fitted is grads[0] else _is_new(fitted, grads))
            _deliver(pending, edge, fitted, owned=owned)


def _over(node: Node, waiting: _Waiting, wanted: Sequence[bool]) -> Grads | None:
    """The gradient of the first input, written over that of the output; None where it cannot be."""
    rule, grad = RULES.get(node.name()), waiting.grads[0]
    if rule is None or rule.over is None or grad is None or not waiting.owned[0] or any(wanted[1:]):
        return None
    return [grad] + [None] * (len(wanted) - 1) if rule.over(node, grad) else None


def _relu_norm(
    node: Node, grad: Tensor | None, ahead: dict[Node, tuple[Tensor, int, Tensor]], visited: set[Node]
) -> Tensor | None:
    """Gradient of the input of a ReLU, or of a BatchNorm before one, where one kernel makes both; None elsewhere.

    From the ReLU on, ``ahead`` keeps for the BatchNorm the gradients of its output, with its version, and of its input.
    """
    if node in ahead:
        masked, version, scaled = ahead.pop(node)
        # Where the BatchNorm has another user, the gradient of that one was added.
        return scaled if grad is masked and masked._version == version else None
    if grad is None or node.name() != "ReluBackward0":
        return None
    source = node.next_functions[0][0]
    # relu(norm(z)), or relu(norm(z) + identity)
    for norm, _ in source.next_functions if source.name() == "AddBackward0" else node.next_functions:
        if norm not in visited or not norm.name().endswith("BatchNormBackward0") or shape_of(norm) != shape_of(node):
            continue
        rule, ones = RULES[norm.name()], grad.new_ones(1, 1, grad.shape[2], *(1,) * (grad.ndim - 3))
        scale = rule.vjp and rule.vjp(norm, [ones], [below in visited for below, _ in norm.next_functions])
        if scale and scale[0] is not None:
            given = grad, node._saved_result, scale[0].flatten()
            if fused(*given):
                masked, scaled = relu_norm_backward_triton(*given)
                ahead[norm] = masked, masked._version, scaled
                return masked
    return None


def _is_new(tensor: Tensor, grads: Grads) -> bool:
    """Whether a rule made memory for a gradient, each entry with a place of its own."""
    memory = tensor.untyped_storage()
    return memory.nbytes() == tensor.numel() * tensor.itemsize and all(
        grad is None or grad.untyped_storage()._cdata != memory._cdata for grad in grads
    )


def _fit(grad: Tensor, node: Node, output: int) -> Tensor:
    """Undo what broadcasting and promotion did on the way forward."""
    meta = node._input_metadata[output]
    shape = shape_of(node, output)
    if tuple(grad.shape[1:]) != shape:
        grad = grad.sum_to_size(grad.shape[0], *(1,) * (grad.ndim - 1 - len(shape)), *shape)
        grad = grad.reshape(grad.shape[0], *shape)
    if grad.is_complex() and not meta.dtype.is_complex:
        grad = grad.real
    return grad.to(meta.dtype)


def vjp(node: Node, grads: Grads, wanted: Sequence[bool], *, over: bool = False) -> Grads:
    """Gradients of a node's inputs, each ``(m, ...)``, from those of its outputs.

    Args:
        node: The node.
        grads: One for each output, None where there is none.
        wanted: Which inputs are asked for; the others may come back as None.
        over: Whether that of the first output may be overwritten.

    Returns:
        One for each input.
    """
    rule, first = RULES.get(node.name()), grads[0]
    if rule is not None and rule.over is not None and over and first is not None and not any(wanted[1:]):
        if rule.over(node, first):
            return [first] + [None] * (len(wanted) - 1)
    if rule is not None and rule.vjp is not None:
        result = rule.vjp(node, grads, wanted)
        if result is not None:
            return result
    return _formula(node, grads, wanted)


def _formula(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads:
    """The node's own backward formula, for all classes by ``vmap``, or one by one where that does not work."""
    given = [i for i, grad in enumerate(grads) if grad is not None]
    tensors = [grad for grad in grads if grad is not None]
    if not given:
        return [None] * len(wanted)
    filled: list[int] = []
    in_python = isinstance(node, torch.autograd.function.BackwardCFunction)

    def run(*parts: Tensor) -> tuple[Tensor, ...]:
        full: Grads = [None] * len(grads)
        for i, part in zip(given, parts, strict=True):
            full[i] = part
        result = (node.apply if in_python else node)(*full)
        result = result if isinstance(result, tuple) else (result,)
        filled[:] = [i for i, want in enumerate(wanted) if want and result[i] is not None]
        return tuple(result[i] for i in filled)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = torch.vmap(run)(*tensors)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        rows = [run(*(tensor[k] for tensor in tensors)) for k in range(len(tensors[0]))]
        parts = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    result: Grads = [None] * len(wanted)
    for i, part in zip(filled, parts, strict=True):
        result[i] = part
    return result


def vector_gram(operand: Operand, rows: Tensor) -> tuple[str, Tensor]:
    """Gram of the gradients ``(N, m, *shape)`` of a parameter itself.

    Args:
        operand: The parameter.
        rows: Gradients of what its node takes; they go back through whatever picked entries of the parameter.

    Returns:
        Its name and the Gram ``(N, m, m)``.
    """
    if operand.picks:
        examples, classes = rows.shape[:2]
        flat = rows.flatten(0, 1)
        for node in operand.picks:
            (back,) = vjp(node, [flat], [True])[:1]
            assert back is not None
            flat = back
        rows = flat.unflatten(0, (examples, classes))
    return operand.name, products(rows.reshape(*rows.shape[:2], -1))
