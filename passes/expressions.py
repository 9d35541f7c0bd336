"""Expressions over logical coordinates: what a mask or score *is*, read off the graph.

An expression is built from the coordinates of one attention score (query position ``q``, key position ``k``,
head ``h``, slots ``i j``), the raw score ``s``, constants, and elements of tensors. :func:`simplify` evaluates
as much as can be known, optionally under a relation between ``q`` and ``k``:

    past    k <= q      what the forest lets a query see
    future  k >  q      what a causal model must hide
    self    k == q      what every model must show

That is how a mask is understood without knowing its name: under *future* it must fold to "hidden"; what is
left of it under *past* is the part that packing still has to apply (a window, say), as a program for the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Union

import torch
from torch import fx

from ..runtime.program import ALWAYS, DTYPES, OPS

__all__ = [
    "HIDDEN",
    "Capture",
    "Const",
    "Expr",
    "Op",
    "Relation",
    "Var",
    "at",
    "conjuncts",
    "is_hidden",
    "linear_form",
    "simplify",
    "to_program",
    "walk",
]

Relation = Literal["past", "future", "self"]


@dataclass(frozen=True)
class Const:
    value: bool | int | float

    def __eq__(self, other: object) -> bool:  # 1, 1.0 and True are different constants
        return isinstance(other, Const) and type(other.value) is type(self.value) and other.value == self.value

    def __hash__(self) -> int:
        return hash((type(self.value), self.value))


@dataclass(frozen=True)
class Var:
    """``s``, ``h``, ``q``, ``k``, ``i`` or ``j``, as in ``runtime.program``."""

    name: str


@dataclass(frozen=True)
class Capture:
    """A tensor of the graph whose elements an expression reads."""

    node: fx.Node


@dataclass(frozen=True)
class Op:
    name: str
    args: tuple[Expr, ...]


Expr = Union[Const, Var, Capture, Op]

HIDDEN = Const(-math.inf)
_HIDING = -1e4
"""A constant at or below this takes a key out of the softmax: ``exp(-1e4 + s - max)`` is 0 in float32 and
below for any score within 9,000 of the row's maximum. Models write -inf, finfo.min, -1e9, -65504 or -1e4."""

_COMPARISONS: dict[str, Callable[[float, float], bool | None]] = {
    # decide a comparison `difference OP 0` from an interval [low, high] of the difference
    "lt": lambda low, high: True if high < 0 else False if low >= 0 else None,
    "le": lambda low, high: True if high <= 0 else False if low > 0 else None,
    "gt": lambda low, high: True if low > 0 else False if high <= 0 else None,
    "ge": lambda low, high: True if low >= 0 else False if high < 0 else None,
    "eq": lambda low, high: True if low == high == 0 else False if low > 0 or high < 0 else None,
    "ne": lambda low, high: False if low == high == 0 else True if low > 0 or high < 0 else None,
}
_LOGICAL = ("and_", "or_", "not_")


def at(node: fx.Node, *index: Expr) -> Expr:
    """One element of a tensor."""
    return Op("at", (Capture(node), *index))


def is_hidden(expr: Expr) -> bool:
    """True for a constant score that removes a key from the softmax."""
    return isinstance(expr, Const) and isinstance(expr.value, float) and expr.value <= _HIDING


def walk(expr: Expr) -> Iterator[Expr]:
    yield expr
    if isinstance(expr, Op):
        for arg in expr.args:
            yield from walk(arg)


def conjuncts(expr: Expr) -> Iterator[Expr]:
    """The parts of a conjunction."""
    if isinstance(expr, Op) and expr.name == "and_":
        for arg in expr.args:
            yield from conjuncts(arg)
    elif expr != Const(True):
        yield expr


def is_bool(expr: Expr) -> bool:
    if isinstance(expr, Const):
        return isinstance(expr.value, bool)
    if isinstance(expr, Op) and expr.name == "at":
        capture = expr.args[0]
        return isinstance(capture, Capture) and capture.node.meta["val"].dtype == torch.bool
    if isinstance(expr, Op) and expr.name == "where":
        return is_bool(expr.args[1]) and is_bool(expr.args[2])
    return isinstance(expr, Op) and (expr.name in _COMPARISONS or expr.name in _LOGICAL or expr.name == "bool")


# --------------------------------------------------------------------------- linear forms and intervals


