"""Regions: a module's part of the graph, and the numerical proof that it maps each token by itself.

Expert layers sort tokens by expert, multiply in groups, and put the tokens back. No op in between is token-wise, the
whole is. The proof runs the region on random tokens: permuting the tokens must permute the result, leaving tokens out
must leave the others' results as they were, also where all tokens choose the same expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .base import PackGraph, call_node, is_mutable, is_op, is_size, may_alias, operands
from .dispatch import foreign_op
from .types import Const, Tok, TokenType

__all__ = ["Region", "enclosing_regions", "prove_token_wise"]

_TOKENS = (7, 64, 300)
_SCALES = ((1.0,), (30.0, 10.0, 3.0))
"""How large tokens are drawn: as they are, and the largest of these at which the module's results are finite."""
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


Run = Callable[[dict[fx.Node, Tensor], int, "list[Tensor] | None"], "tuple[list[Tensor], list[Tensor]]"]


@dataclass
class Region:
    """The nodes of one call of one module.

    Attributes:
        path: the module.
        nodes: in graph order.
        token_inputs: outside nodes with an axis of tokens, and that axis.
        other_inputs: outside nodes without one (weights, sizes).
        outputs: nodes that are read outside, and their token axis.
    """

    path: str
    nodes: list[fx.Node]
    token_inputs: dict[fx.Node, int]
    other_inputs: list[fx.Node]
    outputs: dict[fx.Node, int]

    @property
    def members(self) -> set[fx.Node]:
        """The nodes as a set."""
        return set(self.nodes)

    def types(self) -> dict[fx.Node, TokenType]:
        """Types of the outputs, once the region is proved token-wise."""
        return {node: Tok(axis) for node, axis in self.outputs.items()}

    def __str__(self) -> str:
        return f"{self.path}: {len(self.nodes)} ops proved token-wise as a whole, on random tokens"


def enclosing_regions(graph: PackGraph, node: fx.Node, types: dict[fx.Node, TokenType]) -> Iterator[Region]:
    """Regions around ``node``, innermost module first, that could be token-wise."""
    stack = node.meta.get("nn_module_stack") or {}
    for key, (path, _) in reversed(list(stack.items())):
        if path:
            members = [n for n in graph.graph.nodes if key in (n.meta.get("nn_module_stack") or {})]
            region = _region(graph, path, members, types)
            if region is not None:
                yield region


def _region(graph: PackGraph, path: str, nodes: list[fx.Node], types: dict[fx.Node, TokenType]) -> Region | None:
    nodes = [n for n in nodes if n.op == "call_function" and not _is_known_size(graph, n)]
    members = set(nodes)
    if any(is_op(n, "ppcompile.prefix_attention") or _overwrites_outside(n, members) for n in nodes):
        return None
    read_outside = [n for n in nodes if any(user not in members for user in n.users)]
    outputs = {n: graph.token_axes(n) for n in read_outside}
    token_inputs: dict[fx.Node, int] = {}
    other_inputs: list[fx.Node] = []
    before: set[fx.Node] = set()
    sources = list(dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in members))
    while sources:
        source = sources.pop(0)
        kind = types.get(source)
        if isinstance(kind, Tok) and source.meta["val"].is_floating_point():
            token_inputs[source] = kind.axis
        elif _is_known_size(graph, source) or (kind == Const() and source.op == "placeholder"):
            other_inputs.append(source)
        elif kind is not None and source.op == "call_function":
            # Which expert a token goes to is no number to draw: what chooses it belongs to the region.
            before.add(source)
            known = {*before, *token_inputs, *other_inputs, *sources}
            sources += [n for n in dict.fromkeys(source.all_input_nodes) if n not in known]
        else:
            return None
    if not token_inputs or any(len(axes) != 1 for axes in outputs.values()):
        return None
    nodes = [n for n in graph.graph.nodes if n in before] + nodes if before else nodes
    return Region(path, nodes, token_inputs, other_inputs, {n: axes[0] for n, axes in outputs.items()})


