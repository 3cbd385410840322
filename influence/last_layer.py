"""The last layer: with few features the layers before it need few passes, and FI of the input may need none."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from influence.contrasts import Classes, LogitRows
from influence.grams.rules import Node
from influence.inputs import Batch, Inputs

# Where the features enter each kind of node that a linear layer leaves in the graph.
_PLACES = {"AddmmBackward0": 1, "MmBackward0": 0}


@dataclass(frozen=True)
class NarrowLayer:
    """The linear map from d features to K logits, with d < K - 1.

    The Jacobian of the contrasts is C J, with C (K - 1, d) the contrasts of the rows of the weight and J (d, p) the
    Jacobian of the features, and its Gram is C (J J^T) C^T: the same numbers for d backward passes instead of K - 1.

    Attributes:
        edge: Where the features' gradient enters the graph.
        weight: ``(K, d)``.
        classes: Which contrasts.
    """

    edge: GradientEdge
    weight: Tensor
    classes: Classes

    @classmethod
    def of(cls, logits: Tensor, rows: LogitRows | None = None) -> NarrowLayer | None:
        """Read it off the graph of logits ``(N, K)``; None where something else made them or d is not small.

        None too for ``rows`` that are not the contrasts, of which a few may be all that is asked for.
        """
        node, classes = logits.grad_fn, Classes.of(logits) if rows is None else rows
        # A hook may want to change the gradient of the logits.
        if node is None or node.name() not in _PLACES or logits._backward_hooks or not isinstance(classes, Classes):
            return None
        others = list(node.next_functions)
        source, output = others.pop(_PLACES[node.name()])
        # A weight that is computed would hide a second way into the logits.
        if source is None or not all(_is_leaf(other) for other, _ in others) or getattr(node, "_saved_alpha", 1) != 1:
            return None
        weight = node._saved_mat2.detach().T  # type: ignore[attr-defined]  # PyTorch types no node
        return cls(GradientEdge(source, output), weight, classes) if weight.shape[1] < len(weight) - 1 else None

    @property
    def width(self) -> int:
        """Features d."""
        return self.weight.shape[1]

    def seeds(self, examples: int) -> Tensor:
        """One gradient of the features for each of them, ``(d, N, d)``."""
        unit = torch.eye(self.width, dtype=self.weight.dtype, device=self.weight.device)
        return unit[:, None].expand(-1, examples, -1).contiguous()

    @cached_property
    def contrasts(self) -> Tensor:
        """C of each example, ``(N, K - 1, d)`` float64."""
        weight, order = self.weight.double(), self.classes.order
        return weight[order[:, :-1]] - weight[order[:, -1:]]

    def spread(self, gram: Tensor) -> Tensor:
        """Gram of the contrasts ``(N, K - 1, K - 1)`` from that of the features ``(N, d, d)``, both float64."""
        wide = self.contrasts @ gram @ self.contrasts.mT
        return (wide + wide.mT) / 2


def _is_leaf(node: Node | None) -> bool:
    """Whether an input is a parameter, as it is or transposed, or takes no gradient."""
    if node is not None and node.name() == "TBackward0":
        ((node, _),) = node.next_functions
    return node is None or hasattr(node, "variable")


class Head(nn.Module):
    """The last layer for perturbations of its features ``(N, d)`` that the network's input can bring about.

    A feature that is exactly 0 was shut by a ReLU at all positions: no small perturbation opens it.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.classes = layer, layer.out_features

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(N, K)``."""
        return self.layer(features * (features != 0))


def head(model: nn.Module, x: Batch) -> tuple[Head, Tensor] | None:
    """The linear layer whose output is the logits, and its input, the features ``(N, d)``; None where there is none.

    FI does not depend on the coordinates of a perturbation: where the input moves the d features in all directions, FI
    of the input is FI of the features, which takes no backward pass through the network.
    """
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def listen(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        calls[:] = [(layer, inputs[0].clone(), output.clone())]

    hooks = [m.register_forward_hook(listen) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        with torch.no_grad():
            logits = Inputs.of(x).logits(model)
    finally:
        for hook in hooks:
            hook.remove()
    if not calls or calls[-1][1].ndim != 2 or not torch.equal(calls[-1][2], logits):
        return None
    return Head(calls[-1][0]).eval(), calls[-1][1]
