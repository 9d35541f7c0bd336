"""Reading values: sources, fills, casts and pointwise ops, which become operations of an expression."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .base import argument, is_tensor, op_family, op_name, operands
from .coordinates import Coordinates, Opaque, Reader, reads
from .expressions import Const, Expr, Op, is_bool

_BINARY = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "div", "true_divide": "div", "floor_divide": "floordiv",
    "remainder": "remainder", "pow": "pow", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "eq": "eq", "ne": "ne",
    "minimum": "minimum", "maximum": "maximum", "min": "minimum", "max": "maximum", "divide": "div", "multiply": "mul",
    "subtract": "sub", "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge", "not_equal": "ne",
}  # fmt: skip
_BOOLEAN = {"mul": "and_", "add": "or_"}  # what these two mean on booleans
_LOGICAL = {
    "logical_and": "and_", "bitwise_and": "and_", "__and__": "and_", "logical_or": "or_", "bitwise_or": "or_",
    "__or__": "or_", "logical_not": "not_", "bitwise_not": "not_",
}  # fmt: skip
_UNARY = ("abs", "tanh", "sigmoid", "exp", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "relu", "neg", "erf", "silu")
_FILLS = {"ones": 1, "ones_like": 1, "new_ones": 1, "zeros": 0, "zeros_like": 0, "new_zeros": 0}
_CASTS = {getattr(torch, n): n for n in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "bool")}
_SMALL_INTEGERS = (torch.uint8, torch.int8, torch.int16)


def _dtype(node: Any) -> torch.dtype | None:
    return node.meta["val"].dtype if is_tensor(node) else None


# --------------------------------------------------------------------------- sources


@reads(*_FILLS)
def constant(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """Ones and zeros."""
    return _typed(node, _FILLS[op_family(node)])


@reads("full", "full_like", "new_full", "fill", "scalar_tensor")
def full(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """One number everywhere."""
    value = next(given for name in ("fill_value", "value", "s") if (given := argument(node, name, None)) is not None)
    if not isinstance(value, (bool, int, float)):
        raise Opaque(node, f"{op_name(node)} with a computed value")
    return _typed(node, value)


def _typed(node: fx.Node, value: float) -> Const:
    dtype = node.meta["val"].dtype
    kind = bool if dtype == torch.bool else float if dtype.is_floating_point else int
    return Const(kind(value))


@reads("arange")
def arange(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """``start + step * index``."""
    start, step = argument(node, "start", 0), argument(node, "step", 1)
    if not isinstance(start, (int, float)) or not isinstance(step, (int, float)):
        raise Opaque(node, "arange with a computed start or step")
    value = Op("add", (Op("mul", (where[0], Const(step))), Const(start)))
    return _cast(node, value, torch.int64, node.meta["val"].dtype)


@reads("tril", "triu")
def triangle(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """The part of a matrix on one side of a diagonal, zero on the other."""
    source, diagonal = operands(node)
    if not isinstance(diagonal, int):
        raise Opaque(node, "a triangle with a computed diagonal")
    row, column = where[-2:]
    kept = Op("le" if op_family(node) == "tril" else "ge", (Op("sub", (column, row)), Const(diagonal)))
    return Op("where", (kept, reader.read(source, where), _typed(node, 0)))


# --------------------------------------------------------------------------- pointwise


@reads(*_UNARY)
def unary(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """A function of one number."""
    return Op(op_family(node), (reader.value(operands(node)[0], where),))


@reads(*_BINARY)
def binary(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """A function of two numbers, with the options that torch knows for it."""
    if op_family(node) in ("min", "max") and op_name(node).rpartition(".")[2] != "other":
        raise Opaque(node, f"{op_name(node)} over an axis")
    left, right = operands(node)[:2]
    op, alpha = _BINARY[op_family(node)], argument(node, "alpha", 1)
    if _dtype(node) == torch.bool and op in _BOOLEAN:
        return Op(_BOOLEAN[op], (_truth(reader, left, where), _truth(reader, right, where)))
    if op == "div" and (rounding := argument(node, "rounding_mode", None)) is not None:
        op = {"floor": "floordiv", "trunc": "truncdiv"}[rounding]
    return Op(op, (reader.value(left, where), _times(alpha, reader.value(right, where))))


@reads("rsub")
def subtract_from(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """``other - alpha * self``."""
    left, right = operands(node)[:2]
    return Op("sub", (reader.value(right, where), _times(argument(node, "alpha", 1), reader.value(left, where))))


def _times(factor: Any, value: Expr) -> Expr:
    return value if factor == 1 else Op("mul", (Const(factor), value))


@reads(*_LOGICAL)
def logical(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """And, or, not: of truth values only, bits of integers are refused."""
    if _dtype(node) != torch.bool:
        raise Opaque(node, f"{op_name(node)} on integers")
    return Op(_LOGICAL[op_family(node)], tuple(_truth(reader, arg, where) for arg in operands(node)))


def _truth(reader: Reader, arg: Any, where: Coordinates) -> Expr:
    """``arg`` as a truth value, which is what logical ops make of numbers."""
    value = reader.value(arg, where)
    return value if is_bool(value) else Op("ne", (value, Const(0)))


@reads("where")
def choose(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """One of two values."""
    if len(operands(node)) != 3:
        raise Opaque(node, "the places where a tensor is not zero")
    condition, a, b = operands(node)
    return Op("where", (_truth(reader, condition, where), reader.value(a, where), reader.value(b, where)))


@reads("masked_fill")
def masked_fill(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """``value`` where ``mask`` says so."""
    x, mask, value = operands(node)
    return Op("where", (_truth(reader, mask, where), reader.value(value, where), reader.value(x, where)))


@reads("clamp", "clip", "clamp_min", "clamp_max")
def clamp(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """``min(max(x, low), high)``."""
    expr = reader.value(operands(node)[0], where)
    for bound, pick in (("min", "lt"), ("max", "gt")):
        limit = argument(node, bound, None)
        if limit is not None:
            value = reader.value(limit, where)
            expr = Op("where", (Op(pick, (expr, value)), value, expr))
    return expr


@reads("to", "_to_copy", "type_as")
def cast(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """Another dtype."""
    source = operands(node)[0]
    return _cast(node, reader.read(source, where), source.meta["val"].dtype, node.meta["val"].dtype)


def _cast(node: fx.Node, value: Expr, source: torch.dtype, target: torch.dtype) -> Expr:
    if source == target:
        return value
    if target in _SMALL_INTEGERS and is_bool(value):
        return Op("int32", (value,))  # 0 and 1 fit everywhere
    if target not in _CASTS:
        raise Opaque(node, f"a cast to {target}")
    return Op(_CASTS[target], (value,))
