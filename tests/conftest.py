"""Fixtures of all tests that talk to a real Triton, and hypothesis's profiles."""

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
