"""Reference log-probabilities: a model of its own, adapters off, and the cache answer alike for the same packs."""

import copy
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import zoo

import ppcompile
import ppcompile.reference_cache
from ppcompile.packed_model import PackedModel
from ppcompile.reference_cache import sequence_keys, weights_fingerprint

VOCAB = zoo.VOCABULARY
rng = random.Random(0)


def ids(length: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(length)]


PROMPT, CALL = ids(5), ids(9)
GROUPS = [
    ppcompile.Group(prompt=PROMPT, responses=[ids(4), ids(7), ids(2)]),
    ppcompile.Group(prompt=ids(3), responses=[ids(3), ids(6)]),
    [
        ppcompile.Rollout(input_ids=CALL, completion_mask=[0, 0, 1, 1, 0, 0, 1, 1, 1]),
        ppcompile.Rollout(input_ids=CALL, completion_mask=[0, 0, 0, 0, 0, 0, 1, 1, 1]),
    ],
]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return zoo.EXACT["llama"]()


@pytest.fixture(scope="module")
def frozen(model) -> PackedModel:
    return ppcompile.wrap(copy.deepcopy(model).eval().requires_grad_(False))


@pytest.fixture
def forwards(monkeypatch) -> list:
    """The packs that go through a model for a cache."""
    seen = []
    evaluate = ppcompile.reference_cache.evaluate
    monkeypatch.setattr(
        ppcompile.reference_cache, "evaluate", lambda m, batch: (seen.append(batch), evaluate(m, batch))[1]
    )
    return seen


# --------------------------------------------------------------------------- the three kinds


def test_a_model_of_its_own_answers_without_gradient(frozen):
    batch = ppcompile.pack(GROUPS)
    expected = frozen(batch)
    torch.testing.assert_close(ppcompile.reference_logps(frozen, batch), expected.logps)
    per_token = ppcompile.reference_logps(frozen, batch, per_token=True)
    torch.testing.assert_close(per_token, expected.token_logps)
    assert not per_token.requires_grad


def test_a_reference_runs_in_eval_mode_and_is_left_as_it_was_found():
    noisy = zoo.EXACT["gpt2"]()
    noisy.transformer.drop.p = 0.5
    packed = PackedModel(noisy.train())
    noisy.transformer.h[0].eval()  # a part that the user keeps in eval mode
    modes = [module.training for module in noisy.modules()]
    batch = ppcompile.pack(GROUPS[:2])
    once, again = ppcompile.reference_logps(packed, batch), ppcompile.reference_logps(packed, batch)
    assert torch.equal(once, again)
    assert [module.training for module in noisy.modules()] == modes
    torch.testing.assert_close(once, packed.eval()(batch).logps.detach())


@pytest.fixture(scope="module")
def adapted(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.0)
    return PackedModel(peft.get_peft_model(copy.deepcopy(model), config))  # each graph is made when it is needed


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers by an old name
def test_adapters_off_is_the_base_model_and_the_adapters_train_on(adapted, frozen):
    batch = ppcompile.pack(GROUPS)
    base = ppcompile.reference_logps(frozen, batch)
    reference = ppcompile.AdaptersOff(adapted)
    before = adapted(batch).logps.detach()
    assert (before - base).abs().max() > 1e-2
    torch.testing.assert_close(ppcompile.reference_logps(reference, batch), base)
    adapted(batch).logps.sum().backward()
    trained = [p for name, p in adapted.named_parameters() if "lora_" in name]
    assert trained
    assert all(p.requires_grad and p.grad is not None for p in trained)
    torch.testing.assert_close(adapted(batch).logps.detach(), before)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_off_needs_a_base_that_stays(adapted, frozen):
    reference = ppcompile.AdaptersOff(adapted)
    unfrozen = adapted.unwrapped.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm\.weight for one, so the reference would move with the policy"):
        ppcompile.AdaptersOff(adapted)
    with pytest.raises(ValueError, match="would move"):
        ppcompile.reference_logps(reference, ppcompile.pack(GROUPS))
    unfrozen.requires_grad_(False)
    with pytest.raises(TypeError, match="a wrapped peft model with adapters in its layers, got PackedModel of Llama"):
        ppcompile.AdaptersOff(frozen)
    with pytest.raises(TypeError, match="got PeftModel"):
        ppcompile.AdaptersOff(adapted.unwrapped)


def test_what_is_no_reference_is_refused(model):
    with pytest.raises(TypeError, match=r"got LlamaForCausalLM\. Try: ppcompile\.wrap\(model\)"):
        ppcompile.reference_logps(model, ppcompile.pack(GROUPS))


