"""End a command without success."""

from __future__ import annotations

from typing import NoReturn

import typer

FAILURE, USAGE_ERROR = 1, 2
"""Exit codes: a server did not fulfil a request; the command's arguments are wrong."""

START_A_SERVER = "start one in another terminal: amira run; or name another: --url http://HOST:PORT"
"""Advice if no server responds."""


def fail(message: str, code: int = USAGE_ERROR) -> NoReturn:
    """End the command with one line on standard error."""
    warn(message)
    raise typer.Exit(code)


def warn(message: str) -> None:
    """Print one line on standard error."""
    typer.echo(f"amira: {message}", err=True)
