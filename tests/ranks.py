"""Two processes joined by gloo, which run functions of test files side by side.

A test calls ``ranks.run(function, *arguments)``; both processes import the file that the function is in and call it.
What fails on a rank fails in the test, with the rank's traceback; what hangs is ended.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
PATIENCE = timedelta(seconds=120)


class Ranks:
    """``WORLD`` processes that wait for work; started at the first :meth:`run`, and again after a failure."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, function: FunctionType, *arguments: Any) -> None:
        """Call ``function(*arguments)`` on every rank.

        Raises:
            AssertionError: it raised on a rank, or took too long.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function.__code__.co_filename, function.__qualname__, arguments))
        answers = [pipe.recv() if pipe.poll(PATIENCE.total_seconds()) else "no answer" for pipe in self._pipes]
        failed = [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if answer]
        if failed:
            self.stop()  # the others may wait in a collective for ever
            raise AssertionError("\n".join(failed))

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        meeting = tempfile.mkdtemp()
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, meeting, there), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(here)


def _serve(rank: int, meeting: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # for those who ask; the ranks meet in a file
    sys.path.insert(0, str(Path(__file__).parent))
    dist.init_process_group("gloo", f"file://{meeting}/ranks", PATIENCE, WORLD, rank)
    loaded: dict[str, Any] = {}
    with contextlib.suppress(EOFError):  # the tests are over
        while True:
            path, name, arguments = pipe.recv()
            pipe.send(_answer(loaded, path, name, arguments))


def _answer(loaded: dict[str, Any], path: str, name: str, arguments: tuple[Any, ...]) -> str:
    """The traceback of what went wrong, or nothing."""
    try:
        if path not in loaded:
            spec = importlib.util.spec_from_file_location(Path(path).stem, path)
            assert spec is not None
            assert spec.loader is not None
            loaded[path] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[path])
        function: Callable[..., None] = getattr(loaded[path], name)
        function(*arguments)
        dist.barrier()
    except Exception:  # noqa: BLE001 - whatever it is, the test shows it
        return traceback.format_exc()
    return ""
