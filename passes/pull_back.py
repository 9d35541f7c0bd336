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

import torch
from torch import fx

from .base import PackGraph, is_op, op_name, shape_of
from .expressions import Const, Expr, Op, Var, at, simplify, walk
from .positional import PositionalValues

__all__ = ["Opaque", "PullBack"]

Coordinates = tuple[Expr, ...]
ZERO = Const(0)

_BINARY = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "div", "floor_divide": "floordiv", "remainder": "remainder",
    "pow": "pow", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "eq": "eq", "ne": "ne", "minimum": "minimum",
    "maximum": "maximum", "logical_and": "and_", "logical_or": "or_",
}  # fmt: skip
_UNARY = {
    name: name
    for name in ("abs", "tanh", "sigmoid", "exp", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "relu", "neg", "erf")
} | {"logical_not": "not_", "silu": "silu"}
_PASS_THROUGH = ("contiguous", "clone", "detach", "alias", "lift_fresh_copy", "dropout")
_DTYPE_NAMES = {getattr(torch, n): n for n in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "bool")}
_VIEWS = tuple(f"aten.{name}" for name in ("view", "reshape", "_unsafe_view", "expand", "unsqueeze", "squeeze", "slice",
               "select", "transpose", "permute", "t", "flatten", "unflatten", *_PASS_THROUGH))  # fmt: skip
_CONSTANT_FILLS = {
    "ones": 1, "zeros": 0, "ones_like": 1, "zeros_like": 0, "new_ones": 1, "new_zeros": 0,
    "full": None, "full_like": None, "new_full": None, "scalar_tensor": None,
}  # fmt: skip


