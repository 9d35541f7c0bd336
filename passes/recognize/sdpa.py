"""The fused spelling: one ``scaled_dot_product_attention``.

    query ──┐
    key ────┼── scaled_dot_product_attention(mask | is_causal, scale, enable_gqa) ── output
    value ──┘

The mask is read at logical positions whatever it was built from; ``is_causal`` is the mask ``k <= q``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..base import PackGraph, Refusal, is_op, shape_of
from ..expressions import HIDDEN, Const, Expr, Op, Var
from ..pull_back import Opaque, PullBack
from ..site import NoMatch, Site, head_count, understand_score

__all__ = ["recognize"]

SPELLING = "sdpa"
_DEFAULTS: dict[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


def recognize(graph: PackGraph, node: fx.Node) -> Site | NoMatch | None:
    """A :class:`Site` if ``node`` is a fused attention over tokens, why not, or ``None`` if it is no attention."""
    if not is_op(node, "aten.scaled_dot_product_attention"):
        return None
    query, key, value, *rest = node.args
    options = _DEFAULTS | dict(zip(_DEFAULTS, rest, strict=False)) | node.kwargs
    if not graph.is_length(shape_of(query)[-2]) or not graph.is_length(shape_of(key)[-2]):  # type: ignore[arg-type]
        return NoMatch(Refusal.at(node, "attention whose queries or keys are not the tokens of the row"))
    if options["dropout_p"]:
        return NoMatch(dropout_refusal(node, options["dropout_p"]))
    scale = options["scale"] or 1.0 / math.sqrt(int(shape_of(query)[-1]))  # type: ignore[arg-type]
    try:
        expr = _score(graph, node, options["attn_mask"], bool(options["is_causal"]))
    except Opaque as opaque:
        return NoMatch(Refusal.at(opaque.node, f"an attention mask that cannot be read: {opaque.reason}"))
    meaning = understand_score(node, expr, float(scale))
    if isinstance(meaning, NoMatch):
        return meaning
    heads = head_count(shape_of(query))  # type: ignore[arg-type]
    return Site(SPELLING, node, query, key, value, False, meaning, heads)  # type: ignore[arg-type]


def dropout_refusal(node: fx.Node, p: float) -> Refusal:
    reason = f"dropout in attention while training (p={p}): packed and unpacked rows would draw different masks"
    return Refusal.at(node, reason, "set the model's attention dropout to 0, or call .eval()")


def _score(graph: PackGraph, node: fx.Node, mask: fx.Node | None, is_causal: bool) -> Expr:
    score: Expr = Var("s")
    if is_causal:
        score = Op("where", (Op("le", (Var("k"), Var("q"))), score, HIDDEN))
    if mask is None:
        return score
    reader = PullBack(graph)
    where = (Const(0), Var("h"), Var("q"), Var("k"))
    value = reader.value(mask, where)
    if mask.meta["val"].dtype == torch.bool:
        return Op("where", (value, score, HIDDEN))
    return Op("add", (score, value))
