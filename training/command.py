"""Run the steps of a training as commands."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer


class TrainingError(ValueError):
    """An input of a step is not usable; the message is one line and says what to do."""


def run(main: Callable[..., None]) -> None:
    """Run a step. Print an error that the user can fix, such as a missing file or program, as one line."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except (FileNotFoundError, TrainingError) as error:
        typer.echo(f"training: {error}", err=True)
        sys.exit(2)
