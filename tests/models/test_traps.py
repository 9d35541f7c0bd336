"""The known ways of getting packing silently wrong, one test each; each fails when the trap is sprung."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ppcompile
from ppcompile.verification import unpacked_logps

PROMPT, CHOSEN, REJECTED = [5, 9, 33, 71, 8, 20, 4, 61, 17, 12, 50, 3], [40, 41, 7], [66, 13, 29, 90, 31]
TOLERANCE = 2e-5
SPRUNG = 1e-2  # how far off a sprung trap is at least


def pair(share: str = "prompt", **options: int) -> ppcompile.PackedBatch:
    return ppcompile.pack([ppcompile.Group(PROMPT, [CHOSEN, REJECTED])], share=share, **options)


def assert_exact(model: nn.Module, batch: ppcompile.PackedBatch) -> Tensor:
    out = ppcompile.wrap(model)(batch)
    assert (out.token_logps - unpacked_logps(model, batch)).abs().max() <= TOLERANCE
    return out.token_logps


def rejected(logps: Tensor) -> Tensor:
    return logps[len(CHOSEN) :]


def test_1_jumping_positions_do_not_cut_the_row() -> None:
    """transformers reads positions that jump as a new sequence, and would hide the prompt from the second response."""
    model, batch = zoo.EXACT["llama"](), pair()
    ours = rejected(assert_exact(model, batch))
    # The trap: the second response of a pack as the eager model sees it when it is handed the pack's positions.
    row, positions = torch.tensor([PROMPT + CHOSEN + REJECTED]), batch.position_ids
    logits = model(row, position_ids=positions).logits[0]
    slots = torch.arange(len(PROMPT + CHOSEN), row.shape[1] - 1)
    trapped = logits[slots].log_softmax(-1).gather(1, row[0, slots + 1, None])[:, 0]
    assert (trapped - ours[1:]).abs().max() > SPRUNG


def test_2_the_prompt_predicts_the_first_token_of_every_response() -> None:
    model, batch = zoo.EXACT["llama"](), pair()
    assert batch.predecessors[0] == batch.predecessors[len(CHOSEN)] == len(PROMPT) - 1
    first = rejected(assert_exact(model, batch))[0]
    # The trap: a plain shift predicts the first rejected token from the last chosen one.
    row = torch.tensor([PROMPT + CHOSEN + REJECTED[:1]])
    assert (model(row).logits[0, -2].log_softmax(-1)[REJECTED[0]] - first).abs() > SPRUNG


def test_3_a_shared_token_counts_for_each_response() -> None:
    model = zoo.EXACT["llama"]()
    responses = [[*CHOSEN, 8, 2], [*CHOSEN, 9], CHOSEN, CHOSEN]
    batch = ppcompile.pack([ppcompile.Group(PROMPT, responses)], share="tree")
    assert batch.num_tokens == len(PROMPT) + len(CHOSEN) + 3
    tokens = assert_exact(model, batch)
    out = ppcompile.wrap(model)(batch)
    assert out.token_logps.numel() == sum(map(len, responses))
    expected = torch.stack([part.sum() for part in tokens.split([len(r) for r in responses])])
    torch.testing.assert_close(out.logps, expected)
    out.logps.sum().backward()
    shared = model.lm_head.weight.grad.clone()
    model.zero_grad()
    unpacked_logps(model, batch).sum().backward()
    torch.testing.assert_close(shared, model.lm_head.weight.grad, rtol=1e-4, atol=1e-4)


def test_4_windows_are_measured_in_logical_positions() -> None:
    """The second response is further from the prompt in slots than it is in positions."""
    model = zoo.EXACT["mistral"]()  # a window of 8
    ours = rejected(assert_exact(model, pair()))
    assert_exact(model, pair(share="tree"))
    window = ppcompile.wrap(model).compiled().graph.sites[0].meaning.window
    assert window == 8
    far = zoo._transformers("mistral", sliding_window=8 - len(CHOSEN))()  # what a window in slots would leave
    trapped = rejected(unpacked_logps(far, pair()))
    assert (trapped - ours).abs().max() > SPRUNG


@pytest.mark.parametrize("name", ["plain_fused", "bloom", "gpt2", "opt"])
def test_5_models_are_never_given_positions_and_still_use_them(name: str) -> None:
    model = zoo.EXACT[name]()
    ours = rejected(assert_exact(model, pair()))
    # The trap: the index in the row instead of the position. Filler in front of the response shows the difference.
    row = torch.tensor([PROMPT + CHOSEN + REJECTED])
    logits = model(row)
    logits = (logits if isinstance(logits, Tensor) else logits.logits)[0, -len(REJECTED) - 1 : -1]
    trapped = logits.log_softmax(-1).gather(1, torch.tensor(REJECTED)[:, None])[:, 0]
    assert (trapped - ours).abs().max() > SPRUNG


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_6_recomputation_and_inference_mode_leave_the_layout_usable(name: str) -> None:
    model, batch = zoo.EXACT[name](), pair()
    packed = ppcompile.wrap(model)
    with torch.inference_mode():
        before = packed(batch).logps.clone()
    packed(batch).logps.sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logps = checkpoint(lambda: packed(batch).logps, use_reentrant=False)
    torch.testing.assert_close(logps.detach(), before)
    logps.sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n])


def test_7_low_precision_is_judged_by_the_spread_of_unpacked_batchings() -> None:
    report = ppcompile.verify(zoo.EXACT["qwen3"]().to(torch.bfloat16))
    assert report.spread > 1e-4, "the yardstick should be that of low precision"
    assert report.forward <= report.forward_limit


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_8_padding_attends_to_itself(name: str) -> None:
    model, batch = zoo.EXACT[name](), pair(pad_to_multiple_of=64)
    assert_exact(model, batch)
    ppcompile.wrap(model)(batch).logps.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("cap", [None, 2.0])
def test_9_the_model_as_configured_is_the_reference(cap: float | None) -> None:
    """A softcap, a custom mask, sinks: whatever the user's own configuration says, no more and no less."""
    model = zoo._transformers(
        "gemma2", attn_logit_softcapping=cap, query_pre_attn_scalar=8, attn_implementation="eager"
    )()
    assert_exact(model, pair())
    score = ppcompile.wrap(model).compiled().graph.sites[0].meaning.score_class
    assert ("tanh" in score) is (cap is not None)


def test_9_a_custom_mask_in_sdpa_is_read_not_assumed() -> None:
    assert_exact(zoo.EXACT["plain_triangle"](), pair())
