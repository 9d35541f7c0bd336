"""token demand: after the last attention, compute only what is scored.

before    attention ── o_proj ── + ── norm ── mlp ── + ── norm ── index_select(predecessors) ── token_logps
after     attention ── index_select ── o_proj ── + ── norm ── mlp ── + ── norm ── token_logps
          residual ─── index_select ─────────────┘

An op that treats each token by itself gives the same rows whether it runs before or after rows are selected. The
selection moves up through all ops that nothing but the scored slots needs: in the last layer the prompt's tokens, but
for the last one, cost no projection and no MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .base import PackGraph, PassResult, argument, is_op, module_path, op_family
from .infer import infer, input_types
from .rules_math import cast, normalization, pointwise
from .types import RULES, Mixes, Tok, TokenType

__all__ = ["token_demand"]

aten = torch.ops.aten
_VIEWS = ("aten.view", "aten.reshape", "aten._unsafe_view")
_OTHERS = ("aten.linear", "aten.addmm", "aten.mean", "aten.unsqueeze", "aten.squeeze", "aten.transpose",
           "aten.zeros_like", "aten.ones_like", "aten.full_like", *_VIEWS)  # fmt: skip


def token_demand(graph: PackGraph) -> PassResult:
    """Move the selection of scored slots up as far as it goes."""
    result = PassResult("token_demand")
    predecessors = graph.layout("predecessors")
    select = next((n for n in predecessors.users if is_op(n, "aten.index_select")), None)
    if select is None:  # every slot's logits are asked for
        return result
    types = _known_types(graph)
    demanded = _demanded(select, types)
    if not demanded:
        return result
    moved = _Mover(graph, select, types, demanded).run()
    select.replace_all_uses_with(moved)
    graph.finish()
    paths = dict.fromkeys(module_path(node) for node in demanded)
    result.matched = [f"only scored slots in {path or 'the model itself'}" for path in paths]
    result.changed = len(demanded)
    return result


def _known_types(graph: PackGraph) -> dict[fx.Node, TokenType]:
    """Types of the nodes that have one; what depends on an untyped node (an expert layer's inside) has none."""
    types = input_types(graph)
    for node in graph.graph.nodes:
        if node.op == "call_function" and all(source in types for source in node.all_input_nodes):
            kind = infer(graph, node, types)
            if not isinstance(kind, Mixes):
                types[node] = kind
    return types


def _demanded(select: fx.Node, types: dict[fx.Node, TokenType]) -> list[fx.Node]:
    """Token-wise nodes whose every reader is the selection or another such node, in graph order."""
    found: set[fx.Node] = set()
    node = select.prev
    while node.op != "root":
        wanted = bool(node.users) and all(user is select or user in found for user in node.users)
        if wanted and isinstance(types.get(node), Tok) and _commutes(node, types):
            found.add(node)
        node = node.prev
    return [n for n in select.graph.nodes if n in found]


def _commutes(node: fx.Node, types: dict[fx.Node, TokenType]) -> bool:
    """True if selecting rows before the op is selecting rows after it."""
    if node.op != "call_function" or not any(isinstance(types.get(source), Tok) for source in node.all_input_nodes):
        return False
    return (
        RULES.get(op_family(node)) in (pointwise, cast, normalization)
        or torch.Tag.pointwise in getattr(node.target, "tags", ())
        or is_op(node, *_OTHERS)
    )


class _Mover:
    """Rebuilds the demanded nodes on selected rows."""

    def __init__(
        self, graph: PackGraph, select: fx.Node, types: dict[fx.Node, TokenType], demanded: list[fx.Node]
    ) -> None:
        self.graph, self.select, self.types, self.demanded = graph, select, types, demanded
        self._rows: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.Node:
        with self.graph.graph.inserting_before(self.select):
            for node in self.demanded:
                self._rows[node] = self._rebuilt(node)
            return self._rows[argument(self.select, "self")]

    def _rebuilt(self, node: fx.Node) -> fx.Node:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._selected)
        if is_op(node, *_VIEWS):
            args, kwargs = (self._selected(argument(node, "self")), self.graph.view_sizes(node)), {}
        rebuilt = self.graph.graph.create_node("call_function", node.target, args, kwargs)
        rebuilt.meta = dict(node.meta)
        rebuilt.meta["val"] = self.graph.evaluate(rebuilt)
        return rebuilt

    def _selected(self, source: fx.Node) -> Any:
        kind = self.types.get(source)
        if source in self._rows or not isinstance(kind, Tok):
            return self._rows.get(source, source)
        predecessors = self.graph.layout("predecessors")
        self._rows[source] = self.graph.call(aten.index_select.default, (source, kind.axis, predecessors), like=source)
        return self._rows[source]
