"""``ppcompile plan``: what it measures against brute force, what it predicts against models, and the command itself."""

from __future__ import annotations

import base64
import itertools
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, LlamaForCausalLM, MixtralConfig
from typer.testing import CliRunner

import ppcompile
from ppcompile.cli import app
from ppcompile.plan import advice
from ppcompile.plan.budgets import Packed, packed
from ppcompile.plan.command import memory_of
from ppcompile.plan.cost import HEADROOM, Machine, epoch_flops, fitting_budget, step_bytes
from ppcompile.plan.figures import plots
from ppcompile.plan.lengths import Lengths, distributions, padded, sharing
from ppcompile.plan.reading import read
from ppcompile.plan.size import ModelSize, model_size
from ppcompile.plan.study import Study, best, study
from ppcompile.runtime.groups import as_record

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data (real preference sets) is not there")

SIZE = ModelSize(
    name="made up, 1M parameters",
    parameters=1_000_000,
    layers=4,
    heads=2,
    hidden_size=64,
    vocabulary=1000,
    max_positions=512,
    itemsize=2,
    token_flops=2e6,
    pair_flops=1e3,
    head_flops=1e5,
    kept_bytes=10_000.0,
)


def rows(count: int = 40, seed: int = 0, preamble: int = 0, prompt: int = 30, response: int = 20) -> list[dict]:
    """Records of token ids, two responses each, the first preferred; prompts begin with the same tokens."""
    rng = np.random.default_rng(seed)

    def ids(mean: int) -> list[int]:
        return rng.integers(0, 500, rng.integers(1, 2 * mean)).tolist()

    return [
        {"prompt": [*range(preamble), *ids(prompt)], "responses": [ids(response), ids(response)], "scores": [1, 0]}
        for _ in range(count)
    ]


@pytest.fixture
def data(tmp_path: Path):
    """``data(records)``: the path of a file that holds them."""
    number = itertools.count()

    def write(records: list) -> Path:
        path = tmp_path / f"data{next(number)}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def records_of(raw: list[dict]):
    return [as_record((row["prompt"], row["responses"]), "record") for row in raw]


def study_of(path: Path, size: ModelSize = SIZE, machine: Machine | None = None, **options) -> Study:
    return study(read(str(path)), size, machine or Machine(memory=10e9), **options)


# --------------------------------------------------------------------------- measured


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("by_length", [False, True])
def test_padding_is_that_of_batches_written_out(batch_size: int, by_length: bool) -> None:
    raw = rows()
    raw[5]["responses"].append([1] * 90)  # records may hold different numbers of responses
    sequences = [[len(row["prompt"]) + len(ids) for ids in row["responses"]] for row in raw]
    if by_length:
        sequences.sort(key=max)
    batches = [[*itertools.chain(*sequences[n : n + batch_size])] for n in range(0, len(sequences), batch_size)]
    layout = padded(Lengths.of(records_of(raw)), batch_size, by_length)
    assert layout.steps == len(batches)
    assert layout.slots == sum(max(batch) * len(batch) for batch in batches)
    assert layout.slots - layout.padding == sum(map(sum, sequences))
    assert layout.pairs == sum(len(batch) * sum(range(max(batch) + 1)) for batch in batches)
    assert layout.largest == max(max(batch) * len(batch) for batch in batches)


def test_unique_tokens_are_those_of_prefixes_in_a_set() -> None:
    raw = rows(preamble=6)
    raw[1]["responses"][1] = [*raw[1]["responses"][0][:3], 7]
    raw[2] = raw[3]  # a whole record twice
    counts, between = sharing(records_of(raw))
    sequences = [[tuple(row["prompt"] + ids) for ids in row["responses"]] for row in raw]

    def prefixes(of: list[tuple[int, ...]]) -> int:
        return len({sequence[:n] for sequence in of for n in range(1, len(sequence) + 1)})

    assert counts.unpacked == sum(len(sequence) for group in sequences for sequence in group)
    assert counts.prompt_once == sum(len(row["prompt"]) + sum(map(len, row["responses"])) for row in raw)
    assert counts.record_trie == sum(map(prefixes, sequences))
    assert counts.set_trie == prefixes([sequence for group in sequences for sequence in group])

    def shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
        return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    firsts = [group[0] for group in sequences]
    expected = [max(shared(a, b) for m, b in enumerate(firsts) if m != n) for n, a in enumerate(firsts)]
    assert between.tolist() == expected


