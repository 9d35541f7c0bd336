"""DPO in plain PyTorch over ppcompile, on any Hugging Face causal LM and any preference data.

    python examples/dpo.py                                              # embedded task, packed against unpacked
    python examples/dpo.py --model PATH --data pairs.jsonl              # your model, your data
    python examples/dpo.py --model PATH --data pairs.jsonl --packing off  # the same loop, one sequence at a time

An optimizer step takes a fixed number of groups. They are split into packs, and each pack's gradient is added with
the weight of its pairs, so that a step is the mean over its pairs however the packs fall, packed or not.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from dpo_report import Usage, compare, plot
from dpo_scorers import OneByOne, Packed
from dpo_state import Checkpoints, Metrics
from ppcompile.data import TokenizedPreference, read_preferences, tokenize
from ppcompile.losses import dpo_loss

Groups = list[TokenizedPreference]
Scorer = Packed | OneByOne
console = Console()


class Packing(str, Enum):
    """``both`` runs packed and unpacked one after the other and compares them."""

    on = "on"
    off = "off"
    both = "both"


class Dtype(str, Enum):
    """Of the weights, and so of the whole computation."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run."""

    steps: int = 0  # 0: one pass over the data
    groups_per_step: int = 16
    max_tokens: int = 8192
    learning_rate: float = 1e-6
    warmup: int = 10
    weight_decay: float = 0.0
    clip: float = 1.0
    beta: float = 0.1
    label_smoothing: float = 0.0
    held_out: float = 0.1
    eval_every: int = 100
    seed: int = 0


EMBEDDED = Settings(
    steps=300,
    groups_per_step=8,
    max_tokens=512,
    learning_rate=5e-4,
    warmup=20,
    weight_decay=0.01,
    held_out=0.05,
    eval_every=60,
)
"""For the embedded task: a calm learning rate, so that rounding does not grow into another trajectory."""

TOY = replace(EMBEDDED, steps=6, groups_per_step=4, max_tokens=128, held_out=0.25, eval_every=3)


# --------------------------------------------------------------------------- the training loop


def groups_of_step(step: int, groups: Groups, settings: Settings) -> Groups:
    """The groups of an optimizer step: a function of seed and step, so a resumed run needs no other position."""
    per_epoch = math.ceil(len(groups) / settings.groups_per_step)
    epoch, index = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    order = torch.randperm(len(groups), generator=generator).tolist()
    start = index * settings.groups_per_step
    return [groups[n] for n in order[start : start + settings.groups_per_step]]


def pairs_of(pack: Groups) -> Tensor:
    """int64 ``[N, 2]``: the groups' pairs as indices into the responses of the whole pack."""
    pairs, first = [], 0
    for group in pack:
        pairs += [(first + winner, first + loser) for winner, loser in group.pairs]
        first += len(group.responses)
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def train_step(policy: Scorer, reference: Scorer, groups: Groups, settings: Settings) -> dict[str, float]:
    """Accumulate the gradient of the mean DPO loss over all pairs of ``groups``; the means of the step."""
    total = sum(len(group.pairs) for group in groups)
    sums: dict[str, float] = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
    for pack in policy.split(groups):
        with torch.no_grad():
            reference_logps = reference.logps(pack)
        result = dpo_loss(
            policy.logps(pack),
            reference_logps,
            pairs_of(pack),
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
        )
        (result.losses.sum() / total).backward()
        for name, values in (("loss", result.losses), ("accuracy", result.correct), ("margin", result.margins)):
            sums[name] += values.sum().item() / total
    return {**sums, "pairs": total, "tokens": policy.tokens(groups)}


@torch.no_grad()
def accuracy(policy: Scorer, reference: Scorer, groups: Groups, settings: Settings) -> float:
    """Share of pairs in which the implicit reward prefers the chosen response; a tie counts one half."""
    policy.module.eval()
    correct = []
    for pack in policy.split(groups):
        result = dpo_loss(policy.logps(pack), reference.logps(pack), pairs_of(pack), beta=settings.beta)
        correct += result.correct.tolist()
    policy.module.train()
    return sum(correct) / len(correct)


