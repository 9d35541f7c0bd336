"""positional: which nodes are functions of position alone, and what those functions are.

A node that no token reaches (only ``arange``, masks of ones, tables and the like do) has, for a sequence of
length L, the same values whatever the text is. Evaluated at canonical positions 0..L-1 for two lengths, it is
usable in packed form if the longer evaluation begins with the shorter one: then its value at a slot depends on
the slot's position and on nothing else. What is constant or affine in the position is then known by name, up to
the longer length; the model is limited to the positions that were looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .base import LAYOUT_INPUTS, PackGraph, is_tensor, op_family, run_node, shape_of
from .expressions import Const, Expr, Op, Var

__all__ = ["PositionalValues"]

_SHORT, _LONG, _LONG_SQUARE = 61, 65537, 2053
"""Lengths at which functions of position are compared; primes, so that no period hides in both. Tensors of positions
times positions are only computed for the smaller one."""

_SHAPE_ONLY = ("sym_size", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full",
               "new_empty")  # fmt: skip
_SHAPE_OF_ANOTHER = ("expand_as", "view_as", "reshape_as", "type_as")
_POSITIONS = (Var("q"), Var("k"))


class PositionalValues:
    """Answers questions about position-only nodes of one graph."""

    def __init__(self, graph: PackGraph) -> None:
        self.graph = graph
        self._tokens: dict[fx.Node, bool] = {}
        self._evaluated: dict[tuple[fx.Node, int], torch.Tensor | None] = {}
        for node in graph.graph.nodes:  # in order, so that the recursion below stays shallow
            self.depends_on_tokens(node)

    def depends_on_tokens(self, node: fx.Node) -> bool:
        """True if the value (not merely the shape) of ``node`` depends on the token ids."""
        if node not in self._tokens:
            if node.op == "placeholder":
                self._tokens[node] = node.name == "input_ids"
            else:
                self._tokens[node] = any(self.depends_on_tokens(source) for source in _read_by(node))
        return self._tokens[node]

    def function_of_position(self, node: fx.Node, where: Sequence[Expr]) -> Expr | None:
        """``node`` at ``where`` as a constant or an affine function of the one position that ``where`` names."""
        if self.depends_on_tokens(node) or not all(isinstance(w, Const) or w in _POSITIONS for w in where):
            return None
        axes = [axis for axis, w in enumerate(where) if not isinstance(w, Const)]
        if len(axes) > 1 or any(not self.graph.is_length(shape_of(node)[axis]) for axis in axes):
            return None
        lengths = self._lengths(node)
        tables = [_part(self.evaluate(node, length), where, axes) for length in lengths]
        short, long = tables
        if short is None or long is None:
            return None
        found = _affine(short, long, where[axes[0]]) if axes else _equal(short, long)
        if found is not None and self._has_length(node):
            self.graph.limit_positions(lengths[1], "the lengths at which its tables were compared")
        return found

    def known_table(self, node: fx.Node, where: Sequence[Expr]) -> Expr | None:
        """A buffer read at positions, if its contents are a mask or an affine function that has a name."""
        axes = [axis for axis, w in enumerate(where) if w in _POSITIONS]
        for axis in axes:
            self.graph.limit_positions(int(shape_of(node)[axis]))
        value = self.fixed_value(node)
        if value is None or any(not isinstance(w, Const) for axis, w in enumerate(where) if axis not in axes):
            return None
        table = _part(value.detach().cpu(), where, axes)
        if table is None:
            return None
        if len(axes) == 1:
            return _affine(table[: len(table) // 2], table, where[axes[0]])
        if len(axes) == 2 and where[axes[0]] != where[axes[1]]:
            return _named_mask(table if where[axes[0]] == Var("q") else table.T)
        return None

    def begins_alike(self, node: fx.Node) -> bool:
        """True if a longer evaluation begins, along every axis of tokens, with a shorter one."""
        lengths = self._lengths(node)
        short, long = (self.evaluate(node, length) for length in lengths)
        if short is None or long is None:
            return False
        self.graph.limit_positions(lengths[1], "the lengths at which its tables were compared")
        for axis in self.graph.token_axes(node):
            long = long.narrow(axis, 0, lengths[0])
        return torch.equal(short, long)

    def fixed_value(self, node: fx.Node) -> torch.Tensor | None:
        """The tensor behind an input if training cannot change it and it has data."""
        value = None if node.name in self.graph.parameters else self.graph.values.get(node.name)
        return None if value is None or value.device.type == "meta" else value

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, node: fx.Node, length: int) -> torch.Tensor | None:
        """Value of a position-only node for one unpacked sequence of ``length`` tokens, on the CPU."""
        if self.depends_on_tokens(node):
            return None
        key = (node, length)
        if key not in self._evaluated:
            self._evaluated[key] = self._evaluate(node, length)
        return self._evaluated[key]

    def _evaluate(self, node: fx.Node, length: int) -> torch.Tensor | None:
        env: dict[fx.Node, Any] = {}
        try:
            for ancestor in self.ancestors(node):
                env[ancestor] = self._computed(ancestor, length, env)
        except (LookupError, RuntimeError):  # an input without data, or a table shorter than this length
            return None
        result: torch.Tensor = env[node]
        return result

    def _computed(self, node: fx.Node, length: int, env: dict[fx.Node, Any]) -> Any:
        if self.depends_on_tokens(node):  # read for its shape and dtype
            sizes = [self.graph.size_at(size, length) for size in shape_of(node)]
            return torch.zeros((), dtype=node.meta["val"].dtype).expand(sizes)
        if node.op != "placeholder":
            return run_node(node, env, device=torch.device("cpu"))
        if node.name in LAYOUT_INPUTS:
            return {"position_ids": torch.arange(length)[None]}[node.name]
        value = self.fixed_value(node)
        if value is None:
            raise LookupError(node.name)
        return value.detach().cpu()

    def ancestors(self, node: fx.Node) -> list[fx.Node]:
        """``node`` and all that it is computed from, in graph order; tokens that lend their shape have no sources."""
        found, stack = {node}, [node]
        while stack:
            last = stack.pop()
            for source in [] if self.depends_on_tokens(last) else last.all_input_nodes:
                if source not in found:
                    found.add(source)
                    stack.append(source)
        return [n for n in self.graph.graph.nodes if n in found]

    def _lengths(self, node: fx.Node) -> tuple[int, int]:
        square = any(
            sum(self.graph.mentions_length(size) for size in shape_of(ancestor)) > 1
            for ancestor in self.ancestors(node)
        )
        long = _LONG_SQUARE if square else _LONG
        if self.graph.max_positions is not None:
            long = min(long, self.graph.max_positions)
        return min(_SHORT, long // 2), long

    def _has_length(self, node: fx.Node) -> bool:
        return any(self.graph.mentions_length(ancestor.meta.get("val")) for ancestor in self.ancestors(node)) or any(
            self.graph.mentions_length(size) for ancestor in self.ancestors(node) for size in shape_of(ancestor)
        )


def _read_by(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values ``node`` reads: of the tensor that lends its shape, none."""
    if op_family(node) in _SHAPE_ONLY:
        return [source for source in node.all_input_nodes if not is_tensor(source)]
    if op_family(node) in _SHAPE_OF_ANOTHER:
        return node.all_input_nodes[:1]
    return node.all_input_nodes


