"""Gradients of parameters, and their Grams, for a chunk of examples: one forward and one reverse pass, with rules.

Nothing that a rule assumes is trusted. In every chunk the gradients must be PyTorch's own and lie at the examples they
are taken for (``independence.Weighting``), and the logits must be the same in another batch; in the first one the Gram
of one example, or of two, must be autograd's, for a random combination of the classes. What fails takes the autograd
path: one example alone, one class at a time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from influence.contrasts import Classes, LogitRows, Rows
from influence.grams.gradients import AnyGradient
from influence.grams.graph import Graph, read_graph
from influence.grams.reverse import reverse
from influence.grams.rules import RULES, Layout, Node, Site, in_order_of
from influence.independence import (
    Weighting,
    alone,
    gradients,
    may_be_linear,
    random_weights,
    require_additive,
    require_differentiable,
    require_doubled,
    require_finite_gradients,
    require_independent,
    require_reproducible,
    require_same,
    unreached,
)
from influence.inputs import Inputs, forward
from influence.kernels.gram import products
from influence.kernels.tolerances import REVERSE
from influence.last_layer import NarrowLayer
from influence.memory import is_out_of_memory, require_room

# Models and parameters whose slower way has been announced.
_ANNOUNCED: set[tuple[str, ...]] = set()
# Of so many examples of the first chunk the Gram of one is compared with autograd's: of one at least, of two at most.
_FOR_EACH_COMPARED = 8


@dataclass(frozen=True)
class Pass(Generic[Rows]):
    """A forward pass of N examples, read and found independent.

    Attributes:
        logits: ``(N, K)`` with their graph.
        graph: Of the logits.
        dtype: The coarsest that occurred.
        rows: The m rows of each example's Jacobian that are looked for.
        seeds: ``(m, N, K)``, what their backward passes start from.
        probes: ``(R, m)`` float64, random combinations of the rows of the first R examples, for the comparison with
            autograd; R is 0 where it has been made.
    """

    logits: Tensor
    graph: Graph
    dtype: torch.dtype
    rows: Rows
    seeds: Tensor
    probes: Tensor

    def probe_seeds(self) -> list[Tensor]:
        """What autograd starts from for the comparison: ``(1, K)`` for each of the first R examples."""
        return [(v @ self.seeds[:, n].double()).to(self.seeds.dtype)[None] for n, v in enumerate(self.probes)]


class ParameterPasses:
    """What every computation on the gradients of parameters begins with: a verified pass, chunk by chunk.

    ``refused`` are the parameters that take the autograd path, with the reason.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._model = model
        self._parameters = dict(parameters)
        # Those that must require a gradient.
        self.perturbed = list(parameters.values())
        self._generator = torch.Generator().manual_seed(0)
        self._compared = False
        # Logits of the first example alone, until they have been compared.
        self._first: Tensor | None = None
        # Parameters that no logits have depended on.
        self._unused: set[str] = set()
        # Which examples of the chunk a gradient reached at each site.
        self._reached: list[tuple[Site, Tensor]] = []
        self.refused: dict[str, str] = {}

    def bytes_per_example(self, inputs: Inputs, passes: int | None = None) -> int:
        """Memory that an example takes in so many backward passes; None: in K - 1."""
        logits = self._first = alone(self._model, inputs)
        return read_graph(logits, {}).bytes_per_example(passes or logits.shape[1] - 1)

    def _forward(self, inputs: Inputs, rows: Callable[[Tensor], Rows]) -> Pass[Rows]:
        self._reached.clear()
        logits = forward(self._model, inputs)
        graph = read_graph(logits, {name: p for name, p in self._parameters.items() if name not in self.refused})
        self.refused.update(graph.refused)
        dtype, chosen = graph.coarsest_dtype(), rows(logits)
        seeds = chosen.seeds(logits.dtype)
        require_independent(self._model, inputs, logits.detach(), dtype)
        found = {operand.name for site in graph.sites.values() for operand in site.operands}
        cut = {
            name: p for name, p in self._parameters.items() if name not in found | self.refused.keys() | self._unused
        }
        require_differentiable(self._model, inputs, cut, logits.detach(), dtype)
        self._unused.update(cut)
        self._announce_unused(cut)
        compared = 0 if self._compared else 1 if len(inputs) < 2 * _FOR_EACH_COMPARED else 2
        drawn = torch.randn(compared, len(seeds), generator=self._generator, dtype=torch.float64, device="cpu")
        return Pass(logits, graph, dtype, chosen, seeds, drawn.to(seeds.device))

    def _collect_all(
        self, graph: Graph, seeds: Tensor, dtype: torch.dtype, take: Callable[[list[AnyGradient]], None]
    ) -> None:
        """Hand the gradients at each site of a graph to ``take``, for ``(m, N, ...)`` seeds.

        What fails on the way, or is not PyTorch's own gradient, is refused.
        """
        weighting = Weighting.draw(seeds, dtype, self._generator)
        waiting = dict(graph.sites)
        truth: dict[Node, Tensor | None] = {}

        def refuse(site: Site, reason: object) -> None:
            self.refused.update(dict.fromkeys((operand.name for operand in site.operands), str(reason)))

        def collect(site: Site, grad: Tensor) -> None:
            del waiting[site.node]
            try:
                layout, reached = _layout(site, grad, truth.pop(site.node), weighting)
                self._reached.append((site, reached.to(seeds.device)))
                take(list(RULES[site.node.name()].gradients(site, grad, layout)))  # type: ignore[misc]
            except Exception as error:  # whatever a rule stumbles over, autograd has another way
                if is_out_of_memory(error):
                    raise
                refuse(site, error)

        try:
            truth = _pytorch_gradients(graph, weighting.row(seeds)[0])
            reverse(graph, seeds, collect)
        except Exception as error:  # the same for the way to the sites
            if is_out_of_memory(error):
                raise
            for site in waiting.values():
                refuse(site, f"its graph cannot be followed ({error})")
        for node, site in waiting.items():
            row = truth.get(node)
            if row is not None and bool(row.any()):
                refuse(site, "its gradient does not arrive")

    def _by_pytorch(
        self, inputs: Inputs, batched: Tensor, n: int, seed: Tensor, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Autograd's gradient of each parameter from a seed ``(1, K)`` for example n alone.

        The example must have the logits that it has in the batch.
        """
        one, batched = inputs[n : n + 1], batched[n : n + 1]
        logits, self._first = self._first if self._first is not None else alone(self._model, one), None
        require_same(self._model, one, logits.detach(), batched, dtype)
        grads = gradients(logits, self.perturbed, seed)
        require_finite_gradients(grads)
        return dict(zip(self._parameters, grads, strict=True))

    def _refuse(self, names: set[str], reason: str) -> bool:
        """Send parameters the autograd path; whether one of them did not take it before."""
        new = names - self.refused.keys()
        self.refused.update(dict.fromkeys(new, reason))
        return bool(new)

    def _refuse_what_is_missed(self, inputs: Inputs, logits: Tensor, rows: LogitRows, dtype: torch.dtype) -> bool:
        """Whether alone an example has a gradient of a parameter that no gradient reached in the chunk."""
        missed = unreached(torch.stack([reached for _, reached in self._reached])) if self._reached else None
        if missed is None:
            return False
        names = {operand.name for site, reached in self._reached if not reached[missed] for operand in site.operands}
        seeds = rows.seeds(torch.float64)[:, missed]
        weights = random_weights(len(seeds), self._generator).to(logits.device)
        seed = torch.tensordot(weights, seeds, dims=1)[None].to(logits.dtype)
        grads = self._by_pytorch(inputs, logits, missed, seed, dtype)
        wrong = {name for name in names if bool(grads[name].any())}
        return self._refuse(wrong, "a batch keeps its gradient from an example")

    def _rows_of_refused(
        self, inputs: Inputs, rows: LogitRows, dtype: torch.dtype
    ) -> Iterator[tuple[int, str, Tensor]]:
        """Gradients ``(m, *shape)`` of the refused parameters, row by row by autograd, for one example at a time.

        Each with the number of its example and the name of its parameter; one without entries has none.
        """
        leaves = {name: p for name, p in self._parameters.items() if name in self.refused and p.numel()}
        tensors = list(leaves.values())
        for n in range(len(inputs) if leaves else 0):
            logits = forward(self._model, inputs[n : n + 1])
            seeds = rows.seeds(logits.dtype)[:, n : n + 1]
            rows_of_all = [gradients(logits, tensors, seed) for seed in seeds]
            found = [torch.stack(made) for made in zip(*rows_of_all, strict=True)]
            require_finite_gradients(found)
            if may_be_linear(dtype):
                for row in _largest(found):
                    for made, doubled in zip(found, gradients(logits, tensors, -2 * seeds[row]), strict=True):
                        require_doubled(made[row], doubled, logits.dtype)
                weights = random_weights(len(seeds), self._generator).to(seeds)
                seed = torch.tensordot(weights, seeds, dims=1)
                require_additive(tensors, found, gradients(logits, tensors, seed), weights, seed * logits, dtype)
            for name, made in zip(leaves, found, strict=True):
                yield n, name, made

    def _announce(self) -> None:
        """Say once which parameters go the slower way."""
        self._say_once(
            "have no exact rule and take the slower, equally exact autograd path",
            [f"{name}: {reason}" for name, reason in sorted(self.refused.items())],
        )

    def _announce_unused(self, cut: Mapping[str, nn.Parameter]) -> None:
        """Say once whose part of the metric is 0 because nothing of theirs reaches the logits."""
        self._say_once(
            "do not reach the logits of these examples, so that their metric is 0. If the model keeps a tensor that it "
            "made from them in an earlier call, as a table of attention biases, empty that first",
            sorted(name for name, parameter in cut.items() if parameter.numel()),
        )

    def _say_once(self, what: str, of: Sequence[str]) -> None:
        key = (type(self._model).__name__, what, *of)
        if not of or key in _ANNOUNCED:
            return
        _ANNOUNCED.add(key)
        shown = "; ".join(of[:5]) + (f" and {len(of) - 5} more" if len(of) > 5 else "")
        logging.getLogger("influence").warning(
            f"{key[0]}: {len(of)} of {len(self._parameters)} parameters {what} ({shown})"
        )


class ParameterGrams(ParameterPasses):
    """Contrast Grams of blocks of parameters, chunk by chunk; ``blocks`` are the names of the parameters in each."""

    def __init__(
        self, model: nn.Module, blocks: Mapping[str, Sequence[str]], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._of: dict[str, list[int]] = {}
        for b, names in enumerate(blocks.values()):
            for name in names:
                self._of.setdefault(name, []).append(b)
        super().__init__(model, {name: parameter for name, parameter in parameters.items() if name in self._of})
        self._blocks = len(blocks)

    def bytes_per_example(self, inputs: Inputs, passes: int | None = None) -> int:
        """Memory that an example takes in so many backward passes; None: those that the classes need."""
        logits = self._first = alone(self._model, inputs)
        narrow = NarrowLayer.of(logits)
        needed = logits.shape[1] - 1 if narrow is None else narrow.width
        rows = logits.shape[1] if passes is None else passes
        instead = "Name fewer blocks, or take influence.trace(..., samples=8)."
        grams = require_room(self._blocks, rows, inputs.device, instead)
        return grams + read_graph(logits, {}).bytes_per_example(1 + (needed if passes is None else passes))

    def __call__(
        self, inputs: Inputs, rows: Callable[[Tensor], LogitRows] = Classes.of
    ) -> tuple[Tensor, Tensor, torch.dtype]:
        """Compute a chunk of N examples.

        ``rows`` chooses, from logits ``(N, K)``, the m linear combinations of them whose gradients make the Gram.
        Returns log P ``(N, K)``, the contrast Grams ``(N, B, K, K)``, or ``(N, B, m, m)`` for other rows, and the
        coarsest dtype that occurred.
        """
        made = self._forward(inputs, rows)
        chosen, dtype, logits, seeds = made.rows, made.dtype, made.logits.detach(), made.probe_seeds()

        def lengths(n: int) -> Tensor:
            return squared_lengths(self._by_pytorch(inputs, logits, n, seeds[n], dtype).values())

        squares = [lengths(n) for n in range(len(seeds))]
        count = len(made.seeds)
        gram = made.seeds.new_zeros(len(inputs), self._blocks, count, count, dtype=torch.float64)
        narrow = NarrowLayer.of(made.logits, chosen)
        if narrow is None:
            quadratic = self._add(made.graph, made.seeds, gram, dtype, made.probes)
        else:
            quadratic = self._through_features(made.graph, narrow, gram, dtype, made.probes)
        del made, narrow
        self._compared = True
        differs = bool(squares) and self._refuse_what_differs(torch.stack(squares), quadratic, dtype)
        if differs:
            require_reproducible(squares[0], lengths(0), dtype)
        if differs or self._refuse_what_is_missed(inputs, logits, chosen, dtype):
            return self(inputs, rows)
        self._announce()
        for n, name, jacobian in self._rows_of_refused(inputs, chosen, dtype):
            part = products(jacobian.reshape(1, len(jacobian), -1))[0]
            for block in self._of[name]:
                gram[n, block] += part
        return chosen.log_probs, chosen.embed(gram), dtype

    def _through_features(
        self, graph: Graph, narrow: NarrowLayer, gram: Tensor, dtype: torch.dtype, probes: Tensor
    ) -> dict[str, Tensor]:
        """Send the classes through the last layer, and its features, which are fewer, through all before it."""
        last = {node: site for node, site in graph.sites.items() if node is graph.root[0]}
        seeds = narrow.classes.seeds(narrow.weight.dtype)
        quadratic = self._add(replace(graph, sites=last), seeds, gram, dtype, probes)
        below = {node: site for node, site in graph.sites.items() if node not in last}
        features = gram.new_zeros(len(gram), self._blocks, narrow.width, narrow.width)
        graph = replace(graph, sites=below, root=(narrow.edge.node, narrow.edge.output_nr))
        probes = (probes[:, None] @ narrow.contrasts[: len(probes)]).squeeze(1)
        quadratic |= self._add(graph, narrow.seeds(len(gram)), features, dtype, probes)
        for b in range(self._blocks):
            gram[:, b] += narrow.spread(features[:, b])
        return quadratic

    def _add(self, graph: Graph, seeds: Tensor, gram: Tensor, dtype: torch.dtype, probes: Tensor) -> dict[str, Tensor]:
        """Add the Grams of all sites of a graph to ``(N, B, m, m)``; see ``_quadratic``."""
        quadratic: dict[str, Tensor] = {}

        def take(found: list[AnyGradient]) -> None:
            parts = [(one.operand.name, one.gram()) for one in found]
            for name, part in parts:
                for block in self._of[name]:
                    gram[:, block].add_(part)
            if len(probes):
                quadratic.update(_quadratic(parts, probes))

        self._collect_all(graph, seeds, dtype, take)
        return quadratic

    def _refuse_what_differs(self, squares: Tensor, quadratic: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
        """Whether a Gram was another than autograd's; a parameter whose gradient no rule met has none."""
        none = squares.new_zeros(len(squares), 3)
        value, size, largest = torch.stack([quadratic.get(name, none) for name in self._parameters], dim=1).unbind(-1)
        limit = 2 * REVERSE[dtype] * torch.maximum(size, squares) + REVERSE[dtype] ** 2 * largest
        right = ((value - squares).abs() <= limit).all(dim=0).tolist()
        wrong = {name for name, holds in zip(self._parameters, right, strict=True) if not holds}
        return self._refuse(wrong, "its Gram is not autograd's")


def _largest(found: Sequence[Tensor]) -> set[int]:
    """The row of each Jacobian ``(m, *shape)`` with its largest entry, which what clips gradients clips first."""
    return {int(made.abs().argmax()) // made[0].numel() for made in found}


def squared_lengths(grads: Iterable[Tensor]) -> Tensor:
    """Of each of P gradients, ``(P,)`` float64."""
    # To single precision at least; a copy in double would take longer than the gradient.
    wide = [grad.flatten().to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
    return torch.stack([torch.dot(grad, grad).double() for grad in wide])


def _pytorch_gradients(graph: Graph, seed: Tensor) -> dict[Node, Tensor | None]:
    """Gradient of the output of each site, by PyTorch's own backward pass from one seed ``(N, ...)``."""
    if not graph.sites:
        return {}
    edges = [GradientEdge(node, 0) for node in graph.sites]
    grads = torch.autograd.grad(GradientEdge(*graph.root), edges, seed, retain_graph=True, allow_unused=True)
    return dict(zip(graph.sites, grads, strict=True))


def _quadratic(parts: Sequence[tuple[str, Tensor]], probes: Tensor) -> dict[str, Tensor]:
    """For each parameter at a site ``(R, 3)``: v^T gram v, the size of its terms, and the largest size at the site.

    ``parts`` are the names and Grams ``(N, m, m)``, of which the first R count; ``probes`` are v, ``(R, m)``.
    """
    grams = torch.stack([gram[: len(probes)] for _, gram in parts])
    value = ((grams @ probes[..., None]).squeeze(-1) * probes).sum(dim=-1)
    size = (grams.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt() * probes.abs()).sum(dim=-1).square()
    # A bias whose gradients cancel has rounding alone, of the size of what cancels.
    three = torch.stack([value, size, size.amax(dim=0).expand_as(size)], dim=-1)
    return {name: own for (name, _), own in zip(parts, three, strict=True)}


def _layout(site: Site, grads: Tensor, row: Tensor | None, weighting: Weighting) -> tuple[Layout, Tensor]:
    """The layout of our gradients ``(m, ...)`` at a site: every example's is PyTorch's ``(...)``, with its weight.

    And which examples they reach, ``(N,)`` bool.

    Where two would do, they differ only in entries without a gradient.
    """
    examples = len(weighting.weights)
    if grads.is_complex():
        raise ValueError("it meets complex numbers")
    if row is None:
        raise ValueError("PyTorch has no gradient there")
    # One example is everything, which may have no dimension.
    shape = site.shape if examples > 1 else (1, *site.shape)
    places = [i for i, size in enumerate(shape) if size > 0 and size % examples == 0]
    grads = grads.reshape(len(grads), *shape)
    row = in_order_of(grads, row.reshape(shape))
    for i in places:
        reached = weighting.reached(grads, row, i)
        if reached is not None:
            return Layout(math.prod(shape[:i]), examples), reached
    if places:
        raise ValueError("its gradient is changed on the way, or its examples cannot be told apart")
    raise ValueError("it has no batch dimension")
