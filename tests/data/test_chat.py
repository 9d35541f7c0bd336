"""Conversations as token ids: what the template writes, what of it is scored, and which templates are refused."""

import pytest
import torch

import ppcompile
from ppcompile.data import BadRecord, RecordTokenizer, read_preferences, tokenize
from ppcompile.runtime.groups import Group
from toy_preferences import small_llama

USER = {"role": "user", "content": "Hi?"}
MORE = {"role": "user", "content": "And?"}
FIRST = {"role": "assistant", "content": "Look."}
TOOL = {"role": "tool", "content": "42"}
LAST = {"role": "assistant", "content": "42!"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
SCHEMA = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
PAIR = {"prompt": [USER], "chosen": "Yes.", "rejected": "No."}
TURNS = {"messages": [USER, FIRST, TOOL, LAST]}


def tokens_of(record, tokenizer, **options):
    (found,) = read_preferences([record])
    return tokenize(found, tokenizer, **options)


def scored(tokens, tokenizer, response: int = 0) -> list[str]:
    """The scored runs of a response, as text."""
    ids = tokens.responses[response]
    mask = tokens.masks[response] if tokens.masks else [True] * len(ids)
    runs, open_run = [], False
    for token, is_scored in zip(ids, mask, strict=True):
        if is_scored:
            runs = [*runs[:-1], [*runs[-1], token]] if open_run else [*runs, [token]]
        open_run = is_scored
    return [tokenizer.decode(run) for run in runs]


def text(tokens, tokenizer, response: int = 0) -> str:
    return tokenizer.decode([*tokens.prompt, *tokens.responses[response]])


# --------------------------------------------------------------------------- single answers


@pytest.mark.parametrize("template", ["chatml", "marked", "tools", "trims"])
def test_an_answer_follows_its_header_and_ends_its_turn(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    tokens = tokens_of(PAIR, tokenizer)
    assert tokenizer.decode(tokens.prompt) == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(ids) for ids in tokens.responses] == ["Yes.<|im_end|>", "No.<|im_end|>"]
    assert tokens.masks is None
    assert isinstance(tokens.entry, Group)


def test_a_response_is_what_the_template_makes_of_it(make_tokenizer):
    tokenizer = make_tokenizer("trims")
    tokens = tokens_of({**PAIR, "chosen": "  Yes. \n"}, tokenizer)
    assert scored(tokens, tokenizer) == ["Yes.<|im_end|>"]


def test_turns_that_no_special_token_ends_get_the_end_of_the_text(make_tokenizer):
    tokenizer = make_tokenizer("plain")
    tokens = tokens_of(PAIR, tokenizer)
    assert scored(tokens, tokenizer) == ["Yes.<|endoftext|>"]
    tokens = tokens_of(TURNS, tokenizer)
    assert scored(tokens, tokenizer) == ["Look.", "42!<|endoftext|>"]
    assert text(tokens, tokenizer) == "user: Hi?\n\nassistant: Look.\n\ntool: 42\n\nassistant: 42!<|endoftext|>"


def test_a_text_that_follows_another_gets_no_space_in_front(make_tokenizer):
    tokenizer = make_tokenizer("plain", spaced=True)
    alone, chat = tokens_of({**PAIR, "prompt": "Hi?"}, tokenizer), tokens_of(PAIR, tokenizer)
    for tokens in (alone, chat):
        assert tokenizer.convert_ids_to_tokens(tokens.responses[0]) == [*"Yes.", "<|endoftext|>"]
    assert tokenizer.convert_ids_to_tokens(alone.prompt) == [*"▁Hi?"]  # what the tokenizer puts there by itself


def test_options_reach_the_template(make_tokenizer):
    tokenizer = make_tokenizer("opens reasoning")
    with pytest.raises(BadRecord, match=r"record 1: the chat template does not write the conversation as a contin.*"):
        tokens_of(PAIR, tokenizer)
    tokens = tokens_of(PAIR, tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert scored(tokens, tokenizer, 1) == ["No.<|im_end|>"]


# --------------------------------------------------------------------------- many turns


@pytest.mark.parametrize("template", ["chatml", "marked"])
def test_of_many_turns_those_of_the_assistant_are_scored(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    tokens = tokens_of(TURNS, tokenizer)
    assert tokenizer.decode(tokens.prompt) == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert scored(tokens, tokenizer) == ["Look.<|im_end|>", "42!<|im_end|>"]
    whole = tokenizer.apply_chat_template(TURNS["messages"], tokenize=False)
    assert text(tokens, tokenizer) == whole.removesuffix("\n")
    (rollout,) = tokens.entry
    assert rollout.input_ids == [*tokens.prompt, *tokens.responses[0]]
    assert rollout.completion_mask == [*[False] * len(tokens.prompt), *tokens.masks[0]]


@pytest.mark.parametrize("template", ["chatml", "marked"])
def test_turns_of_the_prompt_are_not_scored(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    shared = [USER, FIRST]
    record = {"chosen": [*shared, USER, LAST], "rejected": [*shared, MORE, LAST]}
    tokens = tokens_of(record, tokenizer)
    assert tokenizer.decode(tokens.prompt).endswith("Look.<|im_end|>\n")  # no header: the user goes on
    assert [scored(tokens, tokenizer, n) for n in (0, 1)] == [["42!<|im_end|>"]] * 2
    assert text(tokens, tokenizer, 1).endswith("user\nAnd?<|im_end|>\n<|im_start|>assistant\n42!<|im_end|>")


def test_responses_that_begin_with_different_roles_share_the_prompt_without_a_header(make_tokenizer):
    tokenizer = make_tokenizer()
    record = {"prompt": [USER], "chosen": [LAST], "rejected": [MORE, LAST]}
    tokens = tokens_of(record, tokenizer)
    assert tokenizer.decode(tokens.prompt) == "<|im_start|>user\nHi?<|im_end|>\n"
    assert [scored(tokens, tokenizer, n) for n in (0, 1)] == [["42!<|im_end|>"]] * 2


def test_what_stands_behind_the_last_answer_stays_and_is_not_scored(make_tokenizer):
    tokenizer = make_tokenizer()
    tokens = tokens_of({"messages": [USER, FIRST, TOOL]}, tokenizer)
    assert text(tokens, tokenizer).endswith("Look.<|im_end|>\n<|im_start|>tool\n42<|im_end|>")
    assert scored(tokens, tokenizer) == ["Look.<|im_end|>"]


def test_rollouts_of_one_task_are_one_group(make_tokenizer):
    tokenizer = make_tokenizer()
    record = {"conversations": [[USER, FIRST, TOOL, LAST], [USER, LAST]], "scores": [0, 1]}
    tokens = tokens_of(record, tokenizer)
    assert (tokens.pairs, tokens.scores) == (((1, 0),), (0.0, 1.0))
    assert [scored(tokens, tokenizer, n) for n in (0, 1)] == [["Look.<|im_end|>", "42!<|im_end|>"], ["42!<|im_end|>"]]
    assert len(tokens.entry) == 2


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_it_marks_them(make_tokenizer):
    thought = {"role": "assistant", "content": "hm</think>Look."}
    record = {"messages": [USER, thought, TOOL, LAST]}
    with pytest.raises(BadRecord, match=r"record 1: the chat template is not prefix-consistent: message 1 reads .*"):
        tokens_of(record, make_tokenizer("forgets reasoning"))
    kept = tokens_of(record, make_tokenizer())
    assert scored(kept, make_tokenizer()) == ["hm</think>Look.<|im_end|>", "42!<|im_end|>"]
    # One answer alone is last, and stands as it was said.
    tokenizer = make_tokenizer("forgets reasoning")
    assert scored(tokens_of({"messages": [USER, thought]}, tokenizer), tokenizer) == ["hm</think>Look.<|im_end|>"]


# --------------------------------------------------------------------------- tools


def test_tools_and_their_calls_go_through_the_template(make_tokenizer):
    tokenizer = make_tokenizer("tools")
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    record = {"messages": [USER, call, TOOL, LAST], "tools": [SCHEMA]}
    tokens = tokens_of(record, tokenizer)
    assert '"name": "look"' in tokenizer.decode(tokens.prompt)
    called = '<call>{"name": "look", "arguments": {"at": "x"}}</call><|im_end|>'
    assert scored(tokens, tokenizer) == [called, "42!<|im_end|>"]
    assert tokens_of({**record, "tools": f"[{str(SCHEMA).replace(chr(39), chr(34))}]"}, tokenizer) == tokens


def test_a_template_without_a_place_for_tools_is_refused(make_tokenizer):
    with pytest.raises(BadRecord, match="the chat template does not write them into the prompt"):
        tokens_of({**PAIR, "tools": [SCHEMA]}, make_tokenizer())


# --------------------------------------------------------------------------- failures


def test_a_template_that_fails_is_named_with_its_words(make_tokenizer):
    record = {"prompt": [{"role": "system", "content": "Be brief."}, USER], "chosen": "Yes.", "rejected": "No."}
    with pytest.raises(
        BadRecord, match="record 1: the chat template failed: TemplateError: roles must alternate user/assistant"
    ):
        tokens_of(record, make_tokenizer("alternates"))
    with pytest.raises(BadRecord, match="the chat template failed: TypeError"):
        tokens_of(PAIR, make_tokenizer("breaks"))


def test_a_conversation_needs_a_template(make_tokenizer):
    with pytest.raises(BadRecord, match="has no chat_template"):
        tokens_of(PAIR, make_tokenizer(None))


def test_a_limit_that_leaves_nothing_scored_is_an_error(make_tokenizer):
    tokenizer = make_tokenizer()
    record = {"prompt": [USER], "chosen": [MORE, LAST], "rejected": [MORE, FIRST]}
    assert tokens_of(record, tokenizer, max_response_tokens=40).masks[0][-1]
    with pytest.raises(BadRecord, match="response 0 has no scored tokens within max_response_tokens"):
        tokens_of(record, tokenizer, max_response_tokens=3)
    with pytest.raises(ValueError, match="max_response_tokens must be at least 1"):
        RecordTokenizer(tokenizer, max_response_tokens=0)


def test_packed_log_probabilities_are_those_of_the_assistants_tokens_alone(make_tokenizer):
    tokenizer, model = make_tokenizer(), small_llama(0).eval()
    turns = {
        "conversations": [[USER, FIRST, TOOL, LAST], [USER, FIRST, MORE, FIRST], [USER, LAST]],
        "scores": [0, 1, 2],
    }
    loader = ppcompile.PackedDataLoader([turns, {**turns, "scores": [2, 1, 0]}], tokenizer=tokenizer, share="tree")
    (batch,) = loader
    expected = []
    for place, rollout in enumerate(turns["conversations"] * 2):
        ids = torch.tensor([batch.sequences()[place].tolist()])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        text, total = "", 0.0
        for message in rollout:
            text += f"<|im_start|>{message['role']}\n"
            start = len(tokenizer(text)["input_ids"])
            text += f"{message['content']}<|im_end|>"
            if message["role"] == "assistant":
                total += logps[start - 1 : len(tokenizer(text)["input_ids"]) - 1].sum()
            text += "\n"
        assert tokenizer.decode(ids[0]) == text.removesuffix("\n")
        expected.append(total)
    torch.testing.assert_close(ppcompile.wrap(model)(batch).logps, torch.stack(expected), atol=1e-4, rtol=1e-5)
