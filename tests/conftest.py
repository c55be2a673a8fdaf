"""Fixtures of all tests that talk to a real Triton, hypothesis's profiles, and the order of files."""

from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.servers import (
    gateway,
    http,
    make_gateway,
    no_sequence_left,
    quick_imports,
    quick_restarts,
    recordings,
    sources,
    triton,
)

__all__ = [
    "gateway",
    "http",
    "make_gateway",
    "no_sequence_left",
    "quick_imports",
    "quick_restarts",
    "recordings",
    "sources",
    "triton",
]

settings.register_profile("ci", deadline=None, max_examples=50)
settings.register_profile("deep", deadline=None, max_examples=500)
settings.load_profile("ci")  # make test-full chooses the other by --hypothesis-profile

LONGEST = ("recovery", "launcher", "observability", "triton", "hostile", "canary", "streaming", "resume", "poison", "models")
"""Files of tests that take longest, in order. They begin first, so that processes in parallel end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, then those that talk to a server, and unit tests last."""

    def rank(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        if "unit" in item.path.relative_to(Path(__file__).parent).parts:
            return len(LONGEST) + 1
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=rank)
