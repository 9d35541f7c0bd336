"""One DPO step (forward, loss, backward) in five layouts, side by side.

padded      rows of prompt + response, chosen rows then rejected rows, padded to the longest of the batch, logits for
            every token: the usual DPO layout, on the eager model
sorted      the same, with the batches made of groups of similar length
one by one  the eager model, one sequence at a time, no padding, no logits on the prompt
unshared    ppcompile, every response packed with a prompt of its own
packed      ppcompile, every prompt once

Process CPU time of one thread, layouts interleaved batch by batch, medians over repeats with their spread. A layout's
ratio can at best be its ratio of tokens, printed beside it (attention aside, which shares more than tokens do).
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import ppcompile
from ppcompile.losses import dpo_loss

from .workload import Batch, Tokens, batches_of, by_length, count_tokens, groups_of, llama, longest

LAYOUTS = ("padded", "sorted", "one by one", "unshared", "packed")
Step = Callable[[Batch], Tensor]


def _pairs(batch: Batch) -> list[tuple[int, int]]:
    """The first response of each group against each of the others, as indices of responses."""
    pairs, start = [], 0
    for group in batch:
        pairs += [(start, start + n) for n in range(1, len(group.responses))]
        start += len(group.responses)
    return pairs


def _loss(logps_R: Tensor, batch: Batch) -> Tensor:
    return dpo_loss(logps_R, torch.zeros_like(logps_R), _pairs(batch)).losses.mean()


def padded_step(model: nn.Module) -> Step:
    """Logits for every token of right-padded rows, the first response of every group first."""

    def run(batch: Batch) -> Tensor:
        most = max(len(group.responses) for group in batch)
        order = [(g, n) for n in range(most) for g, group in enumerate(batch) if n < len(group.responses)]
        rows = [(batch[g].prompt, batch[g].responses[n]) for g, n in order]
        width = max(map(longest, batch))
        ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
        scored = torch.zeros(len(rows), width, dtype=torch.bool)
        for row, (prompt, response) in enumerate(rows):
            length = len(prompt) + len(response)
            ids[row, :length] = torch.tensor([*prompt, *response])
            mask[row, :length] = 1
            scored[row, len(prompt) : length] = True
        logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        target = logits.gather(2, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        logps = (target * scored[:, 1:]).sum(1)
        return _loss(logps[_original_order(order, batch)], batch)

    return run


def _original_order(order: list[tuple[int, int]], batch: Batch) -> list[int]:
    place = {key: row for row, key in enumerate(order)}
    return [place[g, n] for g, group in enumerate(batch) for n in range(len(group.responses))]


def one_by_one_step(model: Any) -> Step:
    """The eager model's body on each sequence, its head on the response only."""

    def run(batch: Batch) -> Tensor:
        logps = []
        for group in batch:
            for response in group.responses:
                ids = torch.tensor([[*group.prompt, *response]])
                start = len(group.prompt)
                hidden = model.model(ids, use_cache=False).last_hidden_state[0, start - 1 : -1]
                logits = model.lm_head(hidden)
                logps.append((logits.gather(1, ids[0, start:, None])[:, 0] - logits.logsumexp(-1)).sum())
        return _loss(torch.stack(logps), batch)

    return run


def packed_step(packed: nn.Module, share: bool) -> Step:
    """One pack for the batch."""

    def run(batch: Batch) -> Tensor:
        groups = batch if share else [ppcompile.Group(g.prompt, [r]) for g in batch for r in g.responses]
        return _loss(packed(ppcompile.pack(groups)).logps, batch)

    return run


def _step_of(layout: str, model: Any) -> Step:
    if layout in ("padded", "sorted"):
        return padded_step(model)
    if layout == "one by one":
        return one_by_one_step(model)
    return packed_step(ppcompile.wrap(model), share=layout == "packed")


