"""Preference data: every accepted spelling, every named reason for refusal, and token counts on real data."""

import gzip
import json
import pickle
import sys
from pathlib import Path

import pytest

from ppcompile.data import BadRecord, Preference, RecordTokenizer, read_preferences, tokenize

SHARED = Path(__file__).resolve().parents[1] / "../shared/data"
MORE = {"role": "user", "content": "And?"}
USER, YES, NO = (
    {"role": "user", "content": "Is it?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "assistant", "content": "No."},
)
PLAIN = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}


def only(record, **options):
    (found,) = read_preferences([record], **options)
    return found


def reason(record) -> str:
    with pytest.raises(BadRecord) as caught:
        read_preferences([record])
    assert caught.value.where == "record 1"
    return caught.value.reason


# --------------------------------------------------------------------------- spellings


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": "Yes.", "rejected": "No."},
        {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "Is it?", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": None, "chosen": [USER, YES], "rejected": [USER, NO]},
        {"chosen": [USER, {**YES, "tool_calls": None}], "rejected": [USER, NO]},
        {
            "conversations": [{"from": "human", "value": "Is it?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        {"prompt": [USER], "chosen": "Yes.", "rejected": "No.", "messages": [USER, YES], "score_chosen": 9.0},
    ],
)
def test_every_conversational_spelling_means_the_same(record):
    assert only(record) == Preference([USER], ("Yes.", "No."), ((0, 1),), "record 1")


@pytest.mark.parametrize("name", ["responses", "completions"])
@pytest.mark.parametrize("replies", [["Yes.", "No."], [YES, [NO]], [[USER, YES], [USER, NO]]])
def test_scored_replies_in_every_spelling_mean_the_same(name, replies):
    expected = Preference([USER], ("Yes.", "No."), ((1, 0),), "record 1", scores=(0.0, 2.0))
    assert only({"prompt": [USER], name: replies, "scores": [0, 2]}) == expected


def test_plain_text():
    assert only(PLAIN) == Preference("Is it?", ("Yes.", "No."), ((0, 1),), "record 1")


def test_a_system_column_becomes_the_first_message():
    record = {
        "conversations": [{"from": "human", "value": "Is it?"}],
        "system": "Be brief.",
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    }
    assert only(record).prompt == [{"role": "system", "content": "Be brief."}, USER]


def test_the_best_response_wins_against_each_strictly_worse_one():
    responses = list("abcd")
    assert only({"prompt": "p", "responses": responses, "scores": [1, 3, 3, 0]}).pairs == ((1, 0), (1, 3))


def test_responses_without_scores_are_undecided_unless_declared_ordered():
    record = {"prompt": "p", "responses": ["a", "b", "c"], "scores": None}
    assert only(record).pairs == ()
    assert only(record, unscored="best-first").pairs == ((0, 1), (0, 2))


def test_records_without_a_preference_are_kept_and_reported():
    same = {"prompt": "p", "chosen": "a", "rejected": "a"}
    data = read_preferences([PLAIN, same, same])
    assert [record.where for record in data.undecided] == ["record 2", "record 3"]
    assert data.summary() == "3 records, 1 pairs, 2 without a preference (first: record 2)"
    (equal,) = read_preferences([{"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}]).undecided
    assert equal.scores == (1.0, 1.0)


def test_one_reply_may_carry_a_label():
    assert only({"prompt": "p", "completion": "a"}) == Preference("p", ("a",), (), "record 1")
    for label in (True, False):
        record = only({"prompt": [USER], "completion": [YES], "label": label})
        assert record == Preference([USER], ("Yes.",), (), "record 1", scores=(float(label),))


@pytest.mark.parametrize(
    ("record", "prompt", "response"),
    [
        ({"messages": [USER, YES]}, [USER], "Yes."),
        ({"messages": [USER, YES, MORE, NO]}, [USER], [YES, MORE, NO]),
        ({"conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}]}, [USER], "Yes."),
        ({"conversations": [USER, YES], "system": "Brief."}, [{"role": "system", "content": "Brief."}, USER], "Yes."),
    ],
)
def test_the_prompt_of_a_conversation_ends_where_the_assistant_first_speaks(record, prompt, response):
    assert only(record) == Preference(prompt, (response,), (), "record 1")


def test_rollouts_begin_alike_and_are_preferred_by_score():
    record = {"conversations": [[USER, YES, MORE, NO], [USER, NO], [USER, MORE, YES]], "scores": [0, 1, 0]}
    found = only(record)
    assert (found.prompt, found.pairs) == ([USER], ((1, 0), (1, 2)))
    assert found.responses == ([YES, MORE, NO], "No.", [MORE, YES])


def test_replies_of_many_messages_follow_what_both_share():
    chosen, rejected = [USER, YES, MORE, YES], [USER, YES, MORE, NO]
    found = only({"chosen": chosen, "rejected": rejected})
    assert (found.prompt, found.responses) == ([USER, YES, MORE], ("Yes.", "No."))
    found = only({"prompt": [USER], "chosen": chosen, "rejected": rejected})
    assert (found.prompt, found.responses) == ([USER], ([YES, MORE, YES], [YES, MORE, NO]))


def test_tools_and_their_calls_are_kept_without_the_nulls_of_a_table():
    datasets = pytest.importorskip("datasets")
    schema = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
    other = {"type": "function", "function": {"name": "go", "arguments": {"to": "y"}}}
    rows = [
        {"messages": [USER, {"role": "assistant", "tool_calls": [one]}, YES], "tools": json.dumps([schema])}
        for one in (call, other)
    ]
    assert datasets.Dataset.from_list(rows)[0]["messages"][1]["content"] is None
    first, second = read_preferences(datasets.Dataset.from_list(rows))
    assert (first.where, second.where) == ("row 1", "row 2")
    assert first.tools == [schema]
    assert first.responses == ([{"role": "assistant", "tool_calls": [call]}, YES],)
    assert second.responses[0][0]["tool_calls"] == [other]


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chosen": None}, "column 'chosen' is missing (found: prompt, rejected); accepted: prompt+chosen+rejected"),
        ({"prompt": None}, "column 'prompt' is missing, and without it"),
        ({"chosen": 3}, "'chosen[0]' must be a message with 'role' and 'content', got int"),
        ({"prompt": 3}, "'prompt' must be a list, got int"),
        ({"prompt": []}, "'prompt' holds no message"),
        ({"prompt": [{"role": "user"}]}, "'prompt[0]' needs a text 'content', got NoneType"),
        ({"rejected": " \n"}, "'rejected' is empty"),
        ({"chosen": [YES, USER, YES]}, "'chosen' must be text or one assistant message under a prompt that is text"),
        ({"prompt": [USER], "chosen": [MORE]}, "'chosen' holds no message of the assistant, so nothing is scored"),
        ({"prompt": [USER], "chosen": [USER]}, "'chosen' holds no message after the prompt"),
        (
            {"prompt": [USER], "chosen": [{"role": "assistant", "content": " "}]},
            "'chosen[0]' is a message of the assistant",
        ),
        (
            {"prompt": [USER, YES, {"role": "user", "content": "\n"}]},
            "'prompt[2]' is a message of the user that is empty",
        ),
        ({"images": ["a.png"]}, "column 'images' is not read: packs hold text. Try: remove the column"),
        ({"tools": [{"name": "look"}]}, "'tools' are written into the prompt by a chat template, and this prompt is"),
        ({"prompt": [USER], "tools": "{"}, "'tools' is text and not JSON"),
        ({"prompt": [USER], "tools": ["look"]}, "'tools[0]' must be a JSON schema, got str"),
        ({"prompt": None, "chosen": [YES], "rejected": [NO]}, "share no first message"),
        ({"prompt": None, "chosen": [USER, YES], "rejected": [USER, YES]}, "are the same conversation"),
        ({"responses": ["a", "b"]}, "columns chosen+rejected and responses both say what the responses are; keep one"),
        ({"completion": "a"}, "columns chosen+rejected and completion both say"),
    ],
)
def test_a_bad_pair_says_what_is_wrong(change, said):
    assert said in reason({**PLAIN, **change})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "p"}, "no column says what the responses are (found: prompt); accepted: prompt+chosen+rejected"),
        ({"prompt": "p", "responses": "ab"}, "'responses' must be a list, got str"),
        ({"prompt": "p", "responses": ["a"]}, "at least two responses, got 1"),
        ({"prompt": "p", "responses": ["a", ""]}, "'responses[1]' is empty"),
        ({"responses": ["a", "b"]}, "column 'prompt' is missing"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1.0]}, "2 responses but 1 scores"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1.0, float("nan")]}, "must be a finite number, got nan"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 10**400]}, "'scores[1]' must be a finite number"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1.0, "2"]}, "must be a finite number, got '2'"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1.0, None]}, "must be a finite number, got None"),
        ({"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}, "are the steps of one response"),
        ({"prompt": "p", "responses": ["a", "b"], "completions": ["a"]}, "columns responses and completions both say"),
        ({"prompt": "p", "completion": "a", "label": 1}, "'label' must be true (wanted) or false, got 1"),
        ({"messages": []}, "'messages' holds no message"),
        ({"messages": [USER]}, "'messages' holds no message of the assistant"),
        ({"messages": [YES]}, "'messages' begins with the assistant, so there is no prompt"),
        ({"messages": "Hi"}, "'messages' must be a list, got str"),
        ({"conversations": [[USER, YES], [MORE, YES]]}, "'conversations' share no first message"),
        ({"conversations": [[USER, YES], "Hi"]}, "'conversations[1]' must be a list, got str"),
        ({"conversations": [[USER, YES], [USER, NO]], "scores": [1]}, "2 responses but 1 scores"),
        (["prompt"], "a record must be an object with columns, got list"),
    ],
)
def test_a_bad_record_says_what_is_wrong(record, said):
    assert said in reason(record)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (
            {"messages": [USER, YES]},
            "this record is messages of messages, and the first one (record 1) is prompt+chosen",
        ),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "this record is prompt+chosen+rejected of messages, and"),
    ],
)
def test_mixed_schemas_are_named(second, said):
    with pytest.raises(BadRecord, match=r"^record 2: mixed schemas") as caught:
        read_preferences([PLAIN, second])
    assert said in caught.value.reason
    data = read_preferences([PLAIN, second, PLAIN], on_bad="skip")
    assert (len(data), [bad.where for bad in data.skipped]) == (2, ["record 2"])


