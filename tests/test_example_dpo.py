"""examples/dpo.py: what its numbers mean, that a killed run continues as if nothing had happened, and its errors."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import dpo
from dpo_scorers import OneByOne, Packed
from dpo_state import Metrics
from ppcompile.data import TokenizedPreference, tokenize
from ppcompile.losses import dpo_loss
from toy_preferences import ByteTokenizer, small_llama, spelling_preferences

SCRIPT = Path(dpo.__file__)
GROUPS = [tokenize(record, ByteTokenizer()) for record in spelling_preferences(4, seed=1)]


def uneven() -> list[TokenizedPreference]:
    """Groups with 3, 1, 2 and 3 pairs."""
    keep = (3, 1, 2, 3)
    return [TokenizedPreference(g.prompt, g.responses, g.pairs[:n], g.where) for g, n in zip(GROUPS, keep, strict=True)]


@pytest.mark.parametrize("max_tokens", [70, 140, 1000])
def test_a_step_is_the_mean_over_its_pairs_however_the_packs_fall(max_tokens):
    groups, settings = uneven(), dpo.TOY
    model, reference = small_llama(0), small_llama(1).requires_grad_(False)
    eager, frozen = OneByOne(model), OneByOne(reference)
    plain = dpo_loss(eager.logps(groups), frozen.logps(groups), dpo.pairs_of(groups), beta=settings.beta).losses.mean()
    (expected,) = torch.autograd.grad(plain, [model.model.embed_tokens.weight])

    row = dpo.train_step(Packed(model, max_tokens), Packed(reference, max_tokens), groups, settings)
    assert (row["pairs"], row["tokens"]) == (9, sum(group.packed_tokens for group in groups))
    assert row["loss"] == pytest.approx(plain.item(), abs=1e-5)
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, expected, atol=1e-6, rtol=1e-4)


def test_packs_hold_every_group_once_and_keep_to_the_budget():
    scorer = Packed(small_llama(0), max_tokens=150)
    packs = list(scorer.split(GROUPS))
    assert sorted(id(group) for pack in packs for group in pack) == sorted(map(id, GROUPS))
    assert all(scorer.tokens(pack) <= 150 for pack in packs)
    assert len(packs) == 2
    scorer.max_tokens = 20
    with pytest.raises(
        ValueError, match=r"generated record 1: \d+ tokens do not fit into packs of 20; raise --max-tokens"
    ):
        list(scorer.split(GROUPS))


def test_an_epoch_visits_each_group_once_in_an_order_of_its_own():
    settings = dpo.replace(dpo.TOY, groups_per_step=3)
    epochs = [
        [g.where for step in (2 * n, 2 * n + 1) for g in dpo.groups_of_step(step, GROUPS, settings)] for n in range(3)
    ]
    assert all(sorted(epoch) == sorted(group.where for group in GROUPS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


# --------------------------------------------------------------------------- as a command


def command(out: Path, *extra: str) -> list[str]:
    steps = ["--toy", "--packing", "on", "--steps", "24", "--checkpoint-every", "4"]
    return [sys.executable, str(SCRIPT), *steps, "--out", str(out), *extra]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in Metrics.read(out / "metrics.jsonl")]


def kill_midway(out: Path) -> None:
    """Start a run and kill it, without a chance to clean up, once it has a checkpoint and some steps beyond."""
    with (out.parent / "killed.log").open("w") as log, subprocess.Popen(command(out), stdout=log, stderr=log) as run:
        deadline = time.monotonic() + 240
        while len(losses(out)) < 7 and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        run.kill()
    assert run.returncode == -signal.SIGKILL, (out.parent / "killed.log").read_text()


@pytest.mark.slow
def test_a_killed_and_resumed_run_gives_the_losses_of_an_uninterrupted_one(tmp_path):
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    kill_midway(tmp_path / "killed")
    assert 7 <= len(losses(tmp_path / "killed")) < 24
    subprocess.run(command(tmp_path / "killed", "--resume"), check=True, capture_output=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")

    changed = subprocess.run(
        command(tmp_path / "killed", "--resume", "--beta", "0.5"), check=False, capture_output=True, text=True
    )
    assert changed.returncode != 0
    assert "beta=0.1 (now 0.5)" in "".join(changed.stderr.split("\n")).replace("│", "")


def invoke(*arguments: str):
    app = typer.Typer()
    app.command()(dpo.main)
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "x.jsonl"], "--model and --data go together"),
        (["--unscored", "best-first"], "unscored: --model and --data go together"),
        (["--model", "m", "--data", "x.jsonl", "--toy"], "leave out --model and --data"),
    ],
)
def test_options_that_would_be_ignored_are_refused(arguments, said, tmp_path):
    done = invoke(*arguments, "--out", str(tmp_path))
    assert done.exit_code == 2
    assert said in done.output


@pytest.fixture
def own(tmp_path) -> list[str]:
    """A saved model with its tokenizer, and a data file whose responses stand best first."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\x00").save_pretrained(tmp_path / "model")
    small_llama(0).save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": r.prompt, "responses": list(r.responses), "scores": None} for r in spelling_preferences(6, seed=2)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out")]


def test_any_model_and_any_data(own, tmp_path):
    done = invoke(*own, "--unscored", "best-first", "--groups-per-step", "2", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert len(losses(tmp_path / "out")) == 3  # one pass over 5 groups; the sixth is held out
    assert (tmp_path / "out" / "curves.png").stat().st_size > 0
    assert (tmp_path / "out" / "model" / "config.json").is_file()


def test_data_without_a_preference_says_what_to_do(own):
    done = invoke(*own, "--device", "cpu")
    assert done.exit_code == 2
    assert "--unscored best-first" in done.output
