"""The command ``ppcompile plan``."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from ppcompile.plan.reading import Reading
    from ppcompile.plan.size import ModelSize

__all__ = ["memory_of", "plan"]

_REASONS = 4  # lines of an error about the data: of many bad records the first few say enough
_DATA = "a .json, .jsonl, .parquet, .csv or .arrow file, a folder of `datasets`, or a hub name"
_STATES = "bytes a parameter of weights, gradients and optimizer: 16 for AdamW in mixed precision, 8 in pure bfloat16"


def plan(
    data: Annotated[str, typer.Argument(help=_DATA, metavar="DATA")],
    tokenizer: Annotated[
        str | None, typer.Option(help="folder or hub id; none where the data are token ids", metavar="T")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="a folder, a hub id, or a config.json; by default a Llama of 1.2B", metavar="M")
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="records a batch of the usual layout; repeat it [default: 4 8 16]")
    ] = None,
    memory: Annotated[str, typer.Option(help="of one device, such as 80GB or 24GiB")] = "80GB",
    state_bytes: Annotated[float, typer.Option(min=0, help=_STATES)] = 16,
    shards: Annotated[int, typer.Option(min=1, help="devices that share weights, gradients and optimizer")] = 1,
    checkpoint: Annotated[str | None, typer.Option(help='"layer": recompute activations, as in wrap()')] = None,
    dtype: Annotated[str, typer.Option(help="of activations: bfloat16, float16 or float32")] = "bfloat16",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="a budget to take instead of the best one")] = None,
    split: Annotated[str | None, typer.Option(help="of a folder or a hub name")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="read at most this many records")] = None,
    unscored: Annotated[str, typer.Option(help="responses without scores: undecided or best-first")] = "undecided",
    pairs: Annotated[bool, typer.Option("--pairs", help="leave out records in which no response is preferred")] = False,
    html: Annotated[Path | None, typer.Option(help="write a report with plots, one file")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="write the numbers; - for the standard output")] = None,
) -> None:
    """Tell what packing will gain on a data set, before training: tokens, padding, cost, memory, settings."""
    to_stdout = json_ == Path("-")
    console = Console(stderr=to_stdout)
    device_memory = _checked(memory_of, memory, hint="--memory")
    _one_of(dtype, ("bfloat16", "float16", "float32"), "--dtype")
    _one_of(unscored, ("undecided", "best-first"), "--unscored")
    _one_of(checkpoint, (None, "layer"), "--checkpoint")
    for path, hint in ((html, "--html"), (json_, "--json")):
        if path is not None and not path.parent.is_dir():  # said now, and not after minutes of tokenizing
            raise typer.BadParameter(f"{path} cannot be written: there is no folder {path.parent}", param_hint=hint)

    from ppcompile.plan import advice, terminal, wording
    from ppcompile.plan.cost import Machine
    from ppcompile.plan.study import study

    machine = Machine(device_memory, state_bytes, shards, checkpoint)
    with _progress(console) as progress:
        size = _size(model, dtype, progress)
        reading = _read(data, tokenizer, progress, split=split, limit=limit, unscored=unscored, pairs=pairs)
        task = progress.add_task("", total=None)
        try:
            found = study(
                reading,
                size,
                machine,
                batch_sizes=sorted(set(batch_size or (4, 8, 16))),
                max_tokens=max_tokens,
                advance=lambda doing: progress.update(task, description=doing),
            )
        except ValueError as wrong:
            raise typer.BadParameter(str(wrong), param_hint="--max-tokens") from None
    words = advice.advice(found)
    code = advice.snippet(found, data=data, tokenizer=tokenizer, split=split, unscored=unscored)
    if json_ is not None:
        numbers = {"data": data, "tokenizer": tokenizer, **found.numbers(), "advice": words, "snippet": code}
        _write(json_, json.dumps(numbers, indent=1), "--json", console)
    if html is not None:
        from ppcompile.plan.page import page

        _write(html, page(found, words, code, Path(data).name), "--html", console)
    if not to_stdout:
        console.print(f"{data}; predicted for {wording.size_line(found)}", highlight=False)
        terminal.show(found, words, code, console)


def memory_of(text: str) -> float:
    """Bytes of ``80GB`` (10 ** 9 each), ``24GiB`` (2 ** 30 each) or plain bytes.

    Raises:
        ValueError: something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[KMGT]i?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a memory size; accepted: a number with GB, GiB, MB or MiB, such as 80GB")
    unit = match[2].lower()
    return float(match[1]) * (1024 if unit.endswith("i") else 1000) ** " kmgt".index(unit[:1] or " ")


def _checked(read: Any, value: Any, hint: str) -> Any:
    try:
        return read(value)
    except ValueError as wrong:
        raise typer.BadParameter(str(wrong), param_hint=hint) from None


def _one_of(value: str | None, accepted: tuple[str | None, ...], hint: str) -> None:
    if value not in accepted:
        names = ", ".join(name for name in accepted if name is not None)
        raise typer.BadParameter(f"{value!r} is not accepted; take one of: {names}", param_hint=hint)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        yield progress


def _size(model: str | None, dtype: str, progress: Progress) -> ModelSize:
    task = progress.add_task("counting the model", total=None)
    from ppcompile.model_source import decoder_config
    from ppcompile.plan.size import default_config, model_size

    try:
        return model_size(default_config() if model is None else decoder_config(model), dtype)
    except ValueError as wrong:
        hint = "" if model is None else ". Without --model, costs are predicted for a Llama of 1.2B parameters"
        raise typer.BadParameter(f"{wrong}{hint}", param_hint="--model") from None
    finally:
        progress.remove_task(task)


def _read(data: str, tokenizer: str | None, progress: Progress, *, limit: int | None, **options: Any) -> Reading:
    from ppcompile.plan.reading import count, read

    loaded = None if tokenizer is None else _tokenizer(tokenizer)
    task = progress.add_task("reading and tokenizing", total=None)
    try:
        progress.update(task, total=count(data, limit))
        return read(data, loaded, limit=limit, advance=lambda: progress.advance(task), **options)
    except (OSError, EOFError, ValueError, ImportError, zlib.error) as error:
        reason = "\n".join((str(error) or type(error).__name__).splitlines()[:_REASONS])
        without = "\nTry: --tokenizer" if tokenizer is None else ""
        raise typer.BadParameter(f"{data!r} cannot be read: {reason}{without}", param_hint="DATA") from None
    finally:
        progress.remove_task(task)


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0]
        message = f"{name!r} is not a folder with a tokenizer, or a hub id that can be reached: {first}"
        raise typer.BadParameter(message, param_hint="--tokenizer") from None


def _write(path: Path, text: str, hint: str, console: Console) -> None:
    if path == Path("-"):
        typer.echo(text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error.strerror}", param_hint=hint) from None
    console.print(f"{path}: {len(text) / 1024:,.0f} KiB", highlight=False)