def train(
    model: nn.Module,
    groups: Groups,
    held_out: Groups,
    settings: Settings,
    *,
    packing: Packing,
    out: Path,
    checkpoint_every: int,
    resume: bool,
) -> None:
    """Train ``model`` in place; writes metrics.jsonl, summary.json and checkpoints into ``out``."""
    started = time.perf_counter()
    scorer = (lambda module: Packed(module, settings.max_tokens)) if packing is Packing.on else OneByOne
    policy = scorer(model.train())
    reference = scorer(copy.deepcopy(model).eval().requires_grad_(False))
    first_accuracy = accuracy(policy, reference, held_out, settings)  # also compiles the graph of eval mode
    setup_seconds = time.perf_counter() - started

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    warm = max(1, settings.warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm))
    checkpoints = Checkpoints(out, model, optimizer, schedule, {**asdict(settings), "packing": packing.value})
    begin = checkpoints.load() if resume else 0
    metrics = Metrics(out, keep_steps=begin)
    usage, tokens, now = Usage(policy.device), 0, first_accuracy

    with progress_bar(f"packing {packing.value}") as bar:
        task = bar.add_task("", total=settings.steps, completed=begin, loss=math.nan, accuracy=math.nan)
        for step in range(begin, settings.steps):
            row = train_step(policy, reference, groups_of_step(step, groups, settings), settings)
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            row |= {"step": step, "grad_norm": norm.item(), "learning_rate": schedule.get_last_lr()[0]}
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            done = step + 1
            if done % settings.eval_every == 0 or done == settings.steps:
                row["eval_accuracy"] = now = accuracy(policy, reference, held_out, settings)
            metrics.write(row)
            tokens += int(row["tokens"])
            bar.update(task, completed=done, loss=row["loss"], accuracy=row["accuracy"])
            if checkpoint_every and done % checkpoint_every == 0:
                checkpoints.save(done)
    metrics.close()
    summary = {"tokens": tokens, "setup_seconds": setup_seconds, "eval_accuracy": now, **usage.read()}
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    console.print(f"held-out accuracy {first_accuracy:.3f} before training, {now:.3f} after")


def progress_bar(title: str) -> Progress:
    """A bar with the loss and accuracy of the last step."""
    return Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  accuracy {task.fields[accuracy]:.3f}"),
        TimeRemainingColumn(),
        console=console,
    )


# --------------------------------------------------------------------------- model and data


def embedded_task(settings: Settings) -> tuple[nn.Module, Groups]:
    """A small Llama and generated preferences: nothing to download."""
    from toy_preferences import ByteTokenizer, small_llama, spelling_preferences

    torch.set_num_threads(1)  # at this size, handing work to a second thread costs more than it saves
    count = math.ceil(settings.steps * settings.groups_per_step / (1 - settings.held_out)) + 1
    records = spelling_preferences(count, settings.seed)
    return small_llama(settings.seed), [tokenize(record, ByteTokenizer()) for record in records]


def own_task(
    model: str,
    tokenizer: str,
    data: str,
    device: str,
    dtype: str,
    limits: dict[str, int | None],
    reading: dict[str, Any],
) -> tuple[nn.Module, Groups]:
    """A Hugging Face model, and the records of ``data`` that hold a preference."""
    preferences = read_preferences(data, **reading)
    console.print(f"{data}: {preferences.summary()}")
    text = transformers.AutoTokenizer.from_pretrained(tokenizer)
    groups = [tokenize(record, text, **limits) for record in preferences if record.pairs]
    if not groups:
        raise typer.BadParameter(
            f"{data} holds no preference: give scores, or --unscored best-first if its responses stand best first",
            param_hint="--data",
        )
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(device), groups


def hold_out(groups: Groups, share: float) -> tuple[Groups, Groups]:
    """Training and held-out groups: the last ``share`` of the data, at least one group."""
    count = max(1, round(share * len(groups)))
    if count >= len(groups):
        raise typer.BadParameter(f"{len(groups)} groups are too few to hold out {count}", param_hint="--held-out")
    return groups[:-count], groups[-count:]


# --------------------------------------------------------------------------- command line


