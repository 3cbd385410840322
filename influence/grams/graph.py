"""The recorded computation: its nodes in order, and where each parameter enters it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from influence.grams.rules import RULES, Node, Operand, Site, shape_of

# Only rearrange the entries of a parameter: its Gram does not see them.
_REARRANGE = {"SqueezeBackward1", "SqueezeBackward2"} | {
    f"{kind}Backward0"
    for kind in "Alias Clone Permute ReshapeAlias Squeeze T ToCopy Transpose UnsafeView Unsqueeze View".split()
}
# Pick entries of a parameter: its gradient goes back through them.
_PICK = {"EmbeddingBackward0", "IndexBackward0", "IndexSelectBackward0", "SelectBackward0", "SliceBackward0"}

Users = Mapping[Node, list[tuple[Node, int]]]


@dataclass(frozen=True)
class Graph:
    """The graph behind some logits: ``root``, the node that made them, and which of its outputs they are.

    ``order`` has all nodes, each after every node that uses its result, ``sites`` those where parameters enter, and
    ``refused`` the parameters that no site can stand for, each with the reason.
    """

    root: tuple[Node, int]
    order: tuple[Node, ...]
    sites: Mapping[Node, Site]
    refused: Mapping[str, str]

    def coarsest_dtype(self) -> torch.dtype:
        """The least precise floating type of anything computed; the Jacobian has no more digits than that."""
        dtypes = {meta.dtype.to_real() for node in self.order for meta in node._input_metadata}
        return max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps)

    def bytes_per_example(self, passes: int) -> int:
        """Memory that one example takes, for the graph of one: its activations, a few of the largest in all passes."""
        sizes = [
            math.prod(shape_of(node)) * node._input_metadata[0].dtype.itemsize
            for node in self.order
            if node._input_metadata and not hasattr(node, "variable")
        ]
        return sum(sizes) + 8 * passes * max(sizes, default=0)

    def visited(self) -> tuple[set[Node], set[Node]]:
        """The nodes that are a site or lead to one, and those of them below which there is another site."""
        visited, further = set(), set()
        for node in reversed(self.order):
            if any(source in visited for source, _ in node.next_functions):
                further.add(node)
            if node in further or node in self.sites:
                visited.add(node)
        return visited, further


def read_graph(logits: Tensor, parameters: Mapping[str, nn.Parameter]) -> Graph:
    """Walk the graph of ``logits`` and find the site of each parameter.

    A parameter that is used twice, has a hook, or whose node has no rule is refused; one that the logits do not depend
    on is left out.

    Raises:
        RuntimeError: For reentrant checkpoints, which keep the graph of what they hold to themselves.
    """
    order = topological(logits.grad_fn)
    users: dict[Node, list[tuple[Node, int]]] = {}
    for node in order:
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(
                "the model uses reentrant activation checkpoints, which hide the parameters inside them and work with "
                "backward() only. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or switch "
                "checkpointing off."
            )
        for place, (source, _) in enumerate(node.next_functions):
            if source is not None:
                users.setdefault(source, []).append((node, place))
    leaves = {id(variable): node for node in order if (variable := getattr(node, "variable", None)) is not None}
    refused: dict[str, str] = {}
    found: dict[Node, list[Operand]] = {}
    for name, parameter in parameters.items():
        if id(parameter) not in leaves:
            continue
        site = "has a hook" if parameter._backward_hooks else _climb(name, leaves[id(parameter)], users)
        if isinstance(site, str):
            refused[name] = site
        else:
            found.setdefault(site[0], []).append(site[1])
    sites = {node: Site(node, tuple(found[node]), _viewed(node, users)) for node in order if node in found}
    return Graph((logits.grad_fn, logits.output_nr), order, sites, refused)


def _climb(name: str, node: Node, users: Users) -> str | tuple[Node, Operand]:
    """Go from a parameter to the one node with a rule that uses it; where there is none, say why."""
    picks: list[Node] = []
    rearranged: list[Node] = []
    while len(above := users.get(node, [])) == 1:
        node, place = above[0]
        kind = node.name()
        if kind in RULES and place in RULES[kind].places and not _is_position(node, users):
            return node, Operand(name, place, tuple(reversed(picks)), tuple(reversed(rearranged)))
        if kind not in _PICK | _REARRANGE:
            return f"no rule for {kind.removesuffix('0').removesuffix('Backward')}"
        if picks or kind in _PICK:
            # Once entries were picked, every step belongs to the way back.
            picks.append(node)
        else:
            rearranged.append(node)
    return f"used {len(above)} times"


def _is_position(node: Node, users: Users) -> bool:
    """Whether a table is looked up once for all examples, as positions are: what it gives is broadcast."""
    size = math.prod(shape_of(node))
    return node.name() == "EmbeddingBackward0" and any(
        math.prod(shape_of(user)) > size for user, _ in users.get(node, []) if user._input_metadata
    )


def _viewed(node: Node, users: Users) -> tuple[int, ...]:
    """Shape of a node's output, as the one node that uses it may split all its dimensions but the last."""
    shape, above = shape_of(node), users.get(node, [])
    if len(above) == 1 and above[0][0].name() in ("ViewBackward0", "UnsafeViewBackward0"):
        viewed = shape_of(above[0][0])
        if viewed[-1:] == shape[-1:]:
            return viewed
    return shape


def topological(root: Node) -> tuple[Node, ...]:
    """Users before what they use, by depth-first search without recursion."""
    done: list[Node] = []
    seen: set[Node] = set()
    stack = [(root, False)]
    while stack:
        node, all_below_done = stack.pop()
        if all_below_done:
            done.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack += [(node, True), *((source, False) for source, _ in reversed(node.next_functions))]
    return tuple(reversed(done))