def _is_known_size(graph: PackGraph, node: fx.Node) -> bool:
    """True for a number that follows from the number of tokens alone, not from what they are."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return bool(value.node.expr.free_symbols <= {graph.length, graph.scored})
    return is_size(node)


def _overwrites_outside(node: fx.Node, members: set[fx.Node]) -> bool:
    """True if ``node`` works in place on memory that the region did not make."""
    if not is_mutable(node):
        return False
    written: Any = operands(node)[0]
    while isinstance(written, fx.Node) and written in members and may_alias(written):
        written = operands(written)[0]
    return written not in members


def prove_token_wise(graph: PackGraph, region: Region) -> str | None:
    """None if the region treats each token by itself, otherwise what was found."""
    if (stranger := foreign_op(graph, region.nodes)) is not None:
        return f"{region.path} is no expert dispatch either: {stranger}"
    if any(v.device.type == "meta" for n in region.other_inputs if (v := graph.values.get(n.name)) is not None):
        return None if _is_registered_dispatch(region) else "the weights are on the meta device, so nothing can be run"
    # Weights at random too: a gate that starts at zero would hide what training will let through.
    for weights in (_present_weights(graph, region), _random_weights(graph, region)):
        run = _runner(graph, region, weights)
        for seed, (count, scales) in enumerate(itertools.product(_TOKENS, _SCALES)):
            for alike in (False, True):
                tokens = _finite_tokens(run, (_random_tokens(region, count, seed, alike, s) for s in scales), count)
                finding = _compare(region, run, tokens, count, seed)
                if finding is not None:
                    return finding
    return None


def _present_weights(graph: PackGraph, region: Region) -> dict[fx.Node, Tensor]:
    return {n: graph.values[n.name].detach() for n in region.other_inputs if not is_size(n)}


def _random_weights(graph: PackGraph, region: Region) -> dict[fx.Node, Tensor]:
    """Normal parameters that keep activations near one; buffers and constants as they are."""
    weights = _present_weights(graph, region)
    for seed, node in enumerate(weights):
        if node.name in graph.parameters and weights[node].is_floating_point():
            value = weights[node]
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(value.shape, generator=generator) / max(1.0, value.shape[-1]) ** 0.5
            weights[node] = drawn.to(value.device, value.dtype)
    return weights


def _is_registered_dispatch(region: Region) -> bool:
    """Without weights only the known expert ops are taken at their word; wrapping real weights proves them."""
    return any("grouped_mm" in str(node.target) for node in region.nodes)


def _finite_tokens(run: Run, drawn: Iterator[dict[fx.Node, Tensor]], count: int) -> dict[fx.Node, Tensor]:
    """The first tokens on which the module's results are finite: a router may divide by what has come to nothing."""
    for tokens in drawn:
        results, _ = run(tokens, count, None)
        if all(t.isfinite().all() for t in results):
            break
    return tokens


def _random_tokens(region: Region, count: int, seed: int, alike: bool, scale: float) -> dict[fx.Node, Tensor]:
    """Normal inputs of ``count`` tokens; ``alike`` makes all tokens nearly equal, so that they crowd one expert."""
    inputs = {}
    for node, axis in region.token_inputs.items():
        value = node.meta["val"]
        generator = torch.Generator().manual_seed(1000 * seed + axis)
        shape = [count if n == axis else int(size) for n, size in enumerate(value.shape)]
        tokens = torch.randn(shape, generator=generator)
        if alike:
            tokens = tokens.select(axis, 0).unsqueeze(axis) + 1e-2 * tokens
        inputs[node] = (scale * tokens).to(value.dtype)
    return inputs


