"""What depends on the slot's index reads the logical position; what cannot stays, and is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppcompile.passes.base import output_node, run_node
from ppcompile.passes.rewrite_positions import rewrite_positions
from ppcompile.passes.types import Mixes, Tok

N, WIDTH = 64, 6


def places(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1])


SOURCES: dict[str, Callable[..., Tensor]] = {
    "arange": lambda ids, table: F.embedding(places(ids), table),
    "arange_plus_two": lambda ids, table: F.embedding(places(ids) + 2, table),
    "arange_from_two": lambda ids, table: F.embedding(torch.arange(2, ids.shape[1] + 2), table),
    "cumsum_of_mask": lambda ids, table: F.embedding(torch.ones_like(ids).cumsum(1) - 1, table),
    "cumsum_of_bool": lambda ids, table: F.embedding(torch.ones_like(ids, dtype=torch.bool).cumsum(-1), table),
    "scaled": lambda ids, table: F.embedding(places(ids) * 2, table),
    "table": lambda ids, table: table[: ids.shape[1]],
    "table_from_two": lambda ids, table: table[2 : ids.shape[1] + 2],
    "table_with_batch": lambda ids, table: table[None][:, : ids.shape[1]],
    "rotary": lambda ids, table: torch.outer(places(ids).float(), table[0]).cos(),
    "rotary_matmul": lambda ids, table: (table[0][None, :, None] @ places(ids).float()[None, None]).mT.sin(),
    "float_positions": lambda ids, table: torch.arange(ids.shape[1], dtype=torch.float32)[:, None] * table[1],
    "clipped": lambda ids, table: F.embedding(places(ids).clamp(max=7), table),
    "chunks": lambda ids, table: F.embedding(places(ids) // 4, table),
}


def final_value(graph: Any, ids: Tensor, positions: Tensor) -> Tensor:
    env: dict[Any, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            env[node] = {"input_ids": ids, "position_ids": positions}.get(node.name, graph.values.get(node.name))
        elif node.op == "call_function":
            env[node] = run_node(node, env)
    return env[output_node(graph.graph)]


@pytest.mark.parametrize("name", SOURCES)
def test_positions_take_the_place_of_indices(name: str, captured: Any, typed: Any) -> None:
    table = nn.Parameter(torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0)))
    graph = captured(SOURCES[name], table=table)
    result = rewrite_positions(graph)
    assert result.changed >= 1
    kind = typed(graph)
    assert isinstance(kind, Tok)
    ids, positions = torch.zeros(1, 9, dtype=torch.int64), torch.tensor([[0, 1, 2, 3, 4, 2, 3, 4, 5]])
    whole = SOURCES[name](torch.zeros(1, 12, dtype=torch.int64), table)
    found = final_value(graph, ids, positions)
    torch.testing.assert_close(found, whole.index_select(kind.axis, positions[0]))


@pytest.mark.parametrize(
    ("name", "limit"),
    [("arange", N), ("arange_plus_two", N - 2), ("table", N), ("table_from_two", N - 2), ("rotary", None)],
)
def test_tables_end_somewhere(name: str, limit: int | None, captured: Any) -> None:
    graph = captured(SOURCES[name], table=nn.Parameter(torch.randn(N, WIDTH)))
    rewrite_positions(graph)
    assert graph.max_positions == limit


def test_the_vocabulary_is_noted(captured: Any) -> None:
    graph = captured(lambda ids, table: F.embedding(ids, table), table=torch.randn(N, WIDTH))
    rewrite_positions(graph)
    assert graph.vocab_size == N


COUNTS: dict[str, Callable[..., Tensor]] = {
    "padding_is_skipped": lambda ids, table: F.embedding((ids != 3).int().cumsum(1).type_as(ids) * (ids != 3), table),
    "of_truth_values": lambda ids, table: F.embedding((ids == 3).cumsum(-1), table),
    "of_ids": lambda ids, table: F.embedding(ids.cumsum(1) % N, table),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_run_along_each_sequence(name: str, captured: Any, typed: Any) -> None:
    """A prompt of three tokens with responses of two and one, and a prompt of its own."""
    table = nn.Parameter(torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0)))
    graph = captured(COUNTS[name], table=table)
    assert rewrite_positions(graph).changed == 1
    assert typed(graph) == Tok(1)
    layout = {
        "input_ids": torch.tensor([[3, 5, 3, 3, 7, 3, 3, 2]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 3, 0, 1]]),
        "subtree_end": torch.tensor([6, 6, 6, 5, 5, 6, 8, 8]),
    }
    (found,) = graph.module(
        *(graph.values.get(n.name, layout.get(n.name)) for n in graph.graph.find_nodes(op="placeholder"))
    )
    for slots in ([0, 1, 2, 3, 4], [0, 1, 2, 5], [6, 7]):
        torch.testing.assert_close(found[:, slots], COUNTS[name](layout["input_ids"][:, slots], table))


STAY: dict[str, Callable[..., Tensor]] = {
    "from_the_end": lambda ids, table: F.embedding(places(ids).flip(0), table),
    "length": lambda ids, table: F.embedding(places(ids), table) / ids.shape[1],
    "length_minus_index": lambda ids, table: (ids.shape[1] - places(ids))[:, None] * table[0],
    "last_rows": lambda ids, table: table[-ids.shape[1] :],
    "every_second_row": lambda ids, table: table[: 2 * ids.shape[1] : 2],
    "rolled": lambda ids, table: F.embedding(places(ids).roll(1), table),
    "random": lambda ids, table: F.embedding(torch.randperm(ids.shape[1]), table),
    "sum_of_embeddings": lambda ids, table: F.embedding(ids, table).cumsum(1),
    "count_in_floats": lambda ids, table: (ids != 3).cumsum(1, dtype=torch.float32)[..., None] * table[0],
    "largest_so_far": lambda ids, table: F.embedding(ids.cummax(1)[0], table),
}


@pytest.mark.parametrize("name", STAY)
def test_what_is_no_function_of_position_has_no_type(name: str, captured: Any, typed: Any) -> None:
    graph = captured(STAY[name], table=nn.Parameter(torch.randn(N, WIDTH)))
    rewrite_positions(graph)
    assert isinstance(typed(graph), Mixes)
