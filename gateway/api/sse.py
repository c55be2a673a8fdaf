"""Server-sent events (HTML standard, 9.2)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Keep caches and nginx from holding events back."""


class EventStream(StreamingResponse):
    """An answer of events, each of which is JSON.

    Args:
        events: the events.
        held: what they need; released after the last event, and when the client leaves.
    """

    def __init__(self, events: AsyncIterator[Mapping[str, Any]], held: AsyncExitStack) -> None:
        super().__init__(_encode(events), headers=HEADERS, media_type="text/event-stream")
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with self._held:
            await super().__call__(scope, receive, send)


async def _encode(events: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
    """Encode events, each as one line of data and a blank line."""
    async for event in events:
        yield b"data: " + orjson.dumps(event) + b"\n\n"
