"""How a command ends without success."""

from __future__ import annotations

from typing import NoReturn

import typer

FAILURE, USAGE_ERROR = 1, 2
"""Exit codes: a server did not do what it was asked; the command can't begin as it was given."""

START_A_SERVER = "start one in another terminal: amira run; or name another: --url http://HOST:PORT"
"""Advice where no server answers."""


def fail(message: str, code: int = USAGE_ERROR) -> NoReturn:
    """End the command with one line on standard error."""
    warn(message)
    raise typer.Exit(code)


def warn(message: str) -> None:
    """Print one line on standard error."""
    typer.echo(f"amira: {message}", err=True)
