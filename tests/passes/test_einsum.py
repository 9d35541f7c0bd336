"""An equation written out is the same sum, with the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppcompile.passes.base import op_family
from ppcompile.passes.types import Mixes, Tok

# Equations of x [1, T, 2, 3] (b t h d) and of y, which is w [3, 4], u [2, 3, 4] or another x.
EQUATIONS: dict[str, tuple[str, str, int]] = {
    "permutes": ("bthd->dhbt", "", 3),
    "sums": ("bthd->bt", "", 1),
    "sums_without_arrow": ("bthd", "", 3),
    "applies_a_matrix": ("bthd,de->bthe", "w", 1),
    "applies_a_matrix_from_the_left": ("de,bthd->bhte", "w", 2),
    "applies_a_matrix_per_head": ("bthd,hde->bthe", "u", 1),
    "contracts_heads": ("bthd,hde->bte", "u", 1),
    "contracts_to_a_vector": ("bthd,d->bth", "v", 1),
    "adds_up_what_one_has_alone": ("bthd,hde->bthd", "u", 1),
    "outer": ("bthd,e->bthde", "v", 1),
    "outer_without_arrow": ("...h,e", "v", 1),
    "ellipsis": ("...d,de->...e", "w", 1),
    "ellipsis_of_both": ("...hd,...hd->...h", "x", 1),
    "within_each_token": ("bthd,bthe->btde", "x", 1),
    "three": ("bthd,btgd,btge->bthe", "three", 1),
    "three_in_a_row": ("bthd,btgd,btge->beth", "three", 2),
    "letters_r_and_c": ("brcd,cde->brc", "u", 1),
}
MIXES = {
    "scores": ("bqhd,bkhd->bhqk", "x"),
    "over_tokens": ("bthd,btge->bhdge", "x"),
    "sum_of_tokens": ("bthd->bhd", ""),
    "sum_of_the_others_tokens": ("bqhd,bkhd->bqhd", "x"),
    "diagonal": ("bthh->bth", "square"),
}


def operands(kind: str, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    w, u, v = state
    others = {"": (), "w": (w,), "u": (u,), "v": (v,), "x": (x * 2,), "three": (x * 2, x * 3)}
    return (x[..., :2],) if kind == "square" else (x, *others[kind])


def function(equation: str, kind: str) -> Any:
    def f(ids: Tensor, words: Tensor, *state: Tensor) -> Tensor:
        x = F.embedding(ids, words).unflatten(-1, (2, 3))
        given = operands(kind, x, state)
        return torch.einsum(equation, *(reversed(given) if equation.startswith("de") else given))

    return f


@pytest.fixture
def state() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"words": (11, 6), "w": (3, 4), "u": (2, 3, 4), "v": (3,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", EQUATIONS)
def test_written_out(name: str, captured: Any, typed: Any, state: dict[str, nn.Parameter], ids: Tensor) -> None:
    equation, kind, axis = EQUATIONS[name]
    graph = captured(function(equation, kind), **state)
    assert all(op_family(node) != "einsum" for node in graph.graph.nodes if node.op == "call_function")
    assert typed(graph) == Tok(axis)
    inputs = [graph.values.get(node.name, ids) for node in graph.graph.find_nodes(op="placeholder")]
    (ours,) = graph.module(*inputs)
    theirs = function(equation, kind)(ids, *state.values())
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad(ours, list(state.values()), cotangent, allow_unused=True),
        torch.autograd.grad(theirs, list(state.values()), cotangent, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_tokens_is_found(name: str, captured: Any, typed: Any, state: Any, ids: Tensor) -> None:
    equation, kind = MIXES[name]
    graph = captured(function(equation, kind), **state)
    assert isinstance(typed(graph), Mixes)
    inputs = [graph.values.get(node.name, ids) for node in graph.graph.find_nodes(op="placeholder")]
    torch.testing.assert_close(graph.module(*inputs)[0], function(equation, kind)(ids, *state.values()))
