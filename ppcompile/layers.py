"""What runs a packed graph: each layer with its own state, gathered, recomputed or compiled by itself.

In the graph a :class:`PackedLayer` stands for one call of a layer of the user's model. It reads the layer's parameters
and buffers when it runs and not before: in between they may be sharded over ranks, moved, or trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from .passes.base import PackGraph, input_nodes
from .shard_hooks import run_sharded
from .sharding import Sharding, is_sharded

__all__ = ["CHECKPOINT", "COMPILE", "PackedLayer", "Runner"]

CHECKPOINT = (None, "layer")
COMPILE = (False, True, "layer")

Program = Callable[..., tuple[Any, ...]]
_FLAG = "gradient_checkpointing"


class _State:
    """Parameters and buffers of a model by qualified name."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._places = [(model.get_submodule(owner), leaf) for owner, _, leaf in (n.rpartition(".") for n in names)]

    def read(self) -> list[Tensor]:
        """The tensors as they are now, in order.

        Raises:
            ValueError: one is in pieces on several ranks, and nothing gathered it.
        """
        tensors = [getattr(owner, leaf) for owner, leaf in self._places]
        for name, tensor in zip(self._names, tensors, strict=True):
            if is_sharded(tensor):
                raise ValueError(_not_gathered(name))
        return tensors


class PackedLayer(nn.Module):
    """One call of one layer.

    Attributes:
        sharded: modules of the layer that ``fully_shard`` was applied to, outermost first. A tuple is not registered:
            the modules stay the user's.
    """

    def __init__(self, program: Program, state: _State) -> None:
        super().__init__()
        self._program, self._state = program, state
        self.sharded: tuple[nn.Module, ...] = ()

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """What leaves the layer, of what enters it."""
        return run_sharded(self.sharded, self._run, inputs) if self.sharded else self._run(*inputs)

    def _run(self, *inputs: Any) -> tuple[Any, ...]:
        return self._program(*inputs, *self._state.read())


class Runner:
    """Runs a packed graph on the state of the user's model.

    Args:
        graph: the graph after the last pass; its layers are put in place.
        model: the user's model.
        checkpoint, compile: see :func:`ppcompile.wrap`.

    Raises:
        ValueError: options that this graph has no layers for.
    """

    def __init__(
        self,
        graph: PackGraph,
        model: nn.Module,
        *,
        checkpoint: str | None,
        compile: bool | str,  # noqa: A002 - torch's word
    ) -> None:
        for option, value in (("checkpoint", checkpoint), ("compile", compile)):
            if value == "layer" and not graph.layers:
                raise ValueError(
                    f"{option}='layer' needs a list of layers, and no attention of this model is in a list"
                )
        self.graph, self._whole = graph, compile is True
        self.layers: dict[str, PackedLayer] = {}
        programs: dict[tuple[fx.GraphModule, Any], Program] = {}
        for target, layer in graph.layers.items():
            recompute = _checkpointing(model, layer.path, wanted=checkpoint == "layer")
            kind = layer.body, recompute
            if kind not in programs:
                program = partial(_recomputed, recompute, layer.body) if recompute else layer.body
                programs[kind] = _compiled(program) if compile == "layer" else program
            self.layers[target] = PackedLayer(programs[kind], _State(model, layer.state))
            graph.module.add_module(target, self.layers[target])
        self._state = _State(model, [graph.state[n.name] for n in input_nodes(graph.graph) if n.name in graph.state])
        self._program = _compiled(graph.module) if self._whole else graph.module

    def __call__(self, layout: Mapping[str, Tensor], sharding: Sharding) -> Tensor:
        """Log-probabilities of the unique scored slots, ``[U]``.

        Args:
            layout: the graph's inputs that are neither state nor constants, by name.
            sharding: of the model, as it is now.
        """
        if sharding and self._whole:
            raise ValueError(
                "compile=True makes one artifact of the whole model, and fully_shard works between its layers; "
                "use ppcompile.wrap(model, compile='layer')"
            )
        for target, layer in self.layers.items():
            layer.sharded = tuple(sharding.inside(self.graph.layers[target].path))
        outside = sharding.outside([layer.path for layer in self.graph.layers.values()])
        (unique,) = run_sharded(outside, lambda: self._program(*self._inputs(layout)), ())
        result: Tensor = unique
        return result

    def _inputs(self, layout: Mapping[str, Tensor]) -> list[Tensor]:
        state, known = iter(self._state.read()), {**layout, **self.graph.constants}
        names = (node.name for node in input_nodes(self.graph.graph))
        return [next(state) if name in self.graph.state else known[name] for name in names]


def _recomputed(recompute: Callable[..., Any], program: Program, *inputs: Any) -> tuple[Any, ...]:
    """``program(*inputs)``, of which the backward keeps the inputs and computes the rest again."""
    if not torch.is_grad_enabled():
        return program(*inputs)
    # Whatever the model's own setting says: the reentrant kind is torch's older one, and fails where gradients are
    # taken with torch.autograd.grad.
    outputs: tuple[Any, ...] = recompute(program, *inputs, use_reentrant=False)
    return outputs


def _compiled(program: Program) -> Program:
    compiled: Program = torch.compile(program, dynamic=True, fullgraph=True)
    return compiled


def _checkpointing(model: nn.Module, path: str, *, wanted: bool) -> Callable[..., Any] | None:
    """What recomputes a layer: torch's checkpoint, or the model's own if it is switched on; nothing otherwise.

    Models of transformers have a flag on each layer, or, in older code, on a module around the layers.
    """
    layer = model.get_submodule(path)
    parents = [model.get_submodule(".".join(path.split(".")[:n])) for n in range(path.count(".") + 1)]
    around: Iterator[Any] = (module for module in (layer, *reversed(parents)) if hasattr(module, _FLAG))
    flagged = next(around, None)
    if layer.training and flagged is not None and getattr(flagged, _FLAG) is True:
        own: Callable[..., Any] = getattr(flagged, "_gradient_checkpointing_func", checkpoint)
        return own
    return checkpoint if wanted else None


def _not_gathered(name: str) -> str:
    return (
        f"the parameter {name!r} is sharded where the packed graph reads it; accepted: parameters of layers in the "
        "shards of their layers, all others in those of the model or of modules outside its layers. If a layer's "
        "parameter is used outside the layer as well, apply fully_shard to a module around both"
    )
