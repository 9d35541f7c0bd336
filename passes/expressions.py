"""Expressions over logical coordinates: what a mask or score *is*, read off the graph.

An expression is built from the coordinates of one attention score (query position ``q``, key position ``k``,
head ``h``, slots ``i j``), the raw score ``s``, constants, and elements of tensors. :func:`simplify` evaluates
as much as can be known, optionally under a relation between ``q`` and ``k``:

    past    k <= q      what the forest lets a query see
    future  k >  q      what a causal model must hide
    self    k == q      what every model must show

Simplification keeps every value as it is. What *hides* a key (a large negative number where a mask says so) is told
apart from the score afterwards, by :func:`split_mask`. That is how a mask is understood without knowing its name:
under *future* nothing may be visible; what is left of visibility under *past* is the part that packing still has to
apply (a window, say), as a program for the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import fx

from ..runtime.program import DTYPES, OPS

__all__ = [
    "HIDDEN",
    "LENGTH",
    "Capture",
    "Const",
    "Expr",
    "Op",
    "Relation",
    "Var",
    "at",
    "conjuncts",
    "is_bool",
    "is_hidden",
    "linear_form",
    "may_be_negative",
    "simplify",
    "split_mask",
    "to_program",
    "variables",
    "walk",
    "without_length",
]

Relation = Literal["past", "future", "self"]


@dataclass(frozen=True)
class Const:
    """A number or a truth value."""

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
    """An op of ``runtime.program`` applied to expressions."""

    name: str
    args: tuple[Expr, ...]


Expr: TypeAlias = "Const | Var | Capture | Op"

HIDDEN = Const(-math.inf)
LENGTH = Var("T")
"""The number of tokens in the row: a score may depend on it only as :func:`without_length` says."""

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
    """An expression and all its parts."""
    yield expr
    if isinstance(expr, Op):
        for arg in expr.args:
            yield from walk(arg)


def variables(expr: Expr) -> set[str]:
    """Names of the variables in an expression."""
    return {part.name for part in walk(expr) if isinstance(part, Var)}


def conjuncts(expr: Expr) -> Iterator[Expr]:
    """The parts of a conjunction."""
    if isinstance(expr, Op) and expr.name == "and_":
        for arg in expr.args:
            yield from conjuncts(arg)
    elif expr != Const(True):
        yield expr


def is_bool(expr: Expr) -> bool:
    """True if the expression is a truth value."""
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
        form = linear_form(expr.args[0])
        return form if form is None or expr.name.startswith("float") or _is_whole(form) else None
    parts = [linear_form(arg) for arg in expr.args]
    if expr.name == "neg" and parts[0] is not None:
        return {name: -value for name, value in parts[0].items()}
    if expr.name in ("add", "sub") and parts[0] is not None and parts[1] is not None:
        sign = 1 if expr.name == "add" else -1
        names = parts[0].keys() | parts[1].keys()
        return {name: parts[0].get(name, 0) + sign * parts[1].get(name, 0) for name in names}
    if expr.name == "mul":
        for constant, form in zip(expr.args, parts[::-1], strict=True):
            if isinstance(constant, Const) and not isinstance(constant.value, bool) and form is not None:
                return {name: constant.value * value for name, value in form.items()}
    return None


def _is_whole(form: dict[str, float]) -> bool:
    return all(math.isfinite(value) and float(value).is_integer() for value in form.values())


def may_be_negative(place: Expr) -> bool:
    """True unless ``place`` is provably at least 0 for all coordinates."""
    if isinstance(place, Op) and place.name in ("floordiv", "remainder") and isinstance(place.args[1], Const):
        return place.args[1].value <= 0 or (place.name == "floordiv" and may_be_negative(place.args[0]))
    if isinstance(place, Op) and place.name == "where":
        condition, a, b = place.args
        return may_be_negative(a) or (not _is_not_below_zero_else(condition, b) and may_be_negative(b))
    form = linear_form(place)
    return form is None or not _interval(form, None)[0] >= 0


def _is_not_below_zero_else(condition: Expr, branch: Expr) -> bool:
    """True if ``branch``, taken where ``condition`` fails, is at least 0 there: ``where(x < low, low, x)``."""
    if not isinstance(condition, Op) or condition.name not in ("lt", "le") or condition.args[0] != branch:
        return False
    low = condition.args[1]
    return isinstance(low, Const) and low.value >= 0


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
        if relation == "self" and isinstance(node, Var):  # the same position of the same sequence is the same slot
            return {Var("k"): Var("q"), Var("j"): Var("i")}.get(node, node)
        if not isinstance(node, Op):
            return node
        if node.name == "at" and relation == "past":
            # Backends compute hidden pairs too, and drop them: an index must stay inside its table there as well.
            return Op("at", tuple(simplify(arg) for arg in node.args))
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
    expr = Op(expr.name, tuple(_as_number(arg) for arg in expr.args))
    return _lift_where(expr, relation) or _fold_arithmetic(expr)


def _as_number(expr: Expr) -> Expr:
    """Arithmetic on truth values is arithmetic on 1 and 0."""
    if isinstance(expr, Const) and isinstance(expr.value, bool):
        return Const(int(expr.value))
    return Op("where", (expr, Const(1), Const(0))) if is_bool(expr) else expr


def _evaluate(expr: Op) -> Expr:
    values: list[Any] = [arg.value for arg in expr.args if isinstance(arg, Const)]
    if expr.name in ("div", "floordiv", "truncdiv", "remainder") and values[1] == 0:
        return expr  # Python raises where torch has an answer
    if expr.name in ("minimum", "maximum", "silu"):
        values = [torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None) for value in values]
        values = [value.to(torch.result_type(values[0], values[-1])) for value in values]
    result = OPS[expr.name](*values)
    number = result.item() if isinstance(result, torch.Tensor) else result
    return expr if number != number else Const(number)  # programs have no word for NaN


def _fold_comparison(expr: Op, relation: Relation | None) -> Expr:
    left, right = expr.args
    if all(isinstance(arg, Const) for arg in expr.args):
        return _evaluate(expr)
    if left == right and expr.name in ("eq", "le", "ge"):
        return Const(True)
    if left == right and expr.name in ("ne", "lt", "gt"):
        return Const(False)
    if is_bool(left) and isinstance(right, Const) and right.value in (0, 1) and expr.name in ("eq", "ne"):
        wants = bool(right.value) is (expr.name == "eq")  # `mask == 0`
        return left if wants else _fold_logical(Op("not_", (left,)))
    expr = Op(expr.name, (_as_number(left), _as_number(right)))
    left, right = expr.args
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
    if isinstance(a, Op) and a.name == "where" and a.args[2] == b:
        return Op("where", (_fold_logical(Op("and_", (condition, a.args[0]))), a.args[1], b))
    return expr


def _fold_cast(expr: Op, relation: Relation | None) -> Expr:
    (inner,) = expr.args
    dtype = DTYPES[expr.name]
    if is_bool(inner):
        if dtype == torch.bool:
            return inner
        one, zero = (1.0, 0.0) if dtype.is_floating_point else (1, 0)
        return _fold_where(Op("where", (inner, Const(one), Const(zero))))
    if not dtype.is_floating_point and dtype != torch.bool and _is_whole_number(inner):
        return inner
    if inner == Var("s") and dtype == torch.float32:
        return inner  # backends hold scores in float32 already
    return _lift_where(expr, relation) or expr


def _is_whole_number(expr: Expr) -> bool:
    form = linear_form(expr)
    return form is not None and _is_whole(form)


def _lift_where(expr: Op, relation: Relation | None) -> Expr | None:
    """``op(where(c, a, b), x) -> where(c, op(a, x), op(b, x))`` for constants, which then fold."""
    for n, arg in enumerate(expr.args):
        if not (isinstance(arg, Op) and arg.name == "where"):
            continue
        condition, a, b = arg.args
        others = [other for m, other in enumerate(expr.args) if m != n]
        if not all(isinstance(e, Const) for e in (a, b, *others)):
            continue
        branches = [_fold(Op(expr.name, (*expr.args[:n], e, *expr.args[n + 1 :])), relation) for e in (a, b)]
        return _fold_where(Op("where", (condition, *branches)))
    return None


def _fold_arithmetic(expr: Op) -> Expr:
    name, args = expr.name, expr.args
    if name in ("add", "sub") and _is_number(args[1], 0):
        return args[0]
    if name == "add" and _is_number(args[0], 0):
        return args[1]
    if name in ("mul", "div") and _is_number(args[1], 1):
        return args[0]
    if name == "mul" and _is_number(args[0], 1):
        return args[1]
    if name == "mul" and any(_is_number(arg, 0) for arg in args):
        return next(arg for arg in args if _is_number(arg, 0))
    if name in ("floordiv", "remainder") and _is_number(args[1], 1) and _is_whole_number(args[0]):
        return args[0] if name == "floordiv" else Const(0)
    return _recombine_division(expr) or _cancelled(expr) or expr


def _cancelled(expr: Op) -> Expr | None:
    """``q - (q - 1) -> 1``."""
    form = linear_form(expr) if expr.name in ("add", "sub") else None
    if form is None or not _is_whole(form) or any(value for name, value in form.items() if name):
        return None
    return Const(form.get("", 0))


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


# --------------------------------------------------------------------------- the row's length


def without_length(score: Expr) -> Expr | None:
    """``score`` with the number of tokens replaced by that up to the query, if a softmax does not see the difference.

    It does not where the length stands in terms that are alike for all keys of a query, such as the last of
    ``s + slope * k - slope * T``. None if it stands elsewhere.
    """
    if LENGTH.name not in variables(score):
        return score
    if not _length_is_alike_for_all_keys(score):
        return None
    return simplify(_replaced(score, LENGTH, Op("add", (Var("q"), Const(1)))))


_OF_THE_KEY = {"s", "k", "j"}


def _length_is_alike_for_all_keys(expr: Expr) -> bool:
    """True if ``expr`` is a sum in which no term has both the length and the key."""
    names = variables(expr)
    if LENGTH.name not in names or not names & _OF_THE_KEY:
        return True
    if not isinstance(expr, Op):
        return False
    if expr.name in ("add", "sub", "neg"):
        return all(_length_is_alike_for_all_keys(arg) for arg in expr.args)
    if expr.name == "mul":  # a factor that is alike for all keys leaves such terms as they are
        return any(
            not variables(factor) & {*_OF_THE_KEY, LENGTH.name} and _length_is_alike_for_all_keys(other)
            for factor, other in (expr.args, expr.args[::-1])
        )
    return False


def _replaced(expr: Expr, old: Expr, new: Expr) -> Expr:
    if expr == old:
        return new
    return Op(expr.name, tuple(_replaced(arg, old, new) for arg in expr.args)) if isinstance(expr, Op) else expr


# --------------------------------------------------------------------------- masks

_SHOWN, _NOTHING = Const(True), Const(False)


def split_mask(expr: Expr) -> tuple[Expr, Expr]:
    """A score as ``(visible, score)``: keys are hidden where ``visible`` is false, and have ``score`` elsewhere.

    A key is hidden by a constant of -1e4 or less that is chosen for it, added to its score, or what the score is
    limited to from above. Everything else is left in the score.
    """
    if is_hidden(expr):
        return _NOTHING, HIDDEN
    if not isinstance(expr, Op):
        return _SHOWN, expr
    split = _SPLITS.get(expr.name)
    visible, score = split(expr) if split is not None else (_SHOWN, expr)
    # Where nothing is hidden the score stays as it was written, but for a floor that no score reaches.
    return (visible, score) if visible != _SHOWN or expr.name == "maximum" else (_SHOWN, expr)


def _split_where(expr: Op) -> tuple[Expr, Expr]:
    condition, a, b = expr.args
    (seen_a, score_a), (seen_b, score_b) = split_mask(a), split_mask(b)
    seen = seen_a if seen_a == seen_b else _either(_both(condition, seen_a), _both(_opposite(condition), seen_b))
    if _NOTHING in (seen_a, seen_b):
        return seen, score_b if seen_a == _NOTHING else score_a
    return seen, _fold_where(Op("where", (condition, score_a, score_b)))


def _split_sum(expr: Op) -> tuple[Expr, Expr]:
    """``a + b`` is hidden where one of them is."""
    a, b = expr.args
    if expr.name == "sub":
        a, b = a, _negative(b)
    (seen_a, score_a), (seen_b, score_b) = split_mask(a), split_mask(b)
    if (seen_a != _SHOWN and _may_be_large(b)) or (seen_b != _SHOWN and _may_be_large(a)):
        return _SHOWN, expr  # what one side hides the other may lift again
    name, right = (expr.name, expr.args[1]) if seen_b == _SHOWN else ("add", score_b)
    return _both(seen_a, seen_b), _fold(Op(name, (score_a, right)), None)


def _may_be_large(expr: Expr) -> bool:
    """True if a constant in ``expr`` could make up for one that hides; positions and scores are taken to be small."""
    if isinstance(expr, Const):
        return not expr.value < -_HIDING / 10
    if not isinstance(expr, Op) or is_bool(expr) or expr.name == "at":
        return False
    if expr.name == "neg" and isinstance(expr.args[0], Op):
        return True
    inner = expr.args[1:] if expr.name == "where" else expr.args
    if expr.name == "sub":
        return _may_be_large(inner[0]) or _may_be_large(_negative(inner[1]))
    return any(_may_be_large(arg) for arg in inner)


def _negative(expr: Expr) -> Expr:
    if isinstance(expr, Op) and expr.name == "where":
        return Op("where", (expr.args[0], _negative(expr.args[1]), _negative(expr.args[2])))
    return _fold(Op("neg", (expr,)), None)


def _split_minimum(expr: Op) -> tuple[Expr, Expr]:
    (seen_a, score_a), (seen_b, score_b) = (split_mask(arg) for arg in expr.args)
    return _both(seen_a, seen_b), Op("minimum", (score_a, score_b))


def _split_maximum(expr: Op) -> tuple[Expr, Expr]:
    """``max(score, finfo.min)`` is the score; a limit that shows takes part in the softmax."""
    (seen_a, score_a), (seen_b, score_b) = (split_mask(arg) for arg in expr.args)
    if seen_b == _NOTHING:
        return seen_a, score_a
    return (seen_b, score_b) if seen_a == _NOTHING else (_SHOWN, expr)


def _split_cast(expr: Op) -> tuple[Expr, Expr]:
    seen, score = split_mask(expr.args[0])
    return seen, _fold(Op(expr.name, (score,)), None)


def _split_scaled(expr: Op) -> tuple[Expr, Expr]:
    """A positive factor on the whole score scales what hides as well; it is still hidden if still large."""
    for constant, other in (expr.args, expr.args[::-1]):
        if isinstance(constant, Const) and constant.value > 0 and not (expr.name == "div" and other is expr.args[1]):
            return split_mask(_scaled(other, constant, expr)) if _can_scale(other) else (_SHOWN, expr)
    return _SHOWN, expr


def _can_scale(expr: Expr) -> bool:
    return isinstance(expr, Op) and expr.name in ("where", "add", "sub")


def _scaled(expr: Expr, constant: Const, by: Op) -> Expr:
    if isinstance(expr, Op) and expr.name == "where":
        return Op("where", (expr.args[0], *(_scaled(arg, constant, by) for arg in expr.args[1:])))
    if isinstance(expr, Op) and expr.name in ("add", "sub"):
        return Op(expr.name, tuple(_scaled(arg, constant, by) for arg in expr.args))
    return _fold(Op(by.name, (expr, constant)), None)


def _both(a: Expr, b: Expr) -> Expr:
    return _fold_logical(Op("and_", (a, b)))


def _either(a: Expr, b: Expr) -> Expr:
    return _fold_logical(Op("or_", (a, b)))


def _opposite(a: Expr) -> Expr:
    return _fold_logical(Op("not_", (a,)))


_SPLITS: dict[str, Callable[[Op], tuple[Expr, Expr]]] = {
    "where": _split_where,
    "add": _split_sum,
    "sub": _split_sum,
    "minimum": _split_minimum,
    "maximum": _split_maximum,
    "mul": _split_scaled,
    "div": _split_scaled,
    **{name: _split_cast for name, dtype in DTYPES.items() if dtype.is_floating_point},
}


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
    if expr.name in ("minimum", "maximum") and any(isinstance(arg, Const) for arg in expr.args):
        pick = Op("lt" if expr.name == "minimum" else "gt", expr.args)  # torch takes tensors only
        return to_program(Op("where", (pick, *expr.args)), captures)
    return f"{expr.name}({', '.join(to_program(arg, captures) for arg in expr.args)})"


def _constant_text(value: bool | int | float) -> str:
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return repr(value)
