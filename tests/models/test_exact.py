"""The promise: packed equals eager unpacked, values and gradients, for every model of the list."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import zoo
from torch import Tensor, nn

import ppcompile

FORWARD = 2e-5  # nats per token
GRADIENT = 1e-4  # norm of the difference over norm
ZERO = 1e-6  # a gradient this small beside the largest is zero but for rounding


def random_ids(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(3, zoo.VOCABULARY, (count,), generator=generator).tolist()


def groups_of_all_shapes(seed: int = 0) -> list[ppcompile.Group]:
    """1 to 9 unequal responses, prompts of 1 to 300 tokens, responses that share their beginning, a shared preamble."""
    generator = torch.Generator().manual_seed(seed)
    ids = lambda count: random_ids(generator, count)  # noqa: E731
    preamble, start = ids(11), ids(6)
    return [
        ppcompile.Group(ids(300), [ids(20), ids(3)]),
        ppcompile.Group(ids(1), [ids(9)]),
        ppcompile.Group(preamble + ids(30), [ids(n) for n in (1, 2, 3, 5, 8, 13, 21, 4, 1)]),
        ppcompile.Group(preamble + ids(7), [start + ids(5), start + ids(9), start, start + ids(5)]),
    ]


def dpo_loss(logps: Tensor, reference: Tensor, sizes: list[int], beta: float = 0.5) -> Tensor:
    """The first response of each group against each of the others; a lone response against its reference."""
    losses, start = [], 0
    for size in sizes:
        margin = beta * (logps - reference)[start : start + size]
        others = margin[1:] if size > 1 else margin.new_zeros(1)
        losses.append(-nn.functional.logsigmoid(margin[0] - others).sum())
        start += size
    return torch.stack(losses).sum()


def eager_unpacked(model: nn.Module, groups: list[ppcompile.Group]) -> list[Tensor]:
    """Token log-probabilities of each response, one sequence at a time."""
    found = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]])
            output = model(ids)
            logits = (output if isinstance(output, Tensor) else output.logits)[0]
            n = len(group.prompt)
            found.append(logits[n - 1 : -1].log_softmax(-1).gather(1, ids[0, n:, None])[:, 0])
    return found


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(g.norm() for g in theirs.values())
    for name, expected in theirs.items():
        difference = (ours[name] - expected).norm()
        if expected.norm() < ZERO * largest:
            assert difference < ZERO * largest, name
        else:
            assert difference <= GRADIENT * expected.norm(), f"{name}: {difference / expected.norm():.1e}"


@pytest.mark.parametrize("share", ["prompt", "tree"])
@pytest.mark.parametrize("name", zoo.EXACT)
def test_packed_equals_eager_unpacked(name: str, share: str) -> None:
    model, groups = zoo.EXACT[name](), groups_of_all_shapes()
    batch = ppcompile.pack(groups, share=share, pad_to_multiple_of=64)
    assert batch.num_slots > batch.num_tokens, "the pack should have padding"

    reference = zoo.sharpen(zoo.EXACT[name](), seed=1)
    with torch.no_grad():
        reference_logps = torch.stack([t.sum() for t in eager_unpacked(reference, groups)])
    sizes = [len(group.responses) for group in groups]

    expected = eager_unpacked(model, groups)
    expected_loss = dpo_loss(torch.stack([t.sum() for t in expected]), reference_logps, sizes)
    expected_gradients = gradients(model, expected_loss)

    packed = ppcompile.wrap(model)
    assert not packed.compiled().graph.unshared
    out = packed(batch)
    assert (out.token_logps - torch.cat(expected)).abs().max() <= FORWARD
    assert out.lengths.tolist() == [len(t) for t in expected]
    torch.testing.assert_close(out.logps, torch.stack([t.sum() for t in expected]), rtol=1e-5, atol=1e-4)
    assert_same_gradients(gradients(model, dpo_loss(out.logps, reference_logps, sizes)), expected_gradients)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "gpt_oss", "plain_written_out"])
def test_reference_backend_agrees(name: str) -> None:
    model, groups = zoo.EXACT[name](), groups_of_all_shapes(1)
    batch = ppcompile.pack(groups, share="tree")
    expected = torch.cat(eager_unpacked(model, groups))
    out = ppcompile.wrap(model, backend="reference")(batch)
    assert (out.token_logps - expected).abs().max() <= FORWARD


def test_train_mode_is_captured_on_its_own() -> None:
    model = zoo.EXACT["llama"]()
    packed = ppcompile.wrap(model)
    packed.train()
    assert model.training
    assert packed.training
    batch = ppcompile.pack(groups_of_all_shapes(2))
    assert (
        packed(batch).token_logps - torch.cat(eager_unpacked(model, groups_of_all_shapes(2)))
    ).abs().max() <= FORWARD
    packed.eval()
    assert not model.training
    assert len(packed._compiled) == 2


def test_state_is_the_models_own() -> None:
    model = zoo.EXACT["llama"]()
    packed = ppcompile.wrap(model)
    assert list(packed.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(packed.parameters(), model.parameters(), strict=True))
    assert packed.config is model.config
    batch = ppcompile.pack(groups_of_all_shapes())
    before = packed(batch).logps
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(packed(batch).logps, before)
    packed.load_state_dict(zoo.EXACT["llama"]().state_dict())
    torch.testing.assert_close(packed(batch).logps, before)


def test_verify_passes_and_leaves_the_model_as_found() -> None:
    model = zoo.EXACT["qwen3"]().train()
    report = ppcompile.verify(model)
    assert report.ok
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_bfloat16_is_as_close_as_unpacked_batchings_are() -> None:
    assert ppcompile.verify(zoo.EXACT["llama"]().to(torch.bfloat16)).ok


def test_copies_and_pickles_carry_the_model() -> None:
    packed = ppcompile.wrap(zoo.EXACT["llama"]())
    batch = ppcompile.pack(groups_of_all_shapes())
    expected = packed(batch).logps
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert again.unwrapped is not packed.unwrapped
        torch.testing.assert_close(again(batch).logps, expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers by an old name
def test_lora_adapters_train_and_switch_off() -> None:
    peft = pytest.importorskip("peft")
    model = zoo.EXACT["llama"]()
    batch = ppcompile.pack(groups_of_all_shapes())
    plain = ppcompile.wrap(model)(batch).logps.detach()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config).eval()
    packed = ppcompile.wrap(adapted)
    assert ppcompile.verify(packed, batch).ok
    assert (packed(batch).logps - plain).abs().max() > 1e-2
    with adapted.disable_adapter():
        torch.testing.assert_close(packed(batch).logps.detach(), plain)
    assert (packed(batch).logps - plain).abs().max() > 1e-2
