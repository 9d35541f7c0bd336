"""Benchmarks of ppcompile: ``python -m benchmarks COMMAND --help``."""

from __future__ import annotations

import typer

from . import packing, step, wrap
from .coverage import command as coverage

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
app.command(name="step", help=step.__doc__)(step.main)
app.command(name="wrap", help=wrap.__doc__)(wrap.main)
app.command(name="packing", help=packing.__doc__)(packing.main)
app.command(name="coverage", help=coverage.__doc__)(coverage.main)


if __name__ == "__main__":
    app()