def linear_form(expr: Expr) -> dict[str, float] | None:
    """Coefficients of ``expr`` as a linear function of the coordinates (key ``""`` is the constant), or None."""
    if isinstance(expr, Const):
        return {"": expr.value} if not isinstance(expr.value, bool) else None
    if isinstance(expr, Var):
        return {expr.name: 1} if expr.name != "s" else None
    if not isinstance(expr, Op):
        return None
    if expr.name in ("int64", "int32", "float32", "float64"):  # exact for positions below 2**24
        return linear_form(expr.args[0])
    parts = [linear_form(arg) for arg in expr.args]
    if expr.name == "neg" and parts[0] is not None:
        return {name: -value for name, value in parts[0].items()}
    if expr.name in ("add", "sub") and parts[0] is not None and parts[1] is not None:
        sign = 1 if expr.name == "add" else -1
        names = parts[0].keys() | parts[1].keys()
        return {name: parts[0].get(name, 0) + sign * parts[1].get(name, 0) for name in names}
    if expr.name == "mul":
        for constant, other in (expr.args, expr.args[::-1]):
            form = linear_form(other)
            if isinstance(constant, Const) and not isinstance(constant.value, bool) and form is not None:
                return {name: constant.value * value for name, value in form.items()}
    return None


def _interval(form: dict[str, float], relation: Relation | None) -> tuple[float, float]:
    """Bounds of a linear form, from ``q, k, h, i, j >= 0`` and the relation between q and k."""
    q, k = form.get("q", 0), form.get("k", 0)
    free = {name: value for name, value in form.items() if name not in ("", "q", "k")}
    low = high = form.get("", 0)
    if relation == "past":  # q = k + d, d >= 0
        free |= {"k": q + k, "d": q}
    elif relation == "future":  # k = q + 1 + d, d >= 0
        free |= {"q": q + k, "d": k}
        low, high = low + k, high + k
    elif relation == "self":
        free |= {"q": q + k}
    else:
        free |= {"q": q, "k": k}
    for coefficient in free.values():
        low += -math.inf if coefficient < 0 else 0
        high += math.inf if coefficient > 0 else 0
    return low, high


# --------------------------------------------------------------------------- simplification


def simplify(expr: Expr, relation: Relation | None = None) -> Expr:
    """``expr`` with everything evaluated that is known, optionally assuming how ``q`` and ``k`` relate."""
    memo: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Expr:
        if relation == "self" and node == Var("k"):
            return Var("q")
        if not isinstance(node, Op):
            return node
        if node not in memo:
            memo[node] = _fold(Op(node.name, tuple(visit(arg) for arg in node.args)), relation)
        return memo[node]

    return visit(expr)


def _fold(expr: Op, relation: Relation | None) -> Expr:
    if expr.name == "at":
        return expr
    if expr.name in _COMPARISONS:
        return _fold_comparison(expr, relation)
    if expr.name in _LOGICAL:
        return _fold_logical(expr)
    if expr.name == "where":
        return _fold_where(expr)
    if all(isinstance(arg, Const) for arg in expr.args):
        return _evaluate(expr)
    if expr.name in DTYPES:
        return _fold_cast(expr, relation)
    lifted = _lift_where(expr, relation)
    if lifted is not None:
        return lifted
    return _fold_arithmetic(expr)


def _evaluate(expr: Op) -> Expr:
    values = [arg.value for arg in expr.args if isinstance(arg, Const)]
    result = OPS[expr.name](*values)
    return Const(result.item() if isinstance(result, torch.Tensor) else result)


def _fold_comparison(expr: Op, relation: Relation | None) -> Expr:
    left, right = expr.args
    if all(isinstance(arg, Const) for arg in expr.args):
        return _evaluate(expr)
    if left == right and expr.name in ("eq", "le", "ge"):
        return Const(True)
    if left == right and expr.name in ("ne", "lt", "gt"):
        return Const(False)
    if is_bool(left) and isinstance(right, Const) and expr.name in ("eq", "ne"):  # `mask == 0`
        wants = bool(right.value) is (expr.name == "eq")
        return left if wants else _fold_logical(Op("not_", (left,)))
    branches = _lift_where(expr, relation)
    if branches is not None:
        return branches
    difference = linear_form(Op("sub", (left, right)))
    if difference is None:
        return expr
    decided = _COMPARISONS[expr.name](*_interval(difference, relation))
    return expr if decided is None else Const(decided)


def _fold_logical(expr: Op) -> Expr:
    if expr.name == "not_":
        (inner,) = expr.args
        if isinstance(inner, Const):
            return Const(not inner.value)
        if isinstance(inner, Op) and inner.name == "not_":
            return inner.args[0]
        inverse = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}
        if isinstance(inner, Op) and inner.name in inverse:
            return Op(inverse[inner.name], inner.args)
        return expr
    absorbing = expr.name == "or_"
    kept: list[Expr] = []
    for arg in expr.args:
        if isinstance(arg, Const):
            if bool(arg.value) is absorbing:
                return Const(absorbing)
        elif arg not in kept:
            kept.append(arg)
    if not kept:
        return Const(not absorbing)
    return kept[0] if len(kept) == 1 else Op(expr.name, tuple(kept))


