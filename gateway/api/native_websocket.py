"""``/v2/decode/stream/{model}``: a live stream over a WebSocket.

With the subprotocol ``amira.v2`` a client learns with every answer what it needs to go on after a lost connection.

Two tasks serve a socket. The reader takes frames and puts their audio into a bounded buffer; when that is full it stops
reading, and TCP tells the client. The pump sends what has gathered to Triton
as soon as a window is complete, one request at a time, and the transcript back. Whatever ends the stream, the pump's last
request is the sequence's end, so nothing stays in the decoder.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import orjson
import structlog
from fastapi import APIRouter, WebSocket
from starlette.responses import Response
from starlette.websockets import WebSocketDisconnect, WebSocketState

from gateway import metrics, tracing
from gateway.audio.files import BYTES_A_SAMPLE, RATE
from gateway.errors import ApiError, ErrorKind
from gateway.framing import SMALL_BYTES, SMALL_FRAMES_PER_SEC
from gateway.limits.access import check_key, origin_allowed
from gateway.limits.bucket import TokenBucket
from gateway.live.resume import Ticket, Tickets
from gateway.logs import REQUEST_ID_HEADER, current_request_id
from gateway.service import BufferUsage, Service
from gateway.transcript.transcript import Answer, Transcript
from gateway.triton.endpoint import Recogniser

END_OF_STREAM, KEEPALIVE = b"\x00", b"\x01"
RESUMABLE = "amira.v2"

MAX_WINDOWS = 4
"""A request carries the audio of so many windows at most: a stream that is sent fast must not hold up the others' requests."""

ARRIVAL_SECS = 0.01
"""So exactly is known when audio came that waits in the buffer: a note of each small frame would be larger than the frame."""

AHEAD_SECS = 0.5
"""Audio that may be decoded ahead of real time, such as what was spoken before the stream began; with more it waits in line."""

BACKLOG_SECS = 60.0
"""Audio that may be decoded at once where it comes late, as after a pause of the network or on another connection."""

MOST_AHEAD_SECS = 2.0
"""What a stream got ahead while there were no others is counted up to this."""

HEARTBEAT_SHARE = 0.5
"""A silent stream's sequence is touched after this share of Triton's idle limit."""

log = structlog.get_logger()
router = APIRouter()


class End(Enum):
    """Why no more audio will come."""

    CLIENT = "the client said so"
    DRAIN = "the server is shutting down"
    ABANDONED = "nobody waits for the transcript any more"


class AudioBuffer:
    """Audio between the reader and the pump.

    Args:
        capacity: bytes that it holds at most.
        usage: told of every byte that comes and goes.
    """

    def __init__(self, capacity: int, usage: BufferUsage) -> None:
        self._capacity = capacity
        self._usage = usage
        self._audio = bytearray()
        # Each is cleared by its one waiter only, just before that looks: what happens after the look can't be missed.
        self._filled = asyncio.Event()
        self._wanted_bytes = 0
        self._emptied = asyncio.Event()
        self._overflows = False  # audio waits for room
        self.end: End | None = None
        self._taken_bytes = 0
        self._arrivals: deque[tuple[int, float]] = deque()  # from which byte of the stream on audio came at this time

    def has_room(self, size: int) -> bool:
        """Whether so many bytes can be appended now."""
        return len(self._audio) + size <= self._capacity

    async def put(self, audio: bytes) -> None:
        """Append audio, once there is room for it."""
        arrived = time.monotonic()
        self._emptied.clear()
        while not self.has_room(len(audio)):
            self._overflows = True
            self._filled.set()
            await self._emptied.wait()
            self._emptied.clear()
        self.append(audio, arrived)

    def append(self, audio: bytes, arrived: float) -> None:
        """Append audio for which there is room; nowhere if no more is to come."""
        if self.end:
            return
        if not self._arrivals or arrived >= self._arrivals[-1][1] + ARRIVAL_SECS:
            self._arrivals.append((self._taken_bytes + len(self._audio), arrived))
        self._audio += audio
        self._usage.used_bytes += len(audio)
        if len(self._audio) >= self._wanted_bytes:
            self._filled.set()

    def close(self, end: End) -> None:
        """No more audio will come; abandoning drops what is here."""
        if self.end is not End.ABANDONED:
            self.end = end
        if end is End.ABANDONED:
            self._clear()
        self._filled.set()

    async def take(self, enough_bytes: int, most_bytes: int, timeout_secs: float) -> tuple[bytes, float, End | None]:
        """Up to ``most_bytes``, once there are ``enough_bytes``, or no more can come or fit in, or the time is over.

        Returns:
            The audio; when what made it enough came, in seconds of ``time.monotonic``, or what came last if it is not enough;
            and why nothing follows it, None if something may.
        """
        deadline = time.monotonic() + timeout_secs
        self._wanted_bytes = enough_bytes = min(enough_bytes, self._capacity // 2)
        self._filled.clear()
        while len(self._audio) < enough_bytes and not self._overflows and not self.end:
            if (left := deadline - time.monotonic()) <= 0:
                break
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._filled.wait(), left)
            self._filled.clear()
        while len(self._arrivals) > 1 and self._arrivals[1][0] < self._taken_bytes + enough_bytes:
            self._arrivals.popleft()
        arrived = self._arrivals[0][1] if self._arrivals else time.monotonic()
        audio = bytes(self._audio[:most_bytes])
        del self._audio[:most_bytes]
        self._taken_bytes += len(audio)
        self._usage.used_bytes -= len(audio)
        self._overflows = False
        self._emptied.set()
        return audio, arrived, None if self._audio else self.end

    def _clear(self) -> None:
        self._usage.used_bytes -= len(self._audio)
        self._audio.clear()
        self._emptied.set()


