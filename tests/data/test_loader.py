"""PackedDataLoader: the same packs from any kind of data set, by any number of processes, before and after a kill."""

import gzip
import itertools
import json
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from ppcompile import Group, PackedBatch, PackedDataLoader, Rollout, packs
from ppcompile.data import (
    BadRecord,
    PackBatchSampler,
    PackCollator,
    RecordTokenizer,
    TokenizedDataset,
    read_preferences,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata calls it
]
SMALL = {"max_tokens": 64, "window": 4}


def groups(count: int) -> list[Group]:
    """Groups of 4 to 30 tokens, each with tokens of its own."""
    return [
        Group(
            prompt=[7 * n + 1] * (2 + n % 5), responses=[[7 * n + 2 + r] * (1 + (n + r) % 8) for r in range(2 + n % 2)]
        )
        for n in range(count)
    ]


def records(count: int) -> list[dict]:
    """Text records of three responses with scores; the second is the best, the third as good as the first."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Count to {n}!"}],
            "responses": [f"{n}", f"1 {n}", f"to {n}!"],
            "scores": [0.5, n + 1.0, 0.5],
        }
        for n in range(count)
    ]


def contents(batch: PackedBatch) -> tuple:
    """All that a pack holds, as plain values."""
    pairs, scores = batch.pairs, batch.scores
    return (
        batch.group_index.tolist(),
        [ids.tolist() for ids in batch.sequences()],
        batch.lengths.tolist(),
        None if pairs is None else pairs.tolist(),
        None if scores is None else scores.tolist(),
        batch.step,
    )


def epoch(loader) -> list[tuple]:
    return [contents(batch) for batch in loader]


def rows(batches) -> list[int]:
    return [index for batch in batches for index in batch[0]]


class Letters:
    """One id per letter, and an end token."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}


def texts(count: int) -> list[dict]:
    return [{**record, "prompt": record["prompt"][0]["content"]} for record in records(count)]


class Stream:
    """Iterable any number of times, and not indexable."""

    def __init__(self, values) -> None:
        self.values = values

    def __iter__(self):
        return iter(self.values)


# --------------------------------------------------------------------------- what comes in and what comes out


def test_batches_hold_the_records_their_pairs_and_their_scores(make_tokenizer):
    tokenizer = make_tokenizer()
    data = records(7)
    loader = PackedDataLoader(data, tokenizer=tokenizer, max_tokens=120)
    seen = []
    for batch in loader:
        texts = [tokenizer.decode(ids) for ids in batch.sequences()]
        for place, row in enumerate(batch.group_index.tolist()):
            first = 3 * place
            seen.append(row)
            for n, response in enumerate(data[row]["responses"]):
                assert texts[first + n].endswith(
                    f"Count to {row}!<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>"
                )
            assert batch.pairs.tolist()[2 * place : 2 * place + 2] == [[first + 1, first], [first + 1, first + 2]]
            assert batch.scores.tolist()[first : first + 3] == [0.5, row + 1.0, 0.5]
        assert batch.step.weight == len(batch.pairs) == 2 * len(batch.group_index)
    assert sorted(seen) == list(range(7))
    moved = batch.to("cpu")
    assert type(moved) is type(batch)
    assert torch.equal(moved.pairs, batch.pairs)


