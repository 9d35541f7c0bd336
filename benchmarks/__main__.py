"""Benchmarks of ppcompile: ``python -m benchmarks step --help``."""

from __future__ import annotations

import typer

from . import step

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
app.command(name="step", help=step.__doc__)(step.main)


@app.callback()
def _group() -> None:
    """Keep ``step`` a subcommand while it is the only one."""


if __name__ == "__main__":
    app()
