"""Tools of this folder, as fixtures: capture a small module, type one of its nodes, read its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ppcompile.capture import capture
from ppcompile.passes.base import PackGraph, output_node, run_node
from ppcompile.passes.canonicalize import canonicalize
from ppcompile.passes.infer import infer, input_types
from ppcompile.passes.types import Mixes, TokenType


class Lambda(nn.Module):
    """A function of token ids and of the tensors it is given as buffers and parameters."""

    def __init__(self, function: Callable[..., Tensor], **state: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in state.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)
        self.names = tuple(state)

    def forward(self, ids: Tensor) -> Tensor:
        return self.function(ids, *(getattr(self, name) for name in self.names))


def captured_graph(function: Callable[..., Tensor] | nn.Module, **state: Tensor) -> PackGraph:
    module = function if isinstance(function, nn.Module) else Lambda(function, **state)
    graph = capture(module)
    canonicalize(graph)
    return graph


def values_of(graph: PackGraph, ids: Tensor) -> dict[fx.Node, Any]:
    """Every node's value for one unpacked sequence."""
    env: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            env[node] = graph.values.get(node.name, ids)
        elif node.op == "call_function":
            env[node] = run_node(node, env)
    return env


@pytest.fixture
def captured() -> Callable[..., PackGraph]:
    """``captured(f, **state)``: the canonical graph of ``f(ids, *state)``."""
    return captured_graph


@pytest.fixture
def evaluated() -> Callable[[PackGraph, Tensor], Tensor]:
    """``evaluated(graph, ids)``: what the graph computes for one unpacked sequence."""
    return lambda graph, ids: values_of(graph, ids)[output_node(graph.graph)]


@pytest.fixture
def node_values() -> Callable[[PackGraph, Tensor], dict[fx.Node, Any]]:
    """``node_values(graph, ids)``: the value of each node for one unpacked sequence."""
    return values_of


def final_type(graph: PackGraph) -> TokenType | Mixes:
    """Type of the graph's output, or the first reason why it has none."""
    types: dict[fx.Node, Any] = dict(input_types(graph))
    for node in graph.graph.nodes:
        if node.op == "call_function":
            types[node] = kind = infer(graph, node, types)
            if isinstance(kind, Mixes):
                return kind
    return types[output_node(graph.graph)]


@pytest.fixture
def typed() -> Callable[[PackGraph], TokenType | Mixes]:
    """``typed(graph)``: type of the output, or the first :class:`Mixes`."""
    return final_type


@pytest.fixture
def without_unsharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pass refuses stays refused: no module is taken out of the graph instead."""
    monkeypatch.setattr("ppcompile.pipeline.widened", lambda *_: None)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 11, (1, 23), generator=torch.Generator().manual_seed(0))
