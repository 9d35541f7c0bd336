"""What a run leaves on disk: one line of metrics per step, checkpoints, and how to continue from the newest one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["Checkpoints", "Metrics"]


class Metrics:
    """``metrics.jsonl``: one JSON object per optimizer step, flushed as it is written."""

    def __init__(self, folder: Path, keep_steps: int) -> None:
        """Open for appending; steps from ``keep_steps`` on, which a resumed run repeats, are dropped."""
        self.path = folder / "metrics.jsonl"
        kept = [row for row in self.read(self.path) if row["step"] < keep_steps] if keep_steps else []
        self._file = self.path.open("w", encoding="utf-8")
        for row in kept:
            self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        """Append one step."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """All complete rows of a metrics file; a killed run may leave half a line at the end."""
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


class Checkpoints:
    """Everything that a run depends on, so that a killed and resumed run repeats the uninterrupted one.

    The position in the data needs no state of its own: the order of groups is a function of seed and step.
    """

    def __init__(
        self, folder: Path, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler, settings: dict[str, Any]
    ) -> None:
        """``settings``: what must not change between a run and its continuation."""
        self.folder = folder
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.settings = settings

    def save(self, step: int) -> None:
        """Write ``checkpoint.pt`` after ``step`` steps; a kill while writing leaves the previous one whole."""
        state = {
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "settings": self.settings,
        }
        half = self.folder / "checkpoint.pt.writing"
        torch.save(state, half)
        os.replace(half, self.folder / "checkpoint.pt")

    def load(self) -> int:
        """Restore the newest checkpoint in place; the number of steps it has done.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it was written under other settings.
        """
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            raise FileNotFoundError(f"--resume: no {path}; run once with --checkpoint-every N and the same --out")
        state = torch.load(path, map_location="cpu", weights_only=True)
        changed = [name for name, value in self.settings.items() if state["settings"].get(name) != value]
        if changed:
            was = ", ".join(f"{name}={state['settings'].get(name)} (now {self.settings[name]})" for name in changed)
            raise ValueError(f"--resume: {path} was written with {was}; resume with the same settings")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        return int(state["step"])
