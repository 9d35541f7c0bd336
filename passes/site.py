"""Sites: one attention of the model, recognized and understood, ready to be rewritten."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import fx

from .base import Refusal, module_path
from .expressions import (
    LENGTH,
    Const,
    Expr,
    Op,
    Relation,
    Var,
    conjuncts,
    is_hidden,
    linear_form,
    simplify,
    split_mask,
    to_program,
    variables,
    walk,
    without_length,
)

__all__ = ["NoMatch", "ScoreMeaning", "Site", "dropout_refusal", "head_count", "understand_score"]


@dataclass(frozen=True)
class NoMatch:
    """Why a node that looks like attention is not a site."""

    refusal: Refusal


@dataclass(frozen=True)
class ScoreMeaning:
    """What happens to a score on its way into the softmax.

    Attributes:
        scale: factor on ``<query, key>``.
        score: expression of the score, in ``s`` after ``scale``.
        visible: what still hides keys once the forest has hidden what is not an ancestor or the past.
        window: keys are visible while ``q - k < window``; 0 for no window.
    """

    scale: float
    score: Expr
    visible: Expr
    window: int

    @property
    def mask_class(self) -> str:
        """``causal``, ``window(w)``, ``chunk(c)``, or the visibility program where it has no name."""
        parts = [f"window({self.window})"] if self.window else []
        for atom in conjuncts(self.visible):
            chunk = _chunk_size(atom)
            parts.append(f"chunk({chunk})" if chunk else to_program(atom, []))
        return " & ".join(parts) or "causal"

    @property
    def score_class(self) -> str:
        """The score program, or ``plain``."""
        return "plain" if self.score == Var("s") else to_program(self.score, [])


@dataclass
class Site:
    """One attention in the captured graph.

    Attributes:
        spelling: name of the recognizer that found it.
        output: the node whose value is the attention output, ``[..., T, E]``.
        query: ``[..., T, D]`` with leading axes that flatten to ``1 x H``.
        key: ``[..., T, D]``; ``value``: ``[..., T, E]``, with ``H`` or ``G`` heads.
        key_is_transposed: ``key`` is ``[..., D, T]``.
        meaning: scale, score program, visibility.
        sinks: node with one logit per head, or ``None``.
        heads: ``H``; ``key_heads``: ``G``, once rewritten.
        attention: the node that computes it in the packed graph, once rewritten.
        backend, why: the backend that runs it, and the reason, once lowered.
    """

    spelling: str
    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    key_is_transposed: bool
    meaning: ScoreMeaning
    heads: int
    sinks: fx.Node | None = None
    key_heads: int = 0
    attention: fx.Node | None = None
    backend: str = ""
    why: str = ""

    @property
    def module(self) -> str:
        """Dotted path of the module that the attention is in."""
        return module_path(self.attention or self.output)

    def __str__(self) -> str:
        grouped = f"/{self.key_heads}" if self.key_heads not in (0, self.heads) else ""
        sinks = ", sinks" if self.sinks is not None else ""
        heads = f"{self.heads}{grouped} heads"
        classes = f"{self.meaning.mask_class}, {self.meaning.score_class}"
        return f"{self.module}: {self.spelling}, {heads}, {classes}{sinks}"


def understand_score(node: fx.Node, expr: Expr, scale: float) -> ScoreMeaning | NoMatch:
    """Split a score expression into scale, program and mask, and prove that the mask is causal.

    Args:
        node: where to point if it is not.
        expr: the score as a function of ``s h q k i j``; hidden keys have a constant score of -1e4 or less.
        scale: factor already applied to ``<query, key>``.
    """
    future, _ = _masked(expr, "future")
    if future != Const(False):
        return NoMatch(Refusal.at(node, _not_causal(future, expr), "only causal decoders can be packed"))
    own, _ = _masked(expr, "self")
    if own != Const(True):
        reason = "a token may not see itself here, so a row can be left without any visible key"
        return NoMatch(Refusal.at(node, reason))
    visible, past = _masked(expr, "past")
    visible, window = _take_window(visible)
    if any(is_hidden(part) for part in walk(past)):
        reason = f"a mask that cannot be told apart from the score: {to_program(past, [])}"
        return NoMatch(Refusal.at(node, reason))
    per_sequence = without_length(past)
    if per_sequence is None or LENGTH.name in variables(visible):
        return NoMatch(Refusal.at(node, "a score or a mask that depends on the number of tokens in the row"))
    score, scale = _take_scale(per_sequence, scale)
    return ScoreMeaning(scale, score, visible, window)


def _masked(expr: Expr, relation: Relation) -> tuple[Expr, Expr]:
    """``(visible, score)`` under a relation between ``q`` and ``k``."""
    visible, score = split_mask(simplify(expr, relation))
    return simplify(visible, relation), simplify(score, relation)


def _not_causal(visible: Expr, expr: Expr) -> str:
    score = to_program(simplify(expr, "future"), [])
    if visible != Const(True):
        return f"a mask that cannot be proved causal: a later token is seen where {to_program(visible, [])}"
    if {"q", "k"} & variables(expr) or any(isinstance(part, Op) and part.name == "at" for part in walk(expr)):
        return f"a mask that cannot be proved causal: a later token has the score {score}"
    return "bidirectional attention: a query sees tokens that come after it"


def _take_window(visible: Expr) -> tuple[Expr, int]:
    """Split ``q - k < w`` off a conjunction."""
    window, rest = 0, []
    for atom in conjuncts(visible):
        width = _window_width(atom)
        if width is None:
            rest.append(atom)
        else:
            window = width if not window else min(window, width)
    return simplify(Op("and_", (Const(True), *rest))), window


def _window_width(atom: Expr) -> int | None:
    """``w`` if ``atom`` says ``q - k < w``."""
    if not isinstance(atom, Op) or atom.name not in ("lt", "le", "gt", "ge"):
        return None
    low, high = atom.args if atom.name in ("lt", "le") else atom.args[::-1]
    form = linear_form(Op("sub", (low, high)))  # the atom says `form < 0` or `form <= 0`
    if form is None or (form.get("q"), form.get("k")) != (1, -1):
        return None
    if any(value for name, value in form.items() if name not in ("q", "k", "")):
        return None
    bound = -form.get("", 0)
    if bound != int(bound):
        return None
    return int(bound) + (1 if atom.name in ("le", "ge") else 0)


def _chunk_size(atom: Expr) -> int | None:
    """``c`` if ``atom`` says ``q // c == k // c``."""
    if not isinstance(atom, Op) or atom.name != "eq":
        return None
    left, right = atom.args
    if not (isinstance(left, Op) and isinstance(right, Op) and left.name == right.name == "floordiv"):
        return None
    size = left.args[1]
    both = {left.args[0], right.args[0]} == {Var("q"), Var("k")}
    return int(size.value) if both and isinstance(size, Const) and right.args[1] == size else None


