"""functionalize: in-place ops become functional ones, so that a node stands for one value from beginning to end.

before    buffer = empty([1, T, 8])                 after    buffer = empty([1, T, 8])
          slice(buffer, -1, 0, 4).copy_(x)                   first = slice_scatter(buffer, x, -1, 0, 4)
          slice(buffer, -1, 4, 8).copy_(y)                   both = slice_scatter(first, y, -1, 4, 8)
          f(buffer)                                          f(both)

A write through a view is written back into the tensor behind it; who reads that tensor or another view of it
afterwards reads the new value. What may be a copy (``contiguous``) is taken for one where nobody could tell: where
what it may be a copy of is not read after the write. Only memory that the model itself has made is followed: what
writes into a parameter, a buffer or the input, or into what others may share, stays as it is, and the token-mixing
check refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .base import PackGraph, argument, is_mutable, is_tensor, may_alias, op_family, operands, same_shape, shape_of

__all__ = ["functionalize"]

aten = torch.ops.aten

_IN_PLACE_OPERATORS = {"__iand__": "__and__", "__ior__": "__or__", "__ixor__": "__xor__"}
"""Operators whose functional form is not the name without its last underscore."""


def functionalize(graph: PackGraph) -> int:
    """Make every in-place op functional that can be; returns how many were."""
    return _Functionalizer(graph).run()


@dataclass
class _Memory:
    """One tensor that the model made, and its views.

    Attributes:
        owner: the node that made it.
        value: the node that holds its present value.
        version: how many times it was written to.
        unclear: nodes that may share it, or may be copies of it.
        copied_from: the memory that this one may be a copy of, or may share.
    """

    owner: fx.Node
    value: fx.Node
    version: int = 0
    unclear: list[fx.Node] = field(default_factory=list)
    copied_from: _Memory | None = None


@dataclass
class _View:
    """A view of a memory.

    Attributes:
        source: the node that it is a view of: the memory's owner or another view.
        value: the node that holds its value as of ``version``.
        version: of the memory.
    """

    source: fx.Node
    value: fx.Node
    version: int


class _Functionalizer:
    """One walk over the graph, in order.

    Attributes:
        memories: the memory behind each node that owns one or is a view of one.
        views: those that are views.
    """

    def __init__(self, graph: PackGraph) -> None:
        self.graph = graph
        self.order = {node: place for place, node in enumerate(graph.graph.nodes)}
        self.memories: dict[fx.Node, _Memory] = {}
        self.views: dict[fx.Node, _View] = {}

    def run(self) -> int:
        changed = 0
        for node in list(self.graph.graph.nodes):
            if node.op == "placeholder":
                continue
            inputs: list[fx.Node] = list(node.all_input_nodes)
            first: Any = operands(node)[0] if node.op == "call_function" and operands(node) else None
            with self.graph.graph.inserting_before(node):
                self._read_present_values(node, inputs)
                if node.op == "call_function" and is_mutable(node) and self._rewrite(node, first):
                    changed += 1
                elif node.op == "call_function":
                    self._remember(node, first, inputs)
        return changed

    # ------------------------------------------------------------------ reading

    def _read_present_values(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """Let ``node`` read what its inputs hold by now."""
        for source in inputs:
            if source in self.memories and (present := self._present(source)) is not source:
                node.replace_input_with(source, present)

    def _present(self, node: fx.Node) -> fx.Node:
        """The node that holds the present value of ``node``, made if there is none yet."""
        memory = self.memories[node]
        if node is memory.owner:
            return memory.value
        view = self.views[node]
        if view.version != memory.version:
            source = self._present(view.source)
            before = operands(node)[0]
            view.value = self._copy(node, lambda n: source if n is before else n)
            view.version = memory.version
        return view.value

    def _copy(self, node: fx.Node, of_input: Callable[[fx.Node], fx.Node]) -> fx.Node:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), of_input)
        again = self.graph.graph.create_node("call_function", node.target, args, kwargs)
        again.meta = dict(node.meta)
        return again

    def _remember(self, node: fx.Node, first: Any, inputs: list[fx.Node]) -> None:
        """File the memory that ``node``, whose first argument was ``first``, makes or shares."""
        if is_tensor(node) and not is_mutable(node) and not may_alias(node):
            self.memories[node] = _Memory(node, node)
        elif op_family(node) in _WRITE_BACK and first in self.memories:
            memory = self.memories[node] = self.memories[first]
            self.views[node] = _View(first, node, memory.version)
        elif is_mutable(node) or may_alias(node):
            for source in inputs:
                if source in self.memories:
                    self.memories[source].unclear.append(node)
            if op_family(node) in _MAYBE_COPIES and first in self.memories:
                self.memories[node] = _Memory(node, node, copied_from=self.memories[first])

    # ------------------------------------------------------------------ writing

    def _rewrite(self, node: fx.Node, written: Any) -> bool:
        """Replace ``node``, which writes into ``written``; False if it is not known what else that changes."""
        memory = self.memories.get(written)
        if memory is None or self._shows_elsewhere(memory, node):
            return False
        value = self._functional_value(node, written)
        if value is None:
            return False
        part = written
        while part is not memory.owner:
            source = self.views[part].source
            value = _WRITE_BACK[op_family(part)](self.graph, part, self._present(source), value)
            part = source
        memory.value = value
        memory.version += 1
        node.replace_all_uses_with(written)
        self.graph.graph.erase_node(node)
        return True

    def _shows_elsewhere(self, memory: _Memory, write: fx.Node) -> bool:
        """True if what ``write`` does to ``memory`` could be read from a tensor that may or may not share it."""
        if any(self._is_read_after(shared, write) for shared in memory.unclear):
            return True
        made = memory
        while (source := made.copied_from) is not None:  # a copy that is the tensor itself would change that tensor
            views = [node for node, owned in self.memories.items() if owned is source]
            others = [node for node in source.unclear if node is not made.owner]
            if any(self.order.get(user, -1) > self.order[write] for node in views for user in node.users):
                return True
            if any(self._is_read_after(shared, write) for shared in others):
                return True
            made = source
        return False

    def _is_read_after(self, shared: fx.Node, write: fx.Node) -> bool:
        """True if ``shared``, or what may share memory with it in turn, is read after ``write``."""
        return any(
            self.order.get(user, -1) > self.order[write] or (may_alias(user) and self._is_read_after(user, write))
            for user in shared.users
            if user is not write
        )

    def _functional_value(self, node: fx.Node, written: fx.Node) -> fx.Node | None:
        """What ``node`` would leave in ``written``: of the same shape and dtype."""
        if op_family(node) == "copy_":
            value = self.graph.call(aten.clone.default, (operands(node)[1],), like=node)
        elif (functional := _functional_op(node)) is not None:
            value = self._copy(node, lambda n: n)
            value.target = functional
            value.meta["val"] = self.graph.evaluate(value)
        else:
            return None
        wanted = written.meta["val"]
        if value.meta["val"].dtype != wanted.dtype:  # in place, half.add_(float) stays half
            value = self.graph.call(aten.to.dtype, (value, wanted.dtype), like=value)
        if not same_shape(value, written):
            value = self.graph.call(aten.expand_as.default, (value, self._present(written)), like=value)
        return value


def _functional_op(node: fx.Node) -> Any:
    """The op that returns what ``node``'s in-place op leaves in its first input, or None."""
    name, _, overload = str(node.target).removeprefix("aten.").partition(".")
    functional = _IN_PLACE_OPERATORS.get(name, name.removesuffix("_"))
    found = getattr(getattr(aten, functional, None), overload, None) if functional != name else None
    if found is None or found._schema.is_mutable:
        return None
    given: Any = node.target
    arguments = [op._schema.arguments for op in (given, found)]
    alike = [(a.name, str(a.type)) for a in arguments[0][1:]] == [(a.name, str(a.type)) for a in arguments[1][1:]]
    writes = [argument.alias_info is not None and argument.alias_info.is_write for argument in arguments[0]]
    return found if alike and writes[0] and not any(writes[1:]) else None