@pytest.mark.parametrize("values", [[5], [3, 3, 3], [0, 0], [0, 1, 5000], [1000, 1001, 1999], [1, 8], [*range(1, 300)]])
def test_every_value_is_in_one_bin(values: list[int]) -> None:
    lengths = Lengths(np.array(values), np.array([1] * len(values)), np.array([1] * len(values)))
    found = distributions(lengths, np.array(values))[0]
    assert sum(found.counts) == len(values)
    assert len(found.counts) == len(found.edges) - 1 <= 40
    by_hand = [sum(low <= v < high for v in values) for low, high in itertools.pairwise(found.edges)]
    assert list(found.counts) == by_hand
    assert found.counts[0]
    assert found.counts[-1]
    assert (found.least, found.most) == (min(values), max(values))


def test_packs_are_those_of_training(data) -> None:
    path = data(rows(200, preamble=40))
    reading = read(str(path))
    for share in ("prompt", "tree"):
        found = packed(reading.samples, 1024, share, count_scored=True)
        loader = ppcompile.PackedDataLoader(path, max_tokens=1024, share=share)
        batches = list(loader)
        assert found.steps == len(batches)
        assert found.slots == sum(batch.num_tokens for batch in batches)
        assert found.pairs == sum(int((batch.position_ids + 1).sum()) for batch in batches)
        assert found.scored == sum(len(batch.targets) for batch in batches)
        assert found.largest == max(batch.num_tokens for batch in batches) <= 1024
    unshared = packed(reading.samples, 1024, "none", count_scored=True)
    assert unshared.slots == unshared.unpacked == found.unpacked
    assert unshared.scored == sum(sample.record.num_scored for sample in reading.samples)


def test_bad_records_are_skipped_with_their_reason(data) -> None:
    found = read(str(data([*rows(5), {"prompt": [1], "responses": []}, {"prompt": [1, -2], "responses": [[3]]}])))
    assert (found.records, found.bad, len(found.samples)) == (7, 2, 5)
    assert "data0.jsonl:6" in found.reasons[0]
    assert "has no responses" in found.reasons[0]


def test_records_without_a_preference_are_measured_unless_pairs_are_asked_for(data) -> None:
    raw = rows(6)
    raw[2]["scores"] = [0, 0]
    both = read(str(data(raw)))
    assert (len(both.samples), both.undecided, both.pairs) == (6, 1, False)
    decided = read(str(data(raw)), pairs=True)
    assert (len(decided.samples), decided.undecided, decided.pairs) == (5, 1, True)


# --------------------------------------------------------------------------- counted on models


def small_llama(**options) -> LlamaConfig:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    return LlamaConfig(**{**sizes, **options})


def test_operations_of_a_llama_are_those_of_its_weights() -> None:
    size = model_size(small_llama(num_key_value_heads=2))
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 256
    assert size.token_flops == 4 * 2 * layer
    assert size.pair_flops == 4 * 2 * 2 * 64  # query times key, probability times value
    assert size.head_flops == 2 * 64 * 300
    assert size.parameters == 4 * (layer + 2 * 64) + 64 + 2 * 64 * 300
    assert (size.layers, size.heads, size.hidden_size, size.vocabulary, size.itemsize) == (4, 4, 64, 300, 2)


def test_operations_of_experts_are_those_of_the_chosen_ones() -> None:
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    assert model_size(config).token_flops == 2 * 2 * (4 * 64 * 64 + 64 * 8 + 2 * 3 * 64 * 128)


def test_layers_that_are_no_linear_modules_are_counted() -> None:
    size = model_size(GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=256))
    assert size.token_flops == 2 * 2 * 12 * 64 * 64
    assert size.max_positions == 256


