"""What every pass shares: the graph it works on, the result it returns, and how it refuses.

A pass is a function ``(PackGraph, **options) -> PassResult``. It edits the graph in place and says what it
matched and what it changed. Legend for shapes: ``T`` packed slots, ``H`` query heads, ``G`` key/value heads,
``D`` head size, ``U`` scored slots, ``C`` hidden size.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

__all__ = [
    "LAYOUT_INPUTS",
    "ROW_INPUTS",
    "NotPackable",
    "PackGraph",
    "PassResult",
    "Refusal",
    "argument",
    "axis_argument",
    "input_nodes",
    "is_mutable",
    "is_op",
    "is_size",
    "is_tensor",
    "may_alias",
    "module_path",
    "op_family",
    "op_name",
    "operands",
    "output_node",
    "run_node",
    "same_shape",
    "shape_of",
    "source_line",
]

LAYOUT_INPUTS = ("input_ids", "position_ids", "subtree_end", "segments", "predecessors", "targets")
"""Inputs of every captured graph besides the model's state (see ``runtime.ops.Layout`` and ``runtime.batch``)."""

ROW_INPUTS = ("rows", "copies")
"""Further inputs where a module runs on unpacked rows (see ``runtime.rows``)."""


@dataclass(frozen=True)
class Refusal:
    """Why a model cannot be packed, and where.

    Attributes:
        reason: what is wrong, in one sentence a user of the model understands.
        module: dotted path of the module, ``""`` for the model itself.
        op: the operator's name, or what was attempted where there is no operator.
        source: ``file:line, code`` in the model's source, ``""`` if unknown.
        hint: what to do about it.
        final: True where it is no use to keep the module out of the graph: the user has to change something.
    """

    reason: str
    module: str = ""
    op: str = ""
    source: str = ""
    hint: str = ""
    final: bool = False

    @classmethod
    def at(cls, node: fx.Node, reason: str, hint: str = "") -> Refusal:
        """A refusal that points at ``node``."""
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
        max_positions: tokens of the longest sequence that the model is known to take, or ``None`` if unlimited.
        limited_by: what says so.
        branches: choices that the model's code made on the row's length while it was captured.
        vocab_size: number of token ids the model has embeddings for, if known.
        sites: attention sites, filled by the recognize pass.
        pooling: for a model that returns one value per sequence, at which token (``passes.pooling``).
        unshared: calls of modules that stay as they are and run on unpacked rows, by name (``passes.unshare``).
        layers: what the ``call_module`` nodes of layers stand for, by target, filled by the outline pass.
    """

    module: fx.GraphModule
    length: sympy.Symbol
    scored: sympy.Symbol
    state: dict[str, str]
    constants: dict[str, torch.Tensor]
    values: Mapping[str, torch.Tensor]
    parameters: frozenset[str] = frozenset()
    max_positions: int | None = None
    limited_by: str = ""
    branches: list[Refusal] = field(default_factory=list)
    vocab_size: int | None = None
    sites: list[Any] = field(default_factory=list)
    pooling: Any = None
    unshared: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph of :attr:`module`."""
        return self.module.graph

    def layout(self, name: str) -> fx.Node:
        """The placeholder of one of :data:`LAYOUT_INPUTS`."""
        return next(node for node in input_nodes(self.graph) if node.name == name)

    def is_length(self, size: Any) -> bool:
        """True if ``size`` is the number of tokens T (and not merely equal to it by chance)."""
        return isinstance(size, torch.SymInt) and size.node.expr == self.length

    def mentions_length(self, size: Any) -> bool:
        """True if ``size`` is T or an expression of T, such as ``4*T``, ``T + 1`` or ``sqrt(T)``."""
        return isinstance(size, _SYMBOLIC) and self.length in size.node.expr.free_symbols

    def token_axes(self, node: fx.Node) -> tuple[int, ...]:
        """Axes of ``node``'s tensor that hold tokens: all of them (T) or the scored ones (U)."""
        return tuple(axis for axis, size in enumerate(shape_of(node)) if self.is_length(size) or self.is_scored(size))

    def is_scored(self, size: Any) -> bool:
        """True if ``size`` is the number of scored slots, U."""
        return isinstance(size, torch.SymInt) and size.node.expr == self.scored

    def size_at(self, size: Any, length: int) -> Any:
        """``size`` in a pack of ``length`` tokens, all of them scored; as it is if it is no symbol.

        Raises:
            LookupError: it depends on more than these.
        """
        if not isinstance(size, torch.SymInt):
            return size
        found = size.node.expr.subs({self.length: length, self.scored: length})
        if found.free_symbols:
            raise LookupError(f"{size} is not known from the number of tokens")
        return int(found)

    def view_sizes(self, node: fx.Node) -> list[int]:
        """``node``'s shape as a reshape takes it: the axis of tokens is left to be inferred."""
        return [-1 if self.is_length(size) else int(size) for size in shape_of(node)]

    def limit_positions(self, count: int, by: str = "its tables of positions") -> None:
        """Positions from ``count`` on are known not to work, or not known to."""
        if self.max_positions is None or count < self.max_positions:
            self.max_positions, self.limited_by = count, by

    def nodes(self) -> Iterator[fx.Node]:
        """All nodes: those of :attr:`graph`, then those of each layer's body, once."""
        yield from self.graph.nodes
        for body in self._bodies():
            yield from body.graph.nodes

    def op_counts(self) -> Counter[str]:
        """How often each op is called, in layers too."""
        bodies = [self.layers[n.target].body.graph for n in self.graph.nodes if n.target in self.layers]
        calls = (node for graph in (self.graph, *bodies) for node in graph.nodes if node.op == "call_function")
        return Counter(op_name(node) for node in calls)

    def readable(self) -> str:
        """The graph as Python, with shapes and the model's source lines; each layer's body once."""
        modules = {self.module: "", **{body: ", ".join(paths) for body, paths in self._bodies().items()}}
        return "\n".join(
            f"# {paths}\n" * bool(paths) + str(module.print_readable(print_output=False, include_stride=False))
            for module, paths in modules.items()
        )

    def _bodies(self) -> dict[fx.GraphModule, list[str]]:
        """Each layer's body once, and the paths of the layers that share it."""
        found: dict[fx.GraphModule, list[str]] = {}
        for layer in self.layers.values():
            found.setdefault(layer.body, []).append(layer.path)
        return found

    # ------------------------------------------------------------------ editing

    def call(
        self,
        target: Callable[..., Any],
        args: Sequence[Any],
        *,
        like: fx.Node,
        options: Mapping[str, Any] | None = None,
    ) -> fx.Node:
        """Append ``target(*args, **options)`` at the insertion point, with its fake value and ``like``'s provenance."""
        node = self.graph.call_function(target, tuple(args), dict(options or {}))
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
            return _function(node)(*args, **kwargs)

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """Output ``index`` of a multi-output node."""
        return self.call(operator.getitem, (node, index), like=node)

    def finish(self) -> None:
        """Drop what is dead and check the graph's well-formedness; every pass ends with it."""
        self.graph.eliminate_dead_code(_is_impure)
        fixed = self.layout("input_ids").meta["val"].fake_mode.shape_env.replacements
        assert self.length not in fixed, f"a pass fixed the row's length to {fixed[self.length]}"
        self.graph.lint()
        self.module.recompile()


