"""A live stream over ``amira.v2``: what the server has not acknowledged is kept, and sent again after a lost connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from typing_extensions import Self
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

PROTOCOL = Subprotocol("amira.v2")
END_OF_STREAM, KEEPALIVE = b"\x00", b"\x01"
BYTES_A_SAMPLE = 2
FRAME_BYTES = 32_000
"""Largest frame that is sent: one second."""

KEEPALIVE_SECS = 10.0
PAUSE_RANGE_SECS = (0.1, 2.0)
"""Between tries to connect; doubles from the one to the other."""

SILENCE_SECS = 60.0
"""A connection on which nothing comes for so long is left. Pings go out every 20 s; a gateway whose buffer is full answers none
while Triton fails, for up to 50 s with its defaults."""

REFUSALS = frozenset((400, 401, 403, 404, 413, 422))
"""Statuses that no second try changes."""


class StreamError(RuntimeError):
    """The server ended the stream with an error, or could not be reached for too long.

    Attributes:
        code: as docs/API.md lists them; ``refused`` where the server answered the upgrade so, ``unreachable`` where none
            answered, ``closed`` where the stream was left before its final.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Message:
    """What was understood so far, of the whole stream.

    Attributes:
        text: the transcript.
        words: its words with their times in seconds, of the final segments and, in a partial, of the current one.
        tokens: its token ids.
        final: whether this is all of it.
        audio_processed_ms: audio that can no longer change it.
    """

    text: str
    words: list[dict[str, Any]]
    tokens: list[int]
    final: bool
    audio_processed_ms: int


class _Heard(NamedTuple):
    """A transcript, or the part of it that is settled."""

    text: str
    words: list[dict[str, Any]]
    tokens: list[int]


_NOTHING = _Heard("", [], [])