class Odd(nn.Module):
    """A model that breaks one of the assumptions under which costs are counted."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed, self.body, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.how == "headless" else self.head

    def forward(self, ids: torch.Tensor, **options: object) -> torch.Tensor:
        hidden = self.embed(ids)
        if self.how == "looks at data" and ids.sum().item():
            return hidden
        if self.how != "unknown operators":
            hidden = self.body(hidden)
        for _ in range((ids.numel() // 64) ** 3 if self.how == "cubic" else 0):
            hidden = self.body(hidden)
        return self.head(self.head(hidden)[..., :8] if self.how == "two heads" else hidden)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("looks at data", "meta tensors"),
        ("headless", "names no output embeddings"),
        ("two heads", "calls the output embeddings 2 times"),
        ("unknown operators", "0 operations a token are too few: its linear layers alone need 128"),
        ("cubic", r"cost is not a \+ b L \+ c L\*\*2"),
    ],
)
def test_a_model_that_cannot_be_counted_says_why(how: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppcompile.plan.size.on_meta", lambda config, **options: Odd(how).to("meta"))
    with pytest.raises(ValueError, match=f"'odd' cannot be counted on the meta device .*{reason}"):
        model_size(SimpleNamespace(model_type="odd"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpoint", [None, "layer"])
def test_kept_bytes_are_what_the_packed_model_keeps(dtype: str, checkpoint: str | None) -> None:
    config = small_llama()
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).train()
    packed_model = ppcompile.wrap(model, checkpoint=checkpoint)
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def kept(length: int) -> int:
        storages = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        half = [*range(length // 2)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            packed_model(ppcompile.pack([ppcompile.Group(half, [half[: length // 4], half[: length // 4]])]))
        return sum(storage.nbytes() for name, storage in storages.items() if name not in own)

    measured = (kept(512) - kept(256)) / 256
    size = model_size(config, dtype)
    machine = Machine(checkpoint=checkpoint)
    predicted = step_bytes(fake_pack(1), size, machine) - step_bytes(fake_pack(0), size, machine)
    recomputed = size.kept_bytes / size.layers if checkpoint else 0  # of the one layer that the backward runs again
    assert predicted - recomputed == pytest.approx(measured, rel=0.15)


# --------------------------------------------------------------------------- predicted


def fake_pack(largest: int) -> Packed:
    return Packed("prompt", 1024, 3, 3000, 4000, 90_000, 700, largest, 0, 0, 0)


def test_costs_follow_the_formulas() -> None:
    layout = padded(Lengths.of(records_of(rows())), 4, False)
    plain, again = Machine(memory=1e9), Machine(memory=1e9, checkpoint="layer", shards=4, state_bytes=8)
    body = 2e6 * layout.slots + 1e3 * layout.pairs
    assert epoch_flops(layout, SIZE, plain) == pytest.approx(3 * body + 3 * 1e5 * layout.slots)
    assert epoch_flops(layout, SIZE, again) == pytest.approx(4 * body + 3 * 1e5 * layout.slots)
    assert epoch_flops(fake_pack(1000), SIZE, plain) == pytest.approx(3 * (2e6 * 3000 + 1e3 * 90_000) + 4 * 1e5 * 700)
    logits = 2 * 2 * 1000
    assert step_bytes(layout, SIZE, plain) == pytest.approx(16e6 + (10_000 + logits) * layout.largest)
    assert step_bytes(layout, SIZE, again) == pytest.approx(2e6 + ((4 + 3) * 64 * 2 + 2500 + logits) * layout.largest)
    assert step_bytes(fake_pack(1000), SIZE, plain) == pytest.approx(16e6 + 10_000 * 1000 + 4 * 4 * 2**26)


@pytest.mark.parametrize("checkpoint", [None, "layer"])
def test_the_largest_budget_just_fits(checkpoint: str | None) -> None:
    machine = Machine(memory=2e9, checkpoint=checkpoint)
    budget = fitting_budget(SIZE, machine)
    assert (
        step_bytes(fake_pack(budget), SIZE, machine)
        <= HEADROOM * 2e9
        < step_bytes(fake_pack(budget + 1), SIZE, machine)
    )


# --------------------------------------------------------------------------- chosen


def packs_at(max_tokens: int, share: str, reduction: float, steps: int) -> Packed:
    return Packed(share, max_tokens, steps, 1000, round(1000 * reduction), 0, 0, max_tokens, 0, 0, 0)


def both(max_tokens: int, prompt: float, tree: float, steps: int) -> list[Packed]:
    return [packs_at(max_tokens, "prompt", prompt, steps), packs_at(max_tokens, "tree", tree, steps)]


@pytest.mark.parametrize(
    ("budgets", "wanted", "expected"),
    [
        # Nothing grows with the budget: the usual one, and the simpler way to share.
        ([(8192, 2.0, 2.01, 80), (16384, 2.0, 2.01, 40), (32768, 2.0, 2.01, 20)], None, (16384, "prompt")),
        ([(8192, 2.0, 2.1, 80), (16384, 2.0, 2.1, 40)], None, (16384, "tree")),
        # A preamble is shared by more sequences in larger packs, up to a point.
        ([(8192, 3, 6, 200), (16384, 3, 8, 99), (32768, 3, 9, 50), (65536, 3, 9.05, 25)], None, (32768, "tree")),
        ([(8192, 3, 6, 200), (16384, 3, 8, 99), (32768, 3, 9, 15)], None, (16384, "tree")),  # too few packs
        ([(1024, 2, 2, 40), (2048, 2, 2, 20), (4096, 2, 2, 10)], None, (2048, "prompt")),  # a small set
        ([(16384, 2, 2, 9), (32768, 2, 2, 5)], None, (16384, "prompt")),  # all make few packs
        ([(4096, 3, 6, 200), (16384, 3, 8, 99)], 4096, (4096, "tree")),
    ],
)
def test_the_budget_follows_its_rules(budgets: list[tuple], wanted: int | None, expected: tuple[int, str]) -> None:
    chosen = best([entry for budget in budgets for entry in both(*budget)], wanted)
    assert (chosen.max_tokens, chosen.share) == expected


def test_candidates_reach_from_the_largest_record_to_the_whole_set(data) -> None:
    raw = rows(200)
    raw[0]["prompt"] = [1] * 1500
    found = study_of(data(raw))
    budgets = [entry.max_tokens for entry in found.budgets[::2]]
    assert budgets == [2048, 4096, 8192, 16384]
    assert 8192 < found.sharing.prompt_once < 16384
    assert found.recommended.slots == found.sharing.prompt_once
    assert "would reach" not in " ".join(advice.advice(found))


def test_a_preamble_is_worth_a_tree_and_a_word_on_large_packs(data) -> None:
    found = study_of(data(rows(300, preamble=900)))
    assert found.chosen.share == "tree"
    assert found.chosen.steps >= 16
    words = " ".join(advice.advice(found))
    assert re.search(r"Packs of [\d,]+ tokens would reach 2\d\.\d+x, in \d packs? an epoch", words)


def test_memory_bounds_the_budget(data) -> None:
    machine = Machine(memory=1.28e9)
    found = study_of(data(rows(1500)), machine=machine)
    assert 1024 < found.fits < 16384
    assert max(entry.max_tokens for entry in found.budgets) == found.fits // 1024 * 1024
    assert found.recommended.bytes <= HEADROOM * machine.memory
    words = " ".join(advice.advice(found))
    assert f"hold packs of up to {found.fits:,} tokens" in words
    assert "--checkpoint layer" in words


def test_records_beyond_memory_are_told(data) -> None:
    long = {"prompt": [1] * 9000, "responses": [[2] * 30, [3] * 40], "scores": [1, 0]}
    found = study_of(data([*rows(300), long]), machine=Machine(memory=1.28e9))
    assert found.chosen.max_tokens < 9000
    assert found.chosen.beyond == 1
    words = " ".join(advice.advice(found))
    assert f"1 record beyond a pack of {found.chosen.max_tokens:,} tokens: 2 sequences dropped (oversize=" in words
    assert 'oversize=("keep_start", "drop")' in advice.snippet(found, data="x.jsonl", tokenizer=None)


def test_a_model_that_does_not_fit_is_told(data) -> None:
    found = study_of(data(rows()), machine=Machine(memory=1e6))
    assert found.fits == 0
    assert "do not hold this model" in " ".join(advice.advice(found))


def test_a_budget_that_is_asked_for_is_taken(data) -> None:
    path = data(rows(300))
    assert study_of(path, max_tokens=3000).chosen.max_tokens == 3000
    with pytest.raises(ValueError, match="no record fits into packs of 1 tokens"):
        study_of(data([{"prompt": [1, 2], "responses": [[3], [4]], "scores": [1, 0]}]), max_tokens=1)


def test_advice_says_where_packing_will_not_gain(data) -> None:
    raw = [{"prompt": [n % 7] * 5, "responses": [[n] * 95, [n + 1] * 95], "scores": [1, 0]} for n in range(64)]
    words = advice.advice(study_of(data(raw)))
    assert "Repeated prompts are 2% of the tokens: expect at most 1.03x from sharing them." in words
    assert any(line.startswith("Packing will not gain much: padded ") for line in words)
    assert any("An epoch is only" in line for line in words)
    gains = advice.advice(study_of(data(rows(200, prompt=300))))
    assert not any("will not gain" in line or "expect at most" in line for line in gains)


def test_advice_sees_a_model_that_does_not_take_the_data(data) -> None:
    raw = rows(20)
    raw[3]["prompt"] = [5] * 600
    raw[4]["responses"][0] = [1000]
    words = " ".join(advice.advice(study_of(data(raw))))
    assert "the model 512 positions" in words
    assert "Token id 1,000 is beyond the model's vocabulary of 1,000" in words


# --------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    small_llama(vocab_size=512).save_pretrained(path)
    return path / "config.json"


def run(*arguments: object):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "130"})


def test_tables_snippet_numbers_and_report(data, config: Path, tmp_path: Path) -> None:
    raw = [*rows(100, preamble=50), {"prompt": []}]
    raw[7]["scores"] = [1, 1]
    path, report, numbers = data(raw), tmp_path / "report.html", tmp_path / "numbers.json"
    result = run(path, "--model", config, "--batch-size", 5, "--html", report, "--json", numbers, "--memory", "40GB")
    assert result.exit_code == 0, result.output
    for expected in ("padded 5, sorted", "packed, tree *", "advice", "1 of 101 records were skipped", "40 GB"):
        assert expected in result.output
    assert "ppcompile.PackedDataLoader(" in result.output
    assert "a loss over pairs leaves them out. Try: --pairs." in flat(result.output)
    found = json.loads(numbers.read_text())
    assert found["reading"]["records"] == 101
    assert found["reading"]["bad"] == 1
    assert [layout["batch_size"] for layout in found["padded"]] == [5, 5]
    # The settings run as they are pasted, and make the packs that were predicted.
    names: dict = {}
    exec(found["snippet"], names)
    assert len(names["loader"]) == found["recommended"]["steps"] == found["layouts"][-1]["steps"]
    assert sum(batch.num_tokens for batch in names["loader"]) == found["recommended"]["slots"]
    check_self_contained(report.read_text(), plots=6)


def test_histograms_say_what_they_count_and_a_bin_of_one_value_is_called_by_it(data) -> None:
    drawn = {plot.title: plot.figure.axes for plot in plots(study_of(data(rows(20))))}
    lengths, shares = drawn["Lengths"], drawn["Shared beginnings"]
    assert [axes.get_ylabel() for axes in lengths] == ["records", "sequences", "sequences", "records"]
    assert {axes.get_ylabel() for axes in shares} == {"records"}
    responses = shares[1]
    assert [
        (tick.get_text(), place)
        for tick, place in zip(responses.get_xticklabels(), responses.get_xticks(), strict=True)
    ] == [("2", 0.46)]
    assert responses.get_xlim()[1] - responses.get_xlim()[0] > 6


def check_self_contained(page: str, plots: int) -> None:
    assert "<script" not in page
    assert "<link" not in page
    assert "url(" not in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == plots
    for source in sources:
        kind, _, picture = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(picture).decode()
        assert svg.rstrip().endswith("</svg>")
        references = re.findall(r'(?:href|src)="([^"]*)"', svg) + re.findall(r"url\(([^)]*)\)", svg)
        assert all(reference.startswith("#") for reference in references)
        outside = set(re.findall(r"https?://[^\"\s]*", svg))
        assert outside <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
            "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd",
        }


def test_numbers_on_the_standard_output_are_nothing_but_json(data, config: Path) -> None:
    result = run(data(rows(30)), "--model", config, "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["recommended"]["share"] == "prompt"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--memory", "much"], "'much' is not a memory size; accepted: a number with GB"),
        (["--memory", "0GB"], "'0GB' is not a memory size"),
        (["--dtype", "int8"], "'int8' is not accepted; take one of: bfloat16, float16, float32"),
        (["--checkpoint", "all"], "'all' is not accepted; take one of: layer"),
        (["--unscored", "first"], "'first' is not accepted; take one of: undecided, best-first"),
        (["--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["--limit", "0"], "Invalid value for '--limit'"),
        (["--tokenizer", "/nowhere/t"], "not a folder with a tokenizer"),
        (["--model", "/nowhere/m"], "not a model folder"),
        (["--split", "test"], "has no splits"),
        (["--html", "/nowhere/a.html"], "/nowhere/a.html cannot be written: there is no folder /nowhere"),
    ],
)
def test_a_mistake_says_what_is_accepted(data, config: Path, monkeypatch, arguments: list[str], expected: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(data(rows(5)), *([] if "--model" in arguments else ["--model", config]), *arguments)
    assert result.exit_code == 2, result.output
    assert expected in flat(result.output)
    assert "Traceback" not in result.output


def flat(output: str) -> str:
    """Text of an error box in one line."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", output).split())


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("nothing.jsonl", None, "no preference data at"),
        ("empty.jsonl", b"", "there is nothing to pack: 0 records"),
        ("broken.jsonl", b'{"prompt":', "broken.jsonl:1: not JSON"),
        ("text.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 9, "there is no tokenizer;"),
        ("bytes.json", bytes(range(128, 256)), "can't decode byte"),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00", "ended before the end-of-stream marker"),
        ("odd.jsonl.gz", b"\x1f\x8b\x08\x00" + b"x" * 60, "decompressing data"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, config: Path, name: str, content: bytes | None, expected: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    result = run(path, "--model", config)
    assert result.exit_code == 2, result.output
    assert expected in flat(result.output)
    assert "Traceback" not in result.output


def test_memory_sizes() -> None:
    sizes = {"80GB": 80e9, "24GiB": 24 * 2**30, "512 MB": 512e6, "1.5TiB": 1.5 * 2**40, "1000": 1000.0, "40g": 40e9}
    assert {text: memory_of(text) for text in sizes} == sizes


# --------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHARED / "tokenizer")


PUBLISHED = {  # ../shared/data/README.md: medians of prompt and response; prompt once, record trie, set trie
    "dpo_en": (210, 380, 1.40, 1.40, 1.45),
    "dpo_zh": (104, 268, 1.22, 1.22, 1.28),
    "dialogue_pairs": (98, 45, 1.59, 1.60, 1.68),
    "qa_feedback": (864, 118, 2.93, 3.07, 3.21),
}
PADDED_IN_FOURS = {"dpo_en": 2.85, "qa_feedback": 3.82}  # docs/log.md: tokens, padded in batches of 4 over prompt once


@needs_shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_real_sets_have_their_published_numbers(name: str, tokenizer) -> None:
    prompt, response, prompt_once, record_trie, set_trie = PUBLISHED[name]
    reading = read(str(SHARED / f"{name}.jsonl.gz"), tokenizer)
    started = time.process_time()
    found = study(reading, SIZE, Machine(memory=10e9))
    assert time.process_time() - started < 5
    medians = {d.title: d.median for d in found.distributions}
    assert medians["prompt"] == pytest.approx(prompt, rel=0.01)
    assert medians["response"] == pytest.approx(response, rel=0.01)
    assert found.sharing.reduction("prompt_once") == pytest.approx(prompt_once, rel=0.01)
    assert found.sharing.reduction("record_trie") == pytest.approx(record_trie, rel=0.01)
    assert found.sharing.reduction("set_trie") == pytest.approx(set_trie, rel=0.01)
    if name in PADDED_IN_FOURS:
        ratio = found.usual[0].slots / found.sharing.prompt_once
        assert ratio == pytest.approx(PADDED_IN_FOURS[name], rel=0.01)


@needs_shared
def test_a_real_set_through_the_command(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    arguments = (SHARED / "dpo_en.jsonl.gz", "--tokenizer", SHARED / "tokenizer", "--unscored", "best-first")
    result = run(*arguments, "--html", report, "--limit", 60)
    assert result.exit_code == 0, result.output
    for expected in ('unscored="best-first"', "Repeated prompts are", "packs of up to", "llama, 1,236M parameters"):
        assert expected in result.output
    check_self_contained(report.read_text(), plots=6)
