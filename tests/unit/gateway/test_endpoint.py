"""The connection to a Triton that is not there."""

from __future__ import annotations

import asyncio

from gateway.config.settings import Address, Settings
from gateway.triton.endpoint import READY_TIMEOUT_SECS, Endpoint


async def test_a_name_is_asked_for_anew() -> None:
    """By a channel of its own: an old one asks again only after up to two minutes, however short its other pauses are."""
    endpoint = Endpoint(Address("no-such-name.invalid:8001", tls=False), Settings())
    await endpoint.start()
    first = endpoint._connection
    await asyncio.sleep(READY_TIMEOUT_SECS + 1)
    assert endpoint._connection is not first
    await endpoint.close()