def test_every_kind_of_data_set_gives_the_same_packs(make_tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    data, tokenizer = records(12), make_tokenizer()
    expected = epoch(PackedDataLoader(data, tokenizer=tokenizer, max_tokens=120, shuffle=False))
    assert len(expected) > 2
    file = tmp_path / "data.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, data)).encode()))
    encode = RecordTokenizer(tokenizer)
    preferences = read_preferences(data)
    tokens = [encode(record) for record in preferences]
    ids_file = tmp_path / "ids.jsonl"
    ids_file.write_text(
        "\n".join(json.dumps({"prompt": t.prompt, "responses": t.responses, "scores": t.scores}) for t in tokens)
    )
    kinds = {
        "a file of token ids": ids_file,
        "a table": datasets.Dataset.from_list(data),
        "a file": file,
        "records": preferences,
        "token ids": tokens,
        "columns of token ids": datasets.Dataset.from_list(
            [{"prompt": t.prompt, "responses": t.responses, "scores": list(t.scores), "id": "x"} for t in tokens]
        ),
        "a stream": Stream(data),
        "a stream of a table": datasets.Dataset.from_list(data).to_iterable_dataset(num_shards=3),
    }
    for name, kind in kinds.items():
        loader = PackedDataLoader(kind, tokenizer=tokenizer, max_tokens=120, shuffle=False)
        assert epoch(loader) == expected, name
        assert loader.streaming == ("stream" in name)


def test_groups_and_rollouts_need_no_tokenizer():
    data = groups(10)
    loader = PackedDataLoader(data, **SMALL)
    expected = list(packs(data, **SMALL))
    for batch, plain in zip(loader, expected, strict=True):
        assert contents(batch)[:3] == (
            plain.group_index.tolist(),
            [s.tolist() for s in plain.sequences()],
            plain.lengths.tolist(),
        )
        assert (batch.pairs, batch.scores) == (None, None)
        assert batch.step.weight == batch.step.responses
    turns = [Rollout([n, 1, 2, 3, 4], [0, 1, 1, 0, 1]) for n in range(5)]
    columns = [{"input_ids": t.input_ids, "completion_mask": t.completion_mask, "id": "x"} for t in turns]
    for kind in (turns, columns, [[t] for t in turns]):
        (batch,) = PackedDataLoader(kind)
        assert batch.lengths.tolist() == [3] * 5


def test_a_length_is_known_unless_streaming():
    loader = PackedDataLoader(groups(40), **SMALL)
    assert len(loader) == len(epoch(loader)) == len(PackedDataLoader(groups(40), **SMALL))
    with pytest.raises(TypeError, match="a streaming PackedDataLoader has no length"):
        len(PackedDataLoader(groups(40), streaming=True, **SMALL))


# --------------------------------------------------------------------------- epochs, ranks, processes


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(8, 60),
    world_size=st.integers(1, 5),
    streaming=st.booleans(),
    shuffle=st.booleans(),
    share=st.sampled_from(["prompt", "tree"]),
    packs_per_step=st.integers(1, 3),
)
def test_all_ranks_together_see_each_record_once(count, world_size, streaming, shuffle, share, packs_per_step):
    data = groups(count)
    ranks = [
        epoch(
            PackedDataLoader(
                data,
                rank=rank,
                world_size=world_size,
                streaming=streaming,
                shuffle=shuffle,
                share=share,
                packs_per_step=packs_per_step,
                **SMALL,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(index for batches in ranks for index in rows(batches)) == list(range(count))
    for rank in ranks[1:]:
        assert [batch[-1] for batch in rank] == [batch[-1] for batch in ranks[0]]  # the totals of each step


@pytest.mark.parametrize(("packs_per_step", "world_size"), [(1, 1), (3, 1), (2, 3)])
def test_batches_know_where_an_optimizer_step_ends(packs_per_step, world_size):
    options = {"packs_per_step": packs_per_step, "world_size": world_size, **SMALL}
    for rank in range(world_size):
        loader = PackedDataLoader(groups(60), rank=rank, **options)
        batches = list(loader)
        following = [batch.step.index for batch in batches[1:]] + [None]
        assert [batch.ends_step for batch in batches] == [
            batch.step.index != after for batch, after in zip(batches, following, strict=True)
        ]
        assert sum(batch.ends_step for batch in batches) > 2
        state = None
        for _ in itertools.islice(loader, 1):  # in the middle of a step, unless it has one pack
            state = loader.state_dict()
        again = PackedDataLoader(groups(60), rank=rank, **options)
        again.load_state_dict(state)
        loader.set_epoch(1)
        assert [b.ends_step for b in again] == [b.ends_step for b in loader][1:]


def test_ranks_default_to_those_of_torch_distributed(monkeypatch):
    data = groups(20)
    alone = PackedDataLoader(data, **SMALL)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    found = PackedDataLoader(data, **SMALL)
    assert (alone.packing.rank, alone.packing.world_size) == (0, 1)
    assert (found.packing.rank, found.packing.world_size) == (1, 3)
    with pytest.raises(ValueError, match="give both rank and world_size, or neither; got rank=None, world_size=2"):
        PackedDataLoader(data, world_size=2)


@pytest.mark.parametrize("streaming", [False, True])
def test_every_epoch_packs_anew_and_can_be_had_again(streaming):
    loader = PackedDataLoader(groups(40), streaming=streaming, **SMALL)
    first, second = epoch(loader), epoch(loader)
    assert sorted(rows(first)) == sorted(rows(second)) == list(range(40))
    assert first != second
    assert loader.epoch == 2
    loader.set_epoch(0)
    assert epoch(loader) == first
    assert epoch(PackedDataLoader(groups(40), streaming=streaming, seed=1, **SMALL)) not in (first, second)


@pytest.mark.parametrize("streaming", [False, True])
def test_packs_do_not_depend_on_the_number_of_processes(make_tokenizer, streaming):
    options = {"tokenizer": make_tokenizer(), "max_tokens": 120, "streaming": streaming}
    alone, helped = (PackedDataLoader(records(90), num_workers=workers, **options) for workers in (0, 2))
    assert epoch(alone) == epoch(helped)
    for _ in helped:  # leaving early leaves no process behind that another epoch would wait for
        break
    helped.set_epoch(1)
    assert epoch(helped) == epoch(alone)


def test_a_data_set_that_divides_itself_among_workers_is_read_once(make_tokenizer):
    datasets = pytest.importorskip("datasets")

    class Torch(IterableDataset):
        def __iter__(self):
            info = torch.utils.data.get_worker_info()
            return iter(records(40)[info.id :: info.num_workers] if info else records(40))

        def __len__(self):
            return 40

    table = datasets.Dataset.from_list(records(40)).to_iterable_dataset(num_shards=4)
    for data in (Torch(), table):
        loader = PackedDataLoader(data, tokenizer=make_tokenizer(), max_tokens=120, num_workers=2)
        assert sorted(rows(epoch(loader))) == list(range(40))
    from datasets.distributed import split_dataset_by_node

    divided = split_dataset_by_node(table, rank=0, world_size=2)
    with pytest.raises(
        ValueError, match=r"divided by datasets\.distributed\.split_dataset_by_node; give every rank all"
    ):
        PackedDataLoader(divided, tokenizer=make_tokenizer())


def test_a_stream_of_datasets_shuffles_by_epoch(make_tokenizer):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{**r, "id": n} for n, r in enumerate(records(30))])
    stream = table.to_iterable_dataset().shuffle(seed=3, buffer_size=30)
    loader = PackedDataLoader(stream, tokenizer=make_tokenizer(), max_tokens=120, shuffle=False)
    first, second = epoch(loader), epoch(loader)
    assert sorted(str(b[1]) for b in first) != sorted(str(b[1]) for b in second)
    loader.set_epoch(0)
    assert epoch(loader) == first


def test_loading_draws_nothing_from_the_generator_of_dropout():
    before = torch.get_rng_state()
    for streaming in (False, True):
        epoch(PackedDataLoader(groups(20), streaming=streaming, **SMALL))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_is_read_as_it_is_needed():
    read = 0

    def source():
        nonlocal read
        for group in itertools.islice(itertools.cycle(groups(50)), 8_000):
            read += 1
            yield group

    done = most = 0
    loader = PackedDataLoader(source(), **SMALL)
    for batch in loader:
        done += batch.num_groups
        most = max(most, read - done)
    assert done == read == 8_000
    assert most < 200  # two windows of four packs, with a few groups each, and a chunk
    with pytest.raises(ValueError, match=r"the data set is an iterator \(generator\) and is used up after one epoch"):
        next(iter(loader))


# --------------------------------------------------------------------------- resume


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    streaming=st.booleans(),
    world_size=st.integers(1, 2),
    share=st.sampled_from(["prompt", "tree"]),
)
def test_a_resumed_epoch_is_the_rest_of_a_whole_one(stops, streaming, world_size, share):
    def make():
        return PackedDataLoader(
            groups(50), streaming=streaming, world_size=world_size, rank=world_size - 1, share=share, **SMALL
        )

    whole = make()
    expected = epoch(whole) + epoch(whole)
    seen, state = [], make().state_dict()
    for stop in stops:
        loader = make()
        loader.load_state_dict(json.loads(json.dumps(state)))
        assert loader.state_dict() == state
        for batch in loader:
            seen.append(contents(batch))
            state = loader.state_dict()
            if len(seen) >= stop:
                break
    last = make()
    last.load_state_dict(state)
    rest = epoch(last)
    seen += rest + ([] if last.epoch == 2 else epoch(last))
    assert seen == expected


