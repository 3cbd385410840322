"""The recorded computation: its nodes in order, and where each parameter enters it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# A node of the autograd graph. PyTorch types its attributes nowhere.
Node = Any

# Only rearrange the entries of a parameter: its Gram does not see them.
_REARRANGE = {
    "AliasBackward0",
    "CloneBackward0",
    "PermuteBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "TBackward0",
    "ToCopyBackward0",
    "TransposeBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
}
# Pick entries of a parameter: its gradient goes back through them.
_PICK = {"EmbeddingBackward0", "IndexBackward0", "IndexSelectBackward0", "SelectBackward0", "SliceBackward0"}


@dataclass(frozen=True)
class Operand:
    """A parameter at one input of a node.

    Attributes:
        name: Of the parameter.
        place: Which input of the node, in ``next_functions``.
        picks: Nodes between the parameter and the input that pick entries of it, from the input on; empty where its
            entries are only rearranged.
    """

    name: str
    place: int
    picks: tuple[Node, ...]


@dataclass(frozen=True)
class Site:
    """A node at which parameters meet the data.

    Attributes:
        node: The node.
        operands: The parameters that it takes.
        shape: Of its output, as the node after it sees it where that one only splits dimensions.
    """

    node: Node
    operands: tuple[Operand, ...]
    shape: tuple[int, ...]

    @property
    def key(self) -> tuple[str, tuple[tuple[str, int], ...]]:
        """What a site keeps from one forward pass to the next."""
        return self.node.name(), tuple((operand.name, operand.place) for operand in self.operands)


@dataclass(frozen=True)
class Graph:
    """The graph behind some logits.

    Attributes:
        root: The node that made the logits, and which of its outputs they are.
        order: All nodes, each after every node that uses its result.
        sites: Where parameters enter, keyed by node.
        refused: Parameters that a site cannot stand for, each with the reason.
        unused: Parameters the logits do not depend on.
    """

    root: tuple[Node, int]
    order: tuple[Node, ...]
    sites: Mapping[Node, Site]
    refused: Mapping[str, str]
    unused: frozenset[str]


def read_graph(logits: Tensor, parameters: Mapping[str, nn.Parameter], knows: Callable[[str, str, int], bool]) -> Graph:
    """Walk the graph of ``logits`` and find the site of each parameter.

    Args:
        logits: The model's output, with a graph.
        parameters: The parameters looked for, by name.
        knows: Whether there is a rule for a parameter at an input of a node, by its name, the
            node's and the input's place.

    Returns:
        The graph. A parameter that is used twice, or whose node has no rule, is refused.
    """
    order = _topological(logits.grad_fn)
    users: dict[Node, list[tuple[Node, int]]] = {}
    for node in order:
        for place, (source, _) in enumerate(node.next_functions):
            if source is not None:
                users.setdefault(source, []).append((node, place))
    names = {id(parameter): name for name, parameter in parameters.items()}
    leaves = {names[id(node.variable)]: node for node in order if id(getattr(node, "variable", None)) in names}

    refused: dict[str, str] = {}
    found: dict[Node, list[Operand]] = {}
    for name in parameters:
        if name not in leaves:
            continue
        reason, user, operand = _climb(name, leaves[name], users, knows)
        if operand is None:
            refused[name] = reason
        else:
            found.setdefault(user, []).append(operand)
    sites = {node: Site(node, tuple(found[node]), _viewed(node, users)) for node in order if node in found}
    return Graph(
        (logits.grad_fn, logits.output_nr), order, sites, refused, frozenset(n for n in parameters if n not in leaves)
    )


def _climb(
    name: str, leaf: Node, users: Mapping[Node, list[tuple[Node, int]]], knows: Callable[[str, str, int], bool]
) -> tuple[str, Node, Operand | None]:
    """Go from a parameter to the one node with a rule that uses it."""
    node = leaf
    picks: list[Node] = []
    while True:
        above = users.get(node, [])
        if len(above) != 1:
            return f"used {len(above)} times", None, None
        user, place = above[0]
        kind = user.name()
        if knows(name, kind, place):
            return "", user, Operand(name, place, tuple(reversed(picks)))
        if kind in _PICK:
            picks.append(user)
        elif kind not in _REARRANGE:
            return f"no rule for {kind.removesuffix('0').removesuffix('Backward')}", None, None
        elif picks:
            # Once entries were picked, every step belongs to the way back.
            picks.append(user)
        node = user


def _viewed(node: Node, users: Mapping[Node, list[tuple[Node, int]]]) -> tuple[int, ...]:
    shape = shape_of(node, 0)
    above = users.get(node, [])
    if len(above) == 1 and above[0][0].name() in ("ViewBackward0", "UnsafeViewBackward0"):
        viewed = shape_of(above[0][0], 0)
        if viewed[-1:] == shape[-1:]:
            return viewed
    return shape


def shape_of(node: Node, output: int) -> tuple[int, ...]:
    """Shape of one result of a node."""
    return tuple(int(size) for size in node._input_metadata[output].shape)


def _topological(root: Node) -> tuple[Node, ...]:
    """Users before what they use, by depth-first search without recursion."""
    done: list[Node] = []
    seen = {root}
    stack: list[tuple[Node, Iterable[tuple[Node, int]]]] = [(root, iter(root.next_functions))]
    while stack:
        node, sources = stack[-1]
        for source, _ in sources:
            if source is not None and source not in seen:
                seen.add(source)
                stack.append((source, iter(source.next_functions)))
                break
        else:
            done.append(node)
            stack.pop()
    return tuple(reversed(done))


def leading(graph: Graph) -> tuple[set[Node], set[Node]]:
    """Which nodes the reverse pass visits, and which of them it must go on from.

    Returns:
        The nodes that are a site or lead to one, and those of them below which there is another site.
    """
    visited, further = set(), set()
    for node in reversed(graph.order):
        if any(source in visited for source, _ in node.next_functions):
            further.add(node)
            visited.add(node)
        elif node in graph.sites:
            visited.add(node)
    return visited, further