class Opaque(Exception):
    """A node whose elements cannot be expressed; carries the node and why."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


class PullBack:
    """Reads elements of a graph's tensors.

    Args:
        graph: the captured graph.
        leaves: nodes to stop at, each with a function from the coordinates it is read at to an expression
            (for example a score contraction, read as ``s``).
        leaf_rule: called on every node before any rule; returns an expression or ``None``.
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
        where = tuple(ZERO if size == 1 else w for size, w in zip(shape_of(node), where, strict=True))
        key = (node, where)
        if key not in self._memo:
            self._memo[key] = simplify(self._read(node, where))
        return self._memo[key]

    def value(self, arg: Any, where: Coordinates = ()) -> Expr:
        """``arg`` broadcast against ``where``: a node, or a number that is what it is."""
        if isinstance(arg, fx.Node):
            rank = len(shape_of(arg))
            return self.read(arg, where[len(where) - rank :])
        if isinstance(arg, (bool, int, float)):
            return Const(arg)
        raise TypeError(f"not a tensor or a number: {arg!r}")

    # ------------------------------------------------------------------ rules

    def _read(self, node: fx.Node, where: Coordinates) -> Expr:
        if self._leaf_rule is not None and (leaf := self._leaf_rule(node, where)) is not None:
            return leaf
        if node.op == "placeholder":
            return self._placeholder(node, where)
        if self.positional.depends_on_tokens(node):
            return self._token_data(node, where)
        if self._is_table_of_heads(node, where):
            return at(node, *where)
        return self._apply_rule(node, where)

    def _is_table_of_heads(self, node: fx.Node, where: Coordinates) -> bool:
        """True for a per-head constant, such as ALiBi slopes: computed once, not once a score."""
        if any(self.graph.mentions_length(size) for size in shape_of(node)) or is_op(node, *_VIEWS):
            return False
        names = {e.name for w in where for e in walk(w) if isinstance(e, Var)}
        return names == {"h"}

    def _apply_rule(self, node: fx.Node, where: Coordinates) -> Expr:
        name = op_name(node).removeprefix("aten.").partition(".")[0]
        if name in _CONSTANT_FILLS:
            return self._fill(node, name)
        if name in _PASS_THROUGH:
            return self.value(node.args[0], where)
        rule = getattr(self, f"_rule_{name.strip('_')}", None)
        if rule is not None:
            return rule(node, where)
        if name in _BINARY:
            return self._binary(node, _BINARY[name], where)
        if name in _UNARY:
            return Op(_UNARY[name], (self.value(node.args[0], where),))
        return self._evaluated(node, where)

    def _evaluated(self, node: fx.Node, where: Coordinates) -> Expr:
        """No rule: read the node's values at canonical positions, if they are a plain function of position."""
        found = self.positional.function_of_position(node, where)
        if found is None:
            raise Opaque(node, f"no rule to read {op_name(node)} at logical positions")
        return found

    def _token_data(self, node: fx.Node, where: Coordinates) -> Expr:
        """Follow pointwise ops and views of token data as well; stop where that ends, at a value per slot."""
        try:
            return self._apply_rule(node, where)
        except Opaque as opaque:
            slots = {Var("q"): Var("i"), Var("k"): Var("j")}
            token_axes = self.graph.token_axes(node)
            if len(token_axes) != 1 or where[token_axes[0]] not in slots:
                raise Opaque(node, f"{op_name(node)} depends on the tokens and mixes them: {opaque.reason}") from None
            read_at = [slots[w] if axis in token_axes else w for axis, w in enumerate(where)]
            return at(node, *read_at)

    def _placeholder(self, node: fx.Node, where: Coordinates) -> Expr:
        if node.name == "position_ids":
            return where[-1]
        if node.name not in self.graph.state and node.name not in self.graph.constants:
            raise Opaque(node, f"{node.name} is token data")
        value = self.positional.fixed_value(node)
        if value is not None and value.numel() == 1:
            return Const(value.item())
        return self.positional.known_table(node, where) or at(node, *where)

    def _fill(self, node: fx.Node, name: str) -> Expr:
        value = _CONSTANT_FILLS[name]
        if value is None:
            value = node.args[0] if name == "scalar_tensor" else node.args[-1]
        if not isinstance(value, (bool, int, float)):
            raise Opaque(node, f"{op_name(node)} with a computed value")
        dtype = node.meta["val"].dtype
        kind = bool if dtype == torch.bool else float if dtype.is_floating_point else int
        return Const(kind(value))

    def _binary(self, node: fx.Node, op: str, where: Coordinates) -> Expr:
        left, right = node.args[0], node.args[1]
        if node.kwargs.get("alpha", 1) != 1:
            right_value: Expr = Op("mul", (Const(node.kwargs["alpha"]), self.value(right, where)))  # type: ignore[arg-type]
        else:
            right_value = self.value(right, where)
        if op == "div" and node.kwargs.get("rounding_mode"):
            op = {"floor": "floordiv", "trunc": "truncdiv"}[str(node.kwargs["rounding_mode"])]
        return Op(op, (self.value(left, where), right_value))

    def _rule_and(self, node: fx.Node, where: Coordinates) -> Expr:
        return self._bitwise(node, "and_", where)

    def _rule_bitwise_and(self, node: fx.Node, where: Coordinates) -> Expr:
        return self._bitwise(node, "and_", where)

    def _rule_or(self, node: fx.Node, where: Coordinates) -> Expr:
        return self._bitwise(node, "or_", where)

    def _rule_bitwise_or(self, node: fx.Node, where: Coordinates) -> Expr:
        return self._bitwise(node, "or_", where)

    def _rule_bitwise_not(self, node: fx.Node, where: Coordinates) -> Expr:
        if node.meta["val"].dtype != torch.bool:
            raise Opaque(node, "bitwise_not on integers")
        return Op("not_", (self.value(node.args[0], where),))

    def _bitwise(self, node: fx.Node, op: str, where: Coordinates) -> Expr:
        if node.meta["val"].dtype != torch.bool:
            raise Opaque(node, f"{op_name(node)} on integers")
        return Op(op, (self.value(node.args[0], where), self.value(node.args[1], where)))

    def _rule_rsub(self, node: fx.Node, where: Coordinates) -> Expr:
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
            raise Opaque(node, "rsub with alpha")
        return Op("sub", (self.value(node.args[1], where), self.value(node.args[0], where)))

    def _rule_where(self, node: fx.Node, where: Coordinates) -> Expr:
        return Op("where", tuple(self.value(arg, where) for arg in node.args))

    def _rule_masked_fill(self, node: fx.Node, where: Coordinates) -> Expr:
        x, mask, value = (self.value(arg, where) for arg in node.args)
        return Op("where", (mask, value, x))

    def _rule_clamp(self, node: fx.Node, where: Coordinates) -> Expr:
        expr = self.value(node.args[0], where)
        low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
        high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
        for bound, op in ((low, "maximum"), (high, "minimum")):
            if bound is not None:
                pick = "lt" if op == "maximum" else "gt"
                limit = self.value(bound, where)
                expr = Op("where", (Op(pick, (expr, limit)), limit, expr))
        return expr

    def _rule_to(self, node: fx.Node, where: Coordinates) -> Expr:
        expr = self.value(node.args[0], where)
        source, target = node.args[0].meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
        return expr if source == target else Op(_DTYPE_NAMES[target], (expr,))

    _rule_to_copy = _rule_type_as = _rule_to

    def _rule_arange(self, node: fx.Node, where: Coordinates) -> Expr:
        start, step = 0, 1
        if op_name(node) != "aten.arange.default":
            start = node.args[0]  # type: ignore[assignment]
            step = node.args[2] if len(node.args) > 2 else 1  # type: ignore[assignment]
        if not isinstance(start, (int, float)) or not isinstance(step, (int, float)):
            raise Opaque(node, "arange with a computed start or step")
        value: Expr = Op("add", (Op("mul", (where[0], Const(step))), Const(start)))
        dtype = node.meta["val"].dtype
        return Op("float32", (value,)) if dtype.is_floating_point else value

    def _rule_tril(self, node: fx.Node, where: Coordinates) -> Expr:
        return self._triangle(node, where, "le")

    def _rule_triu(self, node: fx.Node, where: Coordinates) -> Expr:
        return self._triangle(node, where, "ge")

    def _triangle(self, node: fx.Node, where: Coordinates, comparison: str) -> Expr:
        diagonal = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
        if not isinstance(diagonal, int):
            raise Opaque(node, "a triangle with a computed diagonal")
        row, column = where[-2:]
        kept = Op(comparison, (Op("sub", (column, row)), Const(diagonal)))
        dtype = node.meta["val"].dtype
        zero = Const(False) if dtype == torch.bool else Const(0.0) if dtype.is_floating_point else Const(0)
        return Op("where", (kept, self.value(node.args[0], where), zero))

    # ------------------------------------------------------------------ views

    def _rule_unsqueeze(self, node: fx.Node, where: Coordinates) -> Expr:
        axis = int(node.args[1]) % len(where)  # type: ignore[arg-type]
        return self.value(node.args[0], where[:axis] + where[axis + 1 :])

    def _rule_squeeze(self, node: fx.Node, where: Coordinates) -> Expr:
        kept = iter(where)
        source: Any = node.args[0]
        remaining = list(shape_of(node))
        coordinates: list[Expr] = []
        for axis, size in enumerate(shape_of(source)):
            dropped = size == 1 and (len(shape_of(source)) - axis) > len(remaining)
            coordinates.append(ZERO if dropped else next(kept))
            if not dropped:
                remaining.pop(0)
        return self.read(source, coordinates)

    def _rule_transpose(self, node: fx.Node, where: Coordinates) -> Expr:
        order = list(range(len(where)))
        a, b = (int(axis) % len(where) for axis in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
        return self._permuted(node, order, where)

    def _rule_t(self, node: fx.Node, where: Coordinates) -> Expr:
        return self._permuted(node, list(reversed(range(len(where)))), where)

    def _rule_permute(self, node: fx.Node, where: Coordinates) -> Expr:
        return self._permuted(node, [int(a) % len(where) for a in node.args[1]], where)  # type: ignore[union-attr, arg-type]

    def _permuted(self, node: fx.Node, order: list[int], where: Coordinates) -> Expr:
        inverse = [order.index(axis) for axis in range(len(order))]
        return self.value(node.args[0], tuple(where[n] for n in inverse))

    def _rule_expand(self, node: fx.Node, where: Coordinates) -> Expr:
        return self.value(node.args[0], where)

    def _rule_repeat(self, node: fx.Node, where: Coordinates) -> Expr:
        source: Any = node.args[0]
        sizes = shape_of(source)
        inner = where[len(where) - len(sizes) :]
        read_at = []
        for axis, (w, size, out) in enumerate(
            zip(inner, sizes, shape_of(node)[len(where) - len(sizes) :], strict=True)
        ):
            if self.graph.mentions_length(size) and not self.graph.is_length(out):
                raise Opaque(node, f"axis {axis} of tokens is repeated")
            same = self.graph.is_length(size) or size == out
            read_at.append(w if same else Op("remainder", (w, Const(int(size)))))
        return self.read(source, read_at)

    def _rule_repeat_interleave(self, node: fx.Node, where: Coordinates) -> Expr:
        source, repeats, axis = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None
        axis = node.kwargs.get("dim", axis)
        if not isinstance(repeats, int) or not isinstance(axis, int):
            raise Opaque(node, "repeat_interleave with computed repeats")
        axis %= len(where)
        read_at = list(where)
        read_at[axis] = Op("floordiv", (where[axis], Const(repeats)))
        return self.value(source, tuple(read_at))

    def _rule_slice(self, node: fx.Node, where: Coordinates) -> Expr:
        axis, start, _, step = _slice_arguments(node)
        axis %= len(where)
        if not isinstance(start, int) or start < 0 or not isinstance(step, int):
            raise Opaque(node, "a slice that counts from the end or from a computed place")
        moved = Op("add", (Op("mul", (where[axis], Const(step))), Const(start)))
        return self.value(node.args[0], (*where[:axis], simplify(moved), *where[axis + 1 :]))

    def _rule_select(self, node: fx.Node, where: Coordinates) -> Expr:
        axis, index = int(node.args[1]) % (len(where) + 1), node.args[2]  # type: ignore[arg-type]
        if not isinstance(index, int) or index < 0:
            raise Opaque(node, "a select that counts from the end or from a computed place")
        return self.value(node.args[0], (*where[:axis], Const(index), *where[axis:]))

    def _rule_view(self, node: fx.Node, where: Coordinates) -> Expr:
        source: Any = node.args[0]
        return self.read(source, self._reshaped(node, shape_of(source), shape_of(node), where))

    _rule_reshape = _rule_unsafe_view = _rule_flatten = _rule_unflatten = _rule_view

    def _reshaped(self, node: fx.Node, inner: Sequence[Any], outer: Sequence[Any], where: Coordinates) -> list[Expr]:
        """Coordinates in a tensor of shape ``inner`` of the element at ``where`` in its view of shape ``outer``."""
        left, right = [n for n, s in enumerate(inner) if s != 1], [n for n, s in enumerate(outer) if s != 1]
        read_at: list[Expr] = [ZERO] * len(inner)
        while left or right:
            group_in, group_out = self._matching_axes(node, inner, outer, left, right)
            flat: Expr = ZERO
            for axis in group_out:
                flat = Op("add", (Op("mul", (flat, Const(outer[axis]))), where[axis])) if flat != ZERO else where[axis]
            for n, axis in reversed(list(enumerate(group_in))):
                read_at[axis] = flat if n == 0 else Op("remainder", (flat, Const(inner[axis])))
                flat = flat if n == 0 else Op("floordiv", (flat, Const(inner[axis])))
        return [simplify(w) for w in read_at]

    def _matching_axes(
        self, node: fx.Node, inner: Sequence[Any], outer: Sequence[Any], left: list[int], right: list[int]
    ) -> tuple[list[int], list[int]]:
        """Pop the shortest leading runs of axes that hold the same elements on both sides."""
        if not left or not right:
            raise Opaque(node, "a view whose axes do not match")
        group_in, group_out = [left.pop(0)], [right.pop(0)]
        if self.graph.is_length(inner[group_in[0]]) and self.graph.is_length(outer[group_out[0]]):
            return group_in, group_out
        sizes = [inner[group_in[0]], outer[group_out[0]]]
        if any(self.graph.mentions_length(size) for size in sizes):
            raise Opaque(node, "a view that merges or splits the token axis")
        while sizes[0] != sizes[1]:
            side, rest, group, shape = (
                (0, left, group_in, inner) if sizes[0] < sizes[1] else (1, right, group_out, outer)
            )
            if not rest or self.graph.mentions_length(shape[rest[0]]):
                raise Opaque(node, "a view that merges or splits the token axis")
            group.append(rest.pop(0))
            sizes[side] *= shape[group[-1]]
        return group_in, group_out

    # ------------------------------------------------------------------ lookups

    def _rule_index(self, node: fx.Node, where: Coordinates) -> Expr:
        source, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
        rank = len(shape_of(source))  # type: ignore[arg-type]
        indices += [None] * (rank - len(indices))
        advanced = [axis for axis, index in enumerate(indices) if index is not None]
        if advanced != list(range(advanced[0], advanced[-1] + 1)):
            raise Opaque(node, "indices separated by slices")
        spread = max(len(shape_of(indices[axis])) for axis in advanced)
        before, looked_up = where[: advanced[0]], where[advanced[0] : advanced[0] + spread]
        after = where[advanced[0] + spread :]
        values = [self.value(indices[axis], looked_up) for axis in advanced]
        return self.value(source, (*before, *values, *after))

    def _rule_index_select(self, node: fx.Node, where: Coordinates) -> Expr:
        axis = int(node.args[1]) % len(where)  # type: ignore[arg-type]
        index = self.value(node.args[2], (where[axis],))
        return self.value(node.args[0], (*where[:axis], index, *where[axis + 1 :]))

    def _rule_embedding(self, node: fx.Node, where: Coordinates) -> Expr:
        return self.value(node.args[0], (self.value(node.args[1], where[:-1]), where[-1]))


def _slice_arguments(node: fx.Node) -> tuple[int, Any, Any, Any]:
    """``(axis, start, end, step)`` of an ``aten.slice``."""
    defaults: list[Any] = [0, None, None, 1]
    names = ("dim", "start", "end", "step")
    given = list(node.args[1:]) + defaults[len(node.args) - 1 :]
    axis, start, end, step = (node.kwargs.get(name, value) for name, value in zip(names, given, strict=True))
    return int(axis), start or 0, end, step  # type: ignore[arg-type]