@pytest.mark.parametrize(("streaming", "then", "now"), [(False, 0, 2), (True, 2, 0), (True, 2, 2)])
def test_a_state_knows_nothing_of_processes(make_tokenizer, streaming, then, now):
    options = {"tokenizer": make_tokenizer(), "max_tokens": 120, "streaming": streaming}
    expected = epoch(PackedDataLoader(records(60), **options))
    first = PackedDataLoader(records(60), num_workers=then, **options)
    seen = [contents(batch) for batch in itertools.islice(first, 5)]
    again = PackedDataLoader(records(60), num_workers=now, **options)
    again.load_state_dict(first.state_dict())
    assert seen + epoch(again) == expected


def test_a_state_of_other_settings_or_other_data_is_refused():
    loader = PackedDataLoader(groups(40), **SMALL)
    list(itertools.islice(loader, 5))
    state = loader.state_dict()
    for changed, said in (
        ({"seed": 1}, r"saved with seed=0 \(now 1\)"),
        ({"rank": 0, "world_size": 2}, r"world_size=1 \(now 2\)"),
        ({"streaming": True}, r"streaming=False \(now True\)"),
        ({"oversize": ("split", "drop")}, r"oversize='error' \(now \['split', 'drop'\]\)"),
    ):
        with pytest.raises(ValueError, match=said):
            PackedDataLoader(groups(40), **SMALL, **changed).load_state_dict(state)
    changed = groups(40)
    first = rows(epoch(PackedDataLoader(groups(40), **SMALL)))[0]
    changed[first].responses[0][0] += 1  # one token of a pack that was handed out
    for data in (changed, groups(39), groups(3)):
        other = PackedDataLoader(data, **SMALL)
        other.load_state_dict(state)
        with pytest.raises(
            ValueError, match="the first 5 packs of the epoch are not those of the state that was loaded"
        ):
            next(iter(other))
    with pytest.raises(ValueError, match="the state is of None, and this loader reads"):
        loader.load_state_dict({"epoch": 1})


