"""Typing rules of lookups and of the ops of the packed graph: who reads whose values."""

from __future__ import annotations

import torch
from torch import fx

from .base import PackGraph, argument, axis_argument, op_name, operands, shape_of
from .types import Const, Mixes, Tok, TokenType, Tuple, Types, rule, tensors_of, type_of, within_token


@rule("gather")
def gather(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Reads along one axis at indices laid out like the tokens: each token reads its own row."""
    return _laid_out_alike(node, types, f"{op_name(node)} of tokens and constants")


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Writes along one axis at indices laid out like the tokens: each token writes into its own row."""
    return _laid_out_alike(node, types, f"{op_name(node)} of tokens into constants")


def _laid_out_alike(node: fx.Node, types: Types, otherwise: str) -> TokenType | Mixes:
    if len({types[source] for source in tensors_of(node)}) != 1:
        return Mixes(otherwise)
    return within_token(node, types, [argument(node, "dim")], op_name(node))


@rule("embedding")
def embedding(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Each token looks up its own row of a constant table."""
    if types[argument(node, "weight")] != Const():
        return Mixes("a lookup in a table of tokens")
    if argument(node, "scale_grad_by_freq"):
        return Mixes("an embedding whose gradient is scaled by how often a word occurs in the row")
    return types[argument(node, "indices")]


@rule("index_select")
def index_select(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Each token looks up its own row of a constant table, or every token keeps the same columns."""
    table, _, index = operands(node)
    source, chosen = types[table], types[index]
    axis = axis_argument(node, len(shape_of(table)))
    if source == Const() and isinstance(chosen, Tok):
        return Tok(axis)
    if isinstance(source, Tok) and index is graph.layout("predecessors") and source.axis == axis:
        return source  # each scored token reads the slot that predicts it
    if isinstance(source, Tok) and chosen == Const():
        return within_token(node, types, [axis], "index_select")
    return Mixes("tokens are picked by the values of other tokens")


@rule("index")
def index(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """A lookup in a constant table by per-token indices."""
    table, indices = operands(node)
    if types[table] != Const():
        return Mixes("tokens are picked by index")
    if any(i is None or i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices):
        return Mixes("a lookup that mixes slices, masks and per-token indices")
    rank = max(len(shape_of(i)) for i in indices)
    axes = {rank - len(shape_of(i)) + kind.axis for i in indices if isinstance(kind := types[i], Tok)}
    return Tok(axes.pop()) if len(axes) == 1 else Mixes("indices of different tokens are combined")


# --------------------------------------------------------------------------- attention and epilogues


@rule("scaled_dot_product_attention")
def attention_within_tokens(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Attention that is not over tokens: tokens are a batch axis, or queries of a memory that all share."""
    query, *memory = operands(node)[:3]
    from_end = {kind.axis - len(shape_of(n)) for n in (query, *memory) if isinstance(kind := types[n], Tok)}
    if argument(node, "attn_mask") is not None or argument(node, "is_causal") or argument(node, "dropout_p"):
        return Mixes("attention with a mask that is not attention of tokens over tokens")
    if len(from_end) != 1 or not isinstance(types[query], Tok):
        return Mixes("attention of tokens over other tokens")
    (axis,) = from_end
    shared = all(types[n] == Const() for n in memory)
    own = all(isinstance(types[n], Tok) for n in memory)
    if (shared and axis <= -2) or (own and axis < -2):
        return Tok(len(shape_of(node)) + axis)
    return Mixes("attention over something that is not one memory for all tokens or one for each")


@rule("prefix_attention")
def prefix_attention(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """The one op that may mix tokens: it does so along the forest, by definition."""
    layout = ("position_ids", "subtree_end", "segments")
    if any(types[argument(node, name)] != Tok(2) for name in ("query", "key", "value")):
        return Mixes("attention over something that is not one query, key and value per token")
    if any(argument(node, name) is not graph.layout(name) for name in layout):
        return Mixes("attention over another forest than the row's")
    if type_of(argument(node, "sinks"), types) != Const():
        return Mixes("attention sinks that depend on the tokens")
    return Tuple((Tok(2), Tok(2)))


@rule("token_logps")
def token_logps(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """One log-probability per row of hidden states; the head's weights are the same for all."""
    hidden, targets, captures, _ = operands(node)
    if types[hidden] != Tok(0) or targets is not graph.layout("targets"):
        return Mixes("log-probabilities of something that is not one row per scored token")
    if any(types[capture] != Const() for capture in captures):
        return Mixes("a head whose weights depend on the tokens")
    return Tuple((Tok(0), Tok(0)))