class Session:
    """One stream, from the upgrade to the close."""

    def __init__(
        self,
        socket: WebSocket,
        service: Service,
        model: str,
        recogniser: Recogniser,
        spend: Callable[[float], None],
        *,
        resumable: bool,
    ) -> None:
        self._socket = socket
        self._spend = spend
        self._tickets = service.tickets if resumable else None
        self._settings = service.settings
        self._model = model
        self._recogniser = recogniser
        self._utterance = service.triton.stream(recogniser, service.options)
        self._resumed = self._acknowledged = Ticket(model, self._utterance.latency, stream=secrets.token_hex(8))
        self._buffer = AudioBuffer(service.settings.audio_buffer_capacity, service.buffer_usage)
        self._last_call = service.last_call
        self._admission = service.admission
        self._begun = False  # at Triton, if only by a heartbeat: a state that comes later would be ignored
        self._ahead = self._in_line = False
        self._pace = TokenBucket(
            1.0, BACKLOG_SECS, level=AHEAD_SECS
        )  # seconds of audio, of which a microphone makes one a second
        self._waits_since: float | None = None  # for a frame
        self._transcript = Transcript()
        self._received_bytes = 0
        self._sent_samples = 0  # since the start of the stream
        self._ended_at = 0.0  # seconds of time.monotonic

    @property
    def received_secs(self) -> float:
        """Audio received since the start of the stream, that of earlier connections included."""
        return (self._resumed.samples + self._received_bytes / BYTES_A_SAMPLE) / RATE

    async def run(self) -> int:
        """Serve the stream; gives the code it was closed with."""
        reader = asyncio.create_task(self._read(), name="stream reader")
        pump = asyncio.create_task(self._pump(), name="stream pump")
        watch = asyncio.create_task(self._watch(), name="stream watch")
        last_call = asyncio.create_task(self._end_at_last_call(), name="stream last call")
        try:
            await asyncio.wait({reader, pump, watch}, return_when=asyncio.FIRST_COMPLETED)
            ended = next(task for task in (pump, reader, watch) if task.done())  # a final that was sent stands
            code = await self._close(ended.exception())
            self._buffer.close(End.ABANDONED)
            self._utterance.give_up()
            if self._in_line:
                pump.cancel()
            await asyncio.wait({pump})
        finally:
            others = (reader, pump, watch, last_call)
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            self._set_ahead(False)
        if pump.cancelled() or pump.exception():
            await self._utterance.abandon()
        return code

    async def _close(self, error: BaseException | None) -> int:
        """Close the socket for what ended the stream, with an error frame where it was an error."""
        if isinstance(error, WebSocketDisconnect):
            return error.code if error.code in metrics.PEER_CLOSES else metrics.DISCONNECTED
        if error is None:
            code = ErrorKind.DRAINING.close_code if self._buffer.end is End.DRAIN else 1000
            message = None
        else:
            if not isinstance(error, ApiError):
                log.error("stream failed", exc_info=error)
                error = ApiError(ErrorKind.INTERNAL, "internal error")
            metrics.REJECTIONS.labels(error.kind.code).inc()
            tracing.fail(error.kind)
            code, message = error.kind.close_code, error.frame(current_request_id())
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, asyncio.TimeoutError, ApiError):  # gone, or does not read
            if message:
                await self._send(message)
            await asyncio.wait_for(self._socket.close(code), self._settings.stream_timeout_secs)
        return code

    async def _read(self) -> None:
        """Take frames until the client ends the stream, and from then on wait for it to disappear.

        Raises:
            ApiError: a frame is against the protocol.
            WebSocketDisconnect: the client disappeared.
        """
        while True:
            self._waits_since = None if self._ended_at else time.monotonic()
            message = await self._socket.receive()
            self._waits_since = None
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message["code"])
            if self._ended_at:
                continue
            frame = message.get("bytes")
            if frame is None:
                self._resume(message["text"])
            elif frame == END_OF_STREAM:
                self._ended_at = time.monotonic()
                self._buffer.close(End.CLIENT)
            elif frame != KEEPALIVE:
                self._check(frame)
                await self._buffer.put(frame)

    async def _watch(self) -> None:
        """Look whether frames come, which is cheaper than a timer for each of them, and not too many.

        Raises:
            ApiError: none came for too long, or nothing but small ones.
        """
        limit = self._settings.stream_timeout_secs
        while True:
            idle_secs = time.monotonic() - self._waits_since if self._waits_since else 0.0
            flooding_secs = self._socket.state.flooding_secs()
            if idle_secs >= limit:
                raise ApiError(ErrorKind.STREAM_IDLE, f"nothing came for {limit:g} s; send audio or keepalives")
            if flooding_secs >= limit:
                rule = f"more than {SMALL_FRAMES_PER_SEC} frames a second of less than {SMALL_BYTES} bytes came for {limit:g} s"
                raise ApiError(ErrorKind.QUOTA_EXCEEDED, f"{rule}; send larger ones")
            await asyncio.sleep(limit - max(idle_secs, flooding_secs))

    def _resume(self, text: str) -> None:
        """Take the first frame of a connection that goes on with a stream: ``{"type": "resume", "session": TICKET}``."""
        if not self._tickets:
            raise ApiError(ErrorKind.TEXT_FRAME, "text frames are not understood; audio and control bytes are binary")
        if self._received_bytes or self._begun:
            raise ApiError(ErrorKind.TEXT_FRAME, "resume comes first, before any audio and without a long wait")
        try:
            request = orjson.loads(text)
            session = request["session"] if request["type"] == "resume" else None
        except (orjson.JSONDecodeError, KeyError, TypeError):
            session = None
        if not isinstance(session, str):
            raise ApiError(ErrorKind.TEXT_FRAME, 'the text frame is not understood; known: {"type": "resume", "session": …}')
        self._resumed, age_secs = self._tickets.redeem(session, self._model)
        self._acknowledged = self._resumed
        # The context is sent once more, and what was spoken since the ticket was issued.
        again_secs = self._recogniser.windows[self._resumed.latency].left / RATE if self._resumed.state else 0.0
        self._pace = TokenBucket(1.0, BACKLOG_SECS, level=min(BACKLOG_SECS, AHEAD_SECS + again_secs + age_secs))
        self._utterance.resume(self._resumed.state, self._resumed.samples, self._resumed.latency)
        self._transcript = Transcript(continues=self._resumed.chars > 0)
        self._sent_samples = self._resumed.samples

    def _check(self, frame: bytes) -> None:
        if not frame:
            raise ApiError(ErrorKind.EMPTY_FRAME, "the frame is empty; audio frames have at least 2 bytes")
        if len(frame) == 1:
            raise ApiError(
                ErrorKind.UNKNOWN_CONTROL, f"control byte 0x{frame.hex()} is not known; known: 0x00 end, 0x01 keepalive"
            )
        if len(frame) > self._settings.max_frame_bytes:
            raise ApiError(
                ErrorKind.FRAME_TOO_LARGE,
                f"the frame has {len(frame)} bytes; at most {self._settings.max_frame_bytes} are taken",
            )
        if len(frame) % BYTES_A_SAMPLE:
            raise ApiError(ErrorKind.ODD_LENGTH, f"the frame has {len(frame)} bytes; 16-bit samples need an even number")
        self._spend(len(frame) / BYTES_A_SAMPLE / RATE)
        self._received_bytes += len(frame)
        if self.received_secs > self._settings.max_stream_audio_secs:
            limit = self._settings.max_stream_audio_secs
            raise ApiError(ErrorKind.AUDIO_TOO_LONG, f"the stream is longer than {limit:g} s; open another")

    async def _pump(self) -> None:
        """Decode until the stream has ended.

        Raises:
            ApiError: Triton failed.
            WebSocketDisconnect: the client disappeared.
        """
        heartbeat_secs = self._recogniser.max_idle_secs * HEARTBEAT_SHARE
        while True:
            windows = self._utterance.windows
            due_samples = windows.due(self._sent_samples) - self._sent_samples
            most_samples = due_samples + (self._windows(due_samples) - 1) * windows.chunk
            audio, arrived, end = await self._buffer.take(
                due_samples * BYTES_A_SAMPLE, most_samples * BYTES_A_SAMPLE, heartbeat_secs
            )
            if end is End.ABANDONED or (end is End.DRAIN and self._tickets):  # who holds a ticket goes on elsewhere
                await self._utterance.abandon()
                return
            answer = await self._decode(audio, end=end is not None)
            self._sent_samples += len(audio) // BYTES_A_SAMPLE
            metrics.AUDIO_SECONDS.labels("stream", self._model).inc(len(audio) / BYTES_A_SAMPLE / RATE)
            changed = self._transcript.update(answer)
            lag = max(0.0, self.received_secs - answer.samples / RATE)
            if not self._ahead:  # else it lags because it was sent faster than it was spoken
                metrics.STREAM_LAG.labels(self._model).observe(lag)
            if end:
                tracing.event("final", lag_secs=lag)
                await self._send(self._message("final", answer))
                if self._ended_at:
                    metrics.FINAL_LATENCY.labels(self._model).observe(time.monotonic() - self._ended_at)
                return
            if self._tickets and answer.segment_final:
                changed = True  # the times of words too, which the next acknowledgement settles
            if changed and self._buffer.end is not End.ABANDONED:
                tracing.event("partial", lag_secs=lag)
                await self._send(self._message("partial", answer))
                if not self._ahead:
                    metrics.PARTIAL_LATENCY.labels(self._model).observe(time.monotonic() - arrived)
            if self._tickets and self._buffer.end is not End.ABANDONED:
                await self._acknowledge(self._tickets)

    async def _decode(self, audio: bytes, *, end: bool) -> Answer:
        """Send audio to Triton: at once if the stream is in real time, else when its turn has come."""
        samples = np.frombuffer(audio, "<i2")
        self._begun = True
        self._pace.take(min(len(samples) / RATE, self._pace.level + MOST_AHEAD_SECS))
        ahead_secs = -self._pace.level
        self._set_ahead(ahead_secs > 0)
        if not self._ahead:
            with self._admission.at_once():
                return await self._utterance.send(samples, end=end)
        self._in_line = True  # nothing of it is at Triton, so it may be cancelled
        async with self._admission.turn(ahead_secs):
            self._in_line = False
            return await self._utterance.send(samples, end=end)

    def _windows(self, due_samples: int) -> int:
        """How many windows the next request may carry: while there are others, none that a microphone can't have filled."""
        if not self._admission.crowded:
            return MAX_WINDOWS
        spare_samples = self._pace.level * RATE - due_samples
        return max(1, min(MAX_WINDOWS, 1 + int(spare_samples / self._utterance.windows.chunk)))

    def _set_ahead(self, ahead: bool) -> None:
        self._admission.ahead += ahead - self._ahead
        self._ahead = ahead

    async def _acknowledge(self, tickets: Tickets) -> None:
        """Tell the client what it needs no more, and with what it can go on."""
        state, samples = self._utterance.restart
        counts = (self._resumed.chars, self._resumed.tokens, self._resumed.words)
        chars, tokens, words = (before + now for before, now in zip(counts, self._transcript.settled, strict=True))
        ticket = replace(self._resumed, samples=samples, state=state, chars=chars, tokens=tokens, words=words)
        if ticket != self._acknowledged:
            self._acknowledged = ticket
            settled = {"chars": chars, "tokens": tokens, "words": words}
            await self._send({"type": "ack", "session": tickets.issue(ticket), "samples": samples, "settled": settled})

    def _message(self, kind: str, answer: Answer) -> dict[str, Any]:
        transcript = self._transcript
        confidence = transcript.confidence
        return {
            "type": kind,
            "text": transcript.text,
            "tokens": transcript.tokens,
            "confidence": None if confidence is None else round(confidence, 4),
            # All words in every partial would make a long stream's traffic grow with the square of its length.
            "words": transcript.words if kind == "final" else answer.words,
            "audio_processed_ms": answer.samples * 1000 // RATE,
            "stable_chars": transcript.stable_chars,
        }

    async def _send(self, message: dict[str, Any]) -> None:
        """Send a message; a client that does not read for the stream's idle time is gone."""
        text = orjson.dumps(message).decode()
        try:
            await asyncio.wait_for(self._socket.send_text(text), self._settings.stream_timeout_secs)
        except asyncio.TimeoutError:
            limit = self._settings.stream_timeout_secs
            raise ApiError(ErrorKind.STREAM_IDLE, f"nothing was read for {limit:g} s") from None

    async def _end_at_last_call(self) -> None:
        await self._last_call.wait()
        self._buffer.close(End.DRAIN)


