"""Run ``amira`` with a gateway whose connect rate counts loopback addresses like all others: ``python strangers.py serve``.

So clients on this machine are limited as clients elsewhere are.
"""

from __future__ import annotations

from amira import cli
from gateway.limits import connects

if __name__ == "__main__":
    connects.is_loopback = lambda address: False  # noqa: ARG005 (the name is part of the type)
    cli.app()