def _fold_where(expr: Op) -> Expr:
    condition, a, b = expr.args
    if isinstance(condition, Const):
        return a if condition.value else b
    if a == b:
        return a
    if a == Const(True) and b == Const(False):
        return condition
    if a == Const(False) and b == Const(True):
        return _fold_logical(Op("not_", (condition,)))
    if is_hidden(a) and is_hidden(b):
        return HIDDEN
    if is_hidden(a):  # the visible branch first
        return _fold_where(Op("where", (_fold_logical(Op("not_", (condition,))), b, HIDDEN)))
    if is_hidden(b) and isinstance(a, Op) and a.name == "where" and is_hidden(a.args[2]):
        return Op("where", (_fold_logical(Op("and_", (condition, a.args[0]))), a.args[1], HIDDEN))
    return Op("where", (condition, a, HIDDEN)) if is_hidden(b) else expr


def _fold_cast(expr: Op, relation: Relation | None) -> Expr:
    (inner,) = expr.args
    dtype = DTYPES[expr.name]
    if is_bool(inner):
        if dtype == torch.bool:
            return inner
        one, zero = (1.0, 0.0) if dtype.is_floating_point else (1, 0)
        return _fold_where(Op("where", (inner, Const(one), Const(zero))))
    if not dtype.is_floating_point and dtype != torch.bool and linear_form(inner) is not None:
        return inner
    lifted = _lift_where(expr, relation)
    if lifted is not None:
        return lifted
    if inner == Var("s") and dtype == torch.float32:
        return inner  # backends hold scores in float32 already
    return expr


def _lift_where(expr: Op, relation: Relation | None) -> Expr | None:
    """``op(where(c, a, b), x) -> where(c, op(a, x), op(b, x))`` where that lets constants or masks fold."""
    for n, arg in enumerate(expr.args):
        if not (isinstance(arg, Op) and arg.name == "where"):
            continue
        condition, a, b = arg.args
        others = [other for m, other in enumerate(expr.args) if m != n]
        constant = all(isinstance(e, Const) for e in (a, b, *others))
        additive = (
            expr.name in ("add", "sub", *DTYPES) and (is_hidden(a) or is_hidden(b)) and (n == 0 or expr.name == "add")
        )
        if not (constant or additive):
            continue
        branches = [_fold(Op(expr.name, (*expr.args[:n], e, *expr.args[n + 1 :])), relation) for e in (a, b)]
        return _fold_where(Op("where", (condition, *branches)))
    return None


def _fold_arithmetic(expr: Op) -> Expr:
    name, args = expr.name, expr.args
    if name in ("add", "minimum") and any(is_hidden(arg) for arg in args):
        return HIDDEN
    if name == "maximum" and any(is_hidden(arg) for arg in args):
        return args[1] if is_hidden(args[0]) else args[0]
    if name in ("add", "sub") and _is_number(args[1], 0):
        return args[0]
    if name == "add" and _is_number(args[0], 0):
        return args[1]
    if name in ("mul", "div", "floordiv") and _is_number(args[1], 1):
        return args[0]
    if name == "mul" and _is_number(args[0], 1):
        return args[1]
    if name == "mul" and _is_number(args[0], 0) or name == "remainder" and _is_number(args[1], 1):
        return Const(0)
    return _recombine_division(expr) or expr


def _is_number(expr: Expr, value: int) -> bool:
    return isinstance(expr, Const) and not isinstance(expr.value, bool) and expr.value == value


def _recombine_division(expr: Op) -> Expr | None:
    """``(x // n) * n + x % n -> x``: a head axis that was split and merged again."""
    if expr.name != "add":
        return None
    product, rest = expr.args
    if not (isinstance(product, Op) and product.name == "mul" and isinstance(rest, Op) and rest.name == "remainder"):
        return None
    quotient, n = product.args
    same = isinstance(quotient, Op) and quotient.name == "floordiv" and quotient.args == (rest.args[0], n)
    return rest.args[0] if same and rest.args[1] == n else None


# --------------------------------------------------------------------------- text


def to_program(expr: Expr, captures: list[fx.Node]) -> str:
    """Program text of ``expr`` (see ``runtime.program``); tensors it reads are appended to ``captures``."""
    if isinstance(expr, Const):
        return _constant_text(expr.value)
    if isinstance(expr, Var):
        return expr.name
    if isinstance(expr, Capture):
        if expr.node not in captures:
            captures.append(expr.node)
        return f"c{captures.index(expr.node)}"
    if expr.name in ("and_", "or_") and len(expr.args) > 2:
        return to_program(Op(expr.name, (expr.args[0], Op(expr.name, expr.args[1:]))), captures)
    return f"{expr.name}({', '.join(to_program(arg, captures) for arg in expr.args)})"


def _constant_text(value: bool | int | float) -> str:
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return repr(value)


assert to_program(Const(True), []) == ALWAYS
