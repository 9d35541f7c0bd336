"""positional: which nodes are functions of position alone, and what those functions are.

A node that no token reaches (only ``arange``, masks of ones, tables and the like do) has, for a sequence of
length L, the same values whatever the text is. Evaluated at canonical positions 0..L-1 for two lengths, it is
usable in packed form if the longer evaluation begins with the shorter one: then its value at a slot depends on
the slot's position and on nothing else. What is constant or affine in the position is then known by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .base import LAYOUT_INPUTS, PackGraph, op_name, shape_of
from .expressions import Const, Expr, Op, Var

__all__ = ["PositionalValues"]

_LENGTHS = (61, 509)
"""Lengths at which functions of position are compared; primes, so that no period hides in both."""

_SHAPE_ONLY = ("sym_size", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full",
               "new_empty")  # fmt: skip


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
            elif op_name(node).removeprefix("aten.").partition(".")[0] in _SHAPE_ONLY:
                self._tokens[node] = False
            else:
                self._tokens[node] = any(self.depends_on_tokens(source) for source in node.all_input_nodes)
        return self._tokens[node]

    def function_of_position(self, node: fx.Node, where: Sequence[Expr]) -> Expr | None:
        """``node`` at ``where`` as a constant or an affine function of the one position that ``where`` names."""
        variables = [axis for axis, w in enumerate(where) if not isinstance(w, Const)]
        if len(variables) > 1 or any(not isinstance(w, (Const, Var)) for w in where):
            return None
        if not variables:
            short, long = (self._element(node, where, length) for length in _LENGTHS)
            return Const(short) if short is not None and short == long else None
        (axis,) = variables
        if where[axis] not in (Var("q"), Var("k")) or not self.graph.is_length(shape_of(node)[axis]):
            return None
        columns = [self._column(node, where, axis, length) for length in _LENGTHS]
        return self._affine(columns, where[axis])

    def known_table(self, node: fx.Node, where: Sequence[Expr]) -> Expr | None:
        """A buffer read at positions, if its contents are a mask or an affine function that has a name."""
        value = self.fixed_value(node)
        axes = [axis for axis, w in enumerate(where) if w in (Var("q"), Var("k"))]
        if axes:
            for axis in axes:
                self.graph.limit_positions(int(shape_of(node)[axis]))
        if value is None or not axes:
            return None
        if any(not isinstance(where[axis], Const) for axis in range(len(where)) if axis not in axes):
            return None
        index = tuple(slice(None) if axis in axes else w.value for axis, w in enumerate(where))  # type: ignore[union-attr]
        table = value.detach().cpu()[index]
        if len(axes) == 1:
            return self._affine([table[: len(table) // 2], table], where[axes[0]])
        if len(axes) == 2 and where[axes[0]] != where[axes[1]]:
            return _named_mask(table if where[axes[0]] == Var("q") else table.T)
        return None

    # ------------------------------------------------------------------ evaluation

    def _column(self, node: fx.Node, where: Sequence[Expr], axis: int, length: int) -> torch.Tensor | None:
        value = self.evaluate(node, length)
        if value is None:
            return None
        return value[tuple(slice(None) if n == axis else w.value for n, w in enumerate(where))]  # type: ignore[union-attr]

    def _element(self, node: fx.Node, where: Sequence[Expr], length: int) -> Any:
        value = self.evaluate(node, length)
        return None if value is None else value[tuple(w.value for w in where)].item()  # type: ignore[union-attr]

    def _affine(self, columns: Sequence[torch.Tensor | None], position: Expr) -> Expr | None:
        short, long = columns
        if short is None or long is None or len(short) < 2 or not torch.equal(long[: len(short)], short):
            return None
        start, step = long[0].item(), (long[1] - long[0]).item() if long.dtype != torch.bool else 0
        if (long == long[0]).all():
            return Const(start)
        whole = long.dtype != torch.bool and float(start).is_integer() and float(step).is_integer()
        if not whole or not torch.equal(long, (start + step * torch.arange(len(long))).to(long.dtype)):
            return None
        return Op("add", (Op("mul", (position, Const(step))), Const(start)))

    def evaluate(self, node: fx.Node, length: int) -> torch.Tensor | None:
        """Value of a position-only node for one unpacked sequence of ``length`` tokens, on the CPU."""
        key = (node, length)
        if key not in self._evaluated:
            self._evaluated[key] = self._evaluate(node, length)
        return self._evaluated[key]

    def _evaluate(self, node: fx.Node, length: int) -> torch.Tensor | None:
        env: dict[fx.Node, Any] = {}
        for ancestor in self._ancestors(node):
            if ancestor.op == "placeholder":
                value = self._input(ancestor, length)
                if value is None:
                    return None
                env[ancestor] = value
            else:
                env[ancestor] = self._run(ancestor, env)
        result: torch.Tensor = env[node]
        return result

    @staticmethod
    def _run(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _ancestors(self, node: fx.Node) -> list[fx.Node]:
        found, stack = {node}, [node]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in found:
                    found.add(source)
                    stack.append(source)
        return [n for n in self.graph.graph.nodes if n in found]

    def _input(self, node: fx.Node, length: int) -> torch.Tensor | None:
        if node.name in LAYOUT_INPUTS:
            row = torch.arange(length)
            return {"input_ids": torch.zeros(1, length, dtype=torch.int64), "position_ids": row[None]}.get(
                node.name, row
            )
        value = self.fixed_value(node)
        return None if value is None else value.detach().cpu()

    def fixed_value(self, node: fx.Node) -> torch.Tensor | None:
        """The tensor behind an input if training cannot change it and it has data."""
        value = None if node.name in self.graph.parameters else self.graph.values.get(node.name)
        return None if value is None or value.device.type == "meta" else value


def _named_mask(table: torch.Tensor) -> Expr | None:
    """``[N, N]`` at ``[q, k]``: a causal or banded boolean, integer or additive mask, or None."""
    size = table.shape[0]
    if table.shape[0] != table.shape[1]:
        return None
    shown, hidden = table.diagonal()[0].item(), table[0, -1].item() if size > 1 else None
    if hidden is None or shown == hidden:
        return None
    visible = table == shown
    if not (visible | (table == hidden)).all():
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
