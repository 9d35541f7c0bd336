"""DPO with the packed data loader: a loop to copy, on the task of toy_preferences.py.

    python examples/loader.py --out runs/loader

Each pack goes through the policy and its reference: here a frozen copy, whose log-probabilities are kept on disk, so
that from the second epoch on it is not asked again. For a peft model ``ppcompile.AdaptersOff(policy)`` needs no copy.
Stopped and started again with the same ``--out``, the run goes on behind its last optimizer step.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Annotated

import torch
import typer

import ppcompile
from ppcompile.data import RecordTokenizer
from ppcompile.losses import dpo_loss
from toy_preferences import ByteTokenizer, small_llama, spelling_preferences


def main(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the reference's log-probabilities.")],
    records: Annotated[int, typer.Option(min=2, help="Records to train on.")] = 64,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over them.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Token budget of a pack.")] = 256,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that tokenize.")] = 0,
) -> None:
    """Train a small Llama on packs; print the loss of each optimizer step."""
    out.mkdir(parents=True, exist_ok=True)
    model = small_llama(seed=0)
    policy = ppcompile.wrap(model)
    frozen = ppcompile.wrap(copy.deepcopy(model).requires_grad_(False))
    reference = ppcompile.CachedReference(out / "reference.sqlite", frozen)
    loader = ppcompile.PackedDataLoader(
        spelling_preferences(records, seed=0),
        tokenizer=RecordTokenizer(ByteTokenizer(), max_prompt_tokens=100),
        max_tokens=max_tokens,
        packs_per_step=2,
        num_workers=num_workers,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    parts = {"model": model, "optimizer": optimizer, "loader": loader}
    if (out / "checkpoint.pt").exists():
        for name, state in torch.load(out / "checkpoint.pt").items():
            parts[name].load_state_dict(state)

    while loader.epoch < epochs:
        total = 0.0
        for batch in loader:
            logps, frozen_logps = policy(batch).logps, ppcompile.reference_logps(reference, batch)
            loss = dpo_loss(logps, frozen_logps, batch.pairs).losses.sum() / batch.step.weight  # all pairs of the step
            loss.backward()
            total += loss.item()
            if batch.ends_step:
                optimizer.step()
                optimizer.zero_grad()
                print(
                    f"epoch {loader.epoch} step {batch.step.index} pairs {batch.step.weight:.0f} loss {total:.6f}",
                    flush=True,
                )
                torch.save({name: part.state_dict() for name, part in parts.items()}, out / "checkpoint.pt.writing")
                os.replace(out / "checkpoint.pt.writing", out / "checkpoint.pt")
                total = 0.0
    print(f"{loader.report}\nlog-probabilities kept: {len(reference)} sequences")


if __name__ == "__main__":
    typer.run(main)
