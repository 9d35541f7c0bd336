"""One element at symbolic coordinates is the element that eager computes, however the tensor is built."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

from ppcompile.passes.base import output_node, shape_of
from ppcompile.passes.coordinates import Opaque, score_coordinates
from ppcompile.passes.expressions import Const, Expr, Op, Var, linear_form, simplify, split_mask, to_program, variables
from ppcompile.passes.pull_back import PullBack
from ppcompile.runtime.program import evaluate_program

N, HEADS = 64, 4
INF = float("-inf")
MIN = torch.finfo(torch.float32).min
Function = Callable[..., Tensor]


def places(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1])


def causal(ids: Tensor) -> Tensor:
    p = places(ids)
    return p[None, :] <= p[:, None]


def distance(ids: Tensor) -> Tensor:
    p = places(ids)
    return p[:, None] - p[None, :]


def clipped(ids: Tensor) -> Tensor:
    return distance(ids).clamp(-5, 5) + 5


def t5_bucket(ids: Tensor) -> Tensor:
    """Exact up to 4, then wider and wider, the T5 way."""
    d = distance(ids).clamp(min=0)
    far = 4 + (torch.log(d.float().clamp(min=1) / 4) / math.log(32 / 4) * 4).to(torch.int64)
    return torch.where(d < 4, d, torch.minimum(far, torch.full_like(far, 7)))


def fill_in_place(ids: Tensor) -> Tensor:
    n = ids.shape[1]
    return torch.full((n, n), 1.0).fill_(INF).triu_(1)


def masked_in_place(ids: Tensor) -> Tensor:
    n = ids.shape[1]
    return torch.zeros(n, n).masked_fill_(~causal(ids), MIN)


def indexed(ids: Tensor) -> Tensor:
    """The way of vmapped mask functions: index tensors that broadcast."""
    p = places(ids)
    return causal(ids)[p[:, None], p[None, :]]


def slopes() -> Tensor:
    return 2.0 ** -torch.arange(1, HEADS + 1)


def alibi(ids: Tensor) -> Tensor:
    return slopes()[None, :, None, None] * (torch.ones_like(ids).cumsum(-1) - 1)[:, None, None, :]


def documents(ids: Tensor) -> Tensor:
    """Token data: a flag of each token."""
    flag = ids == 3
    return flag[:, None, :, None] == flag[:, None, None, :]


ON_THE_FLY: dict[str, Function] = {
    "arange": causal,
    "arange_window": lambda ids: causal(ids) & (distance(ids) < 5),
    "arange_or": lambda ids: causal(ids) | (distance(ids) == -2),
    "arange_offset": lambda ids: torch.arange(3, ids.shape[1] + 3)[:, None] * 2 - places(ids)[None],
    "arange_float": lambda ids: torch.arange(ids.shape[1], dtype=torch.float32)[None] / 7,
    "cumsum_of_ones": lambda ids: torch.ones_like(ids).cumsum(1)[:, None] <= torch.ones_like(ids).cumsum(1)[..., None],
    "cumsum_of_mask": lambda ids: ((torch.ones_like(ids) != 0).long().cumsum(1) * 1 - 1)[:, :, None] + 0 * causal(ids),
    "diff": lambda ids: torch.diff(places(ids), prepend=places(ids)[:1] - 1)[None].cumsum(-1)[:, :, None] * 1,
    "tril_ones": lambda ids: torch.tril(torch.ones(ids.shape[1], ids.shape[1])),
    "tril_bool": lambda ids: torch.tril(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool), diagonal=1),
    "triu_inf": lambda ids: torch.triu(torch.full((ids.shape[1],) * 2, INF), diagonal=1),
    "triu_bool_not": lambda ids: ~torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1),
    "band": lambda ids: torch.ones(ids.shape[1], ids.shape[1]).tril().triu(-4),
    "in_place_fill": fill_in_place,
    "in_place_masked": masked_in_place,
    "masked_fill": lambda ids: torch.zeros(ids.shape[1], ids.shape[1]).masked_fill(~causal(ids), -1e9),
    "where": lambda ids: torch.where(causal(ids), 0.0, INF),
    "where_tensors": lambda ids: torch.where(causal(ids), torch.tensor(0.0), torch.tensor(MIN)),
    "one_minus": lambda ids: (1.0 - causal(ids)[None, None].float()) * MIN,
    "as_bytes": lambda ids: causal(ids).to(torch.uint8) == 0,
    "product_of_masks": lambda ids: causal(ids) * (distance(ids) < 3),
    "sum_of_masks": lambda ids: (distance(ids) > 9) + causal(ids),
    "logical": lambda ids: torch.logical_and(causal(ids), torch.logical_not(distance(ids) > 6)),
    "logical_of_numbers": lambda ids: torch.logical_or(distance(ids).clamp(0, 1), causal(ids)),
    "chunk": lambda ids: causal(ids) & ((places(ids) // 5)[:, None] == (places(ids) // 5)[None, :]),
    "chunk_remainder": lambda ids: (places(ids) % 5)[:, None] - (places(ids) % 3)[None, :],
    "dilated": lambda ids: distance(ids) % 3 == 0,
    "truncated": lambda ids: torch.div(distance(ids), 3, rounding_mode="trunc"),
    "alpha": lambda ids: torch.add(places(ids)[:, None], places(ids)[None], alpha=-2),
    "rsub": lambda ids: 1 - causal(ids).float(),
    "batched": lambda ids: causal(ids)[None, None].expand(ids.shape[0], HEADS, -1, -1),
    "viewed": lambda ids: distance(ids).view(1, 1, ids.shape[1], ids.shape[1]).permute(0, 1, 3, 2),
    "squeezed": lambda ids: distance(ids)[None, :, None, :].squeeze(2),
    "squeezed_all": lambda ids: distance(ids)[None, :, None, :, None].squeeze(),
    "repeated": lambda ids: distance(ids)[None].repeat(HEADS, 1, 1),
    "repeated_heads": lambda ids: slopes()[:2].repeat(2)[:, None, None] * distance(ids),
    "interleaved_heads": lambda ids: slopes()[:2].repeat_interleave(2)[:, None, None] * distance(ids),
    "sliced": lambda ids: torch.arange(0, ids.shape[1] + 2)[2:][None] * 1.0 + places(ids)[:, None],
    "stepped": lambda ids: torch.arange(2 * ids.shape[1])[::2][None] * 1.0 + places(ids)[:, None],
    "selected": lambda ids: distance(ids)[None].expand(3, -1, -1)[1],
    "transposed": lambda ids: distance(ids).T,
    "indexed": indexed,
    "index_select": lambda ids: causal(ids).index_select(1, places(ids)),
    "alibi": alibi,
    "alibi_distance": lambda ids: slopes()[:, None, None] * -distance(ids).abs(),
    "clamped": lambda ids: distance(ids).clamp(-3, 4),
    "clip": lambda ids: places(ids).clip(max=7)[None] + places(ids)[:, None],
    "pointwise": lambda ids: torch.exp(-distance(ids).abs().float()).sqrt().tanh(),
    "token_flags": documents,
    "token_order": lambda ids: ids[:, None, :, None].float() - 2 * ids[:, None, None, :],
    "token_flags_and_causal": lambda ids: documents(ids) & causal(ids),
}

TABLES: dict[str, tuple[Function, dict[str, Tensor]]] = {
    "bool": (lambda ids, b: b[: ids.shape[1], : ids.shape[1]], {"b": torch.ones(N, N).tril().bool()}),
    "float": (lambda ids, b: b[None, None, : ids.shape[1], : ids.shape[1]], {"b": torch.full((N, N), INF).triu(1)}),
    "bytes": (
        lambda ids, b: b[:, :, : ids.shape[1], : ids.shape[1]] == 0,
        {"b": torch.ones(1, 1, N, N, dtype=torch.uint8).tril()},
    ),
    "band": (lambda ids, b: b[: ids.shape[1], : ids.shape[1]], {"b": torch.ones(N, N).tril().triu(-6)}),
    "transposed": (lambda ids, b: b[: ids.shape[1], : ids.shape[1]].T, {"b": torch.ones(N, N).tril().bool()}),
    "irregular": (lambda ids, b: b[: ids.shape[1], : ids.shape[1]], {"b": torch.randn(N, N)}),
    "positions": (lambda ids, b: b[:, : ids.shape[1]].unsqueeze(-1) * 1.0, {"b": torch.arange(N)[None]}),
    "slopes": (lambda ids, m: m.view(1, HEADS, 1, 1) * distance(ids), {"m": torch.rand(HEADS)}),
    "learned_slopes": (lambda ids, m: m.exp().view(HEADS, 1, 1) * distance(ids), {"m": nn.Parameter(torch.rand(4))}),
    "relative_bias": (
        lambda ids, w: F.embedding(clipped(ids), w).permute(2, 0, 1).unsqueeze(0),
        {"w": nn.Parameter(torch.randn(11, HEADS))},
    ),
    "relative_bias_index": (lambda ids, w: w[clipped(ids)].permute(2, 0, 1), {"w": nn.Parameter(torch.randn(11, 4))}),
    "t5_bias": (
        lambda ids, w: F.embedding(t5_bucket(ids), w).permute(2, 0, 1)[None],
        {"w": nn.Parameter(torch.randn(8, HEADS))},
    ),
    "wrapped": (lambda ids, w: w[distance(ids)], {"w": nn.Parameter(torch.randn(N))}),
    "heads_in_one_axis": (
        lambda ids, w: w.view(2, 2, 1, 1).expand(2, 2, 3, 5)[:, :, :1, :1].reshape(HEADS, 1, 1) * distance(ids),
        {"w": torch.randn(HEADS)},
    ),
    "scalar": (lambda ids, b: torch.where(causal(ids), 0.0, b), {"b": torch.tensor(-1e4)}),
}


def full_rank(tensor: Tensor, heads: int = HEADS) -> Tensor:
    """``[.., T, T]`` as ``[H, T, T]``."""
    return tensor.expand(heads, *tensor.shape[-2:]) if tensor.dim() < 3 else tensor.reshape(-1, *tensor.shape[-2:])


def coordinates(shape: tuple[Any, ...]) -> tuple[Expr, ...]:
    leading = [Var("h") if size == HEADS else Const(0) for size in shape[:-2]]
    return (*leading, Var("q"), Var("k"))


def check(graph: Any, ids: Tensor, node_values: Any) -> Expr:
    """Read the output everywhere at once and compare it with what eager computes."""
    node = output_node(graph.graph)
    expr = PullBack(graph).read(node, coordinates(shape_of(node)))
    env = node_values(graph, ids)
    captures: list[Any] = []
    text = to_program(expr, captures)
    length = ids.shape[1]
    rows, columns = torch.arange(length)[:, None], torch.arange(length)[None, :]
    heads = torch.arange(HEADS)[:, None, None]
    tensors = [env[capture].detach() for capture in captures]
    found = evaluate_program(text, tensors, h=heads, q=rows, k=columns, i=rows, j=columns)
    expected = full_rank(env[node].detach())
    expected = expected.expand(HEADS, length, length)
    found = torch.as_tensor(found).expand(HEADS, length, length)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5, equal_nan=True)
    return expr


@pytest.mark.parametrize("name", ON_THE_FLY)
def test_what_is_built_on_the_fly(name: str, captured: Any, node_values: Any, ids: Tensor) -> None:
    check(captured(ON_THE_FLY[name]), ids, node_values)


@pytest.mark.parametrize("name", TABLES)
def test_what_is_read_from_tables(name: str, captured: Any, node_values: Any, ids: Tensor) -> None:
    function, state = TABLES[name]
    check(captured(function, **state), ids, node_values)


@pytest.mark.parametrize("name", ["arange", "tril_ones", "triu_inf", "masked_fill", "one_minus", "indexed", "chunk"])
def test_masks_need_no_table(name: str, captured: Any) -> None:
    graph = captured(ON_THE_FLY[name])
    node = output_node(graph.graph)
    captures: list[Any] = []
    to_program(PullBack(graph).read(node, coordinates(shape_of(node))), captures)
    assert not captures
    assert graph.max_positions is None


def test_a_buffer_that_is_a_mask_is_read_by_name_and_ends_somewhere(captured: Any) -> None:
    function, state = TABLES["band"]
    graph = captured(function, **state)
    expr = PullBack(graph).read(output_node(graph.graph), (Var("q"), Var("k")))
    assert to_program(expr, []) == "where(and_(le(k, q), lt(sub(q, k), 7)), 1.0, 0.0)"
    assert graph.max_positions == N


# --------------------------------------------------------------------------- what must not be read


def running_documents(ids: Tensor) -> Tensor:
    document = (ids == 3).cumsum(1)
    return document[:, :, None] == document[:, None, :]


def rounded_to_half(ids: Tensor) -> Tensor:
    return places(ids).to(torch.int8)[None] * places(ids)[:, None]


OPAQUE: dict[str, Function] = {
    "from_the_end": lambda ids: distance(ids)[:, -1:].expand(-1, ids.shape[1]),
    "last": lambda ids: distance(ids)[:, -1][:, None] + 0 * distance(ids),
    "flipped": lambda ids: distance(ids).flip(1),
    "rolled": lambda ids: distance(ids).roll(1, 0),
    "length": lambda ids: distance(ids) / ids.shape[1],
    "length_in_a_tensor": lambda ids: distance(ids) * torch.full((), ids.shape[1]),
    "counted_from_the_end": lambda ids: torch.arange(1 - ids.shape[1], 1)[None] * places(ids)[:, None],
    "negative_lookup_in_what_grows": lambda ids: places(ids)[distance(ids)],
    "merged": lambda ids: distance(ids).reshape(-1).view(ids.shape[1], ids.shape[1]) + distance(ids).reshape(-1)[0],
    "small_integers": rounded_to_half,
    "active_dropout": lambda ids: F.dropout(distance(ids).float(), 0.5, training=True),
    "mixed_diagonal": lambda ids: torch.ones(ids.shape[1], ids.shape[1]).tril(ids.shape[1] // 2),
    "cumsum_of_positions": lambda ids: places(ids).cumsum(0)[None] * places(ids)[:, None],
}


@pytest.mark.parametrize("name", OPAQUE)
def test_what_depends_on_more_than_positions_is_opaque(name: str, captured: Any) -> None:
    graph = captured(OPAQUE[name])
    node = output_node(graph.graph)
    with pytest.raises(Opaque):
        PullBack(graph).read(node, coordinates(shape_of(node)))


def test_the_last_rows_of_a_table_are_counted_from_the_length(captured: Any) -> None:
    graph = captured(lambda ids: torch.arange(N)[None, N - ids.shape[1] :] + 0 * places(ids)[:, None])
    expr = PullBack(graph).read(output_node(graph.graph), (Var("q"), Var("k")))
    assert linear_form(expr) == {"k": 1, "T": -1, "": N}
    assert graph.max_positions == N


def test_a_running_count_of_tokens_stays_token_data(captured: Any, node_values: Any, ids: Tensor) -> None:
    """It once read as 0, because positions were looked at with all tokens 0: the document mask was lost."""
    expr = check(captured(running_documents), ids, node_values)
    assert {"i", "j"} <= variables(expr)


def test_a_bend_beyond_the_looked_at_positions_limits_them(captured: Any) -> None:
    """Without a rule the function is looked at as far as it goes, and the model is limited to what was seen."""
    graph = captured(lambda ids: torch.bucketize(places(ids), torch.arange(600))[None] + 0 * places(ids)[:, None])
    node = output_node(graph.graph)
    with pytest.raises(Opaque):
        PullBack(graph).read(node, (Var("q"), Var("k")))
    graph = captured(lambda ids: torch.bucketize(places(ids), torch.arange(100000))[None] + 0 * places(ids)[:, None])
    expr = PullBack(graph).read(output_node(graph.graph), (Var("q"), Var("k")))
    assert graph.max_positions is not None
    assert graph.max_positions < 100000
    assert "k" in variables(expr)


def test_gradients_stopped_in_a_score_are_not_read_through(captured: Any) -> None:
    def stopped(ids: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            bias = F.embedding(clipped(ids), w)
        return bias.permute(2, 0, 1)[None]

    graph = captured(stopped, w=nn.Parameter(torch.randn(11, HEADS)))
    node = output_node(graph.graph)
    with pytest.raises(Opaque, match="gradient"):
        PullBack(graph).read(node, coordinates(shape_of(node)))
    graph = captured(stopped, w=torch.randn(11, HEADS))  # of a buffer there is none
    node = output_node(graph.graph)
    PullBack(graph).read(node, coordinates(shape_of(node)))


# --------------------------------------------------------------------------- arguments by keyword, heads, real masks


def test_arguments_by_keyword_are_read(captured: Any, node_values: Any, ids: Tensor) -> None:
    aten = torch.ops.aten

    def by_keyword(ids: Tensor) -> Tensor:
        square = torch.ones(ids.shape[1], ids.shape[1])
        banded = aten.triu(aten.tril(square, diagonal=2), diagonal=-3)
        kept = aten.slice(torch.arange(ids.shape[1] + 2), dim=0, start=2)
        kept = aten.unsqueeze(kept, dim=1)
        return aten.clamp(aten.add(banded, kept, alpha=3), min=7.0)

    check(captured(by_keyword), ids, node_values)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 4, 9, 9), "0 h"),
        ((4, 9, 9), "h"),
        ((1, 2, 3, 9, 9), "0 floordiv(h, 3) remainder(h, 3)"),
        ((1, 1, 9, 9), "0 0"),
        ((2, 1, 2, 9, 9), "floordiv(h, 2) 0 remainder(h, 2)"),
    ],
)
def test_heads_are_digits_of_h(shape: tuple[int, ...], expected: str) -> None:
    *leading, q, k = score_coordinates(shape)
    assert (q, k) == (Var("q"), Var("k"))
    assert " ".join(to_program(e, []) for e in leading) == expected


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("llama", {}, "True"),
        ("mistral", {"sliding_window": 8}, "gt(k, sub(q, 8))"),
        ("llama4_text", {"attention_chunk_size": 8, "intermediate_size_mlp": 8}, None),
    ],
)
def test_masks_of_transformers(kind: str, options: dict[str, Any], expected: str | None, captured: Any) -> None:
    from transformers import CONFIG_MAPPING
    from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask
    from transformers.masking_utils import create_sliding_window_causal_mask as create_window_mask

    config = CONFIG_MAPPING[kind](**{**zoo._BASE, **options}, attn_implementation="eager")
    create = {"llama": create_causal_mask, "mistral": create_window_mask}.get(kind, create_chunked_causal_mask)

    def mask(ids: Tensor, w: Tensor) -> Tensor:
        embeds, positions = F.embedding(ids, w), torch.arange(ids.shape[1])[None]
        return create(
            config=config, inputs_embeds=embeds, attention_mask=None, past_key_values=None, position_ids=positions
        )

    graph = captured(mask, w=torch.randn(97, 32))
    node = output_node(graph.graph)
    expr = Op("add", (Var("s"), PullBack(graph).read(node, coordinates(shape_of(node)))))
    assert split_mask(simplify(expr, "future"))[0] == Const(False)
    visible, score = split_mask(simplify(expr, "past"))
    assert score == Var("s")
    rows, columns = torch.arange(40)[:, None], torch.arange(40)[None, :]
    seen = evaluate_program(to_program(visible, []), [], q=rows, k=columns)
    seen = torch.as_tensor(seen).expand(40, 40) & (columns <= rows)
    in_one = {"llama": columns <= rows, "mistral": rows - columns < 8}.get(kind, rows // 8 == columns // 8)
    assert torch.equal(seen, in_one & (columns <= rows))
    assert expected is None or to_program(visible, []) == expected
