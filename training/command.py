"""The steps of a training as commands."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer


class TrainingError(ValueError):
    """What a step was given can't be used; one line that says what to do."""


def run(main: Callable[..., None]) -> None:
    """Run a step; what its user can mend is one line: a file or program that is missing, or one that can't be used."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except (FileNotFoundError, TrainingError) as error:
        typer.echo(f"training: {error}", err=True)
        sys.exit(2)
