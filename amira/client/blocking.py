"""Live streams without asyncio: a ``LiveStream`` on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from amira.client.live import RECONNECT_SECS, LiveStream, Message

if TYPE_CHECKING:
    from typing_extensions import Self

Result = TypeVar("Result")


class SyncLiveStream:
    """A ``LiveStream`` for programs without asyncio.

    One thread may send while another reads.

    Example:
        with Client().live() as stream:
            stream.send(pcm)
            final = stream.finish()

    Args:
        url: URL of the stream, ``ws://…/v2/decode/stream/{model}``.
        headers: headers of the upgrade request, such as ``Authorization``.
        reconnect_secs: maximum time without a connection; after it the stream fails.
    """

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, reconnect_secs: float = RECONNECT_SECS) -> None:
        self._stream = LiveStream(url, headers=headers, reconnect_secs=reconnect_secs)

    @property
    def reconnects(self) -> int:
        """Number of connections that were lost and opened again."""
        return self._stream.reconnects

    def __enter__(self) -> Self:
        """Start to connect."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="live stream", daemon=True)
        self._thread.start()
        self._wait(self._stream.__aenter__())
        return self

    def __exit__(self, *error: object) -> None:
        """Close the stream, finished or not."""
        self._wait(self._stream.__aexit__(*error))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def send(self, pcm: bytes) -> None:
        """Send audio, as ``LiveStream.send`` does."""
        self._wait(self._stream.send(pcm))

    def finish(self) -> Message:
        """End the audio and return the final message, as ``LiveStream.finish`` does."""
        return self._wait(self._stream.finish())

    def __iter__(self) -> Iterator[Message]:
        """Iterate over the messages up to the final one, as ``LiveStream`` does."""
        messages = aiter(self._stream)

        async def read() -> Message | None:
            return await anext(messages, None)

        while message := self._wait(read()):
            yield message

    def _wait(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
