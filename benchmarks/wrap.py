"""Time and memory of wrapping a model without weights: where the seconds go, pass by pass.

The default is an 8B Llama of 32 layers on the meta device. CPU time, and the peak of the process's resident memory.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

import ppcompile


def main(
    config: Annotated[Path | None, typer.Option(help="a config.json; an 8B Llama if not given")] = None,
) -> None:
    """Wrap once and print."""
    described = AutoConfig.from_pretrained(config) if config else _llama_8b()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described)
    size = sum(p.numel() for p in model.parameters()) / 1e9
    console = Console()
    console.print(f"{described.model_type}, {size:.2f}B parameters on the meta device, torch {torch.__version__}")
    start, wall = time.process_time(), time.perf_counter()
    compiled = ppcompile.wrap(model).compiled()
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    table = Table("pass", "wall s", "ops")
    for stage in compiled.stages:
        table.add_row(stage.name, f"{stage.seconds:.2f}", f"{stage.ops_before} -> {stage.ops_after}")
    console.print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    console.print(
        f"{seconds:.1f} s of CPU, {wall:.1f} s of wall time, peak memory {peak:,.0f} MB, the process included"
    )


def _llama_8b() -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
