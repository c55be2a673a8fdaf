"""Fixtures of all tests that talk to a real Triton."""

from tests.support.servers import gateway, http, make_gateway, no_sequence_left, recordings, sources, triton

__all__ = ["gateway", "http", "make_gateway", "no_sequence_left", "recordings", "sources", "triton"]