def _is_impure(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or is_mutable(node)


def input_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """The placeholders of a graph."""
    return (node for node in graph.nodes if node.op == "placeholder")


def output_node(graph: fx.Graph) -> fx.Node:
    """The single node a captured graph returns."""
    returned: Any = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    (result,) = returned
    return result


# --------------------------------------------------------------------------- reading a node

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_REQUIRED: Any = object()


def is_tensor(node: Any) -> bool:
    """True if ``node`` is a node whose value is one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of ``node``'s tensor, ``()`` for what is not a tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """True if two tensors have the same sizes, symbolic ones by expression."""
    return [_expression(size) for size in shape_of(a)] == [_expression(size) for size in shape_of(b)]


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def is_size(node: fx.Node) -> bool:
    """True if ``node`` is a number rather than a tensor."""
    return isinstance(node.meta.get("val"), (int, float, bool, *_SYMBOLIC))


def is_mutable(node: fx.Node) -> bool:
    """True if ``node``'s op overwrites one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


_MAYBE_VIEWS = (
    "reshape", "contiguous", "to", "type_as", "flatten", "dropout", "feature_dropout", "alpha_dropout", "einsum",
    "meshgrid", "broadcast_tensors", "atleast_1d", "atleast_2d", "atleast_3d", "cartesian_prod", "unsafe_chunk",
    "unsafe_split", "getitem",
)  # fmt: skip
"""Ops that return (a view of) their input or a copy, which their schemas do not say."""


def may_alias(node: fx.Node) -> bool:
    """True if what ``node`` returns may share memory with an input."""
    if op_family(node) in _MAYBE_VIEWS:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def operands(node: fx.Node) -> tuple[Any, ...]:
    """All arguments of ``node``'s op in the order of its schema, however they were given, defaults included."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.args
    return tuple(_argument_at(node, place, declared) for place, declared in enumerate(_declared(node)))


def argument(node: fx.Node, name: str, missing: Any = _REQUIRED) -> Any:
    """The argument that the schema of ``node``'s op calls ``name``: positional, by keyword, or the schema's default.

    Args:
        node: a call of an operator.
        name: as in the schema, ``dim`` for example.
        missing: what to return where the schema has no such argument.

    Raises:
        KeyError: the schema has no such argument, and ``missing`` was not given.
    """
    for place, declared in enumerate(_declared(node)):
        if declared.name == name:
            return _argument_at(node, place, declared)
    if missing is _REQUIRED:
        raise KeyError(f"{op_name(node)} has no argument {name!r}")
    return missing


def axis_argument(node: fx.Node, rank: int, name: str = "dim") -> int:
    """The argument ``name`` as an axis of a tensor of ``rank`` axes, counted from the front."""
    return int(argument(node, name)) % rank


def _declared(node: fx.Node) -> Sequence[Any]:
    schema = getattr(node.target, "_schema", None)
    return schema.arguments if schema is not None else ()


def _argument_at(node: fx.Node, place: int, declared: Any) -> Any:
    if place < len(node.args) and not declared.kwarg_only:
        return node.args[place]
    return node.kwargs.get(declared.name, declared.default_value)


def _function(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target), f"{node.format_node()} is not a call"
    return node.target


def run_node(node: fx.Node, values: Mapping[fx.Node, Any], **overrides: Any) -> Any:
    """Call ``node``'s op on real ``values``; ``overrides`` replace keywords that it was given."""
    with torch.no_grad():
        return call_node(node, values, **overrides)


def call_node(node: fx.Node, values: Mapping[fx.Node, Any], **overrides: Any) -> Any:
    """:func:`run_node` in the caller's grad mode."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    kwargs = {name: overrides.get(name, value) for name, value in kwargs.items()}
    return _function(node)(*args, **kwargs)


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


def op_family(node: fx.Node) -> str:
    """``softmax`` for ``aten.softmax.int``, ``prefix_attention`` for ours: the name that rules are filed under."""
    return op_name(node).removeprefix("aten.").removeprefix("ppcompile.").partition(".")[0]


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
