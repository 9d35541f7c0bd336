"""The numbers of a study as rows of text, for the terminal and the page alike; the first row is the header."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ppcompile.plan.lengths import Distribution
from ppcompile.plan.study import Study

__all__ = [
    "BUDGET_NOTE",
    "LAYOUT_NOTE",
    "budget_rows",
    "counted",
    "gigabytes",
    "layout_rows",
    "length_rows",
    "operations",
    "padding_rows",
    "record_rows",
    "sharing_rows",
    "size_line",
]

Rows = list[list[str]]

BUDGET_NOTE = (
    "prompt, tree: packs of an epoch; fewer: times fewer tokens than unpacked; GB: predicted memory of a step; "
    "* recommended"
)
LAYOUT_NOTE = (
    "tokens: computed in an epoch, padding included; cost: operations, over those of the recommended packs; "
    "GB: memory of the largest step; * recommended; ! more than the memory of a device"
)

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def counted(count: int, noun: str) -> str:
    """``1 record``, ``2,000 records``."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def operations(count: float) -> str:
    """``8.25 Pflop``."""
    prefix, size = _prefix(count)
    return f"{count / size:.3g} {prefix}flop"


def _prefix(count: float) -> tuple[str, float]:
    """The prefix of a unit that makes a count readable, and what it stands for."""
    power = min(len(_PREFIXES) - 1, int(math.log10(count)) // 3) if count >= 1 else 0
    return _PREFIXES[power], 1000.0**power


def gigabytes(count: float) -> str:
    """``51.1 GB``, of 10 ** 9 bytes."""
    return f"{count / 1e9:,.1f} GB"


def size_line(study: Study) -> str:
    """Which model and machine costs are predicted for."""
    size, machine = study.size, study.machine
    heads = f"{size.heads} heads, " if size.heads is not None else ""
    states = f"{machine.state_bytes:g} bytes a parameter of states over {counted(machine.shards, 'device')}"
    checkpoint = "activations recomputed by layer" if machine.checkpoint else "activations kept"
    return (
        f"{size.name}: {size.layers} layers, {heads}hidden {size.hidden_size:,}, vocabulary {size.vocabulary:,}, "
        f"{8 * size.itemsize}-bit activations; {machine.memory / 1e9:,.0f} GB a device, {states}, {checkpoint}"
    )


def record_rows(study: Study) -> Rows:
    """What was read, and what became of it; without a header."""
    reading = study.reading
    sequences = sum(sample.record.num_sequences for sample in reading.samples)
    undecided = f" ({'left out' if reading.pairs else 'measured too'})" if reading.undecided else ""
    rows = [
        ["records", f"{reading.records:,}"],
        ["measured", f"{study.sample_count:,} with {sequences:,} sequences"],
        ["spelled", reading.schema],
        ["skipped as bad", f"{reading.bad:,}"],
        ["no response preferred", f"{reading.undecided:,}{undecided}"],
    ]
    return rows + [["  bad", reason] for reason in reading.reasons]


def length_rows(distributions: Sequence[Distribution]) -> Rows:
    """One row a distribution."""
    rows = [["tokens of", "least", "median", "mean", "p95", "most"]]
    for d in distributions:
        form = ",.0f" if d.edges[-1] > 1 else ".0%"
        rows.append([d.title, *(format(value, form) for value in (d.least, d.median, d.mean, d.p95, d.most))])
    return rows


def sharing_rows(study: Study) -> Rows:
    """Unique tokens of the set."""
    sharing = study.sharing
    named = {
        "unpacked": "nothing",
        "prompt_once": "each record's prompt",
        "record_trie": "every beginning inside a record",
        "set_trie": "every beginning in the set",
    }
    rows = [["stored once", "tokens", "fewer"]]
    return rows + [[title, f"{getattr(sharing, k):,}", f"{sharing.reduction(k):.2f}x"] for k, title in named.items()]


def padding_rows(study: Study) -> Rows:
    """Waste at each batch size."""
    rows = [["records a batch", "batches", "padding as it comes", "sorted by length"]]
    for plain, by_length in zip(study.usual[::2], study.usual[1::2], strict=True):
        rows.append([f"{plain.batch_size}", f"{plain.steps:,}", f"{plain.waste:.1%}", f"{by_length.waste:.1%}"])
    return rows


def budget_rows(study: Study) -> Rows:
    """Packs at each budget, both ways of sharing."""
    rows = [["max_tokens", "prompt", "fewer", "filled", "tree", "fewer", "filled", "GB"]]
    for prompt, tree in zip(study.budgets[::2], study.budgets[1::2], strict=True):
        mark = " *" if prompt.max_tokens == study.chosen.max_tokens else ""
        cells = [text for e in (prompt, tree) for text in (f"{e.steps:,}", f"{e.reduction:.2f}x", f"{e.fill:.1%}")]
        rows.append([f"{prompt.max_tokens:,}{mark}", *cells, f"{study.bytes_of(prompt) / 1e9:,.1f}"])
    return rows


def layout_rows(study: Study) -> Rows:
    """An epoch of each layout."""
    # By the least of each, so that none rounds to a single digit.
    epoch, epoch_size = _prefix(min(layout.flops for layout in study.layouts))
    step, step_size = _prefix(min(layout.flops / layout.steps for layout in study.layouts))
    rows = [["layout", "steps", "tokens", "padding", f"{epoch}flop", f"{step}flop a step", "cost", "GB"]]
    for layout in study.layouts:
        rows.append(
            [
                layout.name + " *" * (layout is study.recommended),
                f"{layout.steps:,}",
                f"{layout.slots:,}",
                f"{layout.padding / layout.slots:.0%}",
                f"{layout.flops / epoch_size:,.1f}",
                f"{layout.flops / layout.steps / step_size:,.1f}",
                f"{study.cheaper(layout):.2f}x",
                f"{layout.bytes / 1e9:,.1f}" + " !" * (layout.bytes > study.machine.memory),
            ]
        )
    return rows
