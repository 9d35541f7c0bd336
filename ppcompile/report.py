"""What the compiler did, for people: tables of passes and sites, code per stage, diffs between stages."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import nn

from .passes.base import Refusal
from .passes.site import Site
from .pipeline import Compiled, Stage

__all__ = [
    "dump",
    "passes_table",
    "refusal_panel",
    "shared_weights",
    "sites_table",
    "stage_diff",
    "summary",
    "unshared_note",
    "unshared_table",
]


def summary(compiled: Compiled) -> str:
    """Two lines: what was captured, and the limits that batches must keep."""
    graph = compiled.graph
    limits = [f"vocabulary {graph.vocab_size:,}" if graph.vocab_size else "vocabulary unknown"]
    limits.append(f"at most {graph.max_positions:,} positions" if graph.max_positions else "no limit on positions")
    sites = len(graph.sites)
    return f"packable: {sites} attention sites, {compiled.seconds:.1f} s to compile\n{', '.join(limits)}"


def passes_table(compiled: Compiled) -> Table:
    """One row a pass: seconds, operations before and after, what it matched."""
    table = Table("pass", "seconds", "ops", "changed", "matched", title="passes")
    for stage in compiled.stages:
        ops = (
            f"{stage.ops_after}" if stage.ops_before == stage.ops_after else f"{stage.ops_before} -> {stage.ops_after}"
        )
        table.add_row(
            stage.name, f"{stage.seconds:.2f}", ops, str(stage.result.changed or ""), Text(_brief(stage.result.matched))
        )
    return table


def _brief(matched: Sequence[str], width: int = 60) -> str:
    """One line for what a pass matched; the sites have a table of their own."""
    if not matched:
        return ""
    first = matched[0] if len(matched[0]) <= width else matched[0][: width - 3] + "..."
    return first if len(matched) == 1 else f"{len(matched)}, first: {first}"


def sites_table(sites: Sequence[Site]) -> Table:
    """One row for each run of layers with the same attention."""
    table = Table(title="attention sites")
    for column in ("sites", "heads", "mask", "score", "backend", "why"):
        table.add_column(column, overflow="fold")  # never cut: module paths are what people look for
    for run in _runs(sites):
        first = run[0]
        heads = f"{first.heads}" if first.key_heads == first.heads else f"{first.heads} q, {first.key_heads} kv"
        score = first.meaning.score_class + (", sinks" if first.sinks is not None else "")
        table.add_row(
            _in_ranges([site.module for site in run]),
            heads,
            first.meaning.mask_class,
            Text(score),
            first.backend,
            first.why,
        )
    return table


def unshared_table(compiled: Compiled) -> Table:
    """One row for each kind of module that runs on unpacked rows."""
    table = Table(title="modules on unpacked rows (nothing is shared in them)")
    for column in ("modules", "class", "causality", "why"):
        table.add_column(column, overflow="fold")
    kinds: dict[tuple[str, str, bool], list[str]] = {}
    for call in compiled.graph.unshared.values():
        kind = type(call.module.wrapped).__name__
        kinds.setdefault((kind, call.why, call.proved), []).append(call.path)
    for (kind, why, proved), paths in kinds.items():
        proof = "proved by perturbation" if proved else "to be proved with weights"
        table.add_row(_in_ranges(list(dict.fromkeys(paths))), kind, proof, Text(why))
    return table


def shared_weights(model: nn.Module, compiled: Compiled) -> float:
    """Share of the weights outside embeddings that work on packed slots, where a prompt counts once."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    unshared = {id(p) for call in compiled.graph.unshared.values() for p in call.module.wrapped.parameters()}
    sizes = {id(p): p.numel() for p in model.parameters() if id(p) not in embeddings}
    total = sum(sizes.values())
    return 1.0 - sum(n for p, n in sizes.items() if p in unshared) / total if total else 1.0


def unshared_note(model: nn.Module, compiled: Compiled) -> str:
    """One sentence for logs; empty where everything is shared."""
    paths = list(dict.fromkeys(call.path for call in compiled.graph.unshared.values()))
    if not paths:
        return ""
    return (
        f"{len(paths)} modules run on unpacked rows and share nothing ({_in_ranges(paths)}); "
        f"{shared_weights(model, compiled):.0%} of the weights outside embeddings see every prompt once"
    )


def _runs(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Sites with the same meaning, in order of first appearance; mixed stacks alternate, so not only neighbours."""
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        what = (re.sub(r"\d+", "*", site.module), site.heads, site.key_heads, site.meaning.mask_class)
        groups.setdefault((*what, site.meaning.score_class, site.sinks is None, site.backend), []).append(site)
    return iter(groups.values())


def _in_ranges(paths: Sequence[str]) -> str:
    """``model.layers.{0-3,5}.self_attn``."""
    if len(paths) == 1:
        return paths[0] or "(the model itself)"
    numbers = [[int(n) for n in re.findall(r"\d+", path)] for path in paths]
    varying = [n for n, column in enumerate(zip(*numbers, strict=False)) if len(set(column)) > 1]
    if len(varying) != 1 or len({re.sub(r"\d+", "*", path) for path in paths}) > 1:
        return ", ".join(paths)
    place = itertools.count()
    layers = _ranges([row[varying[0]] for row in numbers])
    return re.sub(r"\d+", lambda m: "{" + layers + "}" if next(place) == varying[0] else m.group(), paths[0])


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def refusal_panel(refusal: Refusal) -> Panel:
    """A refusal, as the terminal shows it."""
    return Panel(Text(str(refusal)), title="not packable", border_style="red")


def dump(compiled: Compiled, folder: Path) -> list[Path]:
    """Write the graph after each stage as ``NN_pass.py``.

    Raises:
        ValueError: the stages were compiled without ``keep_code``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, stage in enumerate(compiled.stages):
        path = folder / f"{number:02d}_{stage.name}.py"
        path.write_text(f"# after {stage.name}: {stage.ops_after} ops\n{_code(stage)}\n")
        written.append(path)
    return written


def stage_diff(compiled: Compiled, before: str, after: str) -> str:
    """Unified diff of the graph's code between two stages, named as in :func:`passes_table`."""
    stages = {stage.name: stage for stage in compiled.stages}
    for name in (before, after):
        if name not in stages:
            raise ValueError(f"unknown stage {name!r}; accepted: {', '.join(stages)}")
    old, new = (_code(stages[name]).splitlines() for name in (before, after))
    return "\n".join(difflib.unified_diff(old, new, before, after, lineterm="", n=1))


def _code(stage: Stage) -> str:
    if not stage.code:
        raise ValueError("the code of the stages was not kept; compile with keep_code=True")
    return stage.code
