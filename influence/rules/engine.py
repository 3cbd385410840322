"""Grams of the parameters for a chunk of examples: one forward and one reverse pass, rules where they hold."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from influence.contrasts import Classes, LogitRows, forward
from influence.kernels.projected import products
from influence.kernels.tolerances import REVERSE
from influence.last_layer import NarrowLayer
from influence.memory import chunk_size, is_out_of_memory, release
from influence.rules.families import grams, knows
from influence.rules.graph import Graph, Site, leading, read_graph, shape_of
from influence.rules.layout import Layout, candidates
from influence.rules.reverse import reverse

_LOG = logging.getLogger("influence")
# Models and parameters whose slower way has been announced.
_ANNOUNCED: set[tuple[str, tuple[str, ...]]] = set()
# Examples that a plan is made from, and from how many where so few leave it open which dimension counts them.
_PROBE, _PROBE_AGAIN = 2, 3
_UNCLEAR = "its batch dimension is unclear"
_LOOKUP = "EmbeddingBackward0"

Key = tuple[str, tuple[tuple[str, int], ...]]
# The nodes of a graph, with the sites among them.
Signature = tuple[tuple[str, Key | None], ...]


@dataclass
class Plan:
    """What a probe of the model has shown.

    Attributes:
        outer: Layout of each site that can be trusted.
        refused: Parameters that take the autograd path, with the reason.
        gathered: Tables looked up the same way for all examples, as positions are: no example meets them there.
        bytes_per_example: Memory that an example's activations take.
        bytes_per_pass: Memory that its gradients take, for each class.
        passes: Backward passes for the contrasts of all classes.
        seen: Graphs that the plan has been used for.
    """

    outer: dict[Key, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    gathered: set[str] = field(default_factory=set)
    bytes_per_example: int = 0
    bytes_per_pass: int = 0
    passes: int = 1
    seen: set[Signature] = field(default_factory=set)

    def refuse(self, site: Site, reason: str) -> None:
        """Send all parameters of a site the other way."""
        self.outer.pop(site.key, None)
        self.refused.update({operand.name: reason for operand in site.operands})


# Plans of models that are still in use, by parameters and inputs: a probe costs as much as an example or two.
_PLANS: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Plan]] = WeakKeyDictionary()
_MOST_PLANS = 32


class ParameterGrams:
    """Contrast Grams of blocks of parameters, chunk by chunk, with one plan for all.

    Args:
        model: The model.
        blocks: Names of the parameters in each block.
        parameters: The parameters by name.
        use_rules: Whether to use the rules at all; else everything takes the autograd path.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, Sequence[str]],
        parameters: Mapping[str, nn.Parameter],
        *,
        use_rules: bool = True,
    ) -> None:
        self._model = model
        self._of = {name: [b for b, names in enumerate(blocks.values()) if name in names] for name in parameters}
        self._parameters = {name: parameters[name] for name in parameters if self._of[name]}
        self._blocks = len(blocks)
        self._plan: Plan | None = None if use_rules else Plan(refused=dict.fromkeys(self._parameters, "asked for"))
        self.dtypes = [p.dtype for p in self._parameters.values()]
        # Not even the probe's few examples fitted.
        self._one_by_one = False
        # The plan was made in an earlier call: it holds for graphs that it has seen.
        self._remembered = False

    def prepare(self, x: Tensor) -> Plan:
        """The plan, made from the first few examples where there is none yet."""
        if self._plan is not None:
            return self._plan
        # A hook may change a gradient from one call to the next, and the graph shows nothing of it.
        plans = {} if _is_hooked(self._model) else _PLANS.setdefault(self._model, {})
        plan = plans.get(self._key(x))
        self._remembered = plan is not None
        if plan is None:
            plan = self._make_plan_that_fits(x)
            if len(plans) >= _MOST_PLANS:
                plans.clear()
            if not self._one_by_one:
                plans[self._key(x)] = plan
        self._plan = plan
        if not self._remembered:
            self._announce()
        return plan

    def _key(self, x: Tensor) -> tuple[object, ...]:
        # One example alone shows less than two, and two less than three.
        return (*self._parameters, min(len(x), _PROBE_AGAIN), tuple(x.shape[1:]), x.dtype, x.device)

    def _make_plan_that_fits(self, x: Tensor) -> Plan:
        try:
            plan = self._make_plan(x[:_PROBE])
            if _UNCLEAR in plan.refused.values() and len(x) >= _PROBE_AGAIN:
                plan = self._make_plan(x[:_PROBE_AGAIN])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._one_by_one = True
        if self._one_by_one:
            release()
            plan = self._make_plan(x[:1])
        return plan

    def chunk_size(self, x: Tensor, passes: int | None = None) -> int:
        """How many of these examples to compute at once, for so many passes; None: as the classes need."""
        plan = self.prepare(x)
        needed = plan.bytes_per_example + plan.bytes_per_pass * (plan.passes if passes is None else passes)
        return 1 if self._one_by_one else chunk_size(needed, x.device)

    def __call__(
        self, x: Tensor, rows: Callable[[Tensor], LogitRows] = Classes.of
    ) -> tuple[Tensor, Tensor, torch.dtype]:
        """Compute a chunk.

        Args:
            x: ``(N, ...)``.
            rows: Chooses, from logits ``(N, K)``, the m linear combinations of them whose gradients make the Gram: the
                contrasts with the predicted class, unless something else is given.

        Returns:
            log P ``(N, K)``, the contrast Grams ``(N, B, K, K)``, or ``(N, B, m, m)`` for other rows, and the dtype of
            the logits.
        """
        plan = self.prepare(x)
        with differentiable(self._model, list(self._parameters.values())):
            return self._chunk(x, plan, rows)

    def _chunk(self, x: Tensor, plan: Plan, rows: Callable[[Tensor], LogitRows]) -> tuple[Tensor, Tensor, torch.dtype]:
        logits = forward(self._model, x)
        classes = rows(logits)
        examples, count = len(x), classes.count
        gram = logits.new_zeros(examples, self._blocks, count, count, dtype=torch.float64)
        if len(plan.refused) < len(self._parameters):
            graph = self._read(logits, plan)
            signature = _signature(graph)
            if self._remembered and signature not in plan.seen:
                # The model computes otherwise than when the plan was made.
                _PLANS.pop(self._model, None)
                self._plan = None
                return self._chunk(x, self.prepare(x), rows)
            plan.seen.add(signature)
            # What the graph of this chunk has in another way than the probe's is not trusted here.
            sites = {node: site for node, site in graph.sites.items() if self._layout(site, plan, examples)}
            left = {o.name for site in graph.sites.values() for o in site.operands}
            left -= {o.name for site in sites.values() for o in site.operands}
            left |= set(graph.refused)

            def collect(site: Site, grad: Tensor, total: Tensor = gram) -> None:
                layout = self._layout(site, plan, examples)
                assert layout is not None
                together = len({tuple(self._of[operand.name]) for operand in site.operands}) == 1
                try:
                    parts = list(grams(site, grad, layout, together=together))
                except ValueError as error:
                    left.update(operand.name for operand in site.operands)
                    plan.refuse(site, str(error))
                    self._announce()
                    return
                for names, part in parts:
                    for block in self._of[names[0]]:
                        total[:, block] += part

            self._back(replace(graph, sites=sites), logits, classes, gram, collect)
            del graph
        else:
            left = set(self._parameters)
        if left:
            del logits
            names = [name for name in self._parameters if name in left]
            for n in range(examples):
                self._by_autograd(x[n : n + 1], names, classes[n], gram[n])
        return classes.log_probs, classes.embed(gram), classes.dtype

    def _back(
        self, graph: Graph, logits: Tensor, classes: LogitRows, gram: Tensor, collect: Callable[..., None]
    ) -> None:
        """Send the classes through the last layer, and its features, where they are fewer, through all before it."""
        narrow = NarrowLayer.of(logits) if isinstance(classes, Classes) else None
        if narrow is None or not isinstance(classes, Classes):
            reverse(graph, classes.seeds(logits.dtype), collect)
            return
        last = {node: site for node, site in graph.sites.items() if node is graph.root[0]}
        reverse(replace(graph, sites=last), classes.seeds(logits.dtype), collect)
        below = {node: site for node, site in graph.sites.items() if node not in last}
        features = gram.new_zeros(len(logits), self._blocks, narrow.width, narrow.width)
        start = (narrow.edge.node, narrow.edge.output_nr)
        reverse(replace(graph, sites=below, root=start), narrow.seeds(len(logits)), partial(collect, total=features))
        rows = narrow.contrasts(classes)
        for b in range(self._blocks):
            gram[:, b] += narrow.spread(features[:, b], rows)

    def _layout(self, site: Site, plan: Plan, examples: int) -> Layout | None:
        if any(operand.name in plan.refused for operand in site.operands):
            return None
        if examples == 1:
            return Layout(1, 1)
        outer = plan.outer.get(site.key)
        return None if outer is None else Layout(outer, examples)

    def _read(self, logits: Tensor, plan: Plan) -> Graph:
        def has_rule(name: str, kind: str, place: int) -> bool:
            return knows(kind, place) and not (kind == _LOOKUP and name in plan.gathered)

        return read_graph(logits, self._parameters, has_rule)

    def _by_autograd(self, x: Tensor, names: list[str], classes: LogitRows, gram: Tensor) -> None:
        """Add the Grams of some parameters of one example, ``(B, m, m)``, by autograd, class by class."""
        leaves = [self._parameters[name] for name in names]
        logits = forward(self._model, x)
        seeds = classes.seeds(logits.dtype)
        rows: list[list[Tensor]] = [[] for _ in names]
        for k, seed in enumerate(seeds):
            grads = torch.autograd.grad(
                logits, leaves, seed, retain_graph=k < len(seeds) - 1, allow_unused=True, materialize_grads=True
            )
            for row, grad in zip(rows, grads, strict=True):
                row.append(grad.detach().flatten())
        for name, row in zip(names, rows, strict=True):
            part = products(torch.stack(row)[None])[0]
            for block in self._of[name]:
                gram[block] += part

    # -- the plan -------------------------------------------------------------------------------------------------

    def _make_plan(self, x: Tensor) -> Plan:
        with differentiable(self._model, list(self._parameters.values())):
            plan = self._probe(x, frozenset())
            return self._probe(x, frozenset(plan.gathered)) if plan.gathered else plan

    def _probe(self, x: Tensor, gathered: frozenset[str]) -> Plan:
        """Which sites can be trusted: our reverse pass must agree with PyTorch's, and the examples must be apart."""
        logits = forward(self._model, x)
        plan = Plan(gathered=set(gathered))
        graph = self._read(logits, plan)
        plan.refused.update(graph.refused)
        plan.bytes_per_example, plan.bytes_per_pass = _footprint(graph, logits, len(x))
        narrow = NarrowLayer.of(logits)
        plan.passes = logits.shape[1] - 1 if narrow is None else narrow.width
        sites = list(graph.sites.values())
        if not sites:
            return plan
        examples = len(x)
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits)
        seeds = torch.stack([weights, torch.zeros_like(weights)][: min(2, examples)])
        if examples > 1:
            # The first example alone, then all the others.
            seeds[1, 1:], seeds[0, 1:] = weights[1:], 0

        ours: dict[Key, Tensor] = {}
        try:
            reverse(graph, seeds, lambda site, grad: ours.__setitem__(site.key, grad.clone()))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            for site in sites:
                plan.refuse(site, f"its graph cannot be followed ({error})")
            return plan
        edges = [GradientEdge(site.node, 0) for site in sites]
        # One backward pass for both: gradients of sums are sums of gradients.
        truth: tuple[Tensor | None, ...] = torch.autograd.grad(logits, edges, seeds.sum(dim=0), allow_unused=True)
        for site, reference in zip(sites, truth, strict=True):
            mine = ours.get(site.key)
            if reference is None and mine is None:
                self._place(site, torch.zeros(len(seeds), *shape_of(site.node, 0)), examples, plan)
            elif reference is None or mine is None:
                plan.refuse(site, "its graph cannot be followed")
            else:
                difference = (mine.sum(dim=0) - reference).abs().amax()
                # Each part on its own scale: two that cancel would hide what is wrong with them.
                if bool(difference <= REVERSE[reference.dtype] * mine.abs().amax()):
                    self._place(site, mine, examples, plan)
                else:
                    plan.refuse(site, "its gradient is changed on the way")
        return plan

    @staticmethod
    def _place(site: Site, grad: Tensor, examples: int, plan: Plan) -> None:
        """Find the batch dimension of a site from which entries each example's loss reaches."""
        if examples == 1:
            return
        fits = []
        options = _options(site, examples)
        for outer in options:
            reached = (grad != 0).reshape(len(grad), outer, examples, -1).any(dim=3).any(dim=1).tolist()
            if not any(reached[0][1:]) and not reached[1][0]:
                fits.append(outer)
        if len(fits) == 1:
            plan.outer[site.key] = fits[0]
        elif not options and site.node.name() == _LOOKUP:
            plan.gathered.update(operand.name for operand in site.operands)
        else:
            plan.refuse(site, _UNCLEAR if fits or options else "it has no batch dimension")

    def _announce(self) -> None:
        """Say once which parameters go the slower way."""
        assert self._plan is not None
        if not self._plan.refused:
            return
        names = tuple(sorted(self._plan.refused))
        key = (type(self._model).__name__, names)
        if key in _ANNOUNCED:
            return
        _ANNOUNCED.add(key)
        shown = [f"{name}: {self._plan.refused[name]}" for name in names[:5]]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        _LOG.warning(
            "%s: %d of %d parameters have no exact rule and take the slower, equally exact autograd path (%s%s)",
            type(self._model).__name__,
            len(names),
            len(self._parameters),
            "; ".join(shown),
            more,
        )