def test_bad_records_travel_between_processes():
    bad = pickle.loads(pickle.dumps(BadRecord("a.jsonl:3", "empty")))
    assert (bad.where, bad.reason, str(bad)) == ("a.jsonl:3", "empty", "a.jsonl:3: empty")


def test_bad_lines_are_named_by_file_and_line_and_can_be_skipped(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(f"{json.dumps(PLAIN)}\n\n{{broken\n{json.dumps({**PLAIN, 'chosen': ''})}\n{json.dumps(PLAIN)}\n")
    with pytest.raises(BadRecord, match=r"pairs\.jsonl:3: not JSON"):
        read_preferences(file)
    data = read_preferences(file, on_bad="skip")
    assert [record.where for record in data] == [f"{file}:1", f"{file}:5"]
    assert [bad.where for bad in data.skipped] == [f"{file}:3", f"{file}:4"]
    assert "2 skipped (first: " in data.summary()


def test_columns_of_images_that_hold_none_are_text():
    assert only({**PLAIN, "images": [], "image": None}) == only(PLAIN)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="on_bad='ignore' is not accepted"):
        read_preferences([PLAIN], on_bad="ignore")
    with pytest.raises(ValueError, match="unscored='first'"):
        read_preferences([PLAIN], unscored="first")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        read_preferences([PLAIN], limit=0)
    with pytest.raises(ValueError, match="has no splits"):
        read_preferences([PLAIN], split="train")


