"""A live stream over ``amira.v2``: what the server has not acknowledged is kept, and sent again after a lost connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
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

REFUSALS = frozenset((400, 401, 403, 404, 413, 422))
"""Statuses that no second try changes."""


class StreamError(RuntimeError):
    """The server ended the stream with an error, or could not be reached for too long.

    Attributes:
        code: as docs/API.md lists them; ``unreachable`` where no server answered.
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


class LiveStream:
    """A live stream, as an asynchronous context: send audio, iterate over messages, finish.

        async with LiveStream("ws://localhost:8057/v2/decode/stream/amira") as stream:
            await stream.send(pcm)
            final = await stream.finish()

    Args:
        url: of the stream.
        headers: for the upgrade, such as ``Authorization``.
        reconnect_secs: for how long a lost connection is tried again.
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
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self._final: Message | None = None
        self._task: asyncio.Task[None] | None = None
        self.reconnects = 0

    async def __aenter__(self) -> Self:
        """Begin to connect."""
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *error: object) -> None:
        """Leave the stream, finished or not."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def send(self, pcm: bytes) -> None:
        """Add audio: 16-bit little-endian samples, 16 kHz, mono.

        Raises:
            StreamError: the stream has failed.
            ValueError: it is no whole number of samples.
        """
        if len(pcm) % BYTES_A_SAMPLE:
            raise ValueError(f"{len(pcm)} bytes are no whole number of 16-bit samples")
        if self._task and self._task.done():
            self._task.result()
        self._audio += pcm
        self._news.set()

    async def finish(self) -> Message:
        """Say that no audio follows, and wait for the final transcript.

        Raises:
            StreamError: the stream has failed.
        """
        self._ended = True
        self._news.set()
        if self._task:
            await asyncio.shield(self._task)
        if self._final is None:
            raise StreamError("closed", "the stream was closed before its end")
        return self._final

    async def __aiter__(self) -> AsyncIterator[Message]:
        """Give the messages as they come, up to the final one."""
        while message := await self._messages.get():
            yield message

    async def _run(self) -> None:
        """Connect, and connect again, until the final is there."""
        shortest, longest = PAUSE_RANGE_SECS
        pause, lost_at = shortest, time.monotonic()
        try:
            while self._final is None:
                try:
                    async with connect(
                        self._url, subprotocols=[PROTOCOL], additional_headers=self._headers, compression=None, max_size=None
                    ) as socket:
                        heard = await self._converse(socket)
                except InvalidStatus as error:
                    heard, reason = False, f"HTTP {error.response.status_code}"
                    if error.response.status_code in REFUSALS:
                        raise StreamError("refused", f"the server refuses the stream: {reason}") from error
                except (OSError, WebSocketException) as error:
                    heard, reason = False, str(error)
                else:
                    reason = f"the connection was closed with code {socket.close_code}"
                if heard:
                    pause, lost_at = shortest, time.monotonic()
                elif time.monotonic() - lost_at > self._reconnect_secs:
                    raise StreamError("unreachable", f"no server for {self._reconnect_secs:g} s; the last one said: {reason}")
                if self._final is None:
                    self.reconnects += 1
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, longest)
        finally:
            self._messages.put_nowait(None)

    async def _converse(self, socket: ClientConnection) -> bool:
        """Send and listen until the connection ends; whether the server said anything.

        Raises:
            StreamError: the server refuses to go on.
        """
        if self._session:
            await socket.send(json.dumps({"type": "resume", "session": self._session}))
        self._sent_to, self._before = self._kept_from, self._settled
        sender = asyncio.create_task(self._send_on(socket))
        heard = False
        try:
            async for text in socket:
                heard |= self._take(json.loads(text))
        except ConnectionClosed:
            pass
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
        return heard

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

    def _take(self, message: dict[str, Any]) -> bool:
        """Take a message; whether it shows that the stream goes on."""
        if message["type"] == "error":
            error = message["error"]
            if not error["retryable"]:
                raise StreamError(error["code"], error["message"])
            return False
        if message["type"] == "ack":
            self._acknowledge(message)
            return True
        final = message["type"] == "final"
        # A partial has the words of its segment only, a final all since the connection began.
        words_before = self._before.words if final else self._settled.words
        self._latest = _Heard(
            self._before.text + message["text"], words_before + message["words"], self._before.tokens + message["tokens"]
        )
        taken = Message(*self._latest, final, message["audio_processed_ms"])
        self._messages.put_nowait(taken)
        self._final = taken if final else None
        return True

    def _acknowledge(self, ack: dict[str, Any]) -> None:
        """Forget audio that is no longer needed, and remember with what a later connection goes on."""
        self._session = ack["session"]
        del self._audio[: (ack["samples"] - self._kept_from) * BYTES_A_SAMPLE]
        self._kept_from = ack["samples"]
        counts, heard = ack["settled"], self._latest
        self._settled = _Heard(heard.text[: counts["chars"]], heard.words[: counts["words"]], heard.tokens[: counts["tokens"]])
