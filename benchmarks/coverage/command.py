"""``python -m benchmarks coverage``: every causal-LM type of transformers, exact or refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from .check import Result
from .configs import APART, registered_types
from .sweep import SECONDS, sweep
from .table import headline, markdown

__all__ = ["main"]

_STYLES = {"exact": "green", "refused": "yellow"}


def main(
    only: Annotated[list[str] | None, typer.Option(help="Check this type; may be given several times.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes at a time.")] = 2,
    seconds: Annotated[int, typer.Option(help="Processor time for one type.")] = SECONDS,
    out: Annotated[Path | None, typer.Option(help="Write the table here, as Markdown.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Keep results here as JSON; those of types not checked now stay as they were.")
    ] = None,
) -> None:
    """Wrap a tiny model of every causal-LM type of transformers and compare it with the eager unpacked model."""
    kinds = _chosen(only)
    found = _kept(results)
    console = Console()
    for result in track(sweep(kinds, jobs, seconds), "checking", total=len(kinds), console=console):
        found[result.kind] = result
        console.print(_line(result), style=_STYLES.get(result.outcome, "bold red"), highlight=False, markup=False)
        if results is not None:
            results.write_text(json.dumps([dataclasses.asdict(r) for r in found.values()], indent=1))
    ordered = [found[kind] for kind in sorted(found)]
    console.print(headline(ordered, APART))
    if out is not None:
        out.write_text(markdown(ordered, APART))
    if any(result.outcome == "wrong" for result in ordered):
        raise typer.Exit(1)


def _chosen(only: list[str] | None) -> list[str]:
    known = registered_types()
    unknown = sorted(set(only or ()) - set(known))
    if unknown:
        raise typer.BadParameter(f"not a causal-LM type of transformers: {', '.join(unknown)}")
    return [kind for kind in only or known if kind not in APART]


def _kept(path: Path | None) -> dict[str, Result]:
    if path is None or not path.exists():
        return {}
    kept = json.loads(path.read_text())
    return {entry["kind"]: Result(**{**entry, "unshared": tuple(entry["unshared"])}) for entry in kept}


def _line(result: Result) -> str:
    if result.outcome in ("exact", "wrong"):
        where = f" at {result.worst}" if result.outcome == "wrong" else ""
        return f"{result.kind:26} {result.outcome}: {result.forward:.1e} nats, gradient {result.gradient:.1e}{where}"
    return f"{result.kind:26} {result.outcome}: {' '.join(result.reason.split())[:150]} [{result.op}] {result.module}"