# --------------------------------------------------------------------------- sources


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize("listed", [True, False])
def test_json_lists_and_json_lines_whatever_the_suffix(tmp_path, name, listed):
    rows = [PLAIN] * 3
    text = json.dumps(rows, indent=1) if listed else "\n".join(map(json.dumps, rows))
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert len(read_preferences(str(file))) == 3
    assert len(read_preferences(file, limit=2)) == 2


def test_a_missing_file_is_not_looked_up_elsewhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="no preference data at"):
        read_preferences(tmp_path / "absent.jsonl")
    with pytest.raises(FileNotFoundError, match="no preference data at"):
        read_preferences("./absent")


def test_datasets_read_from_local_files_and_folders(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_list([PLAIN, {**PLAIN, "chosen": "Sure."}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    rows.to_parquet(tmp_path / "folder" / "train.parquet")

    assert len(read_preferences(tmp_path / "one")) == 2
    assert len(read_preferences(tmp_path / "folder")) == 2
    assert len(read_preferences(tmp_path / "folder" / "train.parquet")) == 2
    (record,) = read_preferences(tmp_path / "splits", split="test")
    assert record.responses == ("Sure.", "No.")
    assert record.where == f"{tmp_path / 'splits'}[test] row 1"
    with pytest.raises(ValueError, match="has no split 'dev'; it has 'train', 'test'"):
        read_preferences(tmp_path / "splits", split="dev")
    with pytest.raises(ValueError, match="has no splits"):
        read_preferences(tmp_path / "one", split="test")


def test_without_datasets_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'ppcompile\[data\]'"):
        read_preferences("some/hub-name")


# --------------------------------------------------------------------------- token ids


class Words:
    """A tokenizer of one id per character, with a beginning and an end token."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self, ends_texts: bool = False) -> None:
        self.ends_texts = ends_texts

    def __call__(self, text, add_special_tokens):
        ids = [ord(letter) for letter in text]
        return {"input_ids": [1, *ids, *([2] if self.ends_texts else [])] if add_special_tokens else ids}


@pytest.mark.parametrize("ends_texts", [False, True])
def test_plain_text_starts_the_prompt_and_ends_the_responses(ends_texts):
    tokens = tokenize(Preference("ab", ("c", "de"), ((0, 1),), "here"), Words(ends_texts))
    assert tokens.prompt == [1, 97, 98]
    assert tokens.responses == [[99, 2], [100, 101, 2]]
    assert (tokens.pairs, tokens.packed_tokens, tokens.unpacked_tokens) == (((0, 1),), 8, 11)


def test_prompts_lose_their_beginning_and_responses_their_end():
    record = Preference("abcd", ("efg", "h"), (), "here")
    tokens = tokenize(record, Words(), max_prompt_tokens=2, max_response_tokens=3)
    assert tokens.prompt == [99, 100]
    assert tokens.responses == [[101, 102, 103], [104, 2]]
    with pytest.raises(ValueError, match="max_prompt_tokens must be at least 1"):
        tokenize(record, Words(), max_prompt_tokens=0)


def test_a_conversation_needs_a_chat_template():
    with pytest.raises(BadRecord, match="here: the prompt is a conversation and Words has no chat_template"):
        tokenize(Preference([USER], ("a", "b"), (), "here"), Words())


@pytest.fixture(scope="module")
def chatml():
    if not SHARED.is_dir():
        pytest.skip(f"needs the sample data at {SHARED}, which is not part of the repository")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(SHARED / "tokenizer")


def test_a_chat_turn_ends_with_the_templates_own_token(chatml):
    tokens = tokenize(only({"prompt": [USER], "chosen": "Yes.", "rejected": "No."}), chatml)
    assert chatml.decode(tokens.prompt) == "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"
    assert chatml.decode(tokens.responses[0]) == "Yes.<|im_end|>"


def test_the_end_of_turn_is_not_the_eos_of_a_base_tokenizer(chatml):
    base = type(chatml).from_pretrained(chatml.name_or_path, eos_token="<|endoftext|>")
    tokens = tokenize(only({"prompt": [USER], "chosen": "Yes.", "rejected": "No."}), base)
    assert base.eos_token_id != tokens.responses[0][-1]
    assert chatml.convert_ids_to_tokens(tokens.responses[0][-1]) == "<|im_end|>"


@pytest.mark.parametrize(
    ("name", "flat", "packed_ratio"),
    [
        ("dpo_en", 516_639, 1.40),
        ("qa_feedback", 1_767_243, 2.93),
        # Trees: counted there with a line break behind each of the 200 and 151 conversations.
        ("tau_airline", 821_762 - 200, 1.33),
        ("toolbench_dfs", 466_462 - 151, 2.25),
    ],
)
def test_token_counts_of_real_data(chatml, name, flat, packed_ratio):
    encode = RecordTokenizer(chatml)
    records = [encode(record) for record in read_preferences(SHARED / f"{name}.jsonl.gz")]
    unpacked = sum(record.unpacked_tokens for record in records)
    assert unpacked == flat
    assert unpacked / sum(record.packed_tokens for record in records) == pytest.approx(packed_ratio, abs=0.005)