# --------------------------------------------------------------------------- the cache


def test_the_cache_answers_for_any_packing_of_what_it_has_seen(frozen, tmp_path, forwards):
    cache = ppcompile.CachedReference(tmp_path / "ref.sqlite", frozen)
    batch = ppcompile.pack(GROUPS)
    expected = ppcompile.reference_logps(cache, batch)
    tokens = ppcompile.reference_logps(cache, batch, per_token=True)
    torch.testing.assert_close(expected, frozen(batch).logps)
    torch.testing.assert_close(tokens, frozen(batch).token_logps)
    assert (len(forwards), len(cache)) == (1, batch.num_responses)

    first, second, third = expected.split(batch.group_sizes.tolist())
    again = ppcompile.CachedReference(tmp_path / "ref.sqlite", name=cache.name)
    for order, share in (([2, 0, 1], "tree"), ([1], "prompt"), ([0, 2], "prompt")):
        logps = ppcompile.reference_logps(again, ppcompile.pack([GROUPS[n] for n in order], share=share))
        assert torch.equal(logps, torch.cat([(first, second, third)[n] for n in order]))
    assert len(forwards) == 1


def test_only_what_is_new_is_kept_anew(frozen, tmp_path):
    cache = ppcompile.CachedReference(tmp_path / "ref.sqlite", frozen)
    old = ppcompile.reference_logps(cache, ppcompile.pack(GROUPS[:1]))
    both = ppcompile.pack([GROUPS[1], GROUPS[0]])
    assert torch.equal(ppcompile.reference_logps(cache, both)[2:], old)
    assert cache.fill([both, ppcompile.pack(GROUPS)]) == 2  # the rollouts
    assert cache.fill([ppcompile.pack(GROUPS)]) == 0


def test_a_sequence_twice_in_a_pack_is_one_entry(frozen, tmp_path):
    cache = ppcompile.CachedReference(tmp_path / "ref.sqlite", frozen)
    twice = ppcompile.pack([GROUPS[0], GROUPS[0]])
    logps = ppcompile.reference_logps(cache, twice)
    assert torch.equal(logps[:3], logps[3:])
    assert len(cache) == 3


def test_keys_know_tokens_order_and_what_is_scored():
    def key(entry):
        (found,) = sequence_keys(ppcompile.pack([entry]))
        return found

    keys = [
        key(ppcompile.Group([1, 2], [[3, 4]])),
        key(ppcompile.Group([1, 2], [[4, 3]])),
        key(ppcompile.Group([1], [[2, 3, 4]])),
        key(ppcompile.Group([1, 2], [[3, 4, 5]])),
        key(ppcompile.Rollout([1, 2, 3, 4], [0, 0, 1, 0])),
        key(ppcompile.Rollout([1, 2, 3, 4], [0, 1, 0, 1])),
    ]
    assert len(set(keys)) == len(keys)
    assert key(ppcompile.Rollout([1, 2, 3, 4], [0, 0, 1, 1])) == keys[0]  # the same sequence, scored alike


def test_another_model_is_refused_by_name(frozen, tmp_path):
    path = tmp_path / "ref.sqlite"
    cache = ppcompile.CachedReference(path, frozen)
    cache.fill([ppcompile.pack(GROUPS)])
    other = copy.deepcopy(frozen.unwrapped)
    assert weights_fingerprint(PackedModel(other)) == cache.name
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-3
    with pytest.raises(
        ValueError, match=r"ref\.sqlite holds the log-probabilities of 'LlamaForCausalLM sha256:"
    ) as said:
        ppcompile.CachedReference(path, PackedModel(other))
    assert cache.name in str(said.value)
    with pytest.raises(ValueError, match="and this reference is 'mine'"):
        ppcompile.CachedReference(path, name="mine")
    changed = copy.deepcopy(frozen.unwrapped)
    changed.config.rms_norm_eps *= 2  # the weights are the same, and what they compute is not
    assert weights_fingerprint(PackedModel(changed)) != cache.name
    assert len(cache) == 7


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_off_is_named_by_its_base_and_can_be_cached(adapted, tmp_path):
    reference = ppcompile.AdaptersOff(adapted)
    cache = ppcompile.CachedReference(tmp_path / "ref.sqlite", reference)
    batch = ppcompile.pack(GROUPS)
    torch.testing.assert_close(ppcompile.reference_logps(cache, batch), ppcompile.reference_logps(reference, batch))
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_" in name).add_(1.0)
    assert weights_fingerprint(reference) == cache.name  # training the adapters does not touch the base
    cache.fill([ppcompile.pack([ppcompile.Group([1, 2], [[3]])])])
    with torch.no_grad():
        adapted.unwrapped.base_model.model.model.norm.weight.add_(1.0)
    assert weights_fingerprint(reference) != cache.name


