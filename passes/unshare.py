"""unshare: modules that mix tokens otherwise than by attention run on rows of whole sequences.

before    x [1, T, C], arange(T), mask [T, T] ── unshared("layers.0.mamba")
after     x [1, T, C], arange(L), mask [L, L] ── unshared("layers.0.mamba")
lower     unpack(x, rows) [B, L, C] ── layers.0.mamba ── repack(copies) [1, T, C]

What one such module hands to another, and to nobody else (the keys that a sparse attention has picked for the layers
that follow), stays on the rows: it need not be one value per token, and it is proved with the module that reads it.

The module is not captured: a marker stands for it (``runtime.ops.unshared``), and what the front door saw when it was
called is in ``PackGraph.unshared``. This pass gives the module its positions and masks for rows of L tokens, as it gets
them from the unpacked model, and proves that it is causal; everything around it stays packed. The gradient of a slot
flows through the first copy of it, which read all that any copy reads.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from .base import NotPackable, PackGraph, PassResult, Refusal, argument, input_nodes, is_op, shape_of
from .causality import NOT_CAUSAL, Chain, prove_causal
from .positional import PositionalValues

__all__ = [
    "Axes",
    "Findings",
    "UnsharedCall",
    "is_marker",
    "is_row_per_token",
    "markers_by_call",
    "stays_on_rows",
    "unshare",
]


Findings = dict[Hashable, "str | None"]
"""What proofs found, by all that they depend on in one model, which is captured again for each module kept out."""


@dataclass(frozen=True)
class Axes:
    """What stands where in a tensor that a module takes or returns.

    Attributes:
        tokens: the axes whose size is the number of tokens.
        batch: the axis whose size is the number of rows, or None.
    """

    tokens: tuple[int, ...]
    batch: int | None


def is_row_per_token(axes: Axes | None) -> TypeGuard[Axes]:
    """True for a tensor of one row per token, of one or several sequences."""
    return axes is not None and len(axes.tokens) == 1 and axes.batch is not None


@dataclass(eq=False)
class UnsharedCall:
    """One call of a module that stays as it is.

    Attributes:
        name: the key in ``PackGraph.unshared``.
        path: dotted path of the module.
        kind: its class, and what it was called with that is not a tensor: calls of one kind are proved alike.
        why: what kept it from being packed.
        module: a module that takes the tensors in order and returns a tuple of tensors; ``wrapped`` is the user's own,
            ``bound_to(other)`` the same call of another one.
        inputs, outputs: the axes of the tensors, None where they cannot be told.
        samples: the tensors that the module was seen to get, for one short row.
        proved: False where there are no weights to prove it with.
    """

    name: str
    path: str
    kind: str
    why: str
    module: Any
    inputs: tuple[Axes | None, ...]
    outputs: tuple[Axes | None, ...]
    samples: tuple[Tensor, ...]
    proved: bool = False


def is_marker(node: fx.Node) -> bool:
    """True for what stands for an unshared module until ``lower`` calls it."""
    return is_op(node, "ppcompile.unshared")


def markers_by_call(graph: PackGraph) -> dict[str, list[fx.Node]]:
    """The markers of each call, one for each output that the graph mentions, in graph order."""
    markers: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if is_marker(node):
            markers.setdefault(argument(node, "call"), []).append(node)
    return markers


def stays_on_rows(graph: PackGraph, node: fx.Node) -> bool:
    """True for what an unshared module returns to other unshared modules alone, and that is no hidden state.

    Indices are never compared: which key is picked among hidden ones may depend on what follows, and does no harm.
    """
    if not is_marker(node) or not all(map(is_marker, node.users)):
        return False
    axes = graph.unshared[argument(node, "call")].outputs[argument(node, "output")]
    return not is_row_per_token(axes) or not node.meta["val"].is_floating_point()


def unshare(graph: PackGraph, *, findings: Findings) -> PassResult:
    """Give every unshared module its inputs for unpacked rows, and prove it causal.

    Args:
        graph: a model's graph.
        findings: of earlier graphs of the same model; what is found here is added.

    Raises:
        NotPackable: a module that is not causal, or reads what cannot be had for unpacked rows.
    """
    result = PassResult("unshare")
    markers = markers_by_call(graph)
    if not markers:
        return result
    rows = _Rows(graph)
    prover = _Prover(rows, findings)
    proofs: dict[str, Chain] = {}
    for name, nodes in markers.items():
        call = graph.unshared[name]
        given: list[fx.Node] = argument(nodes[0], "inputs")
        proofs[name] = _chain(call, given, rows, proofs)
        _check_inputs(call, given, rows)
        inputs = [rows.canonical(call, source, axes) for source, axes in zip(given, call.inputs, strict=True)]
        prover.prove(proofs[name], nodes, any(graph.unshared[n].kind == call.kind for n in proofs if n != name))
        for node in nodes:
            node.args = (inputs, *node.args[1:])
        result.matched.append(f"{call.path} on unpacked rows: {call.why}")
        result.changed += len(nodes)
    graph.finish()
    return result


class _Rows:
    """What the model computes from positions alone, for rows of L tokens."""

    def __init__(self, graph: PackGraph) -> None:
        self.graph = graph
        self.positional = PositionalValues(graph)
        self._clones: dict[fx.Node, fx.Node] = {}

    def is_positional(self, node: fx.Node) -> bool:
        """True for a function of position with an axis of tokens."""
        return bool(self.graph.token_axes(node)) and not self.positional.depends_on_tokens(node)

    def canonical(self, call: UnsharedCall, node: fx.Node, axes: Axes | None) -> fx.Node:
        """``node`` for rows of L tokens if it is a function of position; tokens and weights as they are."""
        if not self.is_positional(node):
            return node
        self._check_prefix(call, node)
        clone = self._clone(node)
        if axes is None or axes.batch is None:
            return clone
        with self.graph.graph.inserting_after(clone):
            batch = self.graph.call(torch.ops.aten.sym_size.int, (self.graph.layout("rows"), 0), like=node)
        shape = [batch if n == axes.batch else -1 for n in range(len(clone.meta["val"].shape))]
        with self.graph.graph.inserting_after(batch):
            return self.graph.call(torch.ops.aten.expand.default, (clone, shape), like=node)

    def _clone(self, node: fx.Node) -> fx.Node:
        """The nodes that ``node`` is computed from, on a row of L tokens in place of the pack."""
        for source in self.positional.ancestors(node):
            if source in self._clones:
                continue
            if self.positional.depends_on_tokens(source):
                self._clones[source] = self._blank(source)
                continue
            if source.op == "placeholder":
                self._clones[source] = source
                continue
            with self.graph.graph.inserting_after(source):
                clone = self.graph.graph.node_copy(source, self._clones.__getitem__)
            clone.meta["val"] = self.graph.evaluate(clone)
            self._clones[source] = clone
        return self._clones[node]

    def _blank(self, source: fx.Node) -> fx.Node:
        """Zeros for tokens of which the shape and dtype alone are read, on one row of L tokens."""
        sizes = shape_of(source)
        if any(isinstance(size, torch.SymInt) and not self.graph.is_length(size) for size in sizes):
            raise NotPackable(
                Refusal.at(source, f"the shape of {source.name}, which others borrow, is not one of tokens")
            )
        rows = self.graph.layout("rows")
        *_, last_input = input_nodes(self.graph.graph)
        with self.graph.graph.inserting_after(last_input):
            length = self.graph.call(torch.ops.aten.sym_size.int, (rows, 1), like=rows)
        with self.graph.graph.inserting_after(length):
            dtype = {"dtype": source.meta["val"].dtype}
            zero = self.graph.call(torch.ops.aten.new_zeros.default, (rows, []), like=rows, options=dtype)
        shape = [length if self.graph.is_length(size) else size for size in sizes]
        with self.graph.graph.inserting_after(zero):
            return self.graph.call(torch.ops.aten.expand.default, (zero, shape), like=rows)

    def at(self, given: Sequence[fx.Node], length: int) -> list[Tensor | None]:
        """The positional ones of a module's inputs, for one row of ``length`` tokens."""
        return [self.positional.evaluate(n, length) if self.is_positional(n) else None for n in given]

    def _check_prefix(self, call: UnsharedCall, node: fx.Node) -> None:
        """A row longer than a sequence must give it the same positions and masks as one of its own length."""
        if not self._has_data(node):
            return
        if not self.positional.begins_alike(node):
            reason = f"{call.path} reads {node.name}, whose values for the first tokens depend on the row's length"
            raise NotPackable(Refusal.at(node, reason))

    def _has_data(self, node: fx.Node) -> bool:
        inputs = [n for n in self.positional.ancestors(node) if n.op == "placeholder" and n.name in self.graph.values]
        return all(self.graph.values[n.name].device.type != "meta" for n in inputs)


