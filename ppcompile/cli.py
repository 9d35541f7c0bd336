"""The command line: ``ppcompile inspect``, ``ppcompile verify``, ``ppcompile plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.syntax import Syntax

from .plan.command import plan

if TYPE_CHECKING:
    from torch import nn

    from .pipeline import Compiled

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Preference packing as a compiler: see what it makes of a model, and prove it.",
)
_META_FROM = 300_000_000  # parameters from which a bare configuration is inspected without weights
_Model = Annotated[str, typer.Argument(help="a folder, a hub id, or a config.json", metavar="MODEL")]
_Mode = Annotated[bool, typer.Option("--train/--eval", help="the mode to capture")]
_Backend = Annotated[str, typer.Option(help="auto, cascade, flex or reference")]


@app.command()
def inspect(
    model: _Model,
    train: _Mode = False,
    backend: _Backend = "auto",
    dump: Annotated[
        Path | None, typer.Option(help="write the graph after each pass as Python into this folder")
    ] = None,
    diff: Annotated[tuple[str, str] | None, typer.Option(help="show what changed between two stages")] = None,
    mask: Annotated[Path | None, typer.Option(help="draw the mask of an example pack, .png or .svg")] = None,
) -> None:
    """Show the passes, the attention sites and the packed graph of a model; weights are not needed."""
    from . import report
    from .passes.base import NotPackable
    from .pipeline import compile_model

    console = Console()
    loaded = _load(model, console, weights=False).train(train)
    try:
        compiled = compile_model(loaded, backend=backend, keep_code=dump is not None or diff is not None)
    except NotPackable as refused:
        console.print(report.refusal_panel(refused.refusal))
        raise typer.Exit(1) from None
    except ValueError as wrong:  # a backend that is unknown, or cannot run this model
        raise typer.BadParameter(str(wrong), param_hint="--backend") from None
    console.print(report.passes_table(compiled))
    console.print(report.sites_table(compiled.graph.sites))
    if compiled.graph.unshared:
        console.print(report.unshared_table(compiled))
        console.print(report.unshared_note(loaded, compiled))
    console.print(report.summary(compiled))
    if dump is not None:
        console.print(f"{len(report.dump(compiled, dump))} stages in {dump}")
    if diff is not None:
        console.print(Syntax(_stage_diff(compiled, *diff), "diff"))
    if mask is not None:
        _draw_example(mask, console)


@app.command()
def verify(
    model: _Model,
    backend: _Backend = "auto",
    gradients: Annotated[bool, typer.Option(help="compare gradients too")] = True,
    seed: Annotated[int, typer.Option(help="of the random tokens")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Compare the packed with the eager unpacked model: log-probabilities, gradients, independence."""
    from . import report
    from .passes.base import NotPackable
    from .verification import Mismatch
    from .verification import verify as run

    console = Console()
    loaded = _load(model, console, weights=True).to(device)
    try:
        console.print(run(loaded, gradients=gradients, seed=seed, backend=backend))
    except NotPackable as refused:
        console.print(report.refusal_panel(refused.refusal))
        raise typer.Exit(1) from None
    except Mismatch as mismatch:
        console.print(mismatch.report)
        console.print("[bold red]the packed model is wrong for this model; please report it[/]")
        raise typer.Exit(2) from None


app.command()(plan)


def main() -> None:
    """Entry point."""
    app()


def _load(name: str, console: Console, *, weights: bool) -> nn.Module:
    """A model from a folder, a hub id or a bare configuration, random where there are no weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from .model_source import decoder_config, on_meta

    try:
        config = decoder_config(name)
    except ValueError as wrong:
        raise typer.BadParameter(str(wrong), param_hint="MODEL") from None
    torch.manual_seed(0)
    if weights and not name.endswith(".json") and _has_weights(name):
        return _as_module(AutoModelForCausalLM.from_pretrained(name, dtype="auto"))
    bare = on_meta(config)
    size = sum(p.numel() for p in bare.parameters())
    kind = "random weights" if weights or size < _META_FROM else "no weights (meta device)"
    console.print(f"{config.model_type}, {size / 1e6:,.1f}M parameters, {kind}")
    if size >= _META_FROM and not weights:
        return bare
    return _as_module(AutoModelForCausalLM.from_config(config))


def _as_module(model: Any) -> nn.Module:
    module: nn.Module = model
    return module


def _has_weights(name: str) -> bool:
    """True for a hub id, and for a folder that holds more than a configuration."""
    folder = Path(name)
    return not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _stage_diff(compiled: Compiled, before: str, after: str) -> str:
    from . import report

    try:
        return report.stage_diff(compiled, before, after)
    except ValueError as wrong:
        raise typer.BadParameter(str(wrong), param_hint="--diff") from None


def _draw_example(path: Path, console: Console) -> None:
    from .runtime.batch import Group, pack
    from .runtime.picture import draw_mask

    groups = [
        Group([*range(8)], [[*range(5)], [*range(3)], [*range(4)]]),
        Group([*range(5)], [[*range(4)], [*range(6)]]),
    ]
    draw_mask(pack(groups), path)
    console.print(f"mask of an example pack in {path}")