def run_both(out: Path, arguments: Sequence[str]) -> None:
    """Packed, then unpacked, each in a process of its own so that memory and clocks do not mix; then the comparison."""
    folders = {"packed": out / "packed", "unpacked": out / "unpacked"}
    for folder, packing in zip(folders.values(), ("on", "off"), strict=True):
        # The last of a repeated option counts.
        command = [sys.executable, __file__, *arguments, "--packing", packing, "--out", str(folder)]
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise typer.Exit(done.returncode)  # the run itself has said why
    plot(folders, out / "curves.png")
    difference = compare(folders["packed"], folders["unpacked"], console)
    console.print(f"largest difference between the losses of a step: {difference:.1e}")
    console.print(f"plot: {out / 'curves.png'}")


def main(
    model: Annotated[str | None, typer.Option(help="Hugging Face model, name or folder. Default: a small one.")] = None,
    data: Annotated[str | None, typer.Option(help="JSON(L) file, folder or data set name; needs --model.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Default: that of --model.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a folder or data set name.")] = None,
    limit: Annotated[int | None, typer.Option(help="Read at most this many records.")] = None,
    on_bad: Annotated[str | None, typer.Option(help="Bad records: error (default) or skip.")] = None,
    unscored: Annotated[str | None, typer.Option(help="Responses without scores: undecided or best-first.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Longer prompts lose their beginning.")] = None,
    max_response_tokens: Annotated[int | None, typer.Option(help="Longer responses lose their end.")] = None,
    device: Annotated[str | None, typer.Option(help="For --model; default: cuda if there, else cpu.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of --model; default float32.")] = None,
    packing: Annotated[Packing | None, typer.Option(help="Default: both; with --model, on.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; default: one pass over the data.")] = None,
    groups_per_step: Annotated[int | None, typer.Option(min=1, help="Groups of an optimizer step.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Token budget of a pack.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="AdamW's, after warmup.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Steps of linear warmup.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of the gradient.")] = None,
    beta: Annotated[float | None, typer.Option(help="DPO's beta.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="Assumed share of wrong labels.")] = None,
    held_out: Annotated[float | None, typer.Option(min=0, max=1, help="Share of the data for evaluation.")] = None,
    eval_every: Annotated[int | None, typer.Option(min=1, help="Steps between evaluations.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the data order, and of the embedded task.")] = None,
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: none.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --out.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for metrics, plot, checkpoint and the trained model.")] = Path(
        "runs/dpo"
    ),
    toy: Annotated[
        bool, typer.Option("--toy", help="Seconds instead of a minute: the embedded task, a few steps.")
    ] = False,
) -> None:
    """Train a causal LM with DPO, its preference pairs packed."""
    arguments = sys.argv[1:]
    names = Settings.__dataclass_fields__
    preset = TOY if toy else Settings() if model else EMBEDDED
    settings = replace(
        preset, **{name: value for name, value in locals().items() if name in names and value is not None}
    )
    out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()  # one bar is enough

    reading = {"split": split, "limit": limit, "on_bad": on_bad, "unscored": unscored}
    limits = {"max_prompt_tokens": max_prompt_tokens, "max_response_tokens": max_response_tokens}
    if model is None or data is None:
        needless = {"model": model, "data": data, "tokenizer": tokenizer, "device": device, "dtype": dtype}
        given = [name for name, value in {**needless, **reading, **limits}.items() if value is not None]
        if given:
            raise typer.BadParameter(
                f"{', '.join(given)}: --model and --data go together; without both, neither is used"
            )
    elif toy:
        raise typer.BadParameter("--toy is the embedded task; leave out --model and --data")
    packing = packing or (Packing.on if model else Packing.both)
    if packing is Packing.both:
        run_both(out, arguments)
        return

    if model is not None and data is not None:
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        chosen = {name: value for name, value in reading.items() if value is not None}
        network, groups = own_task(
            model, tokenizer or model, data, where, (dtype or Dtype.float32).value, limits, chosen
        )
    else:
        network, groups = embedded_task(settings)
    groups, evaluated = hold_out(groups, settings.held_out)
    settings = replace(settings, steps=settings.steps or math.ceil(len(groups) / settings.groups_per_step))
    train(
        network, groups, evaluated, settings, packing=packing, out=out, checkpoint_every=checkpoint_every, resume=resume
    )
    plot({f"packing {packing.value}": out}, out / "curves.png")
    network.save_pretrained(out / "model")
    console.print(f"metrics, plot and model: {out}")


if __name__ == "__main__":
    typer.run(main)