def _chain(call: UnsharedCall, given: Sequence[fx.Node], rows: _Rows, known: Mapping[str, Chain]) -> Chain:
    """The call, and the calls that make what it reads on rows."""
    made = {
        place: (known[argument(node, "call")], argument(node, "output"))
        for place, node in enumerate(given)
        if stays_on_rows(rows.graph, node)
    }
    makers = tuple((place, maker.identity, output) for place, (maker, output) in made.items())
    identity = (call.name, tuple(map(rows.is_positional, given)), makers)
    return Chain(call, lambda length: rows.at(given, length), made, identity)


def _check_inputs(call: UnsharedCall, given: Sequence[fx.Node], rows: _Rows) -> None:
    for node, axes in zip(given, call.inputs, strict=True):
        tokens = bool(rows.graph.token_axes(node)) or rows.positional.depends_on_tokens(node)
        if tokens and not (is_row_per_token(axes) or rows.is_positional(node) or stays_on_rows(rows.graph, node)):
            reason = f"{call.path} reads a tensor that is not one row per token: {node.name}"
            raise NotPackable(Refusal(reason, call.path, call.kind))


@dataclass
class _Prover:
    """Proves calls causal, each only once."""

    rows: _Rows
    findings: Findings

    def prove(self, chain: Chain, markers: Sequence[fx.Node], brief: bool) -> None:
        """Mark a call as proved, or raise what was found; without weights, it is taken at its word."""
        call, graph = chain.call, self.rows.graph
        read = [node for node in markers if not stays_on_rows(graph, node)]
        for node in read:
            if not is_row_per_token(call.outputs[argument(node, "output")]):
                _refuse_reader(node, f"{call.path} returns something that is not one row per token")
        if any(p.device.type == "meta" for p in call.module.wrapped.parameters()):
            return  # wrapping real weights proves it
        hidden = [node for node in read if node.meta["val"].is_floating_point()]
        picked = [node for node in read if node not in hidden]
        for nodes in (hidden, picked):
            finding = self._finding(chain, [argument(node, "output") for node in nodes], brief) if nodes else None
            if finding is not None and nodes is picked and finding.startswith(NOT_CAUSAL):
                _refuse_reader(picked[0], f"{call.path} returns indices that depend on what follows a token")
            if finding is not None:
                reason = f"{call.path} cannot run on rows of whole sequences either: {finding}"
                # What is not causal inside is not causal outside.
                raise NotPackable(Refusal(reason, call.path, final=finding.startswith(NOT_CAUSAL)))
        call.proved = True

    def _finding(self, chain: Chain, outputs: Sequence[int], brief: bool) -> str | None:
        longest = self.rows.graph.max_positions
        key = (chain.identity, tuple(outputs), longest, brief)
        if key not in self.findings:
            self.findings[key] = prove_causal(chain, outputs, longest=longest, brief=brief)
        return self.findings[key]


def _refuse_reader(node: fx.Node, why: str) -> None:
    """Blame what reads ``node``: on rows, it might."""
    reader = next(user for user in node.users if not is_marker(user))
    raise NotPackable(Refusal.at(reader, f"{why}, and {reader.name} reads it"))