@router.websocket("/v2/decode/stream/{model}")
async def decode_stream(socket: WebSocket, model: str) -> None:
    """Admit a stream and serve it, or refuse it before the upgrade."""
    service: Service = socket.app.state.service
    label = model if model in service.settings.models else metrics.UNKNOWN_MODEL
    began = time.monotonic()
    status = 101
    with contextlib.ExitStack() as place:
        place.enter_context(service.tracing.span("GET /v2/decode/stream/{model}", socket.headers, model=label))
        try:
            _check_origin(socket, service)
            caller = check_key(socket.headers, service.settings)
            ensemble = service.ensemble(model)
            place.enter_context(service.quotas.stream(caller))
            place.enter_context(service.admission.stream())
            recogniser = service.triton.recogniser(ensemble)
        except ApiError as error:
            status = error.kind.status
            await _refuse(socket, error, service)
        else:
            resumable = await _accept(socket)
            session = Session(socket, service, model, recogniser, partial(service.quotas.spend, caller), resumable=resumable)
            code = await session.run()
            metrics.CLOSES.labels(str(code)).inc()
            tracing.describe(close_code=code, audio_secs=session.received_secs)
            log.info(
                "stream closed",
                model=label,
                code=code,
                audio_secs=round(session.received_secs, 3),
                duration_secs=round(time.monotonic() - began, 3),
            )
    metrics.REQUESTS.labels("stream", label, str(status)).inc()
    metrics.REQUEST_DURATION.labels("stream", label).observe(time.monotonic() - began)


