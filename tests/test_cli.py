"""The command line, as a person would use it: on a folder, on a bare configuration, on a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import zoo
from typer.testing import CliRunner

from ppcompile import pipeline
from ppcompile.cli import app

WIDE = {"COLUMNS": "200"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma2")
    zoo.EXACT["gemma2"]().save_pretrained(path)
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env=WIDE)


def test_inspect_shows_passes_and_sites_and_writes_dumps(folder: Path, tmp_path: Path) -> None:
    result = run("inspect", folder, "--dump", tmp_path / "dump", "--mask", tmp_path / "mask.svg")
    assert result.exit_code == 0, result.output
    for expected in ("check_token_mixing", "window(8)", "causal", "cascade", "best on cpu", "4 attention sites"):
        assert expected in result.output
    stages = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert stages[0] == "00_capture.py"
    assert len(stages) == 1 + len(pipeline.passes())
    assert "ppcompile.prefix_attention" in (tmp_path / "dump" / stages[-1]).read_text()
    assert "<svg" in (tmp_path / "mask.svg").read_text()


def test_a_diff_between_two_stages(folder: Path) -> None:
    result = run("inspect", folder / "config.json", "--diff", "recognize_attention", "rewrite_attention")
    assert result.exit_code == 0, result.output
    assert "prefix_attention" in result.output
    wrong = run("inspect", folder / "config.json", "--diff", "capture", "rewrite")
    assert wrong.exit_code == 2
    assert "unknown stage 'rewrite'" in wrong.output


def test_verify_compares_real_weights(folder: Path) -> None:
    result = run("verify", folder)
    assert result.exit_code == 0, result.output
    assert "packed equals eager unpacked" in result.output


def test_a_refusal_names_module_and_op(tmp_path: Path) -> None:
    zoo.REFUSED["bert"][0]().config.save_pretrained(tmp_path)
    result = run("inspect", tmp_path)
    assert result.exit_code == 1
    assert "not packable" in result.output
    assert "bert.encoder.layer.0.attention.self" in result.output


def test_a_mistake_says_what_is_accepted(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "nothing")
    assert result.exit_code == 2
    assert "config.json" in result.output
    assert "Traceback" not in result.output


def test_an_unknown_backend_is_named(folder: Path) -> None:
    result = run("inspect", folder, "--backend", "fast")
    assert result.exit_code == 2
    assert "unknown backend 'fast'" in result.output
    assert "Traceback" not in result.output
