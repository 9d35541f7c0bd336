"""TRL's own DPO trainer on padded rows, against packs: the same loss, and the same gradient of every parameter."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor, nn

import ppcompile
from ppcompile.losses import dpo_loss

pytest.importorskip("trl", reason="the comparison with TRL needs ppcompile[trl]")
# TRL announces what its next versions change.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BETA = 0.3
RECORDS = [
    {"prompt": "once upon a time", "chosen": "there was a fox", "rejected": "x"},
    {"prompt": "hi", "chosen": "hello", "rejected": "go away, and do not come back before the night"},
    {"prompt": "count to three", "chosen": "one two three", "rejected": "one two four"},
]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(ord("a") + n) if n < 26 else f"<{n}>": n for n in range(zoo.VOCABULARY)}
    by_letter = Tokenizer(models.WordLevel(letters, unk_token="<26>"))
    by_letter.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=by_letter, eos_token="<27>", pad_token="<28>", unk_token="<26>")


def trainer(model: nn.Module, reference: nn.Module, where: Path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(str(where), beta=BETA, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False)
    return DPOTrainer(model, reference, config, train_dataset=Dataset.from_list(RECORDS), processing_class=tokenizer())


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_step_is_that_of_trls_trainer(name: str, tmp_path: Path) -> None:
    model, reference = zoo.EXACT[name](), zoo.sharpen(zoo.EXACT[name](), seed=1)
    theirs = trainer(copy.deepcopy(model), reference, tmp_path)
    rows = list(theirs.train_dataset)
    padded = theirs.data_collator(rows)
    expected = theirs.compute_loss(theirs.model, padded)

    groups = [ppcompile.Group(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in rows]
    batch = ppcompile.pack(groups)
    with torch.no_grad():
        frozen = ppcompile.wrap(reference)(batch).logps
    logps = ppcompile.wrap(model)(batch).logps
    pairs = [(2 * n, 2 * n + 1) for n in range(len(groups))]
    loss = dpo_loss(logps, frozen, pairs, beta=BETA).losses.mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    ours = gradients(model, loss)
    for parameter, gradient in gradients(theirs.model, expected).items():
        assert (ours[parameter] - gradient).norm() <= 1e-4 * gradient.norm(), parameter
