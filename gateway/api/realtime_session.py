"""One realtime session: from a client's events to the decoder, and back.

Four tasks serve it: one reads events and detects turns, one decodes, one writes events, one looks for clients that are idle or
flood the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import orjson
import structlog
from fastapi import WebSocket
from starlette.websockets import WebSocketDisconnect

from gateway import metrics, tracing
from gateway.api import realtime_items as items
from gateway.api.openai_realtime_events import (
    LOGPROBS,
    Append,
    ClientEvent,
    Commit,
    Update,
    error_message,
    error_of,
    event_id_of,
    messages_of,
    read_event,
)
from gateway.api.realtime_config import EventError, Message, SessionConfig
from gateway.api.realtime_turns import Turns
from gateway.audio import BYTES_PER_SAMPLE, RATE
from gateway.audio.raw import RawStream
from gateway.errors import ApiError, ErrorKind
from gateway.framing import SMALL_BYTES, SMALL_FRAMES_PER_SEC
from gateway.limits.places import Place
from gateway.live.speech import Piece, SpeechDetector
from gateway.service import Service
from gateway.triton.connection import Samples

MAX_UNSENT = 256
"""Events that wait to be sent, above which no more client events are read and nothing more is decoded."""

log = structlog.get_logger()


@dataclass(frozen=True)
class _Ending:
    """How a connection ends, once every item is transcribed.

    Attributes:
        code: close code.
        error: what the client is told before; None for nothing.
    """

    code: int
    error: Message | None = None


class Connection:
    """One WebSocket, from the upgrade to the close.

    Args:
        socket: accepted.
        service: the gateway's.
        caller: who is charged.
        model: public name of the model while the client names none.
        config: the session's at its start.
        place: what ``reclaim`` releases.
    """

    def __init__(
        self, socket: WebSocket, service: Service, caller: int, model: str, config: SessionConfig, place: Place
    ) -> None:
        settings = service.settings
        self._socket = socket
        self._service = service
        self._caller = caller
        self._model = model
        self._place = place
        self._flooding_secs: Callable[[], float] = socket.state.flooding_secs
        self._idle_limit_secs = settings.realtime_timeout_secs
        self._send_timeout_secs = settings.stream_timeout_secs
        self._max_samples = int(settings.max_stream_audio_secs * RATE)
        self._max_waiting = settings.audio_buffer_capacity // BYTES_PER_SAMPLE
        self._id = f"sess_{secrets.token_hex(12)}"
        self._items = items.Items(lambda: f"item_{secrets.token_hex(12)}")
        self._config = config
        self._incoming = RawStream(config.raw_format)
        self._detector: SpeechDetector | None = None
        self._detect()
        self._kept = bytearray()  # audio that may still become part of an item
        self._kept_from = 0
        self._turns = Turns(service, caller, self._items, self._carry_out, self._wait_for_room)
        self._unsent: deque[Message] = deque()
        self._news = asyncio.Event()  # something to send, or the end
        self._room = asyncio.Event()
        self._ending: _Ending | None = None
        self._came_at = self._heard_at = time.monotonic()

    @property
    def received_secs(self) -> float:
        """Audio received, in seconds."""
        return self._items.position / RATE

    @property
    def silent_secs(self) -> float:
        """Time since audio came, or since the connection began, in seconds."""
        return time.monotonic() - self._heard_at

    def reclaim(self) -> None:
        """End, and release the place at once, because another stream waits and this one has sent no audio for long."""
        waited = f"No audio came for {self.silent_secs:.0f} s, and another stream needs the place"
        self._end(1000, f"{waited}; connect again when there is audio.")
        self._place.release()

    def drain(self) -> None:
        """End with the transcription of what came, because the server shuts down."""
        self._end(ErrorKind.DRAINING.close_code)

    async def serve(self) -> int:
        """Serve the session; return the code that closed the socket."""
        self._send({"type": "session.created", "session": self._config.render(self._id)})
        writer = asyncio.create_task(self._write(), name="realtime writer")
        reader = asyncio.create_task(self._read(), name="realtime reader")
        decoder = asyncio.create_task(self._turns.run(), name="realtime decoder")
        watch = asyncio.create_task(self._watch(), name="realtime watch")
        tasks = (writer, reader, decoder, watch)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            ended = next(task for task in tasks if task.done())
            writer.cancel()
            return await self._close(ended.exception())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        """Handle the client's events until it disconnects.

        Raises:
            WebSocketDisconnect: the client disconnected.
        """
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message["code"])
            if self._ending:
                continue
            text = message.get("text") or message.get("bytes") or b""
            self._came_at = time.monotonic()
            try:
                await self._handle(read_event(text))
            except EventError as error:
                given_id = event_id_of(text)
                self._send(error_message(error.message, code=error.code, param=error.param, event_id=given_id))
            await self._wait_for_room()
            self._came_at = time.monotonic()

    async def _handle(self, event: ClientEvent) -> None:
        if isinstance(event, Append):
            self._heard_at = self._came_at
            await self._take(self._incoming.convert(event.audio))
        elif isinstance(event, Update):
            await self._update(event)
        else:
            await self._flush()
            if self._detector:
                self._detector.reset()
            self._carry_out(self._items.commit(event.event_id) if isinstance(event, Commit) else self._items.clear())

    async def _update(self, event: Update) -> None:
        """Change the configuration.

        Raises:
            EventError: a value is not allowed.
        """
        config = self._config.merge(event.session)
        if config.model and config.model != self._config.model:
            try:
                self._model = self._service.resolve_model(config.model)
            except ApiError as error:
                raise EventError(error.message, error.kind.code, "session.audio.input.transcription.model") from None
        if config.raw_format != self._config.raw_format:
            await self._flush()
            self._incoming = RawStream(config.raw_format)
        self._config = config
        self._detect()
        self._send({"type": "session.updated", "session": config.render(self._id)})

    def _detect(self) -> None:
        """Detect turns as the configuration says."""
        detection = self._config.detection
        if detection is None:
            self._detector = None
        elif self._detector:
            self._detector.detection = detection
        else:
            self._detector = self._service.sessions.detector(detection, self._items.position)
        self._items.detect(self._config.padding)

    async def _flush(self) -> None:
        """Take what the resampler has kept."""
        rest, self._incoming = self._incoming.finish(whole=False), RawStream(self._config.raw_format)
        await self._take(rest)

    async def _take(self, samples: Samples) -> None:
        """Take audio [n]: find turns in it, and hand it to the decoder."""
        left = self._max_samples - self._items.position
        too_long, samples = len(samples) > left, samples[:left]
        for piece in await self._detector.feed(samples) if self._detector else (Piece(samples),):
            if self._ending:
                return
            self._kept += piece.samples.tobytes()
            self._carry_out(self._items.append(len(piece.samples)))
            if change := piece.change:
                started = change.speaking
                self._carry_out(self._items.speech_started(change.at) if started else self._items.speech_stopped())
            self._trim()
            await self._turns.wait_below(self._max_waiting)
        if too_long:
            self._end(1000, f"The session has more than {self._max_samples / RATE:g} s of audio; begin another.")

    def _trim(self) -> None:
        """Drop audio that can't become part of an item any more."""
        surplus = self._items.kept_from - self._kept_from
        del self._kept[: surplus * BYTES_PER_SAMPLE]
        self._kept_from += surplus

    def _carry_out(self, outputs: list[items.Output]) -> None:
        """Carry out the outputs of the state machine, in order."""
        for output in outputs:
            if isinstance(output, items.Open):
                self._turns.open(output.item_id, self._model, self._config.latency)
            elif isinstance(output, items.Feed):
                start, end = ((at - self._kept_from) * BYTES_PER_SAMPLE for at in (output.start, output.end))
                self._turns.feed(output.item_id, np.frombuffer(self._kept[start:end], "<i2"))
            elif isinstance(output, items.End):
                self._turns.end(output.item_id)
            elif isinstance(output, items.Abandon):
                self._turns.abandon(output.item_id)
            else:
                for message in messages_of(output, logprobs=LOGPROBS in self._config.include):
                    self._send(message)
        if self._ending:
            self._news.set()  # perhaps everything is transcribed

    async def _wait_for_room(self) -> None:
        """Wait while too many events are unsent."""
        while len(self._unsent) > MAX_UNSENT:
            self._room.clear()
            await self._room.wait()

    def _send(self, message: Message) -> None:
        """Queue a message behind the waiting ones."""
        self._unsent.append(message)
        self._news.set()

    async def _write(self) -> None:
        """Send events until the session has ended, and every item is transcribed.

        Raises:
            ApiError: the client does not read.
            WebSocketDisconnect: the client disconnected.
        """
        while True:
            while self._unsent:
                await self._transmit(self._unsent.popleft())
                self._room.set()
            if self._ending and self._items.idle:
                return
            self._news.clear()
            await self._news.wait()

    async def _transmit(self, message: Message) -> None:
        text = orjson.dumps({"event_id": f"event_{secrets.token_hex(12)}", **message}).decode()
        try:
            await asyncio.wait_for(self._socket.send_text(text), self._send_timeout_secs)
        except asyncio.TimeoutError:
            raise ApiError(ErrorKind.STREAM_IDLE, f"nothing was read for {self._send_timeout_secs:g} s") from None

    async def _watch(self) -> None:
        """End the session when no event comes for too long, or too many small frames come."""
        while not self._ending:
            idle_secs = time.monotonic() - self._came_at
            if idle_secs >= self._idle_limit_secs:
                self._end(1000, f"Nothing came for {self._idle_limit_secs:g} s; send audio, or connect again.")
            if self._flooding_secs() >= self._send_timeout_secs:
                rule = f"More than {SMALL_FRAMES_PER_SEC} frames per second below {SMALL_BYTES} bytes came"
                self._end(1000, f"{rule} for {self._send_timeout_secs:g} s; send larger ones.", "quota_exceeded")
            await asyncio.sleep(min(self._send_timeout_secs, max(0.01, self._idle_limit_secs - idle_secs)))
        await asyncio.Event().wait()  # the writer ends the connection

    def _end(self, code: int, reason: str | None = None, error_code: str = "session_expired") -> None:
        """Commit what came, and close once it is transcribed."""
        if self._ending:
            return
        self._ending = _Ending(code, error_message(reason, code=error_code) if reason else None)
        self._carry_out(self._items.finish())

    async def _close(self, error: BaseException | None) -> int:
        """Close the socket, after an error if there is one; return the close code."""
        if isinstance(error, WebSocketDisconnect):
            return error.code if error.code in metrics.PEER_CLOSES else metrics.DISCONNECTED
        ending = self._ending or _Ending(1000)
        if error:
            if not isinstance(error, ApiError):
                log.error("realtime session failed", exc_info=error)
                error = ApiError(ErrorKind.INTERNAL, "internal error")
            metrics.REJECTIONS.labels(error.kind.code).inc()
            tracing.fail(error.kind)
            ending = _Ending(ErrorKind.INTERNAL.close_code, {"type": "error", "error": error_of(error)})
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, asyncio.TimeoutError, ApiError):  # gone, or does not read
            if ending.error:
                await self._transmit(ending.error)
            await asyncio.wait_for(self._socket.close(ending.code), self._send_timeout_secs)
        return ending.code
