"""The fused spelling: one ``scaled_dot_product_attention``.

    query ──┐
    key ────┼── scaled_dot_product_attention(mask | is_causal, scale, enable_gqa) ── output
    value ──┘

The mask is read at logical positions whatever it was built from; ``is_causal`` is the mask ``k <= q``.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from ..base import PackGraph, Refusal, argument, is_op, operands, shape_of
from ..coordinates import Opaque, score_coordinates
from ..expressions import HIDDEN, Expr, Op, Var
from ..pull_back import PullBack
from ..site import NoMatch, Site, dropout_refusal, head_count, understand_score

__all__ = ["SPELLING", "recognize"]

SPELLING = "sdpa"


def recognize(graph: PackGraph, node: fx.Node) -> Site | NoMatch | None:
    """A :class:`Site` if ``node`` is a fused attention over tokens, why not, or ``None`` if it is no attention."""
    if not is_op(node, "aten.scaled_dot_product_attention"):
        return None
    query, key, value = operands(node)[:3]
    over_tokens = [graph.is_length(shape_of(n)[-2]) for n in (query, key)]
    if not over_tokens[1] and not graph.mentions_length(shape_of(key)[-2]):
        return None  # over heads, or over a memory: whether that is token-wise its typing rule decides
    if not all(over_tokens):
        return NoMatch(Refusal.at(node, "attention whose queries or keys are not the tokens of the row"))
    if dropout := argument(node, "dropout_p"):
        return NoMatch(dropout_refusal(node, dropout))
    if argument(node, "enable_gqa") and len(shape_of(query)) > 4:
        return NoMatch(Refusal.at(node, "grouped heads on more than one axis"))
    scale = argument(node, "scale")
    try:
        expr = _score(graph, node)
    except Opaque as opaque:
        return NoMatch(opaque.refusal("an attention mask that cannot be read"))
    meaning = understand_score(node, expr, 1.0 / math.sqrt(int(shape_of(query)[-1])) if scale is None else float(scale))
    if isinstance(meaning, NoMatch):
        return meaning
    return Site(SPELLING, node, query, key, value, False, meaning, head_count(shape_of(node)))


def _score(graph: PackGraph, node: fx.Node) -> Expr:
    mask, score = argument(node, "attn_mask"), Var("s")
    if argument(node, "is_causal"):
        return Op("where", (Op("le", (Var("k"), Var("q"))), score, HIDDEN))
    if mask is None:
        return score
    value = PullBack(graph).value(mask, score_coordinates(shape_of(node)))  # of its shape only the heads matter
    if mask.meta["val"].dtype == torch.bool:
        return Op("where", (value, score, HIDDEN))
    return Op("add", (score, value))