def _interleaved(
    steps: dict[str, Step], model: nn.Module, batches: list[Batch], repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """CPU seconds of each layout for all batches, once per repeat, and each layout's summed loss."""
    seconds = {layout: [0.0] * repeats for layout in steps}
    losses = dict.fromkeys(steps, 0.0)
    of_layout = {layout: by_length(batches) if layout == "sorted" else batches for layout in steps}
    rounds = [(r, n) for r in range(repeats) for n in range(len(batches))]
    for repeat, n in track(rounds, description="steps", transient=True):
        for layout, step in steps.items():
            model.zero_grad()
            start = time.process_time()
            loss = step(of_layout[layout][n])
            loss.backward()
            seconds[layout][repeat] += time.process_time() - start
            losses[layout] += loss.item() / repeats
    return seconds, losses


def _report(console: Console, seconds: dict[str, list[float]], tokens: Tokens, memory: dict[str, float]) -> None:
    bound = {
        "padded": tokens.padded, "sorted": tokens.sorted, "one by one": tokens.unshared, "unshared": tokens.unshared,
        "packed": tokens.packed,
    }  # fmt: skip
    table = Table("layout", "tokens", "CPU s (median)", "spread", "packed is", "token bound", "peak memory MB")
    for layout, runs in seconds.items():
        ratios = [a / b for a, b in zip(runs, seconds["packed"], strict=True)]
        table.add_row(
            layout,
            f"{bound[layout]:,}",
            f"{statistics.median(runs):.2f}",
            f"{min(runs):.2f} .. {max(runs):.2f}",
            f"{statistics.median(ratios):.2f}x cheaper",
            f"{bound[layout] / tokens.packed:.2f}x",
            f"{memory[layout]:,.0f}" if layout in memory else "",
        )
    console.print(table)


def _peak_memory(layout: str, arguments: list[str]) -> float:
    """Peak resident memory, in MB, that the batch of median length adds in one layout, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks", "step", *arguments, "--memory-of", layout]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1])["peak_mb"])


def _print_own_peak(layout: str, model: nn.Module, batches: list[Batch]) -> None:
    step = _step_of(layout, model)
    small = [ppcompile.Group(g.prompt[:8], [r[:8] for r in g.responses]) for g in batches[0]]
    step(small).backward()  # compile and allocate gradients first
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    typical = sorted(batches, key=lambda batch: max(map(longest, batch)))[len(batches) // 2]
    step(typical).backward()
    print(json.dumps({"peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}))


def main(
    data: Annotated[str, typer.Option(help="dpo_en, qa_feedback or synthetic")] = "dpo_en",
    width: Annotated[int, typer.Option(help="hidden size of the Llama, a multiple of 64")] = 384,
    layers: Annotated[int, typer.Option(help="its layers")] = 8,
    pairs: Annotated[int, typer.Option(help="groups a batch")] = 4,
    batches: Annotated[int, typer.Option(help="batches, spread evenly over the data; 0 for all")] = 8,
    repeats: Annotated[int, typer.Option(help="repeats of everything")] = 3,
    memory: Annotated[bool, typer.Option(help="measure peak memory in fresh processes too")] = True,
    memory_of: Annotated[str, typer.Option(hidden=True)] = "",
    out: Annotated[Path | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """Run and print; see the module's text."""
    torch.set_num_threads(1)
    groups, source = groups_of(data)
    chosen = batches_of(groups, pairs, batches or None)
    model = llama(width, layers).train()
    if memory_of:
        _print_own_peak(memory_of, model, chosen)
        return
    console = Console()
    size = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"{source}; Llama {size:.0f}M float32, torch {torch.__version__}, 1 thread; {len(chosen)} batches of {pairs}"
    )
    steps = {layout: _step_of(layout, model) for layout in LAYOUTS}
    for step in steps.values():
        step([ppcompile.Group(g.prompt[:8], [r[:8] for r in g.responses]) for g in chosen[0]]).backward()
    seconds, losses = _interleaved(steps, model, chosen, repeats)
    arguments = list(_arguments(data, width, layers, pairs, batches))
    peaks = {layout: _peak_memory(layout, arguments) for layout in LAYOUTS} if memory else {}
    tokens = count_tokens(chosen)
    _report(console, seconds, tokens, peaks)
    console.print("summed losses: " + ", ".join(f"{layout} {value:.5f}" for layout, value in losses.items()))
    if out is not None:
        out.write_text(
            json.dumps({"source": source, "seconds": seconds, "tokens": vars(tokens), "memory": peaks}, indent=1)
        )


def _arguments(data: str, width: int, layers: int, pairs: int, batches: int) -> Iterator[str]:
    for name, value in (("data", data), ("width", width), ("layers", layers), ("pairs", pairs), ("batches", batches)):
        yield from (f"--{name}", str(value))
