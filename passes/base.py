"""What every pass shares: the graph it works on, the result it returns, and how it refuses.

A pass is a function ``(PackGraph, **options) -> PassResult``. It edits the graph in place and says what it
matched and what it changed. Legend for shapes: ``T`` packed slots, ``H`` query heads, ``G`` key/value heads,
``D`` head size, ``U`` scored slots, ``C`` hidden size.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

__all__ = [
    "LAYOUT_INPUTS",
    "NotPackable",
    "PackGraph",
    "PassResult",
    "Refusal",
    "input_nodes",
    "is_op",
    "module_path",
    "op_name",
    "output_node",
    "shape_of",
    "source_line",
]

LAYOUT_INPUTS = ("input_ids", "position_ids", "subtree_end", "segments", "predecessors", "targets")
"""Inputs of every captured graph besides the model's state (see ``runtime.ops.Layout`` and ``runtime.batch``)."""


@dataclass(frozen=True)
class Refusal:
    """Why a model cannot be packed, and where.

    Attributes:
        reason: what is wrong, in one sentence a user of the model understands.
        module: dotted path of the module, ``""`` for the model itself.
        op: the operator's name, or what was attempted where there is no operator.
        source: ``file:line, code`` in the model's source, ``""`` if unknown.
        hint: what to do about it.
    """

    reason: str
    module: str = ""
    op: str = ""
    source: str = ""
    hint: str = ""

    @classmethod
    def at(cls, node: fx.Node, reason: str, hint: str = "") -> Refusal:
        return cls(reason, module_path(node), op_name(node), source_line(node), hint)

    def __str__(self) -> str:
        lines = [self.reason]
        for label, text in (("module", self.module), ("op", self.op), ("source", self.source), ("try", self.hint)):
            if text:
                lines.append(f"  {label + ':':<8}{text}")
        return "\n".join(lines)


class NotPackable(Exception):
    """The model mixes tokens in a way that packing would change, or that cannot be proved safe.

    Raised by ``ppcompile.wrap``. ``refusal`` says which module, operator and source line, why, and what to do.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


@dataclass
class PassResult:
    """What a pass did.

    Attributes:
        name: the pass's name in ``pipeline.PASSES``.
        matched: one line for each thing it recognized.
        changed: number of nodes replaced, inserted or moved.
    """

    name: str
    matched: list[str] = field(default_factory=list)
    changed: int = 0


@dataclass
class PackGraph:
    """A captured model on its way to its packed form.

    Attributes:
        module: the graph with parameters, buffers and constants lifted to inputs.
        length: the symbol of the token axis, T.
        scored: the symbol of the axis of scored slots, U.
        state: input name -> qualified name of the parameter or buffer it stands for.
        constants: input name -> tensor lifted from the model's code.
        values: input name -> the tensor behind it, for reading tables and masks and for numerical proofs.
        parameters: the input names that stand for parameters, whose values training changes.
        max_positions: positions the model has tables for, or ``None`` if unlimited.
        vocab_size: number of token ids the model has embeddings for, if known.
        sites: attention sites, filled by the recognize pass.
    """

    module: fx.GraphModule
    length: sympy.Symbol
    scored: sympy.Symbol
    state: dict[str, str]
    constants: dict[str, torch.Tensor]
    values: dict[str, torch.Tensor]
    parameters: frozenset[str] = frozenset()
    max_positions: int | None = None
    vocab_size: int | None = None
    sites: list[Any] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def layout(self, name: str) -> fx.Node:
        """The placeholder of one of :data:`LAYOUT_INPUTS`."""
        return next(node for node in input_nodes(self.graph) if node.name == name)

    def is_length(self, size: Any) -> bool:
        """True if ``size`` is the number of tokens T (and not merely equal to it by chance)."""
        return isinstance(size, torch.SymInt) and size.node.expr == self.length

    def mentions_length(self, size: Any) -> bool:
        """True if ``size`` is T or an expression of T, such as ``4*T`` or ``T + 1``."""
        return isinstance(size, torch.SymInt) and self.length in size.node.expr.free_symbols

    def token_axes(self, node: fx.Node) -> tuple[int, ...]:
        """Axes of ``node``'s tensor that hold tokens: all of them (T) or the scored ones (U)."""
        return tuple(axis for axis, size in enumerate(shape_of(node)) if self.is_length(size) or self.is_scored(size))

    def is_scored(self, size: Any) -> bool:
        """True if ``size`` is the number of scored slots, U."""
        return isinstance(size, torch.SymInt) and size.node.expr == self.scored

    def limit_positions(self, count: int) -> None:
        self.max_positions = count if self.max_positions is None else min(self.max_positions, count)

    def op_counts(self) -> Counter[str]:
        return Counter(op_name(node) for node in self.graph.nodes if node.op == "call_function")

    def readable(self) -> str:
        """The graph as Python, with shapes and the model's source lines."""
        return str(self.module.print_readable(print_output=False))

    # ------------------------------------------------------------------ editing

    def call(self, target: Callable[..., Any], args: Sequence[Any], *, like: fx.Node) -> fx.Node:
        """Append ``target(*args)`` at the insertion point, with its fake value and ``like``'s provenance."""
        node = self.graph.call_function(target, tuple(args))
        for key in ("nn_module_stack", "stack_trace", "from_node"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        node.meta["val"] = self.evaluate(node)
        return node

    def evaluate(self, node: fx.Node) -> Any:
        """The fake value of ``node``, from those of its inputs."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        fake = self.layout("input_ids").meta["val"].fake_mode
        # Without the python dispatcher some decompositions read sizes as plain ints, which would fix T.
        with fake, enable_python_dispatcher(), torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return self.call(operator.getitem, (node, index), like=node)

    def finish(self) -> None:
        """Drop what is dead and check the graph's well-formedness; every pass ends with it."""
        self.graph.eliminate_dead_code(_is_impure)
        shapes = self.layout("input_ids").meta["val"].fake_mode.shape_env
        assert self.length not in shapes.replacements, (
            f"a pass fixed the row's length to {shapes.replacements[self.length]}"
        )
        self.graph.lint()
        self.module.recompile()


def _is_impure(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def input_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "placeholder")


def output_node(graph: fx.Graph) -> fx.Node:
    """The single node a captured graph returns."""
    (result,) = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    return result


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def is_op(node: Any, *names: str) -> bool:
    """True if ``node`` calls one of the named ops, such as ``aten.softmax.int`` or just ``aten.softmax``."""
    return isinstance(node, fx.Node) and (op_name(node) in names or op_name(node).rpartition(".")[0] in names)


def op_name(node: fx.Node) -> str:
    """``aten.softmax.int``, ``ppcompile.prefix_attention.default``, ``getitem``, or a submodule's name."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target))


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that ``node`` was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths else ""


def source_line(node: fx.Node) -> str:
    """``file:line, code`` of the innermost frame of the model's source that made ``node``."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    files = [n for n, line in enumerate(frames) if line.startswith('File "')]
    # Frames inside torch.nn say only "F.linear(...)"; the model's own line is what a user can act on.
    own = [n for n in files if "/torch/nn/" not in frames[n]] or files
    if not own:
        return ""
    where = frames[own[-1]]
    path, _, rest = where.removeprefix('File "').partition('", line ')
    code = frames[own[-1] + 1] if own[-1] + 1 < len(frames) and own[-1] + 1 not in files else ""
    return f"{path}:{rest.split(',')[0]}" + (f", {code}" if code else "")


def nodes_with_val(nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
    return (node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor))