def _signature(graph: Graph) -> Signature:
    sites = graph.sites
    return tuple((node.name(), sites[node].key if node in sites else None) for node in graph.order)


def _is_hooked(model: nn.Module) -> bool:
    """Whether any module calls a hook."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in model.modules()
    )


@contextmanager
def differentiable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only these parameters require a gradient; afterwards all is as before."""
    everything = [p for p in model.parameters() if p.is_floating_point()]
    before = [p.requires_grad for p in everything]
    wanted = {id(p) for p in parameters}
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    cudnn: Any = torch.backends.cudnn
    enabled = cudnn.enabled
    try:
        for p in everything:
            p.requires_grad_(id(p) in wanted)
        if recurrent:
            # cuDNN's recurrent layers have no backward pass in evaluation mode.
            cudnn.enabled = False
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if recurrent:
            cudnn.enabled = enabled
        for p, flag in zip(everything, before, strict=True):
            p.requires_grad_(flag)


def _options(site: Site, examples: int) -> list[int]:
    kind = site.node.name()
    shape = shape_of(site.node, 0)
    if kind in ("AddmmBackward0", "MmBackward0"):
        return candidates(site.shape[:-1], examples)
    if kind == _LOOKUP:
        return candidates(shape[:-1], examples)
    if kind in ("NativeLayerNormBackward0", "FusedRmsNormBackward0"):
        return candidates(shape[: len(shape) - len(site.node._saved_normalized_shape)], examples)
    if kind in ("AddBackward0", "SubBackward0", "MulBackward0", "ExpandBackward0"):
        # The parameter is the same for all examples: it has no size of its own where they are counted.
        source, output = site.node.next_functions[site.operands[0].place]
        own = shape_of(source, output)
        own = (1,) * (len(shape) - len(own)) + own
        return candidates([size if mine == 1 else 0 for size, mine in zip(shape, own, strict=True)], examples, shape)
    return candidates(shape[:1], examples)


def _footprint(graph: Graph, logits: Tensor, examples: int) -> tuple[int, int]:
    """Bytes an example takes: its activations, and for each pass a few of the largest gradients."""
    sizes = [math.prod(shape_of(node, 0)) for node in leading(graph)[0] if node._input_metadata]
    if not sizes:
        return 0, 0
    width = logits.element_size()
    return sum(sizes) * width // examples, 8 * max(sizes) * width // examples
