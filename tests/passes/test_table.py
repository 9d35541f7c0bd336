"""docs/passes.md lists every pass, in order, with code and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import zoo

import ppcompile

ROOT = Path(__file__).resolve().parents[2]


def rows() -> list[list[str]]:
    lines = (ROOT / "docs" / "passes.md").read_text().split("## Reading a mask")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]


def test_the_table_is_the_pipeline() -> None:
    stages = [stage.name for stage in ppcompile.wrap(zoo.EXACT["plain_fused"]()).compiled().stages]
    assert [row[0] for row in rows()] == stages


def test_the_table_points_at_files_that_exist() -> None:
    for name, _, numbers, code, tests in rows():
        assert numbers in ("no", "rounding"), name
        for path in re.findall(r"`([^`]+)`", f"{code} {tests}"):
            assert (ROOT / path).exists(), path
