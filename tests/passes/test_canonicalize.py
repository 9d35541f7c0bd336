"""canonicalize changes no number and no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import ppcompile
from ppcompile.capture import capture
from ppcompile.passes.base import NotPackable, is_op, op_family
from ppcompile.passes.canonicalize import canonicalize
from ppcompile.verification import unpacked_logps

aten = torch.ops.aten


def families(graph: Any) -> set[str]:
    return {op_family(node) for node in graph.graph.nodes if node.op == "call_function"}


@pytest.fixture
def words() -> nn.Parameter:
    return nn.Parameter(torch.randn(11, 6, generator=torch.Generator().manual_seed(0)))


# --------------------------------------------------------------------------- regions


class PartlyFrozen(nn.Module):
    """A parameter used with and without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(zoo.VOCABULARY, 16), nn.Linear(16, zoo.VOCABULARY)
        self.gate = nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        with torch.no_grad():
            gate = self.gate(x).sigmoid()
        return self.head(x * gate + self.gate(x))


def test_no_grad_regions_keep_the_gradients_of_eager() -> None:
    model = zoo.sharpen(PartlyFrozen())
    packed = ppcompile.wrap(model)
    batch = ppcompile.pack([ppcompile.Group([5, 6, 7], [[8, 9], [10]])])
    found, expected = packed(batch).token_logps, unpacked_logps(model, batch)
    torch.testing.assert_close(found, expected)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(found.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert "detach" in families(packed.compiled().graph)


def test_what_passes_through_a_region_keeps_its_gradient(captured: Any, words: Tensor) -> None:
    def twice(ids: Tensor, w: Tensor) -> Tensor:
        x = F.embedding(ids, w)
        with torch.no_grad():
            frozen = x * 2
        return frozen + x

    graph = captured(twice, words=words)
    detached = [node for node in graph.graph.nodes if is_op(node, "aten.detach")]
    assert len(detached) == 1
    assert is_op(detached[0].args[0], "aten.mul")


def test_gradients_switched_on_inside_no_grad_stay_on(captured: Any, words: Tensor) -> None:
    def nested(ids: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = F.embedding(ids, w) * 2
            with torch.enable_grad():
                learned = F.embedding(ids, w) * 3
        return frozen + learned

    graph = captured(nested, words=words)
    detached = [node.args[0] for node in graph.graph.nodes if is_op(node, "aten.detach")]
    assert [node.args[1] for node in detached] == [2]


def test_autocast_that_is_off_is_inlined_and_on_is_refused(captured: Any, words: Tensor) -> None:
    def region(enabled: bool) -> Any:
        def f(ids: Tensor, w: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=enabled):
                return F.embedding(ids, w) @ w.T

        return f

    assert "matmul" in families(captured(region(False), words=words))
    with pytest.raises(NotPackable, match="autocast"):
        captured(region(True), words=words)


# --------------------------------------------------------------------------- ops that do nothing


NOTHING: dict[str, Any] = {
    "to": lambda x: x.to(torch.float32),
    "type_as": lambda x: x.type_as(x * 1.0),
    "slice": lambda x: x[:, :],
    "slice_by_keyword": lambda x: aten.slice(x, dim=2, start=0, end=6),
    "slice_to_length": lambda x: x[:, : x.shape[1]],
    "expand": lambda x: x.expand(1, -1, -1),
    "view": lambda x: x.view(1, -1, 6),
    "dropout_off": lambda x: F.dropout(x, 0.5, training=False),
    "dropout_none": lambda x: F.dropout(x, 0.0, training=True),
    "feature_dropout_off": lambda x: F.dropout1d(x, 0.5, training=False),
    "alias": lambda x: aten.alias(x),
    "add": lambda x: x + 0,
}
SOMETHING: dict[str, Any] = {
    "to": lambda x: x.to(torch.float64),
    "view_as_dtype": lambda x: x.view(torch.int32),
    "slice": lambda x: x[..., 1:],
    "slice_step": lambda x: x[..., ::2],
    "slice_from_the_end": lambda x: x[..., -6:] * 1.5,
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "add_tensor": lambda x: x + torch.zeros(()),
    "add_promotes": lambda x: (x > 0) + 0,
    "add_alpha": lambda x: torch.add(x, 1, alpha=2),
}


@pytest.mark.parametrize("name", NOTHING)
def test_ops_that_do_nothing_are_dropped(name: str, captured: Any, words: Tensor) -> None:
    graph = captured(lambda ids, w: NOTHING[name](F.embedding(ids, w)), words=words)
    assert families(graph) - {"sym_size", "mul"} == {"embedding"}


@pytest.mark.parametrize("name", SOMETHING)
def test_ops_that_do_something_stay(name: str, captured: Any, evaluated: Any, words: Tensor, ids: Tensor) -> None:
    graph = captured(lambda ids, w: SOMETHING[name](F.embedding(ids, w)), words=words)
    assert families(graph) - {"sym_size"} != {"embedding"}
    if name != "dropout":
        torch.testing.assert_close(evaluated(graph, ids), SOMETHING[name](F.embedding(ids, words)))


def test_numbers_stay_bit_for_bit(evaluated: Any) -> None:
    model, ids = zoo._transformers("llama", num_hidden_layers=1)(), torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    graph = capture(model)
    result = canonicalize(graph)
    assert result.changed > 0
    assert torch.equal(evaluated(graph, ids), model(ids).logits)
