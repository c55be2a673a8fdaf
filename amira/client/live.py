"""Stream live audio over ``amira.v2``; audio that the server has not acknowledged is sent again after a lost connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.http11 import Response
from websockets.typing import Subprotocol

from amira.client.types import StreamError, Word

if TYPE_CHECKING:
    from typing_extensions import Self

PROTOCOL = Subprotocol("amira.v2")
END_OF_STREAM, KEEPALIVE = b"\x00", b"\x01"
BYTES_PER_SAMPLE = 2
FRAME_BYTES = 32_000
"""Maximum size of a frame, in bytes: one second of audio."""

KEEPALIVE_SECS = 10.0
"""Time without audio after which a keepalive is sent, in seconds; well below the server's ``stream_timeout_secs``."""

PAUSE_RANGE_SECS = (0.1, 2.0)
"""First and maximum pause between attempts to connect, in seconds; it doubles."""

SILENCE_SECS = 60.0
"""Time without a byte from the server after which the connection counts as lost, in seconds. Pings are sent every 20 s, and a
gateway whose buffer is full answers none while Triton fails, for up to 50 s with its defaults."""

RECONNECT_SECS = 60.0
"""Default maximum time without a connection, in seconds; after it a stream fails."""

REFUSALS = frozenset((400, 401, 403, 404, 413, 422))
"""HTTP statuses of refusals that are not retryable."""


@dataclass(frozen=True)
class Message:
    """The transcript of the stream so far.

    Attributes:
        text: the whole transcript.
        words: words of the final segments and, in a partial, of the current segment.
        tokens: token ids in the model's vocabulary.
        final: whether the stream is complete.
        audio_processed_ms: milliseconds of audio whose text can no longer change.
        stable_chars: number of leading characters of the text that can no longer change.
    """

    text: str
    words: tuple[Word, ...]
    tokens: tuple[int, ...]
    final: bool
    audio_processed_ms: int
    stable_chars: int


class _Transcript(NamedTuple):
    """A transcript, or the settled part of one."""

    text: str
    words: tuple[Word, ...]
    tokens: tuple[int, ...]


_EMPTY = _Transcript("", (), ())