def _take_scale(expr: Expr, scale: float) -> tuple[Expr, float]:
    """Move a constant factor on ``s`` into the kernel's own scale, where it costs nothing."""
    while True:
        factor = _common_factor(expr)
        if factor is None:
            return expr, scale
        expr, scale = _without_factor(expr, factor), scale * _amount(factor)


def _amount(factor: Op) -> float:
    constant = next(arg.value for arg in factor.args if isinstance(arg, Const))
    return 1.0 / constant if factor.name == "div" else float(constant)


def _common_factor(expr: Expr) -> Op | None:
    """The op that scales ``s`` by a constant, if every use of ``s`` goes through it and it is no softcap."""
    users = {part for part in walk(expr) if isinstance(part, Op) and Var("s") in part.args}
    if len(users) != 1:
        return None
    (user,) = users
    if user.name == "div" and isinstance(user.args[1], Const):
        softcap = any(isinstance(part, Op) and part.name == "tanh" and user in part.args for part in walk(expr))
        return None if softcap else user
    return user if user.name == "mul" and any(isinstance(arg, Const) for arg in user.args) else None


def _without_factor(expr: Expr, factor: Op) -> Expr:
    if expr == factor:
        return Var("s")
    if not isinstance(expr, Op):
        return expr
    return Op(expr.name, tuple(_without_factor(arg, factor) for arg in expr.args))


def dropout_refusal(node: fx.Node, p: float) -> Refusal:
    """Why attention dropout cannot be packed."""
    reason = f"dropout in attention while training (p={p}): packed and unpacked rows would draw different masks"
    refusal = Refusal.at(node, reason, "set the model's attention dropout to 0, or call .eval()")
    return dataclasses.replace(refusal, final=True)


def head_count(shape: Any) -> int:
    """Product of the leading axes of ``[..., T, D]``."""
    count = 1
    for size in shape[:-2]:
        count *= int(size)
    return count