def _part(value: torch.Tensor | None, where: Sequence[Expr], axes: Sequence[int]) -> torch.Tensor | None:
    """``value`` at the constant coordinates, whole along ``axes``; None where there is no such place."""
    if value is None:
        return None
    for axis in reversed(range(len(where))):
        place = where[axis]
        if axis not in axes and isinstance(place, Const):
            if not 0 <= place.value < value.shape[axis]:
                return None
            value = value.select(axis, int(place.value))
    return value


def _equal(short: torch.Tensor, long: torch.Tensor) -> Expr | None:
    return Const(long.item()) if torch.equal(short, long) else None


def _affine(short: torch.Tensor, long: torch.Tensor, position: Expr) -> Expr | None:
    if len(short) < 2 or len(long) <= len(short) or not torch.equal(long[: len(short)], short):
        return None
    start, step = long[0].item(), (long[1] - long[0]).item() if long.dtype != torch.bool else 0
    if (long == long[0]).all():
        return Const(start)
    whole = long.dtype != torch.bool and float(start).is_integer() and float(step).is_integer()
    # In double: a table of halves may hold positions that were rounded.
    if not whole or not torch.equal(long.double(), start + step * torch.arange(len(long), dtype=torch.float64)):
        return None
    return Op("add", (Op("mul", (position, Const(step))), Const(start)))


def _named_mask(table: torch.Tensor) -> Expr | None:
    """``[N, N]`` at ``[q, k]``: a causal or banded boolean, integer or additive mask, or None."""
    size = table.shape[0]
    if table.shape[0] != table.shape[1] or size < 2:
        return None
    shown, hidden = table[0, 0].item(), table[0, -1].item()
    visible = table == shown
    if shown == hidden or not (visible | (table == hidden)).all():
        return None
    width = int(visible[-1].sum())  # keys the last query sees
    row = torch.arange(size)
    distance = row[:, None] - row[None, :]
    if not torch.equal(visible, (distance >= 0) & (distance < width)):
        return None
    condition: Expr = Op("le", (Var("k"), Var("q")))
    if width < size:
        window = Op("lt", (Op("sub", (Var("q"), Var("k"))), Const(width)))
        condition = Op("and_", (condition, window))
    return Op("where", (condition, Const(shown), Const(hidden)))
