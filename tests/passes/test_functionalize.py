"""functionalize changes no number and no gradient, and leaves alone what it cannot follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppcompile.passes.base import is_mutable
from ppcompile.passes.types import Mixes, Tok


@pytest.fixture
def words() -> nn.Parameter:
    return nn.Parameter(torch.randn(11, 6, generator=torch.Generator().manual_seed(0)))


def read_afterwards(x: Tensor) -> Tensor:
    y = x * 2
    view = y.unsqueeze(1)
    before = view * 3
    y.add_(1)
    return view.squeeze(1) + y + before.squeeze(1)


def in_pieces(x: Tensor) -> Tensor:
    buffer = x.new_empty(*x.shape[:-1], 8)
    buffer[..., :6].copy_(x)
    buffer[..., 6:].copy_(x[..., :2])
    return buffer[..., 1:7]


def view_of_a_view(x: Tensor) -> Tensor:
    y = x * 2
    turned = y.transpose(1, 2)
    turned[:, 2:4].mul_(3)
    turned[:, 0] = 1.5
    return y + turned.transpose(1, 2)


def through_a_permuted_view(x: Tensor) -> Tensor:
    y = (x * 2).unflatten(-1, (2, 3)).clone()
    y.permute(2, 0, 3, 1).add_(x[..., :3].transpose(1, 2)[None])
    return y.flatten(2)


def some_words_replaced(x: Tensor) -> Tensor:
    y = x * 2
    y[y > 1] = 0.25
    return y + 1


def written_with_another_dtype(x: Tensor) -> Tensor:
    y = torch.zeros_like(x, dtype=torch.float64)
    y.copy_(x[..., :1])
    y[..., 0] = x[..., 1]
    return (y + x.half().mul(2).add_(x)).float()


def the_source_changes_later(x: Tensor) -> Tensor:
    source, y = x * 1, x * 2
    y.copy_(source)
    source.add_(1)
    return y - source * 3


def what_an_in_place_op_returns(x: Tensor) -> Tensor:
    y = x * 2
    z = y.mul_(3)
    y.add_(1)
    return z + y


def into_what_may_be_a_copy(x: Tensor) -> Tensor:
    y = (x * 2).contiguous().type_as(x)
    first = y[..., 0].clone()
    y[..., 1:] += first[..., None]
    return y * 3


IN_PLACE: dict[str, Any] = {
    "activation": lambda x: (x * 2).relu_().mul(3).sigmoid_(),
    "arithmetic": lambda x: (x * 2).add_(x, alpha=3).mul_(2.0).sub_(x).div_(4),
    "mask": lambda x: (x + 1).masked_fill_(x > 0, 0.0).clamp_(max=3.0),
    "operators": lambda x: x * (x > 0).__ior__(x < -1).__iand__(x < 2),
    "dropout": lambda x: F.dropout(x * 2, 0.0, inplace=True),
    "fill": lambda x: x + torch.zeros_like(x).fill_(2.0),
    "detach": lambda x: x + (x * 2).detach_(),
    "read_afterwards": read_afterwards,
    "in_pieces": in_pieces,
    "view_of_a_view": view_of_a_view,
    "through_a_permuted_view": through_a_permuted_view,
    "some_words_replaced": some_words_replaced,
    "written_with_another_dtype": written_with_another_dtype,
    "the_source_changes_later": the_source_changes_later,
    "what_an_in_place_op_returns": what_an_in_place_op_returns,
    "into_what_may_be_a_copy": into_what_may_be_a_copy,
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_ops_become_functional(name: str, captured: Any, node_values: Any, typed: Any, ids: Tensor) -> None:
    words = torch.randn(11, 6, generator=torch.Generator().manual_seed(0))
    graph = captured(lambda ids, w: IN_PLACE[name](F.embedding(ids, w)), words=words)
    assert not any(is_mutable(node) for node in graph.graph.nodes)
    assert typed(graph) == Tok(1)

    found, expected = nn.Parameter(words.clone()), nn.Parameter(words.clone())
    inputs = [
        found if node.name.endswith("words") else graph.values.get(node.name, ids)
        for node in graph.graph.find_nodes(op="placeholder")
    ]
    (ours,) = graph.module(*inputs)
    theirs = IN_PLACE[name](F.embedding(ids, expected))
    assert torch.equal(ours, theirs)
    cotangent = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad(y, w, cotangent)[0] for y, w in ((ours, found), (theirs, expected))]
    torch.testing.assert_close(*gradients)


def through_einsum(x: Tensor) -> Tensor:
    y = x * 2
    turned = torch.einsum("btc->bct", y)
    y.add_(1)
    return turned.transpose(1, 2) + y


def through_what_may_be_a_copy(x: Tensor) -> Tensor:
    y = x * 2
    rows = y.reshape(-1, 6)
    y.add_(1)
    y.mul_(2)
    return rows + y[0]


def into_what_may_be_read_as_another(x: Tensor) -> Tensor:
    y = x * 2
    z = y[..., 1:]
    rows = y.contiguous().type_as(x)
    rows[..., 2:] += 1
    return rows[..., :5] + z


def into_what_may_be_two(x: Tensor) -> Tensor:
    y = x * 2
    one, other = y.reshape(-1, 6), y.reshape(-1, 6)
    one.add_(1)
    return one + other


def over_what_may_be_written(x: Tensor) -> Tensor:
    y = x * 2
    rows = y.reshape(-1, 6)
    rows.add_(1)
    y.mul_(2)
    return rows


def through_a_detached_view(x: Tensor) -> Tensor:
    y = x * 2
    y.detach()[..., 0].add_(1)
    return y


NOT_FOLLOWED = [
    through_einsum,
    through_what_may_be_a_copy,
    into_what_may_be_read_as_another,
    into_what_may_be_two,
    over_what_may_be_written,
    through_a_detached_view,
]


@pytest.mark.parametrize("function", NOT_FOLLOWED)
def test_what_cannot_be_followed_keeps_its_meaning_and_is_refused(
    function: Any, captured: Any, typed: Any, evaluated: Any, words: Tensor, ids: Tensor
) -> None:
    graph = captured(lambda ids, w: function(F.embedding(ids, w)), words=words)
    assert any(is_mutable(node) for node in graph.graph.nodes)
    torch.testing.assert_close(evaluated(graph, ids), function(F.embedding(ids, words)))
    assert isinstance(typed(graph), Mixes)


def test_writes_over_tokens_mix_them(captured: Any, typed: Any, words: Tensor) -> None:
    def shifted(ids: Tensor, w: Tensor) -> Tensor:
        x = F.embedding(ids, w)
        y = torch.zeros_like(x)
        y[:, 1:] = x[:, :-1]
        return y

    def first(ids: Tensor, w: Tensor) -> Tensor:
        x = F.embedding(ids, w) * 1
        x[:, 0] = 0.0
        return x

    for function in (shifted, first):
        assert isinstance(typed(captured(function, words=words)), Mixes)
