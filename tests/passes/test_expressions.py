"""Simplification keeps every value, and masks are told from scores: checked by evaluation on grids of positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from ppcompile.passes.expressions import (
    HIDDEN,
    Const,
    Expr,
    Op,
    Var,
    conjuncts,
    is_hidden,
    linear_form,
    may_be_negative,
    simplify,
    split_mask,
    to_program,
    variables,
    without_length,
)
from ppcompile.runtime.program import evaluate_program

SIZE = 13
RELATIONS = {None: lambda q, k: q >= 0, "past": lambda q, k: k <= q, "future": lambda q, k: k > q}
RELATIONS["self"] = lambda q, k: k == q
Q, K, S, H = Var("q"), Var("k"), Var("s"), Var("h")
MIN = torch.finfo(torch.float32).min


def op(name: str, *args: Any) -> Op:
    return Op(name, tuple(a if isinstance(a, (Const, Var, Op)) else Const(a) for a in args))


def on_grid(expr: Expr, **more: Any) -> Tensor:
    """Values of ``expr`` at every ``[q, k]``, by the evaluator of the runtime."""
    q, k = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    scores = torch.linspace(-3, 3, SIZE * SIZE).reshape(SIZE, SIZE)
    value = evaluate_program(to_program(expr, []), [], q=q, k=k, s=scores, h=torch.tensor(2), **more)
    return torch.as_tensor(value).expand(SIZE, SIZE)


def related(relation: str | None) -> Tensor:
    q, k = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return RELATIONS[relation](q, k)


def assert_same_values(a: Expr, b: Expr, relation: str | None) -> None:
    where = related(relation)
    left, right = on_grid(a)[where].double(), on_grid(b)[where].double()
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6, equal_nan=True)


# --------------------------------------------------------------------------- soundness

whole = st.integers(-20, 20).map(Const)
integers = st.recursive(
    st.sampled_from([Q, K, Q, K, H]) | whole,
    lambda inner: (
        st.tuples(st.sampled_from(["add", "sub", "mul"]), inner, inner).map(lambda t: Op(t[0], t[1:]))
        | st.tuples(st.sampled_from(["floordiv", "remainder"]), inner, st.integers(1, 6)).map(
            lambda t: op(t[0], t[1], t[2])
        )
        | inner.map(lambda e: op("neg", e))
        | inner.map(lambda e: op("int64", op("mul", e, 0.5)))
        | inner.map(lambda e: op("int64", e))
        | inner.map(lambda e: op("abs", e))
    ),
    max_leaves=5,
)
numbers = integers | integers.map(lambda e: op("float32", e)) | integers.map(lambda e: op("mul", e, 0.25))
comparisons = st.tuples(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), numbers, numbers).map(
    lambda t: Op(t[0], t[1:])
)
truths = st.recursive(
    comparisons | st.booleans().map(Const),
    lambda inner: (
        st.tuples(st.sampled_from(["and_", "or_"]), inner, inner).map(lambda t: Op(t[0], t[1:]))
        | inner.map(lambda e: op("not_", e))
        | st.tuples(inner, inner, inner).map(lambda t: Op("where", t))
        | st.tuples(st.sampled_from(["eq", "ne"]), inner, st.sampled_from([0, 1, 0.0, 2])).map(lambda t: op(*t))
        | inner.map(lambda e: op("bool", op("float32", e)))
    ),
    max_leaves=5,
)
masks = st.sampled_from([0.0, 1.0, -1e4, -1e9, MIN, -math.inf, 2.5, -3.0]).map(Const)
scores = st.recursive(
    st.just(S) | masks | truths.map(lambda e: op("float32", e)) | numbers,
    lambda inner: (
        st.tuples(st.sampled_from(["add", "sub"]), inner, inner).map(lambda t: Op(t[0], t[1:]))
        | st.tuples(inner, st.sampled_from([0.5, 1.0, 2, 1e-3])).map(lambda t: op("mul", *t))
        | st.tuples(truths, inner, inner).map(lambda t: Op("where", t))
        | st.tuples(st.sampled_from(["minimum", "maximum"]), inner, st.sampled_from([-1e9, 0.0, MIN])).map(
            lambda t: op(t[0], op("float32", t[1]), t[2])
        )
        | inner.map(lambda e: op("float32", e))
        | inner.map(lambda e: op("tanh", op("float32", e)))
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(truths | numbers, st.sampled_from(list(RELATIONS)))
def test_simplify_keeps_every_value(expr: Expr, relation: str | None) -> None:
    assert_same_values(expr, simplify(expr, relation), relation)


@settings(max_examples=150, deadline=None)
@given(scores, st.sampled_from(list(RELATIONS)))
def test_simplify_keeps_every_score(expr: Expr, relation: str | None) -> None:
    assert_same_values(expr, simplify(expr, relation), relation)


@settings(max_examples=150, deadline=None)
@given(scores)
def test_split_mask_hides_what_is_far_below_and_nothing_else(expr: Expr) -> None:
    """Where a key is visible its score is the same; where it is hidden its score is out of reach of the others."""
    visible, score = split_mask(simplify(expr))
    seen = on_grid(visible).bool()
    before, after = on_grid(expr).double(), on_grid(score).double()
    torch.testing.assert_close(before[seen], after[seen], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert (before[~seen] < -1e3 / 2).logical_or(before[~seen].isnan()).all()


@settings(max_examples=100, deadline=None)
@given(integers)
def test_linear_form_is_the_expression(expr: Expr) -> None:
    form = linear_form(expr)
    if form is not None:
        q, k = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
        values = form.get("q", 0) * q + form.get("k", 0) * k + 2 * form.get("h", 0) + form.get("", 0)
        torch.testing.assert_close(on_grid(expr).double(), torch.as_tensor(values).double().expand(SIZE, SIZE))


@settings(max_examples=100, deadline=None)
@given(integers)
def test_a_place_called_not_negative_is_not(expr: Expr) -> None:
    if not may_be_negative(expr):
        assert (on_grid(expr) >= 0).all()


@settings(max_examples=200, deadline=None)
@given(truths | scores)
def test_programs_are_what_the_runtime_evaluates(expr: Expr) -> None:
    assert to_program(expr, []) == to_program(expr, [])
    try:
        on_grid(expr)  # the evaluator accepts the text
    except RuntimeError as error:  # of a number beyond float32 in torch.where, as from torch itself
        if "without overflow" not in str(error):
            raise
        reject()


# --------------------------------------------------------------------------- what must be understood

CAUSAL, WINDOW, CHUNK = (
    op("le", K, Q),
    op("lt", op("sub", Q, K), 4),
    op("eq", op("floordiv", Q, 5), op("floordiv", K, 5)),
)


@pytest.mark.parametrize(
    ("expr", "relation", "expected"),
    [
        (CAUSAL, "past", Const(True)),
        (CAUSAL, "future", Const(False)),
        (CAUSAL, "self", Const(True)),
        (CAUSAL, None, CAUSAL),
        (op("ge", op("sub", Q, K), 0), "past", Const(True)),
        (op("lt", op("add", K, 0), op("add", Q, 1)), "past", Const(True)),
        (op("le", K, op("add", Q, 1)), "future", None),
        (WINDOW, "past", None),
        (WINDOW, "self", Const(True)),
        (WINDOW, "future", Const(True)),
        (CHUNK, "self", Const(True)),
        (op("gt", op("float32", K), op("float32", Q)), "past", Const(False)),
        (op("eq", op("float32", CAUSAL), 0), "past", Const(False)),
        (op("eq", CAUSAL, 2), None, Const(False)),
        (op("int64", op("mul", Q, 0.5)), None, op("int64", op("mul", Q, 0.5))),
        (op("remainder", op("mul", Q, 0.5), 1), None, op("remainder", op("mul", Q, 0.5), 1)),
        (op("sub", Q, op("sub", Q, 1)), None, Const(1)),
        (op("add", op("mul", op("floordiv", H, 3), 3), op("remainder", H, 3)), None, H),
    ],
)
def test_simplify(expr: Expr, relation: Any, expected: Expr | None) -> None:
    found = simplify(expr, relation)
    assert found == expected if expected is not None else not isinstance(found, Const)


def additive(condition: Expr, hidden: float) -> Expr:
    return op("add", S, op("where", condition, 0.0, hidden))


@pytest.mark.parametrize("hidden", [-1e4, -65504.0, -1e9, MIN, -math.inf])
@pytest.mark.parametrize(
    "spelling",
    [
        lambda c, m: op("where", c, S, m),
        lambda c, m: op("where", op("not_", c), m, S),
        additive,
        lambda c, m: op("add", op("where", c, 0.0, m), S),
        lambda c, m: op("add", S, op("mul", op("sub", 1.0, op("float32", c)), m)),
        lambda c, m: op("sub", S, op("where", c, 0.0, -m)),
        lambda c, m: op("add", op("add", S, op("where", CAUSAL, 0.0, m)), op("where", c, 0.0, m)),
        lambda c, m: op("where", CAUSAL, op("where", c, S, m), m),
        lambda c, m: op("float32", op("float16", additive(c, m))),
        lambda c, m: op("mul", additive(c, m * 8), 0.125),
        lambda c, m: op("div", op("where", c, S, m * 8), 8.0),
        lambda c, m: op("maximum", additive(c, m), MIN),
        lambda c, m: op("minimum", S, op("where", c, 1e9, m)),
        lambda c, m: op("where", op("eq", op("where", c, 1.0, 0.0), 0), m, S),
    ],
)
def test_every_spelling_of_a_mask_is_a_mask(spelling: Any, hidden: float) -> None:
    expr = spelling(op("and_", CAUSAL, WINDOW), hidden)
    for relation, expected in (("future", Const(False)), ("self", Const(True))):
        assert simplify(split_mask(simplify(expr, relation))[0], relation) == expected
    visible, score = split_mask(simplify(expr, "past"))
    visible = simplify(visible, "past")
    where = related("past")
    assert torch.equal(on_grid(visible).bool()[where], on_grid(WINDOW)[where])
    assert not any(is_hidden(part) for part in conjuncts(score))


@pytest.mark.parametrize(
    "expr",
    [
        op("tanh", additive(CAUSAL, -1e9)),  # -1 is a score like any other
        op("mul", op("where", CAUSAL, 0.0, -1e5), 1e-4),  # -10
        op("add", op("where", CAUSAL, 1e5, 0.0), op("where", CAUSAL, -1e5, -3.0)),
        op("where", CAUSAL, S, -100.0),
        op("add", additive(CAUSAL, -1e9), op("where", CAUSAL, 0.0, 1e9)),  # lifted again
        op("sub", additive(CAUSAL, -1e9), op("where", CAUSAL, 0.0, -1e9)),
        op("maximum", additive(CAUSAL, -1e9), 0.0),
        op("neg", op("where", CAUSAL, S, -1e9)),
        op("mul", S, op("float32", CAUSAL)),
    ],
)
def test_what_does_not_hide_is_not_a_mask(expr: Expr) -> None:
    assert simplify(split_mask(simplify(expr, "future"))[0], "future") == Const(True)


T = Var("T")


@pytest.mark.parametrize(
    "score",
    [
        op("add", S, op("mul", H, op("sub", K, T))),
        op("sub", op("mul", S, 0.3), op("mul", op("add", op("sub", 4, T), K), H)),
        op("add", S, op("neg", op("mul", Q, op("sub", T, K)))),
        op("add", op("add", S, op("tanh", T)), op("mul", T, Q)),
    ],
)
def test_a_length_that_is_alike_for_all_keys_is_replaced(score: Expr) -> None:
    """For each query the two scores differ by one number, for all keys and raw scores."""
    replaced = without_length(score)
    assert replaced is not None
    assert "T" not in variables(replaced)
    for q, h in ((3, 1), (5, 2)):
        found = [
            evaluate(score, s=s, q=q, k=k, h=h, T=9) - evaluate(replaced, s=s, q=q, k=k, h=h)
            for k in range(q + 1)
            for s in (-1.0, 2.0)
        ]
        assert max(found) - min(found) < 1e-5


@pytest.mark.parametrize(
    "score",
    [
        op("mul", S, T),
        op("div", S, T),
        op("add", S, op("mul", K, T)),
        op("tanh", op("add", S, T)),
        op("where", op("lt", T, 9), S, op("neg", S)),
        op("add", S, op("mul", op("sub", K, T), op("sub", K, T))),
        op("add", S, op("maximum", K, T)),
    ],
)
def test_a_length_that_a_softmax_sees_is_not(score: Expr) -> None:
    assert without_length(score) is None


def evaluate(expr: Expr, **values: float) -> float:
    """A program knows no ``T``: it takes the place of ``i`` here."""
    values = {{"T": "i"}.get(name, name): torch.tensor(float(value)) for name, value in values.items()}
    return float(evaluate_program(to_program(expr, []).replace("T", "i").replace("irue", "True"), (), **values))


def test_constants_of_different_types_differ() -> None:
    assert Const(1) != Const(True)
    assert Const(1) != Const(1.0)
    assert split_mask(HIDDEN)[0] == Const(False)
