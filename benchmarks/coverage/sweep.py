"""Many types, each in a process of its own: a crash, a hang or a leak of one is that one's row and nobody else's."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from .check import Result, check
from .configs import VOCABULARY
from .models import build

__all__ = ["sweep"]

SECONDS = 240
"""Processor time that one type may take."""
MEMORY = 8 << 30
"""Bytes of address space that one type may take."""


def sweep(kinds: Sequence[str], jobs: int = 2, seconds: int = SECONDS) -> Iterator[Result]:
    """Check every type, ``jobs`` at a time; results in the order of ``kinds``.

    Args:
        kinds: types as transformers names them.
        jobs: processes at a time.
        seconds: processor time for each, before it counts as a timeout; four times as much on the clock.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch and transformers are imported once, not once for each type
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda kind: _isolated(context, kind, seconds), kinds)


def _isolated(context: multiprocessing.context.BaseContext, kind: str, seconds: int) -> Result:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(kind, seconds, sender), daemon=True)  # type: ignore[attr-defined]
    start = time.monotonic()
    process.start()
    sender.close()
    result = None
    try:
        if receiver.poll(4 * seconds):
            result = receiver.recv()
    except EOFError:  # it died before it had anything to say
        pass
    finally:
        process.kill()
        process.join()
        receiver.close()
    if result is not None:
        return result
    if process.exitcode == -signal.SIGXCPU or time.monotonic() - start >= 4 * seconds:
        return Result(kind, "timeout", reason=f"took more than {seconds} s of processor time")
    return Result(kind, "crash", reason=f"the process ended with {_ending(process.exitcode)}")


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _child(kind: str, seconds: int, sender: Connection) -> None:
    import transformers

    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # exports that fail print the whole graph
        os.dup2(silent, stream)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    sender.send(check(kind, lambda: build(kind), VOCABULARY))