def _runner(graph: PackGraph, region: Region, weights: dict[fx.Node, Tensor]) -> Run:
    """A function of tokens, their count and cotangents: the region's outputs, and gradients of tokens and weights."""
    device = next((v.device for v in weights.values()), torch.device("cpu"))
    sizes = {n: n.meta["val"] for n in region.other_inputs if is_size(n)}

    def run(
        tokens: dict[fx.Node, Tensor], count: int, cotangents: list[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        leaves = {n: t.detach().to(device) for n, t in (*tokens.items(), *weights.items())}
        leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in leaves.items()}
        env: dict[fx.Node, Any] = {n: t.clone() if n in tokens else t for n, t in leaves.items()}
        env |= {n: graph.size_at(value, count) for n, value in sizes.items()}
        with torch.enable_grad():
            for node in region.nodes:
                env[node] = call_node(node, env)
        outputs = [env[n] for n in region.outputs]
        wanted = [t for t in leaves.values() if t.requires_grad]
        differentiable = [n for n, t in enumerate(outputs) if t.requires_grad]
        gradients: list[Tensor] = []
        if differentiable and cotangents is not None:
            over, of = [cotangents[n] for n in differentiable], [outputs[n] for n in differentiable]
            found: Sequence[Tensor | None] = torch.autograd.grad(of, wanted, over, allow_unused=True)
            gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
        return [t.detach() for t in outputs], gradients

    return run


def _compare(region: Region, run: Run, inputs: dict[fx.Node, Tensor], count: int, seed: int) -> str | None:
    """Permute the tokens, and leave some out: values and gradients of the others must not notice."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    whole, _ = run(inputs, count, None)
    for what, kept in (("permuted", order), ("left out", order[: max(2, count // 2)].sort().values)):
        part_of = {n: t.index_select(region.token_inputs[n], kept) for n, t in inputs.items()}
        cotangents = [_cotangent(t, axis, kept, seed) for t, axis in zip(whole, region.outputs.values(), strict=True)]
        kept = kept.to(whole[0].device)
        chosen = [c.index_select(axis, kept) for c, axis in zip(cotangents, region.outputs.values(), strict=True)]
        _, of_whole = run(inputs, count, cotangents)
        part, of_part = run(part_of, len(kept), chosen)
        values = zip(region.outputs.values(), whole, part, strict=True)
        if not all(_same(all_of_it.index_select(axis, kept), some) for axis, all_of_it, some in values):
            return f"{region.path} as a whole is not token-wise either: its result changes when tokens are {what}"
        axes = [axis for n, axis in region.token_inputs.items()]
        expected = [g.index_select(axis, kept) for g, axis in zip(of_whole, axes, strict=False)] + of_whole[len(axes) :]
        if not all(_same(a, b, loose=True) for a, b in zip(expected, of_part, strict=True)):
            return f"{region.path} as a whole is not token-wise either: its gradient changes when tokens are {what}"
    return None


def _cotangent(output: Tensor, axis: int, kept: Tensor, seed: int) -> Tensor:
    """Random on the kept tokens, zero on the others: nothing may flow back to those or from them."""
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = torch.randn(output.shape, generator=generator).to(output.device)
    mask = torch.zeros(output.shape[axis], device=output.device).index_fill(0, kept.to(output.device), 1.0)
    shape = [-1 if n == axis else 1 for n in range(output.dim())]
    return (drawn * mask.view(shape)).to(output.dtype if output.is_floating_point() else torch.float32)


def _same(wanted: Tensor, found: Tensor, loose: bool = False) -> bool:
    """Equal up to rounding; NaN is equal to nothing, so a region that cannot be run on random tokens is refused."""
    if wanted.shape != found.shape or not wanted.is_floating_point():
        return torch.equal(wanted, found)
    scale = wanted.abs().max().clamp_min(1e-6)
    tolerance = _TOLERANCE.get(found.dtype, 0.0) * (10 if loose else 1)  # gradients sum over tokens
    return bool((wanted - found).abs().max() <= tolerance * scale)
