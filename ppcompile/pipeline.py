"""The ordered list of passes: read this first.

A captured model is a graph from ``input_ids [1, T]`` to ``logits [1, T, V]`` for one plain sequence. The passes turn it
into a graph from a pack to the log-probabilities of its scored tokens, one change at a time:

    canonicalize          one flat, functional graph
    unshare               modules that stay as they are: positions and masks for unpacked rows, proved causal
    recognize_attention   find every attention, read its score and its mask, prove the mask causal
    rewrite_attention     attention -> prefix_attention: my ancestors and my own past
    rewrite_positions     index of a token -> its logical position
    insert_epilogue       logits -> log-probabilities of the scored tokens, in chunks
    token_demand          after the last attention, only scored slots are computed
    check_token_mixing    prove that nothing else mixes tokens
    lower                 pick a backend for every attention
    outline_layers        one subgraph for each layer of the model

The same names appear in reports, dumps and errors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from .capture import call_model, capture
from .passes.base import NotPackable, PackGraph, PassResult, Refusal
from .passes.canonicalize import canonicalize
from .passes.check_token_mixing import check_token_mixing
from .passes.insert_epilogue import insert_epilogue
from .passes.lower import lower
from .passes.outline_layers import outline_layers
from .passes.recognize import recognize_attention
from .passes.rewrite_attention import rewrite_attention
from .passes.rewrite_positions import rewrite_positions
from .passes.token_demand import token_demand
from .passes.unshare import Findings, unshare
from .sharding import Sharding
from .unsharing import Unsharing, observe
from .unsharing_choice import widened

__all__ = ["Compiled", "Stage", "compile_model", "passes"]

Pass = Callable[[PackGraph], PassResult]


def passes(backend: str = "auto", epilogue: str = "scores", findings: Findings | None = None) -> tuple[Pass, ...]:
    """The passes in order, options bound.

    Args:
        backend, epilogue: see :func:`compile_model`.
        findings: see ``passes.unshare``; of no earlier graph if not given.
    """
    known: Findings = {} if findings is None else findings

    def unshare_modules(graph: PackGraph) -> PassResult:
        return unshare(graph, findings=known)

    def insert_this_epilogue(graph: PackGraph) -> PassResult:
        return insert_epilogue(graph, epilogue=epilogue)

    def lower_to_backend(graph: PackGraph) -> PassResult:
        return lower(graph, backend=backend)

    return (
        canonicalize,
        unshare_modules,
        recognize_attention,
        rewrite_attention,
        rewrite_positions,
        insert_this_epilogue,
        token_demand,
        check_token_mixing,
        lower_to_backend,
        outline_layers,
    )


@dataclass(frozen=True)
class Stage:
    """One line of the report: a pass, or the capture before them.

    Attributes:
        name: the pass.
        seconds: wall time it took.
        ops_before, ops_after: number of operations in the graph.
        result: what it matched and changed.
        code: the graph after it, as Python, where dumps were asked for.
    """

    name: str
    seconds: float
    ops_before: int
    ops_after: int
    result: PassResult
    code: str = ""


@dataclass
class Compiled:
    """A packed graph and how it came to be.

    Attributes:
        graph: the graph after the last pass.
        stages: one entry for the capture and each pass.
    """

    graph: PackGraph
    stages: list[Stage] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Wall time of capture and passes."""
        return sum(stage.seconds for stage in self.stages)


def compile_model(
    model: nn.Module,
    *,
    backend: str = "auto",
    epilogue: str = "scores",
    keep_code: bool = False,
    sharding: Sharding | None = None,
) -> Compiled:
    """Capture ``model`` in its present mode and run every pass.

    Args:
        model: see :func:`ppcompile.wrap`.
        backend: attention backend, ``"auto"`` for the device's best.
        epilogue: what the graph returns, see ``passes.insert_epilogue``.
        keep_code: keep the graph's code after each stage, for dumps and diffs.
        sharding: which modules of the model are sharded; none if not given.

    Raises:
        NotPackable: the model cannot be captured, or a pass cannot prove it safe.
    """
    sharding = sharding or Sharding(model, model)
    unshared: Unsharing = {}
    refusals: list[Refusal] = []
    findings: Findings = {}
    while True:
        try:
            # Modules that stay as they are are run while the graph is made.
            with sharding.gathered() if unshared else contextlib.nullcontext():
                return _compile(model, passes(backend, epilogue, findings), keep_code, unshared, sharding)
        except NotPackable as refused:
            refusals.append(refused.refusal)
            with sharding.gathered():
                wider = widened(model, unshared, refused.refusal)
            if wider is None:
                raise NotPackable(_in_one(refusals)) from refused.__cause__
            unshared = wider


def _in_one(refusals: list[Refusal]) -> Refusal:
    """The first refusal, and why keeping its module out of the graph did not help."""
    first, *_ = refusals
    later = [refusal.reason for refusal in refusals[1:] if refusal.reason != first.reason]
    return dataclasses.replace(first, reason="; ".join((first.reason, *later[-1:])))


def _compile(
    model: nn.Module, in_order: Sequence[Pass], keep_code: bool, unshared: Unsharing, sharding: Sharding
) -> Compiled:
    start = time.perf_counter()
    watched = observe(model, unshared, call_model) if unshared else {}
    with sharding.weightless() as gathered:
        graph = capture(model, watched)
    graph.values = gathered(graph.values)
    count = sum(graph.op_counts().values())
    compiled = Compiled(graph)
    compiled.stages.append(_stage("capture", start, 0, count, PassResult("capture"), graph, keep_code))
    for run in in_order:
        start = time.perf_counter()
        result = run(graph)
        after = sum(graph.op_counts().values())
        compiled.stages.append(_stage(result.name, start, count, after, result, graph, keep_code))
        count = after
    return compiled


def _stage(
    name: str, start: float, before: int, after: int, result: PassResult, graph: PackGraph, keep_code: bool
) -> Stage:
    seconds = time.perf_counter() - start
    return Stage(name, seconds, before, after, result, graph.readable() if keep_code else "")
