"""One stream of the gRPC face: audio from messages into a live session, and its events into responses.

Two tasks serve it: one reads messages, one writes responses. A full session stops the reader; then gRPC's flow control stops
the client. A client that does not read stops the session. A third task looks for clients that are idle.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from gateway.api.riva_call import Context, read
from gateway.api.riva_config import Options
from gateway.api.riva_results import LiveResults
from gateway.audio.errors import undecodable
from gateway.audio.pool import FilePool
from gateway.audio.sniff import LIVE_MAGICS
from gateway.audio.stream import StreamInput
from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.framing import SMALL_BYTES, SMALL_FRAMES_PER_SEC
from gateway.limits.bucket import TokenBucket
from gateway.live.events import Failed
from gateway.live.session import Session
from gateway.live.states import Ending

MAGIC_BYTES = max(map(len, LIVE_MAGICS))
"""Number of bytes that show whether a stream is a file."""

PIECE_BYTES = 2**16
"""Part of a message that is decoded before other tasks get a turn, in bytes; a multiple of any sample's size."""


class RivaStream:
    """One ``StreamingRecognize``, after its configuration.

    Args:
        context: gRPC's.
        session: the stream's.
        options: what the configuration asks for.
        files: decodes containers.
        settings: the gateway's.
        request_id: the client's id of the request, which each response repeats; empty for none.
    """

    def __init__(
        self, context: Context, session: Session, options: Options, files: FilePool, settings: Settings, request_id: str
    ) -> None:
        self._context = context
        self._request_id = request_id
        self._session = session
        self._options = options
        self._timeout_secs = settings.stream_timeout_secs
        self._audio = StreamInput(options.raw, files, session.append, settings.max_stream_audio_secs)
        self._results = LiveResults(words=options.words, interim=options.interim)
        self._held = b""  # bytes of an incomplete sample, or of a file's first bytes
        self._checked = not options.is_file
        self._small = TokenBucket(SMALL_FRAMES_PER_SEC, SMALL_FRAMES_PER_SEC)
        self._waits_since: float | None = None  # for a message

    async def serve(self) -> None:
        """Serve the stream to its last result.

        Raises:
            ApiError: the session failed, a message is not allowed, the client is idle or does not read, or the server stops.
        """
        writer = asyncio.create_task(self._write(), name="riva writer")
        reader = asyncio.create_task(self._read(), name="riva reader")
        watch = asyncio.create_task(self._watch(), name="riva watch")
        tasks = (writer, reader, watch)
        try:
            running: set[asyncio.Future[None]] = {*tasks, self._audio.failed}
            while not writer.done():  # a last result that was sent counts, whatever else ended at the same time
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in () if writer in done else done:
                    task.result()
            writer.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._audio.close()
        if self._session.ending is Ending.DRAIN:
            raise ApiError(ErrorKind.DRAINING, "the server is shutting down; open another stream for the audio that follows")

    async def _read(self) -> None:
        """Take messages until the client ends the stream.

        Raises:
            ApiError: a message is not allowed.
        """
        while (message := await self._next()) is not None:
            if message.HasField("streaming_config"):
                raise ApiError(ErrorKind.INVALID_VALUE, "streaming_config may only be in the first message", "streaming_config")
            await self._take(message.audio_content)
        await self._finish()
        self._session.end()

    async def _next(self) -> Any | None:
        self._waits_since = time.monotonic()
        message = await read(self._context)
        self._waits_since = None
        if message is not None and len(message.audio_content) < SMALL_BYTES:  # small messages cost more than their audio
            self._small.take(1)
            await asyncio.sleep(max(0.0, -self._small.level / SMALL_FRAMES_PER_SEC))
        return message

    async def _take(self, data: bytes) -> None:
        """Take the next bytes, cut anywhere."""
        data = self._held + data
        if len(data) >= MAGIC_BYTES:
            self._check(data)
        whole = len(data) - len(data) % self._options.raw.sample_bytes if self._checked else 0
        self._held = data[whole:]
        for at in range(0, whole, PIECE_BYTES):
            await self._audio.feed(data[at : min(whole, at + PIECE_BYTES)])

    async def _finish(self) -> None:
        if self._held:
            self._check(self._held)
            await self._audio.feed(self._held)
        await self._audio.end()

    def _check(self, data: bytes) -> None:
        """Check the first bytes of a stream that must be a file."""
        if not self._checked and not data.startswith(LIVE_MAGICS):
            raise undecodable(f"encoding is {self._options.encoding}, but the stream does not start like a file.")
        self._checked = True

    async def _write(self) -> None:
        """Send a response for each event until the session has ended.

        Raises:
            ApiError: the session failed, or the client does not read.
        """
        async for event in self._session:
            if isinstance(event, Failed):
                raise event.error
            if response := self._results.response(event):
                if self._request_id:
                    response.id.value = self._request_id
                try:
                    await asyncio.wait_for(self._context.write(response), self._timeout_secs)
                except asyncio.TimeoutError:
                    message = f"nothing was read for {self._timeout_secs:g} s"
                    raise ApiError(ErrorKind.STREAM_IDLE, message) from None

    async def _watch(self) -> None:
        """Look whether messages come, which is cheaper than a timer for each message.

        Raises:
            ApiError: none came for too long.
        """
        limit = self._timeout_secs
        while True:
            idle_secs = time.monotonic() - self._waits_since if self._waits_since else 0.0
            if idle_secs >= limit:
                rule = "send audio, or empty messages to keep the stream open"
                raise ApiError(ErrorKind.STREAM_IDLE, f"nothing came for {limit:g} s; {rule}")
            await asyncio.sleep(limit - idle_secs)
