"""pooling: models that return one value per sequence, not logits per token: rewards, classes.

before    hidden [1,T,C] ── score ── [1,T,K] ── taken at the row's last token ── tanh, ... ── [1,K]
after     hidden [1,T,C] ── score ── [1,T,K] ── index_select(predecessors) [U,K] ── tanh, ... ── [U,K]

``predecessors`` then holds the last slot of every sequence, in input order. Which token is the last is read from the
graph: index -1, or the rightmost one that is not the padding token, which the front door looks up in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .base import NotPackable, PackGraph, PassResult, Refusal, argument, is_op, is_tensor, op_family, operands, shape_of
from .positional import PositionalValues

__all__ = ["Pooling", "pool_epilogue"]

aten = torch.ops.aten
_LENGTH = 7  # any row to evaluate positions on
_CASTS = ("aten.to", "aten._to_copy", "aten.type_as", "aten.int", "aten.long")
_VIEWS = ("aten.view", "aten.reshape")


@dataclass(frozen=True)
class Pooling:
    """Which token of a sequence stands for it.

    Attributes:
        padding: the rightmost token that is not this one (the first token, if all are); None for the last token.
    """

    padding: int | None


def pool_epilogue(graph: PackGraph, result: fx.Node, output: fx.Node) -> PassResult:
    """Make the graph return one row per scored slot.

    Raises:
        NotPackable: tokens are pooled otherwise than by taking the last one, or what follows cannot be done per row.
    """
    reader = _Reader(graph)
    pool, after = reader.find(result)
    graph.pooling = reader.rule(pool)
    source = operands(pool)[0]
    with graph.graph.inserting_before(output):
        picked = graph.call(aten.index_select.default, (source, 1, graph.layout("predecessors")), like=pool)
        rows = {pool: graph.call(aten.squeeze.dim, (picked, 0), like=pool)}
        for node in after:
            rows[node] = rows[operands(node)[0]] if reader.is_identity(node) else _per_row(graph, node, rows)
        output.args = ((rows[result],),)
    graph.finish()
    which = "the last token" if graph.pooling.padding is None else f"the last token that is not {graph.pooling.padding}"
    return PassResult("insert_epilogue", [f"one value per sequence, at {which}"], 1)


def _per_row(graph: PackGraph, node: fx.Node, rows: dict[fx.Node, fx.Node]) -> fx.Node:
    """``node``, which saw one row, on all of them."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: rows.get(n, n))
    if is_op(node, *_VIEWS):
        args, kwargs = (rows[operands(node)[0]], [-1, *(int(size) for size in shape_of(node)[1:])]), {}
    copy = graph.graph.create_node("call_function", node.target, args, kwargs)
    copy.meta = dict(node.meta)
    copy.meta["val"] = graph.evaluate(copy)
    if not shape_of(copy) or not graph.is_scored(shape_of(copy)[0]):
        raise NotPackable(Refusal.at(node, "after the last token is taken, an op does not keep the rows apart"))
    return copy


class _Reader:
    """Finds where tokens become one row, and which token is taken."""

    def __init__(self, graph: PackGraph) -> None:
        self.graph = graph
        self.positional = PositionalValues(graph)

    def find(self, result: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """The node that takes a token, and the nodes between it and the result, in graph order."""
        pools, after, waiting = set(), set(), [result]
        while waiting:
            node = waiting.pop()
            if node in after or node in pools:
                continue
            reads = [n for n in self._read(node) if is_tensor(n) and self.positional.depends_on_tokens(n)]
            if any(self._has_tokens(n) for n in reads):
                pools.add(node)
            else:
                after.add(node)
                waiting += reads
        if len(pools) != 1:
            reason = "the result has no axis of tokens and is not taken from one token"
            raise NotPackable(Refusal.at(result, reason, "return logits per token, or one value at the last token"))
        return pools.pop(), [n for n in self.graph.graph.nodes if n in after]

    def rule(self, pool: fx.Node) -> Pooling:
        """Which token ``pool`` takes."""
        shape = shape_of(operands(pool)[0])
        in_place = len(shape) >= 2 and shape[0] == 1 and self.graph.is_length(shape[1])
        if in_place and is_op(pool, "aten.select.int") and argument(pool, "dim") == 1 and argument(pool, "index") == -1:
            return Pooling(None)
        if in_place and is_op(pool, "aten.index.Tensor"):
            first, *place = argument(pool, "indices")
            if len(place) == 1 and self._is_zero(first):
                return self._rightmost(pool, place[0])
        reason = "tokens are pooled otherwise than by taking the last one"
        raise NotPackable(Refusal.at(pool, reason, "take the value at the last token of the row"))

    def is_identity(self, node: fx.Node) -> bool:
        """True for ``x[arange(1)]`` of a single row."""
        if not is_op(node, "aten.index.Tensor"):
            return False
        indices = argument(node, "indices")
        return len(indices) == 1 and self._is_zero(indices[0]) and shape_of(node) == shape_of(operands(node)[0])

    def _rightmost(self, pool: fx.Node, place: fx.Node) -> Pooling:
        """``argmax(arange(T) * (input_ids != padding))``."""
        if is_op(place, "aten.argmax") and argument(place, "dim") in (-1, 1):
            for mask, row in _both_ways(operands(place)[0]):
                padding = self._padding(mask)
                if padding is not None and self._is_row(row):
                    return Pooling(padding)
        reason = "the token that stands for a sequence is chosen in a way that is not understood"
        raise NotPackable(Refusal.at(pool, reason, "take the last token, or the rightmost that is not padding"))

    def _padding(self, mask: fx.Node) -> int | None:
        while is_op(mask, *_CASTS):
            mask = operands(mask)[0]
        if not is_op(mask, "aten.ne.Scalar") or operands(mask)[0] is not self.graph.layout("input_ids"):
            return None
        return int(argument(mask, "other"))

    def _is_row(self, node: fx.Node) -> bool:
        value = self._evaluated(node)
        return value is not None and torch.equal(value.flatten(), torch.arange(_LENGTH, dtype=value.dtype))

    def _is_zero(self, node: Any) -> bool:
        value = self._evaluated(node)
        return value is not None and value.numel() == 1 and value.item() == 0

    def _evaluated(self, node: Any) -> torch.Tensor | None:
        known = is_tensor(node) and not self.positional.depends_on_tokens(node)
        return self.positional.evaluate(node, _LENGTH) if known else None

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """What a node takes values from; of an index, the table."""
        return [operands(node)[0]] if is_op(node, "aten.index.Tensor") else node.all_input_nodes

    def _has_tokens(self, node: fx.Node) -> bool:
        return any(self.graph.mentions_length(size) for size in shape_of(node))


def _both_ways(product: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    if op_family(product) != "mul":
        return []
    a, b = operands(product)[:2]
    return [(a, b), (b, a)] if is_tensor(a) and is_tensor(b) else []
