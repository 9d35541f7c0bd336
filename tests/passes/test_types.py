"""One accepted and one refused use of every typing rule; the accepted ones are shown right by experiment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppcompile.passes.base import output_node
from ppcompile.passes.types import Const, Mixes, Tok

aten = torch.ops.aten
WIDTH, WORDS = 6, 11
Function = Callable[..., Tensor]

# Functions of x [1, T, 6] and a square constant w [6, 6]; the axis that holds the tokens of the result.
TOKEN_WISE: dict[str, tuple[Function, int]] = {
    "pointwise": (lambda x, w: x.sin() * 2 + x, 1),
    "broadcast_constant": (lambda x, w: x * w[0] + w[:1].unsqueeze(0), 1),
    "broadcast_tokens": (lambda x, w: x * x.mean(-1, keepdim=True), 1),
    "outer_within_token": (lambda x, w: x.unsqueeze(-1) * x.unsqueeze(-2), 1),
    "where": (lambda x, w: torch.where(x > 0, x, w[0]), 1),
    "masked_fill": (lambda x, w: x.masked_fill(x > 0, 0.0), 1),
    "cast_to_other": (lambda x, w: x.type_as(w).to(torch.float64), 1),
    "two_outputs": (lambda x, w: torch.frexp(x)[0], 1),
    "maximum_of_two": (lambda x, w: torch.max(x, -x), 1),
    "mean": (lambda x, w: x.mean(-1), 1),
    "mean_by_keyword": (lambda x, w: aten.mean.dim(x, dim=[2]), 1),
    "sum_before_tokens": (lambda x, w: x.transpose(1, 2).sum(1), 1),
    "sum_of_batch": (lambda x, w: x.sum((0, 2)), 0),
    "negative_axis_keepdim": (lambda x, w: x.transpose(0, 1).sum(-2, keepdim=True), 0),
    "variance": (lambda x, w: x.var(-1, correction=0), 1),
    "variance_unbiased": (lambda x, w: x.var(2, unbiased=True, keepdim=True), 1),
    "norm": (lambda x, w: x.norm(dim=-1, keepdim=True), 1),
    "norm_by_keyword": (lambda x, w: aten.linalg_vector_norm(x, dim=[-1]), 1),
    "any": (lambda x, w: (x > 0).any(-1), 1),
    "argmax": (lambda x, w: x.argmax(-1), 1),
    "max_values": (lambda x, w: x.max(-1).values, 1),
    "max_by_keyword": (lambda x, w: aten.max.dim(x, dim=-1, keepdim=True)[0], 1),
    "topk": (lambda x, w: x.topk(2)[0], 1),
    "sort": (lambda x, w: x.sort().values, 1),
    "argsort": (lambda x, w: x.argsort(-1), 1),
    "chunk": (lambda x, w: x.chunk(2, -1)[1], 1),
    "split": (lambda x, w: x.split([2, 4], dim=-1)[1], 1),
    "unbind": (lambda x, w: x.unbind(0)[0], 0),
    "softmax": (lambda x, w: x.softmax(-1), 1),
    "cumsum": (lambda x, w: x.cumsum(-1), 1),
    "flip": (lambda x, w: x.flip(2), 1),
    "roll": (lambda x, w: x.roll(1, -1), 1),
    "glu": (lambda x, w: F.glu(x), 1),
    "layer_norm": (lambda x, w: F.layer_norm(x, (WIDTH,), w[0], w[1]), 1),
    "rms_norm": (lambda x, w: F.rms_norm(x, (WIDTH,), w[0]), 1),
    "linear": (lambda x, w: F.linear(x, w, w[0]), 1),
    "matmul": (lambda x, w: x @ w, 1),
    "matmul_from_left": (lambda x, w: w @ x.transpose(1, 2), 2),
    "matmul_vector": (lambda x, w: x @ w[0], 1),
    "matmul_by_token": (lambda x, w: x[0].unsqueeze(1) @ x[0].unsqueeze(2), 0),
    "addmm": (lambda x, w: torch.addmm(w[0], x[0], w), 0),
    "baddbmm": (lambda x, w: torch.baddbmm(x, x, w[None], beta=2), 1),
    "outer": (lambda x, w: torch.outer(w[0], x[0, :, 0]), 1),
    "floor_divide": (lambda x, w: x // 2, 1),
    "view": (lambda x, w: x.view(1, -1, 2, 3), 1),
    "view_without_batch": (lambda x, w: x.reshape(-1, WIDTH), 0),
    "view_of_inner": (lambda x, w: x.transpose(1, 2).reshape(1, 2, 3, -1), 3),
    "flatten": (lambda x, w: x.unflatten(-1, (2, 3)).flatten(2), 1),
    "squeeze": (lambda x, w: x.squeeze(0).unsqueeze(1), 0),
    "permute": (lambda x, w: x.permute(2, 1, 0), 1),
    "expand": (lambda x, w: x.expand(3, -1, -1), 1),
    "expand_constant": (lambda x, w: w[:1].expand_as(x[0]), 0),
    "repeat": (lambda x, w: x.repeat(1, 1, 2), 1),
    "repeat_interleave": (lambda x, w: x.repeat_interleave(2, dim=-1), 1),
    "repeat_constant": (lambda x, w: x + w[:1].repeat(x.shape[1], 1), 1),
    "slice": (lambda x, w: x[..., 1:3], 1),
    "slice_by_keyword": (lambda x, w: aten.slice(x, dim=2, end=3), 1),
    "select": (lambda x, w: x[..., 2], 1),
    "select_before": (lambda x, w: x[0], 0),
    "cat": (lambda x, w: torch.cat([x, -x], -1), 1),
    "stack": (lambda x, w: torch.stack([x, -x], 1), 2),
    "stack_after": (lambda x, w: torch.stack([x, -x], dim=-1), 1),
    "pad": (lambda x, w: F.pad(x, (1, 2)), 1),
    "gather": (lambda x, w: x.gather(-1, x.argsort(-1)), 1),
    "scatter": (lambda x, w: torch.zeros_like(x).scatter(-1, x.topk(2)[1], 1.0), 1),
    "scatter_add": (lambda x, w: torch.zeros_like(x).scatter_add(-1, x.argsort(-1), x), 1),
    "embedding": (lambda x, w: F.embedding(x.argmax(-1), w), 1),
    "index_constant": (lambda x, w: w[x.argmax(-1)], 1),
    "index_constant_twice": (lambda x, w: w[x.argmax(-1), x.argmin(-1)], 1),
    "index_select": (lambda x, w: w.index_select(0, x.argmax(-1)[0]), 0),
    "index_select_columns": (lambda x, w: x.index_select(-1, w.argmax(-1)), 1),
    "fill": (lambda x, w: x + torch.ones_like(x) + x.new_zeros(x.shape[1], 1) + torch.full((1, x.shape[1], 1), 2.0), 1),
    "fill_of_constants": (lambda x, w: x * x.new_full((3, 1, 1), 2.0), 1),
    "view_as": (lambda x, w: x.view_as(x[0]) + x.reshape_as(x[0].unsqueeze(1)).squeeze(1), 0),
    "complex": (lambda x, w: torch.view_as_complex(x.unflatten(-1, (3, 2))) * torch.polar(w[0, :3], w[1, :3]), 1),
    "complex_as_pairs": (lambda x, w: torch.view_as_real(torch.complex(x, -x).conj().resolve_conj()).flatten(2), 1),
    "windows": (lambda x, w: x.unfold(2, 3, 1), 1),
    "triangle_of_each_token": (lambda x, w: (x.unsqueeze(-1) * x.unsqueeze(-2)).tril(), 1),
    "diagonal_of_each_token": (lambda x, w: (x[0].unsqueeze(-1) * x[0].unsqueeze(-2)).diagonal(0, -2, -1), 0),
    "diagonal_before": (lambda x, w: (x.unsqueeze(-1) * x.unsqueeze(-2)).permute(2, 3, 0, 1).diagonal().squeeze(0), 0),
    "one_hot": (lambda x, w: F.one_hot(x.argmax(-1), WIDTH), 1),
    "bucketize": (lambda x, w: torch.bucketize(x, w[0].sort().values), 1),
    "searchsorted": (lambda x, w: torch.searchsorted(w[0].sort().values, x.contiguous()), 1),
    "isin": (lambda x, w: torch.isin(x.argmax(-1), w.argmax(-1)), 1),
    "two_reductions": (lambda x, w: torch.var_mean(x, -1, keepdim=True)[0], 1),
    "kth_value": (lambda x, w: x.kthvalue(2)[0], 1),
    "count_nonzero": (lambda x, w: (x > 0).count_nonzero(-1), 1),
    "gather_from_matrix": (lambda x, w: w.gather(0, x.argsort(-1)[0]), 0),
    "gather_from_table": (lambda x, w: w.expand(1, -1, -1).gather(1, x.argsort(-1)), 1),
    "index_columns": (lambda x, w: x[..., w.argmax(-1)], 1),
    "index_columns_before": (lambda x, w: x.permute(2, 0, 1)[w.argmax(-1)[:, None]], 3),
    "index_apart": (lambda x, w: x[0].unflatten(-1, (2, 3))[None][w.argmax(-1) * 0, :, :, w.argmax(-1) % 3], 1),
    "index_constant_in_part": (lambda x, w: w[:, x.argmax(-1)], 2),
    "index_add_columns": (lambda x, w: x.index_add(-1, w.argmax(-1), x), 1),
    "index_fill_columns": (lambda x, w: x.index_fill(-1, w.argmax(-1), 0.5), 1),
    "slice_scatter": (lambda x, w: x.slice_scatter(x[..., :2] * 2, -1, 1, 3), 1),
    "select_scatter": (lambda x, w: x.permute(2, 0, 1).select_scatter(x[..., 0] * 2, 0, 1), 2),
    "attention_within_token": (
        lambda x, w: F.scaled_dot_product_attention(*[x[0].view(-1, 1, 3, 2)] * 3).flatten(1),
        0,
    ),
    "attention_to_memory": (lambda x, w: F.scaled_dot_product_attention(x[None], w[None, None], w[None, None]), 2),
}

MIXES: dict[str, Function] = {
    "shifted_pointwise": lambda x, w: x[0].unsqueeze(0) * x[0].unsqueeze(1),
    "position_table": lambda x, w: x + torch.arange(x.shape[1])[None, :, None],
    "length": lambda x, w: x / x.shape[1],
    "length_as_keyword": lambda x, w: torch.add(x, x, alpha=x.shape[1]),
    "root_of_length": lambda x, w: x * x.shape[1] ** 0.5,
    "length_in_a_constant": lambda x, w: x * torch.full((), x.shape[1]),
    "length_picks_a_constant": lambda x, w: x + torch.cat([w] * 9)[x.shape[1] - 1],
    "mean": lambda x, w: x - x.mean(1, keepdim=True),
    "mean_of_all": lambda x, w: x - x.mean(),
    "sum_by_keyword": lambda x, w: aten.sum.dim_IntList(x, dim=[-2], keepdim=True) + x,
    "variance": lambda x, w: x - x.var(1, keepdim=True, correction=0),
    "variance_of_all": lambda x, w: x - x.var(unbiased=True),
    "variance_of_transposed": lambda x, w: aten.var.default(x.squeeze(0), True) + x,
    "norm_of_all": lambda x, w: x / x.norm(),
    "any": lambda x, w: x * (x > 0).any(1, keepdim=True),
    "argmax": lambda x, w: x * x.argmax(1),
    "argmax_of_all": lambda x, w: x * x.argmax(),
    "max": lambda x, w: x - x.max(1, keepdim=True).values,
    "max_of_all": lambda x, w: x - x.max(),
    "topk": lambda x, w: x.transpose(1, 2).topk(2)[0].sum(),
    "sort": lambda x, w: x.sort(1).values,
    "sort_default_axis": lambda x, w: x.transpose(1, 2).sort().values,
    "chunk": lambda x, w: x.transpose(0, 1).chunk(2)[0],
    "unbind": lambda x, w: x.softmax(1),
    "log_softmax": lambda x, w: x.transpose(1, 2).log_softmax(-1),
    "cumsum": lambda x, w: x.cumsum(1),
    "cumsum_negative_axis": lambda x, w: x.cumsum(-2),
    "flip": lambda x, w: x.flip(1),
    "flip_several": lambda x, w: x.flip((2, 1)),
    "roll": lambda x, w: x.roll(1, 1),
    "roll_everything": lambda x, w: x.roll(1),
    "layer_norm": lambda x, w: F.layer_norm(x.transpose(1, 2), (x.shape[1],)),
    "norm_weight_of_tokens": lambda x, w: F.layer_norm(w[None], (WIDTH,), x.argmax(-1).float()[0, :WIDTH]),
    "batch_norm": lambda x, w: F.batch_norm(x.transpose(1, 2), None, None, training=True),
    "group_norm": lambda x, w: F.group_norm(x.transpose(1, 2), 2),
    "linear_with_itself": lambda x, w: F.linear(x[0], x[0]),
    "matmul_over_tokens": lambda x, w: x.transpose(1, 2) @ x,
    "matmul_pairs": lambda x, w: x @ x.transpose(1, 2),
    "outer": lambda x, w: torch.outer(x[0, :, 0], x[0, :, 0]),
    "vector_of_tokens": lambda x, w: x[0].T @ x[0, :, 0],
    "addmm": lambda x, w: torch.addmm(x[0], x[0], w, beta=x.shape[1]),
    "baddbmm": lambda x, w: torch.baddbmm(x, x, x.transpose(1, 2) @ x),
    "view_merges": lambda x, w: x.reshape(-1),
    "view_scrambles": lambda x, w: x.reshape(1, WIDTH, -1),
    "view_scrambles_heads": lambda x, w: x.view(1, -1, 2, 3).reshape(2, -1, 3),
    "view_splits": lambda x, w: x.reshape(1, -1, 3),
    "permute_pairs": lambda x, w: (x[0] @ x[0].T).permute(1, 0),
    "expand_to_pairs": lambda x, w: x.expand(x.shape[1], -1, -1),
    "repeat_tokens": lambda x, w: x.repeat(1, 2, 1),
    "repeat_by_length": lambda x, w: x.repeat(1, 1, x.shape[1]),
    "repeat_interleave": lambda x, w: x.repeat_interleave(2, dim=1),
    "slice": lambda x, w: x[:, 1:],
    "slice_by_keyword": lambda x, w: aten.slice(x, dim=1, start=1),
    "slice_default_axis": lambda x, w: aten.slice(x[0], start=1),
    "select": lambda x, w: x - x[:, 0:1],
    "select_last": lambda x, w: x - x[:, -1].unsqueeze(1),
    "cat": lambda x, w: torch.cat([x, x], 1),
    "cat_shift": lambda x, w: torch.cat([x[:, :1] * 0, x[:, :-1]], dim=1),
    "cat_default_axis": lambda x, w: torch.cat([x[0], x[0]]),
    "stack_mixed": lambda x, w: torch.cat([x, w[None]], 1),
    "pad": lambda x, w: F.pad(x, (0, 0, 1, -1)),
    "gather": lambda x, w: x.gather(1, x.argsort(-1)),
    "scatter": lambda x, w: torch.zeros_like(x).scatter(1, x.argsort(-1), 1.0),
    "scatter_reduce": lambda x, w: torch.zeros_like(x).scatter_reduce(1, x.argsort(-1), x, "amax"),
    "view_as_scrambles": lambda x, w: x.view_as(x.permute(0, 2, 1)),
    "windows": lambda x, w: x.unfold(1, 3, 1).sum(-1),
    "triangle": lambda x, w: x.tril(),
    "diagonal": lambda x, w: x.diagonal(0, 1, 2),
    "bucketize": lambda x, w: torch.bucketize(x, x[0, :, 0].contiguous()),
    "isin": lambda x, w: torch.isin(x.argmax(-1), x.argmin(-1)),
    "two_reductions": lambda x, w: torch.var_mean(x, 1, keepdim=True)[0] + x,
    "two_reductions_of_all": lambda x, w: torch.var_mean(x)[0] + x,
    "kth_value": lambda x, w: x.kthvalue(1, dim=1)[0],
    "largest_and_smallest_of_all": lambda x, w: x - x.aminmax()[0],
    "count_nonzero": lambda x, w: x * (x > 0).count_nonzero(),
    "gather_from_table_by_index": lambda x, w: w.repeat(9, 1)[None].gather(2, x.argsort(-1)),
    "index_of_tokens": lambda x, w: x[:, w.argmax(-1)],
    "index_columns_of_other_tokens": lambda x, w: x[0, :, :][:, x.argmax(-1)[0]],
    "index_add": lambda x, w: x.index_add(1, x.argmax(-1)[0], x),
    "index_add_of_tokens": lambda x, w: w.index_add(0, x.argmax(-1)[0], x[0]),
    "slice_scatter": lambda x, w: x.slice_scatter(x[:, :2], 1, 1, 3),
    "select_scatter": lambda x, w: x.select_scatter(x[:, 0], 1, 1),
    "embedding_in_tokens": lambda x, w: F.embedding(x.argmax(-1), x[0]),
    "embedding_by_frequency": lambda x, w: F.embedding(x.argmax(-1), w, scale_grad_by_freq=True),
    "index_tokens": lambda x, w: x[0][x.argmax(-1)[0]],
    "index_put": lambda x, w: x[0].index_put((x.argmax(-1)[0],), x[0]),
    "index_select_tokens": lambda x, w: x.index_select(1, x.argmax(-1)[0]),
    "nonzero": lambda x, w: x[0].nonzero(),
    "mask_picks_tokens": lambda x, w: x[x > 0],
    "random": lambda x, w: x * torch.rand_like(x),
    "bernoulli": lambda x, w: torch.bernoulli(x.sigmoid()),
    "convolution": lambda x, w: torch.ops.aten.conv1d(x.transpose(1, 2), w[:, :, None]),
    "attention": lambda x, w: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
    "attention_memory_is_tokens": lambda x, w: F.scaled_dot_product_attention(w[None, None], x[None], x[None]),
    "attention_to_masked_memory": lambda x, w: F.scaled_dot_product_attention(
        x[None], w[None, None], w[None, None], is_causal=True
    ),
    "einsum": lambda x, w: torch.einsum("btc,bsc->bts", x, x),
    "diff": lambda x, w: x.diff(dim=1, prepend=x[:, :1]),
    "median": lambda x, w: x - x.median(),
    "in_place_on_what_is_read_later": lambda x, w: (x * 2, x.view(-1).add_(1))[0],
}  # fmt: skip


def tokens(function: Function) -> Function:
    return lambda ids, table, w: function(F.embedding(ids, table), w)


@pytest.fixture
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    table = nn.Parameter(torch.randn(WORDS, WIDTH, generator=generator))
    return {"table": table, "w": torch.randn(WIDTH, WIDTH, generator=generator)}


@pytest.mark.parametrize("name", TOKEN_WISE)
def test_token_wise(name: str, state: dict[str, Tensor], captured: Any, typed: Any, evaluated: Any) -> None:
    """The rule finds the axis, and along it the result is what each token gives alone."""
    function, axis = TOKEN_WISE[name]
    graph = captured(tokens(function), **state)
    assert typed(graph) == Tok(axis)
    row = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])
    whole = evaluated(graph, row)
    order = torch.tensor([9, 2, 5, 0, 7, 7])
    torch.testing.assert_close(evaluated(graph, row[:, order]), whole.index_select(axis, order))


@pytest.mark.parametrize("name", MIXES)
def test_mixing_has_no_type(name: str, state: dict[str, Tensor], captured: Any, typed: Any) -> None:
    kind = typed(captured(tokens(MIXES[name]), **state))
    assert isinstance(kind, Mixes), f"{kind} was proved"
    assert kind.reason


def test_a_number_read_from_tokens_has_no_type(captured: Any, typed: Any, state: dict[str, Tensor]) -> None:
    graph = captured(lambda ids, table, w: F.embedding(ids, table) * 2, **state)
    node = output_node(graph.graph)
    with graph.graph.inserting_after(node):
        number = graph.graph.call_function(aten.item.default, (node,))
    number.meta["val"] = 1.0
    with graph.graph.inserting_after(number):
        scaled = graph.graph.call_function(aten.mul.Scalar, (node, number))
    scaled.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(scaled, lambda user: user.op == "output")
    assert isinstance(typed(graph), Mixes)


def test_constants_stay_constants(captured: Any, typed: Any, state: dict[str, Tensor]) -> None:
    graph = captured(lambda ids, table, w: (w @ w).softmax(-1) + torch.arange(WIDTH), **state)
    assert typed(graph) == Const()
