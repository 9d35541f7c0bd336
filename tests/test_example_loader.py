"""examples/loader.py: killed in the middle of an epoch, it goes on with the same packs and the same losses."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import loader

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def run(out: Path) -> list[str]:
    app = typer.Typer()
    app.command()(loader.main)
    done = CliRunner().invoke(app, ["--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output.splitlines()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_losses(tmp_path):
    whole = run(tmp_path / "whole")
    steps = [line for line in whole if line.startswith("epoch")]
    command = [sys.executable, loader.__file__, "--out", str(tmp_path / "killed"), "--num-workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        seen = [process.stdout.readline().rstrip() for _ in range(len(steps) // 2 + 3)]
        process.kill()
        seen += process.stdout.read().splitlines()
    assert process.returncode == -signal.SIGKILL
    rest = run(tmp_path / "killed")
    again = [line for line in rest if line.startswith("epoch")]
    assert seen == steps[: len(seen)]
    assert 0 < len(again) <= len(steps) - len(seen) + 1  # the last step that was seen may have had no checkpoint yet
    assert again == steps[len(steps) - len(again) :]
    assert rest[-1] == whole[-1] == "log-probabilities kept: 256 sequences"