class _Connection(ClientConnection):
    """A connection that ends when the server sends nothing for too long, not even pongs."""

    # A limit for each pong would cut off a slow server, which answers a ping after it has read the audio before it. Sending no
    # more audio than the server acknowledges could deadlock: only the server knows how much audio a window of its model needs.
    _abort: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._abort = self.loop.call_later(SILENCE_SECS, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        self._abort.cancel()
        self._abort = self.loop.call_later(SILENCE_SECS, self.transport.abort)
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._abort.cancel()
        super().connection_lost(exc)


def _reason(response: Response) -> str:
    """Return why a server, or a proxy before it, refuses the upgrade."""
    try:
        return f"HTTP {response.status_code}: {json.loads(response.body or b'')['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"


class LiveStream:
    """A live stream: an asynchronous context in which audio is sent and messages are read.

        async with LiveStream("ws://localhost:8057/v2/decode/stream/amira") as stream:
            await stream.send(pcm)
            final = await stream.finish()

    Args:
        url: URL of the stream, ``ws://…/v2/decode/stream/{model}``.
        headers: headers of the upgrade request, such as ``Authorization``.
        reconnect_secs: maximum time without a connection; after it the stream fails.

    Attributes:
        reconnects: number of connections that were lost and opened again.
    """

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, reconnect_secs: float = RECONNECT_SECS) -> None:
        self._url = url
        self._headers = dict(headers or {})
        self._reconnect_secs = reconnect_secs
        self._audio = bytearray()  # from sample _kept_from on
        self._kept_from = 0
        self._sent_to = 0  # samples
        self._ended = False
        self._to_send = asyncio.Event()  # set when there is audio to send, or the end
        self._session: str | None = None
        self._before = _EMPTY  # settled when this connection began; its messages continue from here
        self._settled = _EMPTY  # settled by now; the next connection's messages continue from here
        self._latest = _EMPTY
        self._unread: Message | None = None  # the newest message; each has the whole text, so older ones are dropped
        self._to_read = asyncio.Event()  # set when there is a message to read, or the stream is over
        self._progressed = False  # whether a message or an acknowledgement was received on this connection
        self._final: Message | None = None
        self._task: asyncio.Task[None] | None = None
        self.reconnects = 0

    async def __aenter__(self) -> Self:
        """Start to connect."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(lambda _: self._to_read.set())
        return self

    async def __aexit__(self, *error: object) -> None:
        """Close the stream, finished or not."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def send(self, pcm: bytes) -> None:
        """Send audio. Returns at once; the audio is kept until the server acknowledges it.

        Args:
            pcm: 16-bit little-endian samples, 16 kHz, mono.

        Raises:
            StreamError: the stream has failed or was closed.
            ValueError: the bytes are not a whole number of samples.
        """
        if len(pcm) % BYTES_PER_SAMPLE:
            raise ValueError(f"{len(pcm)} bytes are not a whole number of 16-bit samples")
        if self._task and self._task.done():
            self._outcome()
        self._audio += pcm
        self._to_send.set()

    async def finish(self) -> Message:
        """End the audio and return the final message.

        Raises:
            StreamError: the stream has failed or was closed.
        """
        self._ended = True
        self._to_send.set()
        if self._task:
            await asyncio.wait({self._task})
        return self._outcome()

    async def __aiter__(self) -> AsyncIterator[Message]:
        """Iterate over the messages up to the final one; a slow reader skips partials, each of which has the whole text.

        Raises:
            StreamError: the stream has failed, or was closed before its final message.
        """
        while True:
            await self._to_read.wait()
            if message := self._unread:
                self._unread = None
                yield message
            elif self._task and self._task.done():
                self._outcome()
                return
            else:
                self._to_read.clear()

    def _outcome(self) -> Message:
        """Return the final message of a stream that is over.

        Raises:
            StreamError: the stream has failed, or was closed before its final message.
        """
        if self._task and not self._task.cancelled():
            self._task.result()
        if self._final is None:
            raise StreamError("closed", "the stream was closed before its end")
        return self._final

    async def _run(self) -> None:
        """Connect, and reconnect, until the final message is received."""
        shortest, longest = PAUSE_RANGE_SECS
        pause, lost_at = shortest, time.monotonic()
        while self._final is None:
            self._progressed, opened_at = False, math.inf
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
                reason = _reason(error.response)
                if error.response.status_code in REFUSALS:
                    raise StreamError("refused", f"the server refuses the stream: {reason}") from error
            except (OSError, WebSocketException) as error:
                reason = str(error)
            else:
                reason = f"the connection was closed with code {socket.close_code}"
            # A stream of silence brings no messages, so a connection that lasted counts too; but a server that drops each
            # connection at once is not tried forever.
            if self._progressed or time.monotonic() - opened_at > longest:
                pause, lost_at = shortest, time.monotonic()
            elif time.monotonic() - lost_at > self._reconnect_secs:
                raise StreamError("unreachable", f"no server for {self._reconnect_secs:g} s; the last error was: {reason}")
            if self._final is None:
                self.reconnects += 1
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)

    async def _converse(self, socket: ClientConnection) -> None:
        """Send and receive until the connection ends.

        Raises:
            ConnectionError: the server ended it with a retryable error.
            StreamError: the server ended it with another error.
        """
        if self._session:
            await socket.send(json.dumps({"type": "resume", "session": self._session}))
        self._sent_to, self._before = self._kept_from, self._settled
        sender = asyncio.create_task(self._send_audio(socket))
        try:
            async for text in socket:
                self._take(json.loads(text))
        except ConnectionClosed:
            pass
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def _send_audio(self, socket: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                self._to_send.clear()
                while part := self._unsent():
                    self._sent_to += len(part) // BYTES_PER_SAMPLE
                    await socket.send(part)
                if self._ended:
                    await socket.send(END_OF_STREAM)
                    return
                try:
                    await asyncio.wait_for(self._to_send.wait(), KEEPALIVE_SECS)
                except asyncio.TimeoutError:
                    await socket.send(KEEPALIVE)

    def _unsent(self) -> bytes:
        start = (self._sent_to - self._kept_from) * BYTES_PER_SAMPLE
        return bytes(self._audio[start : start + FRAME_BYTES])

    def _take(self, message: dict[str, Any]) -> None:
        """Handle a message of the server.

        Raises:
            ConnectionError, StreamError: as ``_converse`` does.
        """
        if message["type"] == "error":
            error = message["error"]
            if error["retryable"]:
                raise ConnectionError(error["message"])
            raise StreamError(error["code"], error["message"])
        self._progressed = True
        if message["type"] == "ack":
            self._acknowledge(message)
            return
        final = message["type"] == "final"
        text = self._before.text + message["text"]
        # A partial has only the words of its segment, a final all words since the connection began.
        words_before = self._before.words if final else self._settled.words
        words = words_before + tuple(map(Word.read, message["words"]))
        self._latest = _Transcript(text, words, self._before.tokens + tuple(message["tokens"]))
        stable_chars = len(text) if final else len(self._before.text) + message["stable_chars"]
        self._unread = Message(*self._latest, final, message["audio_processed_ms"], stable_chars)
        self._final = self._unread if final else None
        self._to_read.set()

    def _acknowledge(self, ack: dict[str, Any]) -> None:
        """Drop the audio that is no longer needed, and keep the transcript from which a later connection continues."""
        self._session = ack["session"]
        del self._audio[: (ack["samples"] - self._kept_from) * BYTES_PER_SAMPLE]
        self._kept_from = ack["samples"]
        counts, latest = ack["settled"], self._latest
        self._settled = _Transcript(
            latest.text[: counts["chars"]], latest.words[: counts["words"]], latest.tokens[: counts["tokens"]]
        )
