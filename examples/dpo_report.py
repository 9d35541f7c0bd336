"""What a run cost and how it went: clocks and memory, the plot, and the table of packed against unpacked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dpo_state import Metrics

__all__ = ["Usage", "compare", "plot"]

PLOTTED = (("loss", "DPO loss"), ("accuracy", "accuracy on the step's pairs"), ("margin", "reward margin"))


class Usage:
    """Wall time, CPU time and peak memory from its construction on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._before = self._reset_peak()

    def read(self) -> dict[str, float | None]:
        """``wall_seconds``, ``cpu_seconds`` (all threads), ``peak_mib`` above the start (``None`` if unknown)."""
        peak = self._peak()
        known = peak is not None and self._before is not None
        return {
            "wall_seconds": time.perf_counter() - self._wall,
            "cpu_seconds": time.process_time() - self._cpu,
            "peak_mib": (peak - self._before) / 2**20 if known else None,  # type: ignore[operator]
        }

    def _reset_peak(self) -> int | None:
        """Start a new high-water mark; the bytes in use now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again from the present size
        except OSError:
            return None
        return _status_bytes("VmRSS")

    def _peak(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def plot(runs: dict[str, Path], target: Path) -> None:
    """Draw loss, accuracy and margin over the steps of each run (name -> folder) into the PNG ``target``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PLOTTED), figsize=(12, 3.4), layout="constrained")
    for color, style, (name, folder) in zip(("C0", "C1"), ("-", "--"), runs.items(), strict=False):
        rows = Metrics.read(folder / "metrics.jsonl")
        for axis, (key, title) in zip(axes, PLOTTED, strict=True):
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], style, color=color, label=name)
            axis.set(title=title, xlabel="optimizer step")
        held_out = [(row["step"], row["eval_accuracy"]) for row in rows if "eval_accuracy" in row]
        if held_out:
            axes[1].plot(*zip(*held_out, strict=True), "o", color=color, label=f"{name}, held out")
    axes[0].legend()
    axes[1].legend()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def compare(packed: Path, unpacked: Path, console: Console) -> float:
    """Print two finished runs side by side; the largest difference between their losses."""
    curves = [Metrics.read(folder / "metrics.jsonl") for folder in (packed, unpacked)]
    costs: list[dict[str, Any]] = [
        json.loads((folder / "summary.json").read_text("utf-8")) for folder in (packed, unpacked)
    ]
    console.print(_curves(*curves))
    console.print(_costs(*costs))
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(*curves, strict=True))


def _curves(packed: list[dict[str, Any]], unpacked: list[dict[str, Any]]) -> Table:
    table = Table(
        "step", "loss, packed", "loss, unpacked", "difference", "held-out accuracy", title="The same training"
    )
    shown = max(1, len(packed) // 10)
    for a, b in zip(packed, unpacked, strict=True):
        if a["step"] == 0 or (a["step"] + 1) % shown == 0:
            accuracy = f"{a['eval_accuracy']:.3f}" if "eval_accuracy" in a else ""
            difference = f"{abs(a['loss'] - b['loss']):.1e}"
            table.add_row(str(a["step"]), f"{a['loss']:.6f}", f"{b['loss']:.6f}", difference, accuracy)
    return table


def _costs(packed: dict[str, Any], unpacked: dict[str, Any]) -> Table:
    table = Table("", "packed", "unpacked", "unpacked / packed", title="What it cost")
    rows = (
        ("tokens through the policy", "tokens", ",.0f"),
        ("training, wall seconds", "wall_seconds", ".1f"),
        ("training, CPU seconds", "cpu_seconds", ".1f"),
        ("capture, compile, first evaluation, seconds", "setup_seconds", ".1f"),
        ("peak memory above the start, MiB", "peak_mib", ".0f"),
        ("held-out accuracy", "eval_accuracy", ".3f"),
    )
    for title, key, form in rows:
        a, b = packed[key], unpacked[key]
        ratio = f"{b / a:.2f}" if a and b and key not in ("setup_seconds", "eval_accuracy") else ""
        table.add_row(title, *("n/a" if value is None else format(value, form) for value in (a, b)), ratio)
    return table