@router.websocket("/{path:path}")
async def unknown_path(socket: WebSocket, path: str) -> None:
    """Refuse a stream anywhere else."""
    await _refuse(socket, ApiError(ErrorKind.NOT_FOUND, f"there is nothing at {'/' + path[:200]!r}"), socket.app.state.service)


def _check_origin(socket: WebSocket, service: Service) -> None:
    origin = socket.headers.get("origin")
    if origin is not None and not origin_allowed(origin, service.settings):
        raise ApiError(ErrorKind.ORIGIN_NOT_ALLOWED, f"origin {origin[:128]!r} is not allowed")


async def _accept(socket: WebSocket) -> bool:
    """Upgrade; gives whether the client may resume. A browser leaves where none of the protocols that it offers is taken."""
    resumable = RESUMABLE in socket.scope.get("subprotocols", ())
    headers = [(REQUEST_ID_HEADER.lower().encode(), (current_request_id() or "").encode())]
    await socket.accept(RESUMABLE if resumable else None, headers)
    return resumable


async def _refuse(socket: WebSocket, error: ApiError, service: Service) -> None:
    """Refuse a stream by HTTP status; a browser, which can't read that, gets the upgrade, the error frame and the close."""
    metrics.REJECTIONS.labels(error.kind.code).inc()
    tracing.fail(error.kind)
    request_id = current_request_id()
    log.info("stream refused", code=error.kind.code)
    origin = socket.headers.get("origin")
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        if origin is not None and origin_allowed(origin, service.settings):
            await _accept(socket)
            await socket.send_text(orjson.dumps(error.frame(request_id)).decode())
            await socket.close(error.kind.close_code)
            metrics.CLOSES.labels(str(error.kind.close_code)).inc()
        elif socket.application_state is WebSocketState.CONNECTING:
            headers = {**error.headers(), REQUEST_ID_HEADER: request_id or ""}
            await socket.send_denial_response(
                Response(orjson.dumps(error.body(request_id)), error.kind.status, headers, "application/json")
            )
