"""One reverse pass for all classes at once, for gradients of activations only.

PyTorch's own batched backward (``is_grads_batched``) would do, but it copies the activations once for each class in
batch normalisation, and takes the gradients of the weights along. The nodes that cost most are written out here; every
other one runs its own backward formula under ``vmap``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from influence.memory import is_out_of_memory
from influence.rules.graph import Graph, Node, Site, leading, shape_of

Grads = list[Tensor | None]

# From so many on a matrix product for each example keeps a processor busy.
_MANY_PIXELS = 64


def reverse(graph: Graph, seeds: Tensor, collect: Callable[[Site, Tensor], None]) -> None:
    """Send the seeds of all classes back through the graph and hand over the gradient at each site.

    Args:
        graph: From ``read_graph``.
        seeds: ``(m, N, K)``, one gradient of the logits for each of m classes.
        collect: Called with each site, latest first, and the gradient ``(m, ...)`` of its output, which lasts for the
            call only.
    """
    visited, further = leading(graph)
    if graph.root[0] not in visited:
        return
    pending: dict[Node, Grads] = {}
    owned: set[int] = set()
    _deliver(pending, owned, graph.root, seeds)
    with torch.no_grad():
        for node in graph.order:
            if node not in visited or node not in pending:
                continue
            grads = pending.pop(node)
            if node in graph.sites and grads[0] is not None:
                collect(graph.sites[node], grads[0])
            if node not in further:
                continue
            wanted = [source in visited for source, _ in node.next_functions]
            ours = id(grads[0]) in owned
            for grad in grads:
                owned.discard(id(grad))
            kind = node.name()
            below = _IN_PLACE[kind](node, grads) if ours and kind in _IN_PLACE and not any(wanted[1:]) else None
            below = step(node, grads, wanted) if below is None else below
            del grads
            for (source, output), grad, want in zip(node.next_functions, below, wanted, strict=True):
                if want and grad is not None:
                    fitted = _fit(grad, source, output)
                    if kind in _FRESH and fitted is grad:
                        owned.add(id(grad))
                    _deliver(pending, owned, (source, output), fitted)
            del below


def _deliver(pending: dict[Node, Grads], owned: set[int], edge: tuple[Node, int], grad: Tensor) -> None:
    """Add to what a node waits for, in place where the sum is ours alone."""
    node, output = edge
    grads = pending.setdefault(node, [None] * len(node._input_metadata))
    before = grads[output]
    if before is None:
        grads[output] = grad
    elif id(before) in owned:
        before += grad
        owned.discard(id(grad))
    elif id(grad) in owned:
        grad += before
        grads[output] = grad
    else:
        total = before + grad
        grads[output] = total
        owned.add(id(total))


def _fit(grad: Tensor, node: Node, output: int) -> Tensor:
    """Undo what broadcasting and promotion did on the way forward."""
    meta = node._input_metadata[output]
    shape = tuple(int(size) for size in meta.shape)
    if tuple(grad.shape[1:]) != shape:
        grad = grad.sum_to_size(grad.shape[0], *(1,) * (grad.ndim - 1 - len(shape)), *shape)
        grad = grad.reshape(grad.shape[0], *shape)
    return grad.to(meta.dtype)


def step(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads:
    """Gradients of a node's inputs, each ``(m, ...)``, from those of its outputs.

    Args:
        node: The node.
        grads: One for each output, None where there is none.
        wanted: Which inputs are asked for; the others may come back as None.

    Returns:
        One for each input.
    """
    handler = _HANDLERS.get(node.name())
    if handler is not None:
        result = handler(node, grads, wanted)
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

    def run(*parts: Tensor) -> tuple[Tensor, ...]:
        full: Grads = [None] * len(grads)
        for i, part in zip(given, parts, strict=True):
            full[i] = part
        result = (node.apply if _in_python(node) else node)(*full)
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


def _in_python(node: Node) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _first_only(grads: Grads) -> Tensor | None:
    return grads[0] if all(grad is None for grad in grads[1:]) else None


def _convolution(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    grad, weight = grads[0], node._saved_weight.detach()
    if grad is None or any(wanted[1:]):
        return None
    classes, batch = grad.shape[:2]
    shape = (classes * batch, *shape_of(*node.next_functions[0])[1:])
    if _is_product(node, grad):
        # Several times as fast as a library's convolution; the pixels that a stride left out get zeros.
        flat = grad.flatten(0, 1).flatten(2)
        seen = torch.bmm(weight.flatten(1).T.expand(len(flat), -1, -1), flat)
        if all(step == 1 for step in node._saved_stride):
            return [seen.view(classes, batch, *shape[1:]), None, None]
        result = grad.new_zeros(shape)
        index: tuple[Any, ...] = (..., *(slice(None, None, step) for step in node._saved_stride))
        result[index] = seen.view(result[index].shape)
        return [result.unflatten(0, (classes, batch)), None, None]
    if _is_convolution_back(node, grad):
        # A convolution with the weight turned round: a library's forward pass is its fastest.
        turned = weight.flip(*range(2, weight.ndim)).transpose(0, 1)
        sides = zip(weight.shape[2:], node._saved_padding, node._saved_dilation, strict=True)
        rest = [dilation * (size - 1) - padding for size, padding, dilation in sides]
        dilation = [int(step) for step in node._saved_dilation]
        result = torch.convolution(
            grad.flatten(0, 1), turned, None, [1] * len(rest), rest, dilation, False, [0] * len(rest), 1
        )
        return [result.unflatten(0, (classes, batch)), None, None]
    # Only the shape of the input matters: untouched memory on a CPU, a single number on a GPU.
    like = grad.new_empty(shape) if grad.device.type == "cpu" else grad.new_empty(()).expand(shape)
    result = torch.ops.aten.convolution_backward(
        grad.flatten(0, 1),
        like,
        weight,
        None,
        node._saved_stride,
        node._saved_padding,
        node._saved_dilation,
        node._saved_transposed,
        node._saved_output_padding,
        node._saved_groups,
        [True, False, False],
    )[0]
    return [result.unflatten(0, (classes, batch)), None, None]


def _is_product(node: Node, grad: Tensor) -> bool:
    """A 1x1 convolution that a batched matrix product does faster: one with many pixels, or that skips some."""
    one = all(size == 1 for size in node._saved_weight.shape[2:])
    plain = node._saved_groups == 1 and not any(node._saved_padding) and not node._saved_transposed
    many = grad.device.type == "cpu" and math.prod(grad.shape[3:]) >= _MANY_PIXELS
    return one and plain and (many or any(step > 1 for step in node._saved_stride))


def _is_convolution_back(node: Node, grad: Tensor) -> bool:
    """A convolution without a stride over many pixels, at the ends of which no padding is left out."""
    sides = zip(node._saved_weight.shape[2:], node._saved_padding, node._saved_dilation, strict=True)
    inside = all(dilation * (size - 1) >= padding for size, padding, dilation in sides)
    plain = node._saved_groups == 1 and not node._saved_transposed and all(s == 1 for s in node._saved_stride)
    many = grad.device.type == "cpu" and math.prod(grad.shape[3:]) >= 4 * _MANY_PIXELS
    return plain and inside and many


def _batch_norm(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    grad = grads[0]
    if grad is None or node._saved_training or any(wanted[1:]) or node._saved_running_var is None:
        return None
    return [grad * _scale(node, grad), None, None]


def _scale(node: Node, grad: Tensor) -> Tensor:
    scale = (node._saved_running_var.double() + node._saved_eps).rsqrt()
    if node._saved_weight is not None:
        scale = scale * node._saved_weight.detach().double()
    return scale.to(grad.dtype).view(-1, *(1,) * (grad.ndim - 3))


def _batch_norm_in_place(node: Node, grads: Grads) -> Grads | None:
    grad = grads[0]
    if grad is None or node._saved_training or node._saved_running_var is None:
        return None
    return [grad.mul_(_scale(node, grad)), None, None]


def _layer_norm(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    grad = grads[0]
    if grad is None or any(wanted[1:]):
        return None
    weight, axes = node._saved_weight, tuple(range(-len(node._saved_normalized_shape), 0))
    normal = (node._saved_input.detach() - node._saved_result1) * node._saved_result2
    inner = grad if weight is None else grad * weight.detach()
    inner = inner - inner.mean(dim=axes, keepdim=True) - normal * (inner * normal).mean(dim=axes, keepdim=True)
    return [inner * node._saved_result2, None, None]


def _group_norm(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    grad = _first_only(grads)
    if grad is None or any(wanted[1:]):
        return None
    saved = node._saved_input.detach()
    batch, groups = saved.shape[0], node._saved_group
    mean, deviation = (node._saved_result1.view(batch, groups, 1), node._saved_result2.view(batch, groups, 1))
    normal = (saved.reshape(batch, groups, -1) - mean) * deviation
    if node._saved_weight is not None:
        grad = grad * node._saved_weight.detach().view(-1, *(1,) * (saved.ndim - 2))
    inner = grad.reshape(len(grad), batch, groups, -1)
    inner = inner - inner.mean(dim=-1, keepdim=True) - normal * (inner * normal).mean(dim=-1, keepdim=True)
    return [(inner * deviation).view(len(grad), *saved.shape), None, None]


def _addmm(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    if grads[0] is None or wanted[0] or wanted[2]:
        return None
    result = grads[0] @ node._saved_mat2.detach().mT
    return [None, result if node._saved_alpha == 1 else node._saved_alpha * result, None]


def _mm(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    if grads[0] is None or wanted[1]:
        return None
    return [grads[0] @ node._saved_mat2.detach().mT, None]


def _relu(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    del wanted
    return None if grads[0] is None else [torch.ops.aten.threshold_backward(grads[0], node._saved_result, 0)]


def _relu_in_place(node: Node, grads: Grads) -> Grads | None:
    grad = grads[0]
    if grad is None:
        return None
    torch.ops.aten.threshold_backward.grad_input(grad, node._saved_result, 0, grad_input=grad)
    return [grad]


def _add(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    del wanted
    return [grads[0], grads[0]] if node._saved_alpha == 1 else None


def _cat(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    grad = grads[0]
    # The index comes back unsigned: a negative dimension is one of the last numbers of 64 bits.
    axis = (node._saved_dim + 2**63) % 2**64 - 2**63
    if grad is None or len(wanted) != len(node.next_functions):
        return None
    shapes = [() if source is None else shape_of(source, output) for source, output in node.next_functions]
    if any(len(shape) != grad.ndim - 1 for shape in shapes):
        return None
    axis = axis % (grad.ndim - 1)
    parts = grad.split([shape[axis] for shape in shapes], dim=axis + 1)
    return list(parts)


def _view(node: Node, grads: Grads, wanted: Sequence[bool]) -> Grads | None:
    del wanted
    grad = grads[0]
    if grad is None:
        return None
    source, output = node.next_functions[0]
    shape = shape_of(source, output)
    if math.prod(shape) != math.prod(grad.shape[1:]):
        return None
    return [grad.reshape(len(grad), *shape)]


_HANDLERS: dict[str, Callable[[Any, Grads, Sequence[bool]], Grads | None]] = {
    "AddBackward0": _add,
    "AddmmBackward0": _addmm,
    "CatBackward0": _cat,
    "ConvolutionBackward0": _convolution,
    "CudnnBatchNormBackward0": _batch_norm,
    "MmBackward0": _mm,
    "NativeBatchNormBackward0": _batch_norm,
    "NativeGroupNormBackward0": _group_norm,
    "NativeLayerNormBackward0": _layer_norm,
    "ReluBackward0": _relu,
    "UnsafeViewBackward0": _view,
    "ViewBackward0": _view,
}

# What these give is no view of anything and goes to one place: the next one may work in it.
_FRESH = {
    "AddmmBackward0",
    "ConvolutionBackward0",
    "CudnnBatchNormBackward0",
    "MmBackward0",
    "NativeBatchNormBackward0",
    "ReluBackward0",
}
_IN_PLACE: dict[str, Callable[[Any, Grads], Grads | None]] = {
    "CudnnBatchNormBackward0": _batch_norm_in_place,
    "NativeBatchNormBackward0": _batch_norm_in_place,
    "ReluBackward0": _relu_in_place,
}
