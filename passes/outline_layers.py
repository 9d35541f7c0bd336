"""outline layers: the packed graph calls one subgraph for each layer of the model.

before    embedding ── norm ── attention ── + ── mlp ── + ── norm ── attention ── + ── mlp ── + ── token_logps
after     embedding ── model.layers.0 ────────────────── model.layers.1 ────────────────────── token_logps

What shards, recomputes or compiles a model works on its layers, and the flat graph has none. A layer's body takes what
enters it, then the parameters and buffers that are the layer's own; those are no inputs of the whole graph any more, so
they need not be there before the layer runs. Positions, tables and block lists belong to no layer and stay outside.
Layers that are the same operations on tensors of the same shapes share one body.

A *layer* is an element of a list of modules in which attention happens, such as ``model.layers.7``.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .base import PackGraph, PassResult, argument, is_mutable, is_op, may_alias, operands

__all__ = ["Layer", "outline_layers"]

_ELEMENT = re.compile(r"(?:(.*)\.)?\d+")


@dataclass(frozen=True)
class Layer:
    """One call of one layer.

    Attributes:
        path: dotted path of the user's module.
        body: what it computes; several layers may share it. Its inputs are the arguments of the call, then ``state``.
        state: qualified names of the parameters and buffers that are the body's last inputs, in order.
    """

    path: str
    body: fx.GraphModule
    state: tuple[str, ...]


def outline_layers(graph: PackGraph) -> PassResult:
    """Move every layer's nodes into a body, called by a ``call_module`` node.

    The calls are in ``graph.layers``, by the name of the submodule that stands for them. They do not pass the layer's
    state: whoever runs the graph puts a module there that adds it (``ppcompile.layers``).
    """
    result = PassResult("outline_layers")
    lists = _lists_of_layers(graph)
    if lists:
        _Outlined(graph, _Stages(graph, lists)).run()
    bodies: dict[int, list[str]] = {}
    for layer in graph.layers.values():
        bodies.setdefault(id(layer.body), []).append(layer.path)
    result.matched = [f"{paths[0]}" + f" and {len(paths) - 1} like it" * (len(paths) > 1) for paths in bodies.values()]
    result.changed = len(graph.layers)
    return result


# --------------------------------------------------------------------------- which layers there are


def _lists_of_layers(graph: PackGraph) -> set[str]:
    """Paths of the lists whose elements are layers: for each attention the outermost list that holds several."""
    mixers = [site.attention for site in graph.sites]
    mixers += [node for node in graph.graph.nodes if node.op == "call_module"]
    stacks = [list(_elements(node)) for node in mixers]
    members: dict[str, set[str]] = {}
    for element in itertools.chain.from_iterable(stacks):
        members.setdefault(element.list, set()).add(element.path)
    found: set[str] = set()
    for stack in stacks:
        several = [element for element in stack if len(members[element.list]) > 1]
        found.update(element.list for element in (several or stack)[:1])
    return found


class _Element(NamedTuple):
    """A call of an element of a list of modules."""

    call: Hashable
    path: str
    list: str


def _elements(node: fx.Node) -> Iterator[_Element]:
    """The elements of lists that a node was traced in, outermost first."""
    for call, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        match = _ELEMENT.fullmatch(path)
        if match is not None:
            yield _Element(call, path, match[1] or "")


class _Stages:
    """When each node runs: odd stages are the calls of layers in order, even ones what stands between them.

    No node has a stage before that of a node it reads, so the stages can run one after the other.

    Attributes:
        paths: path of the layer of each call; call ``n`` is stage ``2 * n + 1``.
        of: the stage of each node.
    """

    def __init__(self, graph: PackGraph, lists: set[str]) -> None:
        self.graph, self._lists = graph, lists
        self.paths: list[str] = []
        self.of: dict[fx.Node, int] = {}
        self._calls: dict[Hashable, int] = {}
        self._own_nothing: set[fx.Node] = set()
        for node in graph.graph.nodes:
            self.of[node] = self._earliest(node)
        for node in reversed(graph.graph.nodes):
            self._settle(node)
        for node in graph.graph.nodes:
            assert not is_mutable(node) or self._is_private(node), f"{node.format_node()} overwrites what others read"

    def layer(self, stage: int) -> str:
        """Path of the layer that an odd stage is a call of."""
        return self.paths[stage // 2]

    def owns(self, stage: int, node: fx.Node) -> bool:
        """True if ``node`` is a parameter or buffer of the layer."""
        return self.graph.state.get(node.name, "").startswith(f"{self.layer(stage)}.")

    def _earliest(self, node: fx.Node) -> int:
        """The stage of the layer that the node was traced in, or else the first after what it reads."""
        floor = max((self.of[source] for source in node.all_input_nodes), default=0)
        layer = next((element for element in _elements(node) if element.list in self._lists), None)
        outside = floor + floor % 2
        if layer is None:
            return outside
        if layer.call not in self._calls:
            self._calls[layer.call] = len(self.paths)
            self.paths.append(layer.path)
        stage = 2 * self._calls[layer.call] + 1
        if stage < floor:
            return outside
        if self._reads_nothing_of(node, stage):
            self._own_nothing.add(node)
        return stage

    def _reads_nothing_of(self, node: fx.Node, stage: int) -> bool:
        """True if neither the layer's state nor any layer's result enters the node."""
        return not is_mutable(node) and all(
            source in self._own_nothing or (self.of[source] == 0 and not self.owns(stage, source))
            for source in node.all_input_nodes
        )

    def _settle(self, node: fx.Node) -> None:
        """Last node first: move what sits in a layer by chance.

        What a layer makes of nothing of its own, and others read, is made before all layers: a table that the first
        layer unsqueezes for all. A selection of rows is made in the layer that wants it.
        """
        readers = {self.of[user] for user in node.users}
        if node in self._own_nothing and readers - {self.of[node]}:
            self.of[node] = 0
        elif len(readers) == 1 and _selects_rows(self.graph, node) and max(readers) % 2:
            self.of[node] = max(readers)

    def _is_private(self, node: fx.Node) -> bool:
        """True if what a node overwrites is read in its own stage only."""
        stage, written = self.of[node], operands(node)[0]
        while isinstance(written, fx.Node) and written.op != "placeholder":
            if any(self.of[user] != stage for user in written.users):
                return False
            if not may_alias(written):
                return True
            written = operands(written)[0]
        return True


def _selects_rows(graph: PackGraph, node: fx.Node) -> bool:
    return is_op(node, "aten.index_select") and argument(node, "index") is graph.layout("predecessors")


# --------------------------------------------------------------------------- cutting


class _Outlined:
    """The graph, rebuilt stage by stage."""

    def __init__(self, graph: PackGraph, stages: _Stages) -> None:
        self.graph, self.stages = graph, stages
        self.top = fx.Graph()
        self._made: dict[fx.Node, fx.Node] = {}
        self._bodies: dict[Hashable, fx.GraphModule] = {}
        self._last = 2 * len(stages.paths)
        self._nodes: dict[int, list[fx.Node]] = {stage: [] for stage in range(self._last + 1)}
        for node in graph.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self._nodes[stages.of[node]].append(node)

    def run(self) -> None:
        """Replace the graph."""
        for node in self.graph.graph.find_nodes(op="placeholder"):
            self._copy(node)
        for stage, nodes in self._nodes.items():
            if stage % 2 == 0:
                for node in nodes:
                    self._copy(node)
            elif nodes:
                self._call(stage, nodes)
        self._copy(next(iter(self.graph.graph.find_nodes(op="output"))))
        self._drop_moved_state()
        self.graph.module.graph = self.top
        self.graph.module.delete_all_unused_submodules()
        self.graph.finish()

    def _copy(self, node: fx.Node) -> None:
        self._made[node] = self.top.node_copy(node, self._made.__getitem__)

    def _call(self, stage: int, nodes: list[fx.Node]) -> None:
        members = set(nodes)
        inputs = dict.fromkeys(source for n in nodes for source in n.all_input_nodes if source not in members)
        entering = [source for source in inputs if not self.stages.owns(stage, source)]
        state = [source for source in inputs if self.stages.owns(stage, source)]
        leaving = [n for n in nodes if any(user not in members for user in n.users)]
        path = self.stages.layer(stage)
        names = tuple(self.graph.state[source.name] for source in state)
        body = self._body([*entering, *state], [name.removeprefix(f"{path}.") for name in names], nodes, leaving)
        target = f"{path.replace('.', '_')}_call_{stage // 2}"
        self.graph.layers[target] = Layer(path, body, names)
        self.graph.module.add_module(target, nn.Module())
        call = self.top.call_module(target, tuple(self._made[source] for source in entering))
        call.meta["val"] = tuple(n.meta.get("val") for n in leaving)
        for place, node in enumerate(leaving):
            self._made[node] = self.top.call_function(operator.getitem, (call, place))
            self._made[node].meta = dict(node.meta)

    def _body(
        self, inputs: list[fx.Node], state: list[str], nodes: list[fx.Node], leaving: list[fx.Node]
    ) -> fx.GraphModule:
        """The nodes as a graph of their own, or the same one that was made for another layer."""
        body = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        entering = len(inputs) - len(state)
        for number, source in enumerate(inputs):
            shared = source.op == "placeholder" and number < entering
            name = source.name if shared else f"x{number}" if number < entering else state[number - entering]
            made[source] = body.placeholder(name.replace(".", "_"))
        for node in nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), made.__getitem__)
            made[node] = body.create_node(node.op, node.target, args, kwargs)
        for node, copy in made.items():
            copy.meta = dict(node.meta)
        body.output(tuple(made[node] for node in leaving))
        return self._bodies.setdefault(self._meaning(body), fx.GraphModule(self.graph.module, body, "Layer"))

    def _meaning(self, body: fx.Graph) -> Hashable:
        """Equal for graphs that compute the same of tensors of the same shapes and dtypes."""
        place = {node: f"%{number}" for number, node in enumerate(body.nodes)}
        return tuple(
            (node.op, self._callee(node), repr(fx.node.map_arg((node.args, node.kwargs), lambda n: _Name(place[n]))))
            + (_kind(node.meta.get("val")),) * (node.op == "placeholder")
            for node in body.nodes
        )

    def _callee(self, node: fx.Node) -> Hashable:
        """What a node calls. Modules by identity: two layers that call one each do not compute the same."""
        if node.op == "call_module":
            return id(self.graph.module.get_submodule(str(node.target)))
        return "" if node.op == "placeholder" else node.target

    def _drop_moved_state(self) -> None:
        for node in list(self.top.find_nodes(op="placeholder")):
            if not node.users and self.graph.state.pop(node.name, None) is not None:
                self.top.erase_node(node)


class _Name(str):
    """Prints without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _kind(value: Any) -> Hashable:
    """What a program can depend on in an input besides its numbers."""
    if isinstance(value, torch.Tensor):
        return value.dtype, str(value.device), str(tuple(value.shape)), str(value.stride())
    return type(value).__name__
