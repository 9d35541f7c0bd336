"""A study in words, and its settings as code to paste."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ppcompile.plan.budgets import oversize_policy
from ppcompile.plan.cost import HEADROOM
from ppcompile.plan.study import CLOSE, ENOUGH_PACKS, USUAL_BUDGET, Study
from ppcompile.plan.wording import counted

__all__ = ["advice", "snippet"]

LITTLE = 1.1  # a reduction below this is not worth much
MUCH = 0.05  # what larger packs must gain to be worth a word
SHORT = 48  # tokens of a median response below which attention kernels gain less than its pairs say


def advice(study: Study) -> list[str]:
    """One or two sentences each: what gains and what does not, and what to look out for."""
    return [*_gain(study), *_sharing(study), *_padding(study), *_memory(study), *_records(study), *_model(study)]


def _gain(study: Study) -> Iterator[str]:
    first, layout = study.usual_costs[0], study.usual[0]
    padding = layout.slots / study.sharing.unpacked
    yield (
        f"Against padded batches of {layout.batch_size} records, packs compute "
        f"{first.slots / study.recommended.slots:.2f}x fewer tokens: {padding:.2f}x is padding, "
        f"{study.chosen.reduction:.2f}x what sequences share. Predicted: {study.cheaper(first):.2f}x fewer operations."
    )


def _sharing(study: Study) -> Iterator[str]:
    bound = study.sharing.reduction("prompt_once")
    repeated = 1 - 1 / bound
    if bound < LITTLE:
        yield f"Repeated prompts are {repeated:.0%} of the tokens: expect at most {bound:.2f}x from sharing them."
    else:
        yield f"Repeated prompts are {repeated:.0%} of the tokens: sharing them is worth {bound:.2f}x."
    whole, chosen = study.sharing.reduction("set_trie"), study.chosen
    if chosen.share == "tree":
        yield (
            f'Sequences also share beginnings beyond their own prompt: share="tree" reaches {chosen.reduction:.2f}x in '
            f"packs of {chosen.max_tokens:,} tokens, of {whole:.2f}x if the whole set were one pack."
        )
    else:
        yield (
            f'share="tree" would gain little here (at most {whole:.2f}x, if the whole set were one pack); '
            'share="prompt" plans faster.'
        )
    median = next(d.median for d in study.distributions if d.title == "response")
    if median < SHORT:
        yield (
            f"Responses are short (median {median:,.0f} tokens): attention over such short segments gains less than "
            "its pairs say. The rest of the model gains what the tokens say."
        )


def _padding(study: Study) -> Iterator[str]:
    for plain, by_length in zip(study.usual[::2], study.usual[1::2], strict=True):
        if plain.batch_size == study.usual[-1].batch_size:
            yield (
                f"Padding is {plain.waste:.0%} of batches of {plain.batch_size} as the data come and "
                f"{by_length.waste:.0%} where they are sorted by length; packs have none."
            )
    best = min(study.usual_costs, key=lambda layout: layout.flops)
    if study.cheaper(best) < LITTLE:
        yield f"Packing will not gain much: {best.name}, is as good within {study.cheaper(best) - 1:.0%}."


def _memory(study: Study) -> Iterator[str]:
    machine, chosen = study.machine, study.chosen
    room = f"{HEADROOM:.0%} of {machine.memory / 1e9:,.0f} GB"
    if study.fits == 0:
        yield (
            f"{room} do not hold this model at {machine.state_bytes:g} bytes a parameter on "
            f"{counted(machine.shards, 'device')}. Try: --shards, --state-bytes (8 for AdamW in pure bfloat16, 2 for "
            "adapters), or more --memory."
        )
    else:
        yield f"{room} hold packs of up to {study.fits:,} tokens."
        most = max(entry.reduction for entry in study.budgets)
        larger = next(entry for entry in study.budgets if entry.reduction >= (1 - CLOSE) * most)
        if larger.reduction > (1 + MUCH) * chosen.reduction:
            yield (
                f"Packs of {larger.max_tokens:,} tokens would reach {larger.reduction:.2f}x, in "
                f"{counted(larger.steps, 'pack')} an epoch. Try: --max-tokens, if so few steps are enough."
            )
        if study.fits < min(USUAL_BUDGET, study.sharing.prompt_once) and machine.checkpoint is None:
            yield "Packs are small for a GPU. Try: --checkpoint layer, which trades a forward for memory."
    if 0 < study.fits < chosen.largest:
        yield f"Packs of {chosen.largest:,} tokens, as asked for with --max-tokens, are predicted not to fit."
    if chosen.beyond:
        yield f"{counted(chosen.beyond, 'record')} beyond a pack of {chosen.max_tokens:,} tokens: {_fate(study)}."


def _fate(study: Study) -> str:
    """What becomes of records beyond the budget."""
    chosen, policy = study.chosen, oversize_policy(study.reading.pairs)
    found = ["split over several packs"] if "split" in policy else []
    if chosen.cut:
        found.append(f"{counted(chosen.cut, 'record')} cut at the end")
    if chosen.dropped:
        found.append(f"{counted(chosen.dropped, 'sequence')} dropped")
    return f"{', '.join(found)} (oversize={policy!r})"


def _records(study: Study) -> Iterator[str]:
    reading, chosen = study.reading, study.chosen
    if chosen.steps < ENOUGH_PACKS:
        yield (
            f"An epoch is only {counted(chosen.steps, 'pack')}, of about "
            f"{counted(round(study.sample_count / chosen.steps), 'record')}. Try: --max-tokens, if you want more steps."
        )
    if reading.bad:
        yield f"{reading.bad:,} of {reading.records:,} records were skipped; the first: {reading.reasons[0]}"
    if reading.undecided and reading.pairs:
        yield f"Left out: {counted(reading.undecided, 'record')} in which no response is preferred."
    elif reading.undecided:
        unscored = any(sample.scores is None and sample.pairs is None for sample in reading.samples)
        listed = "--unscored best-first, if responses are listed so, or " if unscored else ""
        yield (
            f"In {counted(reading.undecided, 'record')} no response is preferred; they are measured all the same, and "
            f"a loss over pairs leaves them out. Try: {listed}--pairs."
        )


def _model(study: Study) -> Iterator[str]:
    size = study.size
    if size.max_positions is not None and study.longest > size.max_positions:
        yield (
            f"The longest sequence has {study.longest:,} tokens and the model {size.max_positions:,} positions: such "
            "sequences are refused in training."
        )
    if study.largest_id >= size.vocabulary:
        yield (
            f"Token id {study.largest_id:,} is beyond the model's vocabulary of {size.vocabulary:,}: the tokenizer "
            "belongs to another model."
        )


# --------------------------------------------------------------------------- code


def snippet(
    study: Study, *, data: str, tokenizer: str | None, split: str | None = None, unscored: str = "undecided"
) -> str:
    """Python that packs the data as recommended; it runs as it stands."""
    reading, chosen = study.reading, study.chosen
    imports, source = ["import ppcompile"], _text(data)
    if tokenizer is not None:
        imports.insert(0, "from transformers import AutoTokenizer\n")
    if split is not None:
        imports.append("from ppcompile.data import read_preferences")
        source = f'read_preferences({source}, split={_text(split)}, on_bad="skip")'
    options: dict[str, str | None] = {
        "tokenizer": None if tokenizer is None else f"AutoTokenizer.from_pretrained({_text(tokenizer)})",
        "share": _text(chosen.share),
        "max_tokens": f"{chosen.max_tokens}",
        "oversize": f"({', '.join(map(_text, oversize_policy(reading.pairs)))})" if chosen.beyond else None,
        "on_bad": _text("skip") if reading.bad else None,
        "unscored": None if unscored == "undecided" else _text(unscored),
        "pairs": "False" if reading.undecided and not reading.pairs else None,
    }
    arguments = [source, *(f"{name}={value}" for name, value in options.items() if value is not None)]
    lines = [*imports, "", "loader = ppcompile.PackedDataLoader(", *(f"    {argument}," for argument in arguments), ")"]
    if study.machine.checkpoint is not None:
        lines.append(f"# and: packed = ppcompile.wrap(model, checkpoint={_text(study.machine.checkpoint)})")
    return "\n".join(lines)


def _text(value: str) -> str:
    """A string as Python writes it between double quotes."""
    return json.dumps(value, ensure_ascii=False)