def test_a_policy_in_training_is_no_reference(model, tmp_path):
    policy = ppcompile.wrap(copy.deepcopy(model))
    cache = ppcompile.CachedReference(tmp_path / "ref.sqlite", policy, name="start")
    cache.fill([ppcompile.pack(GROUPS[:1])])
    policy(ppcompile.pack(GROUPS[:1])).logps.sum().backward()
    torch.optim.SGD(policy.parameters(), lr=0.1).step()
    ppcompile.reference_logps(cache, ppcompile.pack(GROUPS[:1]))  # remembered, and still right
    with pytest.raises(RuntimeError, match="the weights of the reference have changed"):
        ppcompile.reference_logps(cache, ppcompile.pack(GROUPS))


def test_without_a_reference_what_is_missing_is_an_error(frozen, tmp_path):
    path = tmp_path / "ref.sqlite"
    with pytest.raises(FileNotFoundError, match=r"ref\.sqlite is not there"):
        ppcompile.CachedReference(path, name="mine")
    ppcompile.CachedReference(path, frozen, name="mine").fill([ppcompile.pack(GROUPS[:1])])
    cache = ppcompile.CachedReference(path, name="mine")
    with pytest.raises(LookupError, match=r"2 of 5 responses of the batch are not in .*, for one response 3"):
        ppcompile.reference_logps(cache, ppcompile.pack(GROUPS[:2]))
    with pytest.raises(ValueError, match="a cache belongs to one reference"):
        ppcompile.CachedReference(path)
    with pytest.raises(TypeError, match="got LlamaForCausalLM"):
        ppcompile.CachedReference(path, frozen.unwrapped)
    with pytest.raises(FileNotFoundError, match="absent"):
        ppcompile.CachedReference(tmp_path / "absent" / "ref.sqlite", frozen)


def test_weights_that_are_not_here_need_a_name(frozen, tmp_path):
    elsewhere = copy.deepcopy(frozen.unwrapped).to("meta")
    with pytest.raises(ValueError, match=r"is on the meta device and cannot be read as a whole here; name the weights"):
        weights_fingerprint(PackedModel(elsewhere))


# --------------------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", [b"not a database at all, whatever its length" * 100, None])
def test_a_damaged_file_is_refused(frozen, tmp_path, damage):
    path = tmp_path / "ref.sqlite"
    cache = ppcompile.CachedReference(path, frozen, name="mine")
    many = [ppcompile.Group([n], [ids(60), ids(60)]) for n in range(40)]
    cache.fill([ppcompile.pack(many)])
    whole = path.read_bytes()
    path.write_bytes(damage or whole[: len(whole) // 2])  # None: half a copy
    with pytest.raises(ValueError, match=r"ref\.sqlite is no file of log-probabilities, or is damaged"):
        ppcompile.CachedReference(path, frozen, name="mine").fill([ppcompile.pack(many)])


def test_files_of_others_are_refused(frozen, tmp_path):
    path = tmp_path / "ref.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE songs (title TEXT)")
    database.close()
    with pytest.raises(ValueError, match=r"a database of something else \(tables songs\)"):
        ppcompile.CachedReference(path, frozen, name="mine")


WRITER = """
    import sys, pathlib
    import numpy as np
    from ppcompile.logp_store import LogpStore
    store = LogpStore(pathlib.Path(sys.argv[1]), "mine")
    for n in range(1_000_000):
        store.write({f"{sys.argv[2]} {n} {k}".encode(): np.full(40, n, dtype=np.float32) for k in range(50)})
"""


def test_killed_writers_leave_whole_records(frozen, tmp_path):
    path = tmp_path / "ref.sqlite"
    cache = ppcompile.CachedReference(path, frozen, name="mine")
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path)]
    writers = [subprocess.Popen([*command, name]) for name in "ab"]
    while len(cache) < 500 and all(writer.poll() is None for writer in writers):
        time.sleep(0.01)
    for writer in writers:
        writer.kill()
        assert writer.wait() == -signal.SIGKILL
    rows = len(ppcompile.CachedReference(path, frozen, name="mine"))
    assert rows >= 500
    assert rows % 50 == 0  # a transaction is all there, or not at all
    with sqlite3.connect(path) as database:
        assert {len(row) for (row,) in database.execute("SELECT row FROM logps")} == {160}
    database.close()
    assert cache.fill([ppcompile.pack(GROUPS)]) == 7