# --------------------------------------------------------------------------- views and how they are written through

_MAYBE_COPIES = ("contiguous", "to", "type_as", "reshape", "flatten")
"""Ops that return their input, or a copy of it."""

WriteBack = Callable[[PackGraph, fx.Node, fx.Node, fx.Node], fx.Node]


def _slice(graph: PackGraph, view: fx.Node, source: fx.Node, value: fx.Node) -> fx.Node:
    how = [argument(view, name) for name in ("dim", "start", "end", "step")]
    return graph.call(aten.slice_scatter.default, (source, value, *how), like=view)


def _select(graph: PackGraph, view: fx.Node, source: fx.Node, value: fx.Node) -> fx.Node:
    return graph.call(
        aten.select_scatter.default, (source, value, argument(view, "dim"), argument(view, "index")), like=view
    )


def _same_op(graph: PackGraph, view: fx.Node, source: fx.Node, value: fx.Node) -> fx.Node:
    """A view that is its own inverse: two axes change places, twice."""
    return graph.call(view.target, (value, *operands(view)[1:]), like=view)  # type: ignore[arg-type]


def _permute(graph: PackGraph, view: fx.Node, source: fx.Node, value: fx.Node) -> fx.Node:
    order = [int(axis) % len(shape_of(view)) for axis in argument(view, "dims")]
    back = sorted(range(len(order)), key=order.__getitem__)
    return graph.call(aten.permute.default, (value, back), like=view)


def _unsqueeze(graph: PackGraph, view: fx.Node, source: fx.Node, value: fx.Node) -> fx.Node:
    return graph.call(aten.squeeze.dim, (value, argument(view, "dim")), like=view)


def _view(graph: PackGraph, view: fx.Node, source: fx.Node, value: fx.Node) -> fx.Node:
    return graph.call(aten.reshape.default, (value, graph.view_sizes(source)), like=view)


def _whole(graph: PackGraph, view: fx.Node, source: fx.Node, value: fx.Node) -> fx.Node:
    return value


_WRITE_BACK: dict[str, WriteBack] = {
    "slice": _slice,
    "select": _select,
    "transpose": _same_op,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "alias": _whole,
}
"""Ops that always return a view of their first input -> how a write through the view changes that input."""
