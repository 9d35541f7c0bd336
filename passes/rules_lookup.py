"""Typing rules of lookups and of the ops of the packed graph: who reads whose values."""

from __future__ import annotations

import torch
from torch import fx

from .base import PackGraph, argument, axis_argument, op_family, op_name, operands, shape_of
from .types import Const, Mixes, Rows, Tok, TokenType, Tuple, Types, rule, tensors_of, type_of, within_token
from .unshare import is_row_per_token, stays_on_rows


@rule("gather")
def gather(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Reads along one axis at indices laid out like the tokens: each token its own row, or a constant table."""
    source, _, chosen = operands(node)[:3]
    axis = axis_argument(node, len(shape_of(node)))
    if types[source] == Const() and isinstance(kind := types[chosen], Tok):
        # On other axes a gather reads where it writes, and a constant has no place for each slot there.
        return kind if kind.axis == axis else Mixes("a table is read at the slot's index in the row")
    return _laid_out_alike(node, types, f"{op_name(node)} of tokens by the same index for all")


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Writes along one axis at indices laid out like the tokens: each token writes into its own row."""
    return _laid_out_alike(node, types, f"{op_name(node)} of tokens into constants")


def _laid_out_alike(node: fx.Node, types: Types, otherwise: str) -> TokenType | Mixes:
    if len({types[source] for source in tensors_of(node)}) != 1:
        return Mixes(otherwise)
    return within_token(node, types, [argument(node, "dim")], op_name(node))


@rule("index_fill", "index_add", "index_copy")
def write_columns(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """The same columns of each token are written, with a number or with what that token has for them."""
    written = [types[n] for n in tensors_of(node) if n is not argument(node, "index")]
    if type_of(argument(node, "index"), types) != Const() or len(set(written)) != 1:
        return Mixes(f"{op_name(node)} at places, or of values, of other tokens")
    return within_token(node, types, [argument(node, "dim")], op_name(node))


@rule("bucketize", "searchsorted", "isin")
def search(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Where each value stands in, or whether it is in, a list that is the same for all tokens."""
    first, second = operands(node)[:2]
    values, known = (second, first) if op_family(node) == "searchsorted" else (first, second)
    if type_of(known, types) != Const() or len(shape_of(known)) > 1 or argument(node, "sorter", None) is not None:
        return Mixes(f"{op_name(node)} in a list that depends on the tokens")
    return types[values]


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
    """Each token looks up its own element of a constant table, or every token keeps the same columns.

    Indices that stand side by side are replaced by their common shape, others make it stand in front.
    """
    table, given = operands(node)
    places = [place for place, i in enumerate(given) if i is not None]
    indices = [given[place] for place in places]
    if any(i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices):
        return Mixes("a mask as an index, which picks as many elements as it shows")
    common = max(len(shape_of(i)) for i in indices)
    side_by_side = places == list(range(places[0], places[-1] + 1))
    kind = types[table]
    if isinstance(kind, Tok):
        if kind.axis in places or any(types[i] != Const() for i in indices):
            return Mixes("tokens are picked by index")
        in_front = not side_by_side or places[0] < kind.axis
        return Tok(kind.axis - sum(place < kind.axis for place in places) + (common if in_front else 0))
    first = places[0] if side_by_side else 0
    axes = {first + common - len(shape_of(i)) + of.axis for i in indices if isinstance(of := types[i], Tok)}
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


@rule("unshared")
def unshared(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """A module on rows of whole sequences, which ``passes.unshare`` proved causal."""
    call = graph.unshared[argument(node, "call")]
    for source, axes in zip(argument(node, "inputs"), call.inputs, strict=True):
        kind = types[source]
        if kind not in (Const(), Rows()) and not (is_row_per_token(axes) and kind == Tok(*axes.tokens)):
            return Mixes(f"{call.path} reads {source.name}, which is not one row per token")
    return Rows() if stays_on_rows(graph, node) else Tok(call.outputs[argument(node, "output")].tokens[0])
