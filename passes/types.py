"""Token types, and the typing rule of every op: the proof that nothing mixes tokens.

A tensor of the packed graph is one of

    Const       no axis of tokens; the same for every token
    Tok(d)      axis ``d`` holds the tokens; what stands at slot t depends on slot t alone, or went through
                ``prefix_attention``, which is exact by its own definition

A rule takes an op and the types of its inputs and returns the type of its output, or a :class:`Mixes` that says how
the op would let one slot see another. An op without a rule is an error, never a guess. To add a rule: find the kind
below whose reason holds for the op and add its name there, or write a function and register it with ``@rule``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import fx

from .base import PackGraph, input_nodes, is_op, op_name, shape_of

__all__ = ["Const", "Mixes", "Tok", "TokenType", "Tuple", "infer", "input_types"]


@dataclass(frozen=True)
class Const:
    """No axis of tokens."""

    def __str__(self) -> str:
        return "Const"


@dataclass(frozen=True)
class Tok:
    """Axis ``axis`` holds the tokens."""

    axis: int

    def __str__(self) -> str:
        return f"Tok({self.axis})"


@dataclass(frozen=True)
class Tuple:
    """What a multi-output op returns."""

    items: tuple[TokenType, ...]


@dataclass(frozen=True)
class Mixes:
    """Why an op is not token-wise."""

    reason: str


TokenType = Union[Const, Tok, Tuple]
Rule = Callable[[PackGraph, fx.Node, dict[fx.Node, TokenType]], Union[TokenType, Mixes]]

RULES: dict[str, Rule] = {}
"""Op name without ``aten.`` and overload -> rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def infer(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """Type of ``node`` from the types of its inputs."""
    inputs = [types[source] for source in node.all_input_nodes]
    if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
        return Mixes(f"{op_name(node)} overwrites a tensor that other parts of the model may still read")
    if not any(isinstance(t, (Tok, Tuple)) for t in inputs):
        return _from_constants(graph, node)
    name = op_name(node).removeprefix("aten.").removeprefix("ppcompile.").partition(".")[0]
    if _is_size(node):
        return Const()
    if name in RULES:
        return RULES[name](graph, node, types)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return pointwise(graph, node, types)
    return Mixes(f"there is no typing rule for {op_name(node)}, so it cannot be proved to keep tokens apart")


def input_types(graph: PackGraph) -> dict[fx.Node, TokenType]:
    """Types of the graph's inputs: the model's state is constant, the layout holds one value per slot."""
    tokens = {"input_ids": Tok(1), "position_ids": Tok(1), "subtree_end": Tok(0), "targets": Tok(0)}
    return {node: tokens.get(node.name, Const()) for node in input_nodes(graph.graph)}


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def _from_constants(graph: PackGraph, node: fx.Node) -> TokenType | Mixes:
    """No tokens go in. A token axis that comes out must be a fill: anything else depends on the index."""
    if not graph.token_axes(node) and not any(graph.mentions_length(size) for size in shape_of(node)):
        return Const()
    name = op_name(node).removeprefix("aten.").partition(".")[0]
    if len(graph.token_axes(node)) == 1 and name in _FILLS:
        return Tok(graph.token_axes(node)[0])
    if len(graph.token_axes(node)) == 1 and name == "expand":  # every slot holds the same
        return Tok(graph.token_axes(node)[0])
    return Mixes(f"{op_name(node)} makes values that depend on the slot's index in the row")


_FILLS = (
    "ones",
    "zeros",
    "full",
    "ones_like",
    "zeros_like",
    "full_like",
    "new_ones",
    "new_zeros",
    "new_full",
    "empty_like",
)


# --------------------------------------------------------------------------- kinds of rules


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def _type(arg: Any, types: dict[fx.Node, TokenType]) -> TokenType:
    return types[arg] if isinstance(arg, fx.Node) else Const()


def pointwise(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """Each output element reads one element of each input, broadcast: token axes must coincide."""
    rank = len(shape_of(node))
    axes = set()
    for source in _tensors(node):
        kind = types[source]
        if isinstance(kind, Tok):
            axes.add(rank - len(shape_of(source)) + kind.axis)
    if len(axes) != 1:
        return Mixes("tokens are combined with other tokens: their axes do not line up")
    (axis,) = axes
    for source in _tensors(node):
        if types[source] == Const() and _size_at(source, rank, axis) != 1:
            return Mixes(f"{source.name} has one value per slot of the row that is not a function of its token")
    return Tok(axis)


def _size_at(source: fx.Node, rank: int, axis: int) -> Any:
    shape = shape_of(source)
    own = axis - (rank - len(shape))
    return shape[own] if own >= 0 else 1


for _name in ("where", "masked_fill", "to", "type_as", "_to_copy", "dropout", "native_dropout", "contiguous", "clone",
              "detach", "alias", "lift_fresh_copy", "relu", "silu", "gelu", "softplus", "clamp", "rsub", "nan_to_num",
              "zeros_like", "ones_like", "full_like", "empty_like", "hardswish", "leaky_relu", "elu", "mish",
              "log_sigmoid", "hardtanh", "relu6", "selu", "celu", "square", "isnan", "isinf", "feature_dropout"):  # fmt: skip
    RULES[_name] = pointwise


def _within_token(node: fx.Node, kind: TokenType, axes: Sequence[int], what: str) -> TokenType | Mixes:
    """An op along ``axes`` of its first input leaves tokens apart if the token axis is none of them."""
    if not isinstance(kind, Tok):
        return Mixes(f"{what} with tokens in an unexpected argument")
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    if kind.axis in {axis % rank for axis in axes}:
        return Mixes(f"{what} over the tokens of the row")
    return kind


def _axes_argument(node: fx.Node, position: int, name: str) -> list[int]:
    given = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    if given is None or given == []:
        return list(range(rank))
    return [int(a) for a in given] if isinstance(given, (list, tuple)) else [int(given)]  # type: ignore[call-overload]


@rule("mean", "sum", "amax", "amin", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "prod", "all", "any")
def reduction(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """A reduction within each token. Without ``keepdim`` the token axis moves down."""
    position = 2 if is_op(node, "aten.norm", "aten.linalg_vector_norm") else 1
    axes = _axes_argument(node, position, "dim")
    kind = _within_token(node, types[node.args[0]], axes, op_name(node))  # type: ignore[index]
    if isinstance(kind, Mixes):
        return kind
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    if len(shape_of(node)) == rank:
        return kind
    return Tok(kind.axis - sum(1 for a in {a % rank for a in axes} if a < kind.axis))  # type: ignore[union-attr]


@rule("max", "min", "topk", "sort", "chunk", "split", "split_with_sizes", "unbind", "cummax", "argmax", "argmin")
def along_axis(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """Ops along one axis with several outputs: token-wise if that axis is not the token axis."""
    name = op_name(node).removeprefix("aten.").partition(".")[0]
    position = {"topk": 2, "chunk": 2, "split": 2, "split_with_sizes": 2}.get(name, 1)
    default = {"topk": -1, "sort": -1, "chunk": 0, "split": 0, "split_with_sizes": 0, "unbind": 0}.get(name)
    given = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    if not isinstance(given, int):
        return Mixes(f"{op_name(node)} over the whole row")
    kind = _within_token(node, types[node.args[0]], [given], op_name(node))  # type: ignore[index]
    if isinstance(kind, Mixes):
        return kind
    value, rank = node.meta["val"], len(shape_of(node.args[0]))  # type: ignore[arg-type]
    outputs = value if isinstance(value, (tuple, list)) else (value,)
    assert isinstance(kind, Tok)
    lost = len(outputs[0].shape) < rank and given % rank < kind.axis
    item = Tok(kind.axis - 1) if lost else kind
    return Tuple((item,) * len(outputs)) if isinstance(value, (tuple, list)) else item


@rule(
    "softmax",
    "_softmax",
    "log_softmax",
    "_log_softmax",
    "cumsum",
    "cumprod",
    "flip",
    "roll",
    "glu",
    "gather",
    "logcumsumexp",
)
def along_given_axis(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """Ops along the axis given as second argument, all tensors laid out alike."""
    position = 2 if is_op(node, "aten.roll") else 1
    kinds = {types[source] for source in _tensors(node)}
    if len(kinds) != 1:
        return Mixes(f"{op_name(node)} of tokens and constants")
    return _within_token(node, kinds.pop(), _axes_argument(node, position, "dim"), op_name(node))


@rule("scatter", "scatter_add")
def scatter(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """Writes along one axis at indices laid out like the tokens: each token writes into its own row."""
    kinds = {types[source] for source in _tensors(node)}
    if len(kinds) != 1:
        return Mixes(f"{op_name(node)} of tokens into constants")
    return _within_token(node, kinds.pop(), [int(node.args[1])], op_name(node))  # type: ignore[call-overload]


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def normalization(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """Statistics over the trailing axes only."""
    trailing = len(node.args[1])  # type: ignore[arg-type]
    if any(types[source] != Const() for source in _tensors(node)[1:]):
        return Mixes("a norm whose weights depend on the tokens")
    kind = _within_token(node, types[node.args[0]], range(-trailing, 0), op_name(node))  # type: ignore[index]
    if isinstance(kind, Tok) and isinstance(node.meta["val"], (tuple, list)):
        return Tuple((kind,) * len(node.meta["val"]))
    return kind


@rule("linear")
def linear(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """A matrix applied to the last axis of each token."""
    if any(types[source] != Const() for source in _tensors(node)[1:]):
        return Mixes("a linear layer whose weight depends on the tokens")
    return _within_token(node, types[node.args[0]], [-1], "a linear layer")  # type: ignore[index]


@rule("addmm", "baddbmm")
def add_product(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    bias, left, right = node.args[:3]
    product = _product(graph, left, right, types, len(shape_of(node)))  # type: ignore[arg-type]
    kind = _type(bias, types)
    if isinstance(product, Mixes) or kind in (Const(), product):
        return product
    return Mixes("a bias of tokens added to other tokens")


@rule("mm", "bmm", "matmul")
def product(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    left, right = node.args[:2]
    return _product(graph, left, right, types, len(shape_of(node)))  # type: ignore[arg-type]


def _product(
    graph: PackGraph, left: fx.Node, right: fx.Node, types: dict[fx.Node, TokenType], rank: int
) -> TokenType | Mixes:
    """``[.., n, c] @ [.., c, m]``: tokens may be rows, columns, or a batch axis of both; never contracted."""
    a, b = types[left], types[right]
    ranks = len(shape_of(left)), len(shape_of(right))
    if min(ranks) < 2:
        return _product_with_vector(a, b, ranks)
    left_axis = a.axis - ranks[0] if isinstance(a, Tok) else None
    right_axis = b.axis - ranks[1] if isinstance(b, Tok) else None
    if left_axis == -1 or right_axis == -2:
        return Mixes("a matrix product that sums over the tokens of the row")
    if left_axis is not None and right_axis is not None:
        aligned = left_axis == right_axis and left_axis < -2
        return Tok(rank + left_axis) if aligned else Mixes("a matrix product of tokens with other tokens")
    axis = left_axis if left_axis is not None else right_axis
    assert axis is not None
    return Tok(rank + axis)


def _product_with_vector(a: TokenType, b: TokenType, ranks: tuple[int, int]) -> TokenType | Mixes:
    if ranks[1] == 1 and isinstance(a, Tok) and b == Const() and a.axis < ranks[0] - 1:
        return a
    return Mixes("a product of tokens with a vector of tokens")


@rule("embedding")
def embedding(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """Each token looks up its own row of a constant table."""
    table, index = node.args[:2]
    if types[table] != Const():  # type: ignore[index]
        return Mixes("a lookup in a table of tokens")
    return types[index]  # type: ignore[index]


@rule("index_select")
def index_select(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """Each token looks up its own row of a constant table, or every token keeps the same columns."""
    table, axis, index = node.args[:3]
    source, chosen = types[table], types[index]  # type: ignore[index]
    rank = len(shape_of(table))  # type: ignore[arg-type]
    if source == Const() and isinstance(chosen, Tok):
        return Tok(int(axis) % rank)  # type: ignore[call-overload]
    if isinstance(source, Tok) and index is graph.layout("predecessors") and source.axis == int(axis) % rank:  # type: ignore[call-overload]
        return source  # each scored token reads the slot that predicts it
    if isinstance(source, Tok) and chosen == Const():
        return _within_token(node, source, [int(axis)], "index_select")  # type: ignore[call-overload]
    return Mixes("tokens are picked by the values of other tokens")


@rule("index")
def index(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """A lookup in a constant table by per-token indices."""
    table, indices = node.args[:2]
    kinds = [types[i] for i in indices if i is not None]  # type: ignore[union-attr, index]
    if types[table] != Const():  # type: ignore[index]
        return Mixes("tokens are picked by index")
    tokens = [(i, types[i]) for i in indices if isinstance(i, fx.Node) and isinstance(types[i], Tok)]  # type: ignore[union-attr]
    if len(kinds) != len(indices) or not tokens:  # type: ignore[arg-type]
        return Mixes("a lookup that mixes slices and per-token indices")
    spread = max(len(shape_of(i)) for i in indices)  # type: ignore[arg-type, union-attr]
    axes = {spread - len(shape_of(i)) + kind.axis for i, kind in tokens if isinstance(kind, Tok)}
    return Tok(axes.pop()) if len(axes) == 1 else Mixes("indices of different tokens are combined")


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
def view(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """The token axis stays an axis of its own: as many elements stand before it as did."""
    kind = types[node.args[0]]  # type: ignore[index]
    if not isinstance(kind, Tok):
        return Mixes("a view of several tensors")
    before = _count(shape_of(node.args[0])[: kind.axis])  # type: ignore[arg-type]
    for axis in graph.token_axes(node)[:1]:  # a second token axis cannot be the one that moved
        if _count(shape_of(node)[:axis]) == before:
            return Tok(axis)
    return Mixes(f"a view that merges or splits the token axis: {_show(node.args[0])} -> {_show(node)}")  # type: ignore[arg-type]


def _count(sizes: Sequence[Any]) -> int:
    total = 1
    for size in sizes:
        total *= int(size)
    return total


def _show(node: fx.Node) -> str:
    return "[" + ", ".join(str(size) for size in shape_of(node)) + "]"


@rule("transpose", "permute", "t", "movedim")
def permutation(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """Axes change places; the token axis is found by its size, of which there is one."""
    axes = graph.token_axes(node)
    return Tok(axes[0]) if len(axes) == 1 else Mixes("a permutation of several axes of tokens")


@rule("expand", "expand_as", "broadcast_to")
def expand(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    kind, source = types[node.args[0]], node.args[0]  # type: ignore[index]
    if not isinstance(kind, Tok) or len(graph.token_axes(node)) != 1:
        return Mixes("tokens are repeated along another axis of tokens")
    return Tok(kind.axis + len(shape_of(node)) - len(shape_of(source)))  # type: ignore[arg-type]


@rule("repeat", "repeat_interleave", "tile")
def repeat(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """Repetition along other axes; a repeated token axis would no longer have the size T."""
    axes = graph.token_axes(node)
    return Tok(axes[0]) if len(axes) == 1 else Mixes("tokens are repeated")


@rule("slice", "narrow")
def slice_(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[call-overload]
    return _within_token(node, types[node.args[0]], [axis], "a slice")  # type: ignore[index]


@rule("select")
def select(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    rank, axis = len(shape_of(node.args[0])), int(node.args[1])  # type: ignore[arg-type, call-overload]
    kind = _within_token(node, types[node.args[0]], [axis], "selecting one slot")  # type: ignore[index]
    return Tok(kind.axis - 1) if isinstance(kind, Tok) and axis % rank < kind.axis else kind


@rule("cat", "stack")
def concatenate(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """Side by side within each token."""
    parts: Any = node.args[0]
    axis = int(node.args[1]) if len(node.args) > 1 else int(node.kwargs.get("dim", 0))  # type: ignore[call-overload, arg-type]
    kinds = {types[part] for part in parts}
    if len(kinds) != 1 or not isinstance(kind := kinds.pop(), Tok):
        return Mixes("tokens are concatenated with something that is not per token")
    rank = len(shape_of(node))
    if is_op(node, "aten.stack"):
        return Tok(kind.axis + (1 if axis % rank <= kind.axis else 0))
    return Mixes("a concatenation along the tokens of the row") if axis % rank == kind.axis else kind


@rule("pad", "constant_pad_nd")
def pad(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """Padding within each token; over tokens it would shift the row."""
    kind, amounts = types[node.args[0]], node.args[1]  # type: ignore[index]
    rank, padded = len(shape_of(node)), len(amounts) // 2  # type: ignore[arg-type]
    touched = {rank - 1 - n for n in range(padded) if any(amounts[2 * n : 2 * n + 2])}  # type: ignore[index]
    if not isinstance(kind, Tok) or kind.axis in touched:
        return Mixes("padding along the tokens of the row (a shift by one token leaks neighbours)")
    return kind


@rule("getitem")
def item(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    kind = types[node.args[0]]  # type: ignore[index]
    return kind.items[node.args[1]] if isinstance(kind, Tuple) else Mixes("an item of something that has no items")  # type: ignore[index]


@rule("convolution", "conv1d", "conv2d", "conv_transpose1d")
def convolution(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    return Mixes("a convolution over the tokens of the row lets neighbours of different responses see each other")


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "instance_norm", "group_norm")
def batch_statistics(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    return Mixes(f"{op_name(node)} computes statistics over the tokens of the row")


@rule("prefix_attention")
def prefix_attention(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """The one op that may mix tokens: it does so along the forest, by definition."""
    if any(types[part] != Tok(2) for part in node.args[:3]):  # type: ignore[index]
        return Mixes("attention over something that is not one query, key and value per token")
    if list(node.args[3:6]) != [graph.layout(name) for name in ("position_ids", "subtree_end", "segments")]:
        return Mixes("attention over another forest than the row's")
    return Tuple((Tok(2), Tok(2)))


@rule("token_logps")
def token_logps(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> TokenType | Mixes:
    """One log-probability per row of hidden states; the head's weights are the same for all."""
    hidden, targets, captures, _ = node.args
    if types[hidden] != Tok(0) or targets is not graph.layout("targets"):  # type: ignore[index]
        return Mixes("log-probabilities of something that is not one row per scored token")
    if any(types[capture] != Const() for capture in captures):  # type: ignore[union-attr, index]
        return Mixes("a head whose weights depend on the tokens")
    return Tuple((Tok(0), Tok(0)))