class _Connection(ClientConnection):
    """A connection that ends when nothing comes any more, not even answers to pings."""

    # A limit for each answer would cut off a slow server, which answers a ping when it has read the audio before it. Holding
    # audio back until the server acknowledges could last forever: only that knows how much a window of its model needs.
    _end: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._end = self.loop.call_later(SILENCE_SECS, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        self._end.cancel()
        self._end = self.loop.call_later(SILENCE_SECS, self.transport.abort)
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end.cancel()
        super().connection_lost(exc)


class LiveStream:
    """A live stream, as an asynchronous context: send audio, iterate over messages, finish.

        async with LiveStream("ws://localhost:8057/v2/decode/stream/amira") as stream:
            await stream.send(pcm)
            final = await stream.finish()

    Args:
        url: of the stream.
        headers: for the upgrade, such as ``Authorization``.
        reconnect_secs: for how long a lost connection is tried again, from its loss on.
    """

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, reconnect_secs: float = 60.0) -> None:
        self._url = url
        self._headers = dict(headers or {})
        self._reconnect_secs = reconnect_secs
        self._audio = bytearray()  # from sample _kept_from on
        self._kept_from = 0
        self._sent_to = 0  # samples
        self._ended = False
        self._news = asyncio.Event()  # there is audio to send, or the end
        self._session: str | None = None
        self._before = _NOTHING  # settled when this connection began; what it says comes behind
        self._settled = _NOTHING  # settled by now, for the next connection
        self._latest = _NOTHING
        self._unread: Message | None = None  # the newest; each holds the whole text, so that all of them would be too much
        self._told = asyncio.Event()  # there is a message to read, or the stream is over
        self._heard = False  # on this connection, what shows that the stream goes on
        self._final: Message | None = None
        self._task: asyncio.Task[None] | None = None
        self.reconnects = 0

    async def __aenter__(self) -> Self:
        """Begin to connect."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(lambda _: self._told.set())
        return self

    async def __aexit__(self, *error: object) -> None:
        """Leave the stream, finished or not."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def send(self, pcm: bytes) -> None:
        """Add audio: 16-bit little-endian samples, 16 kHz, mono.

        Raises:
            StreamError: the stream has failed, or was left.
            ValueError: it is no whole number of samples.
        """
        if len(pcm) % BYTES_A_SAMPLE:
            raise ValueError(f"{len(pcm)} bytes are no whole number of 16-bit samples")
        if self._task and self._task.done():
            self._outcome()
        self._audio += pcm
        self._news.set()

    async def finish(self) -> Message:
        """Say that no audio follows, and wait for the final transcript.

        Raises:
            StreamError: the stream has failed, or was left.
        """
        self._ended = True
        self._news.set()
        if self._task:
            await asyncio.wait({self._task})
        return self._outcome()

    async def __aiter__(self) -> AsyncIterator[Message]:
        """Give the messages as they come, up to the final one; who is slow gets the newest next, and not those before it.

        Raises:
            StreamError: the stream has failed, or was left before its final.
        """
        while True:
            await self._told.wait()
            if message := self._unread:
                self._unread = None
                yield message
            elif self._task and self._task.done():
                self._outcome()
                return
            else:
                self._told.clear()

    def _outcome(self) -> Message:
        """The final of a stream that is over.

        Raises:
            StreamError: there is none.
        """
        if self._task and not self._task.cancelled():
            self._task.result()
        if self._final is None:
            raise StreamError("closed", "the stream was closed before its end")
        return self._final

    async def _run(self) -> None:
        """Connect, and connect again, until the final is there."""
        shortest, longest = PAUSE_RANGE_SECS
        pause, lost_at = shortest, time.monotonic()
        while self._final is None:
            self._heard, opened_at = False, math.inf
            try:
                async with connect(
                    self._url,
                    subprotocols=[PROTOCOL],
                    additional_headers=self._headers,
                    compression=None,
                    max_size=None,
                    ping_timeout=None,
                    create_connection=_Connection,
                ) as socket:
                    opened_at = time.monotonic()
                    await self._converse(socket)
            except InvalidStatus as error:
                reason = f"HTTP {error.response.status_code}"
                if error.response.status_code in REFUSALS:
                    raise StreamError("refused", f"the server refuses the stream: {reason}") from error
            except (OSError, WebSocketException) as error:
                reason = str(error)
            else:
                reason = f"the connection was closed with code {socket.close_code}"
            # A silent stream hears nothing; but a server that drops each connection at once is not to be tried forever.
            if self._heard or time.monotonic() - opened_at > longest:
                pause, lost_at = shortest, time.monotonic()
            elif time.monotonic() - lost_at > self._reconnect_secs:
                raise StreamError("unreachable", f"no server for {self._reconnect_secs:g} s; the last one said: {reason}")
            if self._final is None:
                self.reconnects += 1
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)

    async def _converse(self, socket: ClientConnection) -> None:
        """Send and listen until the connection ends.

        Raises:
            ConnectionError: the server ends it with an error that another connection may not have.
            StreamError: the server refuses to go on.
        """
        if self._session:
            await socket.send(json.dumps({"type": "resume", "session": self._session}))
        self._sent_to, self._before = self._kept_from, self._settled
        sender = asyncio.create_task(self._send_on(socket))
        try:
            async for text in socket:
                self._take(json.loads(text))
        except ConnectionClosed:
            pass
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def _send_on(self, socket: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                self._news.clear()
                while part := self._unsent():
                    self._sent_to += len(part) // BYTES_A_SAMPLE
                    await socket.send(part)
                if self._ended:
                    await socket.send(END_OF_STREAM)
                    return
                try:
                    await asyncio.wait_for(self._news.wait(), KEEPALIVE_SECS)
                except asyncio.TimeoutError:
                    await socket.send(KEEPALIVE)

    def _unsent(self) -> bytes:
        start = (self._sent_to - self._kept_from) * BYTES_A_SAMPLE
        return bytes(self._audio[start : start + FRAME_BYTES])

    def _take(self, message: dict[str, Any]) -> None:
        """Take a message.

        Raises:
            ConnectionError, StreamError: as ``_converse`` does.
        """
        if message["type"] == "error":
            error = message["error"]
            if error["retryable"]:
                raise ConnectionError(error["message"])
            raise StreamError(error["code"], error["message"])
        self._heard = True
        if message["type"] == "ack":
            self._acknowledge(message)
            return
        final = message["type"] == "final"
        # A partial has the words of its segment only, a final all since the connection began.
        words_before = self._before.words if final else self._settled.words
        self._latest = _Heard(
            self._before.text + message["text"], words_before + message["words"], self._before.tokens + message["tokens"]
        )
        self._unread = Message(*self._latest, final, message["audio_processed_ms"])
        self._final = self._unread if final else None
        self._told.set()

    def _acknowledge(self, ack: dict[str, Any]) -> None:
        """Forget audio that is no longer needed, and remember with what a later connection goes on."""
        self._session = ack["session"]
        del self._audio[: (ack["samples"] - self._kept_from) * BYTES_A_SAMPLE]
        self._kept_from = ack["samples"]
        counts, heard = ack["settled"], self._latest
        self._settled = _Heard(heard.text[: counts["chars"]], heard.words[: counts["words"]], heard.tokens[: counts["tokens"]])
