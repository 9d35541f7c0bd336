"""Read one element of any tensor in the graph, at symbolic coordinates.

``PullBack.read(node, (Const(0), Var("h"), Var("q"), Var("k")))`` answers: what is ``node[0, h, q, k]``? The
coordinates are pulled back through views, broadcasts and lookups, pointwise ops become expressions, and what
cannot be followed stays as an element of a tensor. A mask of shape ``[1, 1, T, T]`` turns into a statement
about two positions, and no table of positions times positions is ever needed.

Coordinates of token axes are *logical positions*: the model's own code, run on one unpacked sequence, has the
token at position ``p`` at index ``p``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from . import pull_lookups, pull_values, pull_views
from .base import PackGraph, is_tensor, op_family, op_name, shape_of
from .coordinates import READERS, ZERO, Coordinates, Opaque
from .expressions import Const, Expr, Var, at, simplify, variables
from .positional import PositionalValues

__all__ = ["PullBack"]

_RULE_FILES = (pull_lookups, pull_values, pull_views)  # importing them fills READERS
_SLOTS: dict[Expr, Expr] = {Var("q"): Var("i"), Var("k"): Var("j")}


class PullBack:
    """Reads elements of a graph's tensors.

    Args:
        graph: the captured graph.
        leaf_rule: called on every node before any rule; returns an expression, for example ``s`` for a score
            contraction, or ``None``.
    """

    def __init__(
        self, graph: PackGraph, leaf_rule: Callable[[fx.Node, Coordinates], Expr | None] | None = None
    ) -> None:
        self.graph = graph
        self.positional = PositionalValues(graph)
        self._leaf_rule = leaf_rule
        self._memo: dict[tuple[fx.Node, Coordinates], Expr] = {}

    def read(self, node: fx.Node, where: Sequence[Expr]) -> Expr:
        """The element of ``node`` at ``where``, one coordinate for each axis.

        Raises:
            Opaque: something on the way has no rule.
        """
        if not is_tensor(node):
            return self._number(node)
        where = tuple(ZERO if size == 1 else w for size, w in zip(shape_of(node), where, strict=True))
        key = (node, where)
        if key not in self._memo:
            self._memo[key] = simplify(self._read(node, where))
        return self._memo[key]

    def value(self, arg: Any, where: Coordinates = ()) -> Expr:
        """``arg`` broadcast against ``where``: a node, or a number that is what it is."""
        if isinstance(arg, fx.Node):
            return self.read(arg, where[len(where) - len(shape_of(arg)) :])
        if isinstance(arg, (bool, int, float)):
            return Const(arg)
        raise TypeError(f"not a tensor or a number: {arg!r}")

    def _number(self, node: fx.Node) -> Expr:
        value = node.meta.get("val")
        if isinstance(value, (bool, int, float)):
            return Const(value)
        raise Opaque(node, "a value computed from the number of tokens in the row")

    def _read(self, node: fx.Node, where: Coordinates) -> Expr:
        if self._leaf_rule is not None and (leaf := self._leaf_rule(node, where)) is not None:
            return leaf
        if node.op == "placeholder":
            return self._placeholder(node, where)
        if self.positional.depends_on_tokens(node):
            return self._token_data(node, where)
        if self._is_table_of_heads(node, where):
            return at(node, *where)
        if (rule := READERS.get(op_family(node))) is not None:
            return rule(self, node, where)
        return self._evaluated(node, where)

    def _placeholder(self, node: fx.Node, where: Coordinates) -> Expr:
        if node.name == "position_ids":
            return where[-1]
        if node.name not in self.graph.state and node.name not in self.graph.constants:
            raise Opaque(node, f"{node.name} is token data")
        value = self.positional.fixed_value(node)
        if value is not None and value.numel() == 1:
            return Const(value.item())
        return self.positional.known_table(node, where) or at(node, *where)

    def _token_data(self, node: fx.Node, where: Coordinates) -> Expr:
        """Follow pointwise ops and views of token data as well; stop where that ends, at a value per slot."""
        cause = Opaque(node, f"{op_name(node)} depends on the tokens, and there is no rule to read it")
        try:
            if (rule := READERS.get(op_family(node))) is not None:
                return rule(self, node, where)
        except Opaque as deeper:  # of what is no tensor, the model's source line says little
            cause = deeper if is_tensor(deeper.node) else Opaque(node, deeper.reason)
        axes = self.graph.token_axes(node)
        if len(axes) != 1 or where[axes[0]] not in _SLOTS:
            raise cause
        return at(node, *(_SLOTS[w] if axis in axes else w for axis, w in enumerate(where)))

    def _is_table_of_heads(self, node: fx.Node, where: Coordinates) -> bool:
        """True for a per-head constant, such as ALiBi slopes: computed once, not once a score."""
        if any(self.graph.mentions_length(size) for size in shape_of(node)) or op_family(node) in pull_views.VIEWS:
            return False
        return {name for w in where for name in variables(w)} == {"h"}

    def _evaluated(self, node: fx.Node, where: Coordinates) -> Expr:
        """No rule: read the node's values at canonical positions, if they are a plain function of position."""
        found = self.positional.function_of_position(node, where)
        if found is None:
            raise Opaque(node, f"no rule to read {op_name(node)} at logical positions")
        return found