def test_the_rest_of_a_loaded_epoch_is_not_left_out_by_mistake():
    loader = PackedDataLoader(groups(40), **SMALL)
    epoch(loader)
    list(itertools.islice(loader, 5))
    again = PackedDataLoader(groups(40), **SMALL)
    again.load_state_dict(loader.state_dict())
    with pytest.raises(
        ValueError, match=r"in the middle of epoch 1, and set_epoch\(0\) would leave the rest of it out"
    ):
        again.set_epoch(0)
    again.set_epoch(1)
    loader.set_epoch(1)
    assert epoch(again) == epoch(loader)[5:]


RUN = """
    import sys
    sys.path[:0] = [{path!r}]
    from test_loader import train
    train(sys.argv[1], num_workers=2, streaming=sys.argv[2] == "True", seconds=0.05)
"""


def train(folder: str, num_workers: int, streaming: bool, seconds: float = 0.0) -> None:
    """Two epochs, or what a state leaves of them: a line for each pack, and then the state."""
    data = Stream(texts(150)) if streaming else texts(150)
    loader = PackedDataLoader(data, tokenizer=Letters(), max_tokens=150, num_workers=num_workers)
    state_file, writing = Path(folder, "state.json"), Path(folder, "state.json.writing")
    if state_file.exists():
        loader.load_state_dict(json.loads(state_file.read_text()))
    with Path(folder, "packs.txt").open("a") as log:
        while loader.epoch < 2:
            for batch in loader:
                state = loader.state_dict()
                writing.write_text(json.dumps(state))
                print(state["epoch"], state["packs"], contents(batch), file=log, flush=True)
                time.sleep(seconds)
                writing.replace(state_file)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_killed_run_goes_on_with_the_same_packs(tmp_path, streaming):
    def lines(folder: str) -> list[str]:
        log = tmp_path / folder / "packs.txt"
        return (
            [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")] if log.exists() else []
        )

    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    train(str(tmp_path / "whole"), num_workers=0, streaming=streaming)
    whole = lines("whole")
    code = textwrap.dedent(RUN).format(path=str(Path(__file__).parent))
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed"), str(streaming)]) as process:
        while len(lines("killed")) < len(whole) // 2 + 3 and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    seen = lines("killed")
    place = json.loads((tmp_path / "killed" / "state.json").read_text())
    assert (place["epoch"], place["packs"] > 1) == (1, True)  # in the middle of the second epoch
    train(str(tmp_path / "killed"), num_workers=2, streaming=streaming)
    rest = lines("killed")[len(seen) :]
    assert rest[0].startswith(f"1 {place['packs'] + 1} ")
    assert seen == whole[: len(seen)]
    assert rest == whole[len(whole) - len(rest) :]
    assert len(whole) <= len(seen) + len(rest) <= len(whole) + 1  # the last pack before the kill had no state yet


# --------------------------------------------------------------------------- bad records


def bad_file(tmp_path) -> Path:
    good = records(12)
    lines = [json.dumps(record) for record in good]
    lines[2] = "{broken"
    lines[4] = json.dumps({**good[4], "scores": [1.0, float("nan"), 2.0]})
    lines[6] = json.dumps({**good[6], "responses": ["a", "", "b"]})
    lines[8] = json.dumps({"prompt": "text", "chosen": "a", "rejected": "b"})
    lines[10] = json.dumps({**good[10], "prompt": [{"role": "assistant", "content": "Hi."}]})
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


REASONS = {
    3: "not JSON",
    5: "'scores[1]' must be a finite number, got nan",
    7: "'responses[1]' is empty",
    9: "mixed schemas: this record is prompt+chosen+rejected of text",
    11: "the chat template failed: TemplateError: roles must alternate",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_records_are_named_by_file_line_and_reason(make_tokenizer, tmp_path, streaming, num_workers):
    file, tokenizer = bad_file(tmp_path), make_tokenizer("alternates")
    options = {"tokenizer": tokenizer, "max_tokens": 120, "streaming": streaming, "num_workers": num_workers}
    with pytest.raises(BadRecord, match=rf"^{file}:3: not JSON"):
        epoch(PackedDataLoader(file, **options))
    loader = PackedDataLoader(file, on_bad="skip", **options)
    assert sorted(rows(epoch(loader))) == [0, 1, 3, 5, 7, 9, 11]
    assert [bad.where for bad in loader.read.reasons] == [f"{file}:{line}" for line in REASONS]
    for bad, said in zip(loader.read.reasons, REASONS.values(), strict=True):
        assert said in bad.reason
    assert (loader.read.records, loader.read.bad) == (12, 5)
    assert str(loader.read).startswith(f"12 records, 5 bad:\n  {file}:3: not JSON")


def test_bad_token_ids_are_bad_records_too():
    picture = {"input_ids": [1, 2], "completion_mask": [0, 1], "pixel_values": torch.zeros(3)}
    data = [*groups(3), Group([], [[1]]), {"input_ids": [1, 2], "completion_mask": [1, 1]}, 5, groups(6)[5], picture]
    with pytest.raises(BadRecord, match=r"^record 4: prompt of the record is empty"):
        PackedDataLoader(data)
    loader = PackedDataLoader(data, on_bad="skip")
    assert [bad.where for bad in loader.read.reasons] == ["record 4", "record 5", "record 6", "record 8"]
    assert "column 'pixel_values' is not read" in loader.read.reasons[-1].reason
    assert sorted(rows(epoch(loader))) == [0, 1, 2, 6]
    with pytest.raises(BadRecord, match="record 1: the record is text, and there is no tokenizer"):
        PackedDataLoader(records(2))


@pytest.mark.parametrize("streaming", [False, True])
def test_an_epoch_of_nothing_is_an_error(make_tokenizer, streaming):
    tied = [{**record, "scores": [1, 1, 1]} for record in records(3)]
    options = {"tokenizer": make_tokenizer(), "streaming": streaming}
    for data, said in (([], "0 records"), (tied, r"3 records, 3 without a preference\. Try: pairs=False")):
        with pytest.raises(ValueError, match=f"there is nothing to pack: {said}"):
            epoch(PackedDataLoader(data, **options))
    loader = PackedDataLoader([*tied, *records(2)], **options)
    assert sorted(rows(epoch(loader))) == [3, 4]
    assert loader.read.undecided == 3
    (batch,) = PackedDataLoader(tied, pairs=False, **options)
    assert batch.pairs is None
    assert batch.scores.tolist() == [1.0] * 9
    assert batch.step.weight == 9


def test_records_beyond_the_budget_follow_the_policy_and_are_called_by_their_place(make_tokenizer, tmp_path):
    data = records(4)
    data[2]["responses"][0] = "x" * 200
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(map(json.dumps, data)))
    options = {"tokenizer": make_tokenizer(), "max_tokens": 240}
    with pytest.raises(ValueError, match=rf"{file}:3 \(prompt \d+, responses .* is beyond max_tokens=240"):
        epoch(PackedDataLoader(file, **options))
    loader = PackedDataLoader(file, oversize="drop", **options)
    assert sorted(rows(epoch(loader))) == [0, 1, 3]
    assert loader.report.dropped_groups == 1
    with pytest.raises(ValueError, match=rf"{file}:3 is split over several packs, where its preferred and its other"):
        epoch(PackedDataLoader(file, oversize="split", **options))
    apart = PackedDataLoader(file, oversize="split", pairs=False, **options)
    assert sorted(rows(epoch(apart))) == [0, 1, 2, 2, 3]
    for batch in apart:
        of_group = torch.repeat_interleave(batch.group_index, batch.group_sizes).tolist()
        places = zip(of_group, batch.sequence_index.tolist(), strict=True)
        assert batch.scores.tolist() == [data[row]["scores"][n] for row, n in places]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"share": "forest"}, ValueError, "share='forest'"),
        ({"on_bad": "ignore"}, ValueError, "on_bad='ignore' is not accepted"),
        ({"unscored": "first"}, ValueError, "unscored='first' is not accepted"),
        ({"oversize": "cut"}, ValueError, "oversize='cut' is not accepted"),
        ({"num_workers": -1}, ValueError, "num_workers must be at least 0"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank must be below world_size=2"),
        ({"batch_size": 4}, TypeError, "batch_size"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_options_are_refused_at_once(options, error, said, streaming):
    with pytest.raises(error, match=said):
        PackedDataLoader(groups(3), streaming=streaming, **options)


# --------------------------------------------------------------------------- parts for a DataLoader of one's own


def own_loader(kind=DataLoader, num_workers: int = 0, **options):
    samples = TokenizedDataset(groups(40))
    sampler = PackBatchSampler(samples, **SMALL, **options)
    return kind(samples, batch_sampler=sampler, collate_fn=sampler.collator(), num_workers=num_workers)


def test_sampler_and_collator_make_the_packs_of_the_loader_in_a_plain_dataloader():
    expected = epoch(PackedDataLoader(groups(40), **SMALL))
    loader = own_loader()
    for num_workers in (0, 2):
        loader = own_loader(num_workers=num_workers)
        assert len(loader) == len(expected)
        found = epoch(loader)
        assert [batch[:-1] for batch in found] == [batch[:-1] for batch in expected]
        assert {batch[-1] for batch in found} == {None}
    assert loader.batch_sampler.totals() == [batch[-1] for batch in expected]
    loader.batch_sampler.set_epoch(1)
    assert rows(epoch(loader)) != rows(expected)
    assert sorted(rows(epoch(loader))) == list(range(40))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_torchdata_resumes_with_the_sampler(num_workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    expected = epoch(own_loader())
    for stop in (1, 4, len(expected) - 1):
        first = own_loader(stateful.StatefulDataLoader, num_workers)
        seen = [contents(batch) for batch in itertools.islice(first, stop)]
        state = pickle.loads(pickle.dumps(first.state_dict()))
        again = own_loader(stateful.StatefulDataLoader, num_workers)
        again.load_state_dict(state)
        assert seen + epoch(again) == expected
    other = own_loader(stateful.StatefulDataLoader, num_workers, seed=1)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"saved with seed=0 \(now 1\)"):
        next(iter(other))


def test_the_loader_has_the_state_protocol_of_torchdata_and_torch():
    from torch.distributed.checkpoint.stateful import Stateful

    assert isinstance(PackedDataLoader(groups(3)), Stateful)
    stateful = pytest.importorskip("torchdata.stateful_dataloader.stateful")
    assert isinstance(PackedDataLoader(groups(3)), stateful.Stateful)


def test_splits_and_columns_are_no_list_of_records(make_tokenizer):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(records(3))
    for data, keys in (
        (datasets.DatasetDict(train=table, test=table), "'train', 'test'"),
        (records(1)[0], "'prompt', "),
    ):
        for streaming in (False, True):
            with pytest.raises(TypeError, match=rf"got a \w+ with keys {keys}.*Try: dataset\['train'\] for one split"):
                PackedDataLoader(data, tokenizer=make_tokenizer(), streaming=streaming)
        with pytest.raises(TypeError, match="records come as a list"):
            read_preferences(data)


def test_a_collator_of_another_share_does_not_go_beyond_the_budget():
    alike = [Group([5] * 20, [[6, n], [7, n]]) for n in range(8)]
    samples = TokenizedDataset(alike)
    sampler = PackBatchSampler(samples, share="tree", max_tokens=50)
    loader = DataLoader(samples, batch_sampler=sampler, collate_fn=sampler.collator())
    assert [batch.num_groups for batch in loader] == [8]
    loader = DataLoader(samples, batch_sampler=sampler, collate_fn=PackCollator(max_tokens=50))
    with pytest.raises(ValueError, match="max_tokens=50"):
        next(iter(loader))
    with pytest.raises(ValueError, match="share='forest'"):
        PackCollator("forest")


def test_what_an_index_cannot_say_is_refused():
    with pytest.raises(TypeError, match=r"samples must be a TokenizedDataset, got list\. Try: TokenizedDataset"):
        PackBatchSampler(groups(3))
    with pytest.raises(ValueError, match="oversize='split' is not accepted; an index stands for a whole record"):
        PackBatchSampler(TokenizedDataset(groups(3)), oversize="split")
    for option in ("split_groups", "batch_size"):
        with pytest.raises(TypeError, match=f"argument '{option}'"):
            PackBatchSampler(TokenizedDataset(groups(3)), **{option: 1})


def test_accelerate_leaves_the_loader_as_it_is():
    accelerate = pytest.importorskip("accelerate")
    loader = PackedDataLoader(groups(20), rank=1, world_size=2, **SMALL)
    assert accelerate.Accelerator(cpu=True).prepare(loader) is loader


@pytest.mark.parametrize("even_batches", [True, False])
def test_accelerate_would_divide_a_loader_of_ones_own_a_second_time(even_batches):
    data_loader = pytest.importorskip("accelerate.data_loader")
    loader = own_loader(rank=1, world_size=2)
    with pytest.raises(TypeError, match=r"its packs are dealt to ranks already.*keep the DataLoader out of"):
        data_loader.prepare_data_loader(
            loader, num_processes=2, process_index=1, even_batches=even_batches, put_on_device=False
        )


def test_pairs_and_scores_are_pinned_with_the_rest(make_tokenizer, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pinned.append(tensor), tensor)[1])
    (batch,) = PackedDataLoader(records(3), tokenizer=make_tokenizer())
    again = batch.pin_memory()
    assert type(again) is type(batch)
    assert {id(batch.pairs), id(batch.scores), id(batch.input_ids)} <= set(map(id, pinned))
