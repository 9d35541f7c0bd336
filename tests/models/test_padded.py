"""The drop-in door: ordinary padded batches in, the model's own output out."""

from __future__ import annotations

import logging

import pytest
import torch
import zoo
from torch import Tensor, nn

import ppcompile

PROMPT = [11, 12, 13, 14, 15, 16, 17]
ROWS = [[*PROMPT, 21, 22], [31, 32], [*PROMPT, 41, 42, 43, 44], [*PROMPT, 21, 23], [31, 32]]


def padded(side: str, rows: list[list[int]] = ROWS) -> dict[str, Tensor]:
    width = max(map(len, rows)) + 1
    ids, mask = torch.full((len(rows), width), 3), torch.zeros(len(rows), width, dtype=torch.int64)
    for n, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[n, place], mask[n, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """All tokens but the first one of a row, which nothing predicts."""
    return batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(1) * batch["attention_mask"] < 2, -100)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return zoo.EXACT["llama"]()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_loss_logits_and_gradients_of_an_unmodified_loop(name: str, side: str) -> None:
    model = zoo.EXACT[name]()
    packed, batch = ppcompile.wrap(model), padded(side)
    real = batch["attention_mask"].bool()

    def step(forward: nn.Module) -> tuple[Tensor, Tensor, list[Tensor]]:
        out = forward(**batch, labels=labels_of(batch), use_cache=False)
        return out.loss, out.logits, list(torch.autograd.grad(out.loss, list(model.parameters())))

    (loss, logits, grads), (expected_loss, expected, expected_grads) = step(packed), step(model)
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits[real], expected[real], atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(loss, expected_loss, atol=2e-5, rtol=1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_learned_positions_count_from_the_first_token(llama: nn.Module) -> None:
    model = zoo.EXACT["gpt2"]()
    batch = padded("left")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    real = batch["attention_mask"].bool()
    out = ppcompile.wrap(model)(**batch, position_ids=positions)
    torch.testing.assert_close(
        out.logits[real], model(**batch, position_ids=positions).logits[real], atol=5e-5, rtol=1e-4
    )


def test_it_counts_what_it_saved(llama: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    packed = ppcompile.wrap(llama)
    packed(**padded("right"))
    assert (packed.savings.padded, packed.savings.real, packed.savings.computed) == (60, 33, 16)
    assert "17 shared, 27 padding" in str(packed.savings)
    assert "share no beginning" not in caplog.text
    with caplog.at_level(logging.WARNING):
        ppcompile.wrap(llama)(torch.tensor([[5, 6], [7, 8]]))
    assert "share no beginning" in caplog.text


def test_a_module_of_ones_own_gets_its_tensor_back() -> None:
    model = zoo.EXACT["plain_fused"]()
    ids = torch.tensor([[5, 6, 7], [5, 6, 9]])
    torch.testing.assert_close(ppcompile.wrap(model)(ids), model(ids), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("side", "said"),
    [
        ("left", r"row 0: its padding has a label \(column 1\)"),
        ("right", r"row 0: its padding has a label \(column 10\)"),  # column 9 is predicted by the row's last token
    ],
)
def test_labels_on_padding_are_refused(llama: nn.Module, side: str, said: str) -> None:
    """As loops hand them in that take ``labels=input_ids``: their loss is noise, and the packed model has none."""
    batch = padded(side)
    with pytest.raises(ValueError, match=rf"{said}, which the padded model predicts from padding; set that label"):
        ppcompile.wrap(llama)(**batch, labels=batch["input_ids"])


def test_a_label_on_the_first_token_behind_padding_is_refused(llama: nn.Module) -> None:
    batch = padded("left")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with pytest.raises(ValueError, match=r"row 0: its first token, behind padding on the left, has a label \(column 3"):
        ppcompile.wrap(llama)(**batch, labels=labels)


def test_a_label_on_the_first_padding_is_predicted_by_the_last_token(llama: nn.Module) -> None:
    """Where padding is the end-of-sequence token, a label on the first of it is the end of the row."""
    batch = padded("right")
    width = batch["attention_mask"].sum(1, keepdim=True)
    labels = batch["input_ids"].masked_fill(torch.arange(batch["input_ids"].shape[1]) > width, -100)
    ours, theirs = (model(**batch, labels=labels).loss for model in (ppcompile.wrap(llama), llama))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_logits_to_keep(llama: nn.Module) -> None:
    batch = padded("left")
    assert ppcompile.wrap(llama)(**batch, logits_to_keep=2).logits.shape == (5, 2, zoo.VOCABULARY)


def test_attributes_of_the_model_stay_reachable(llama: nn.Module) -> None:
    packed = ppcompile.wrap(llama)
    assert packed.config is llama.config
    assert packed.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape == (1, 4)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, ValueError, "row 0 of attention_mask has padding b"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, ValueError, "row 1 of attention_mask is all pad"),
        ({"attention_mask": torch.ones(2, 1, 3, 3)}, ValueError, "must have the shape"),
        ({"position_ids": torch.tensor([[5, 6, 7]])}, ValueError, "position_ids must count"),
        ({"output_hidden_states": True}, TypeError, "cannot honour output_hidden_states"),
        ({"use_cache": True}, TypeError, "cannot honour use_cache"),
        ({"input_ids": torch.tensor([[5, 6, zoo.VOCABULARY]])}, ValueError, "outside the model's vocabulary"),
        ({"input_ids": [[1, 2]]}, TypeError, "must be an integer tensor"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_said(
    llama: nn.Module, change: dict[str, object], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        ppcompile.wrap(llama)(**{"input_ids": torch.tensor([[5, 6, 7], [5, 6, 8]]), **change})
