"""Live session: takes audio, and yields events.

Audio is appended to a bounded buffer. The pump, one task per session, takes audio when it completes a window, sends it to
Triton, one request at a time, and publishes the transcript. Every ending goes through the pump. Its last request ends the
sequence at Triton, so no state remains in the decoder.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

import structlog

from gateway import metrics, tracing
from gateway.audio import BYTES_PER_SAMPLE, RATE
from gateway.errors import ApiError, ErrorKind
from gateway.limits.places import Place
from gateway.live.buffer import AudioBuffer
from gateway.live.events import Acknowledged, Event, Failed, Final, Partial, SegmentFinal, SpeechStarted, SpeechStopped
from gateway.live.outbox import Outbox
from gateway.live.pace import Pace, Plan, plan
from gateway.live.publisher import Publisher
from gateway.live.resume import SessionToken
from gateway.live.shared import Shared
from gateway.live.speech import Detection, SpeechDetector
from gateway.live.states import Ending, State
from gateway.transcript.transcript import Answer
from gateway.triton.connection import Samples
from gateway.triton.ensemble import Ensemble
from gateway.triton.utterance import Utterance

HEARTBEAT_SHARE = 0.5
"""Share of Triton's idle timeout after which an empty request is sent for a silent stream."""

log = structlog.get_logger()


class Session:
    """One live stream: a context manager, and an iterator of events.

    Whatever ends the stream, leaving the context waits until the decoder's state is freed. One task appends, and one iterates.
    An event is delivered when the next one is asked for; until then no more audio is decoded.

    Args:
        shared: objects that all sessions share.
        model: public name of the model.
        ensemble: Triton ensemble of the model.
        utterance: the stream at Triton.
        spend: charges seconds of audio to the caller; raises ``ApiError`` when its quota is used up.
        resumable: whether to issue session tokens.
        place: the place that ``reclaim`` releases.
        detection: rules for the start and stop of speech; None: they are not published.
        clock: returns monotonic seconds.

    Attributes:
        state: current state.
        ending: reason why no more audio is taken; None while it is taken.
    """

    def __init__(
        self,
        shared: Shared,
        model: str,
        ensemble: Ensemble,
        utterance: Utterance,
        spend: Callable[[float], None],
        *,
        resumable: bool,
        place: Place | None = None,
        detection: Detection | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state = State.CONNECTING
        self.ending: Ending | None = None
        self._model = model
        self._ensemble = ensemble
        self._utterance = utterance
        self._spend = spend
        self._resumable = resumable
        self._clock = clock
        self.place = place
        self._detection = detection
        self._detector: SpeechDetector | None = None
        self._heard_at = clock()
        self._running = shared.running
        self._voices = shared.voices
        self._tokens = shared.tokens
        self._priority = shared.priority
        self._max_samples = shared.settings.max_stream_audio_secs * RATE
        self._buffer = AudioBuffer(shared.settings.audio_buffer_capacity // BYTES_PER_SAMPLE, shared.usage, clock)
        self._pace = Pace(clock=clock)
        self._publisher = Publisher()
        stream, language = secrets.token_hex(8), utterance.language
        self._resumed = self._acknowledged = SessionToken(model, utterance.latency, stream=stream, language=language)
        self._received = 0  # samples on this connection
        self._sent = 0  # samples since the start of the stream
        self._ended_at: float | None = None  # by the client
        self._opened = asyncio.Event()
        self._waits_in_line = False
        self._outbox = Outbox(clock)
        self._pump: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Session:  # noqa: PYI034 (Self comes with Python 3.11)
        """Start."""
        self._member = self._priority.join()
        self._running.add(self)
        self._pump = asyncio.create_task(self._run(), name="live session")
        self._pump.add_done_callback(lambda _: self._running.discard(self))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Abandon the stream unless it has ended, and wait until the decoder's state is freed."""
        self.abandon()
        await self.wait_freed()

    async def wait_freed(self) -> None:
        """Wait until the stream has ended and the decoder's state is freed. Both happen even if this wait is cancelled."""
        if self._pump:
            await asyncio.wait({self._pump})

    @property
    def received_secs(self) -> float:
        """Audio received from the start of the stream, including earlier connections, in seconds."""
        return (self._resumed.samples + self._received) / RATE

    @property
    def silent_secs(self) -> float:
        """Time since the last audio, or since the start of the session, in seconds."""
        return self._clock() - self._heard_at

    def reclaim(self) -> None:
        """Fail, and release the place at once: another stream needs it, and this one has sent no audio for a long time."""
        if self.state is State.ENDED or not self.place:
            return
        waited = f"no audio came for {self.silent_secs:.0f} s, and another stream needs the place"
        self._fail(ApiError(ErrorKind.STREAM_IDLE, f"{waited}; connect again when there is audio"))
        self.place.release()

    def resume(self, token: str) -> None:
        """Continue the stream of a session token.

        Raises:
            RuntimeError: the session is not resumable, or no longer CONNECTING.
            ApiError: the token is not valid here; the session is unchanged.
        """
        if not self._resumable or self.state is not State.CONNECTING:
            raise RuntimeError(
                f"a session can be resumed only if it is resumable and CONNECTING; this one is {self.state.name}"
            )
        self._resumed, age_secs = self._tokens.redeem(token, self._model)
        self._acknowledged = self._resumed
        # The client sends the context again, and the audio since the token was issued.
        again_secs = self._ensemble.context_secs(self._resumed.latency) if self._resumed.state else 0.0
        self._pace = Pace(again_secs + age_secs, self._clock)
        resumed = self._resumed
        self._utterance.resume(resumed.state, resumed.samples, resumed.latency, resumed.language)
        self._publisher = Publisher(resumed.settled)
        self._sent = self._resumed.samples

    async def append(self, samples: Samples) -> None:
        """Append audio; wait while the buffer has no room.

        The session fails if the audio exceeds the caller's quota or the maximum length. After an ending, audio is dropped.

        Args:
            samples: contiguous 16 kHz mono audio [n].
        """
        if self.ending:
            return
        self._heard_at = self._clock()
        try:
            self._spend(len(samples) / RATE)
            self._received += len(samples)
            if self._resumed.samples + self._received > self._max_samples:
                limit_secs = self._max_samples / RATE
                raise ApiError(ErrorKind.AUDIO_TOO_LONG, f"the stream is longer than {limit_secs:g} s; open another")
        except ApiError as error:
            self._fail(error)
            return
        if self.state is State.CONNECTING:
            self._enter(State.OPEN)
            if self._detection:
                self._detector = SpeechDetector(self._detection, self._voices, self._resumed.samples)
        if self._detector:
            await self._detect(self._detector, samples)
        if not self._buffer.offer(samples):
            await self._buffer.put(samples)

    async def _detect(self, detector: SpeechDetector, samples: Samples) -> None:
        """Publish where speech starts and stops."""
        for piece in await detector.feed(samples):
            if (change := piece.change) and not self.ending:
                self._outbox.put(SpeechStarted(change.at) if change.speaking else SpeechStopped(change.at))

    def end(self) -> None:
        """Accept no more audio: the client has ended the stream. The final follows."""
        if not self.ending:
            self._ended_at = self._clock()
            self._stop(Ending.CLIENT)

    def drain(self) -> None:
        """Accept no more audio: the server shuts down.

        The final follows, unless the session is resumable: its client continues on another gateway.
        """
        if self.state is not State.ENDED:
            self._stop(Ending.DRAIN)

    def abandon(self) -> None:
        """Drop all audio: the client is gone. No more events follow."""
        if self.state is not State.ENDED:
            self._drop(Ending.ABANDONED)

    def __aiter__(self) -> Session:
        """Iterate over the events."""
        return self

    async def __anext__(self) -> Event:
        """Return the next event."""
        return await self._outbox.take()

    async def _run(self) -> None:
        """Decode until the stream has ended, and free its resources."""
        try:
            await self._decode_all()
        except ApiError as error:
            self._fail(error)
        except Exception as error:
            log.error("stream failed", exc_info=error)
            self._fail(ApiError(ErrorKind.INTERNAL, "internal error"))
        finally:
            self._end_events()
            self._buffer.clear()
            self._priority.leave(self._member)
            await self._utterance.abandon()

    async def _decode_all(self) -> None:
        await self._opened.wait()
        heartbeat_secs = self._ensemble.max_idle_secs * HEARTBEAT_SHARE
        last = False
        while not last:
            await self._outbox.wait_delivered()
            windows = self._utterance.windows
            due = windows.due(self._sent) - self._sent
            await self._buffer.gather(due, heartbeat_secs)
            if self.state is State.ENDED or (self.ending is Ending.DRAIN and self._resumable):
                return
            planned = plan(len(self._buffer), due, windows.chunk, self._pace.spare_secs, crowded=self._priority.crowded)
            samples, arrived = self._buffer.take(planned.samples, due)
            last = self.ending is not None and not len(self._buffer)
            answer = await self._decode(samples, planned, end=last)
            self._publish(answer, arrived, last=last)

    async def _decode(self, samples: Samples, planned: Plan, *, end: bool) -> Answer:
        """Wait for the request's turn, and send it to Triton."""
        self._pace.spend(planned)
        self._waits_in_line = True  # nothing of the request is at Triton
        try:
            async with self._priority.turn(self._member, planned.ahead_secs):
                self._waits_in_line = False
                answer = await self._utterance.send(samples, end=end)
        finally:
            self._waits_in_line = False
        self._sent += len(samples)
        metrics.AUDIO_SECONDS.labels("stream", self._model).inc(len(samples) / RATE)
        return answer

    def _publish(self, answer: Answer, arrived: float, *, last: bool) -> None:
        """Publish what an answer changes.

        Args:
            answer: the decoder's answer.
            arrived: arrival of the audio that the answer was due for, on the clock.
            last: whether it is the last one.
        """
        if self.state is State.ENDED:
            return
        lag_secs = max(0.0, self.received_secs - answer.samples / RATE)
        in_real_time = not self._member.ahead  # a stream that is sent faster than real time always lags
        if in_real_time:
            metrics.STREAM_LAG.labels(self._model).observe(lag_secs)
        event = self._publisher.publish(answer, last=last)
        latency = None
        if isinstance(event, Final):
            tracing.event("final", lag_secs=lag_secs)
            if self._ended_at is not None:
                latency, arrived = metrics.FINAL_LATENCY.labels(self._model), self._ended_at
            self._outbox.put(event, latency, arrived)
            self._end_events()
            return
        if isinstance(event, Partial) or (isinstance(event, SegmentFinal) and event.changed):
            tracing.event("partial", lag_secs=lag_secs)
            latency = metrics.PARTIAL_LATENCY.labels(self._model) if in_real_time else None
        if event:
            self._outbox.put(event, latency, arrived)
        if self._resumable:
            self._acknowledge(answer.samples)

    def _acknowledge(self, decoded: int) -> None:
        """Publish the position from which the stream can be resumed, if it has changed.

        Args:
            decoded: audio decoded for good, in samples from the start of the stream.
        """
        state, samples = self._utterance.restart
        settled = self._publisher.settled
        token = replace(self._resumed, samples=samples, state=state, **settled._asdict())
        if token != self._acknowledged:
            self._acknowledged = token
            self._outbox.put(Acknowledged(self._tokens.issue(token), samples, settled, decoded))

    def _enter(self, state: State) -> None:
        self.state = state
        self._opened.set()

    def _stop(self, ending: Ending) -> None:
        self.ending = ending
        self._enter(State.ENDING)
        self._buffer.close()

    def _fail(self, error: ApiError) -> None:
        if self.state is not State.ENDED:
            self._outbox.clear()
            self._outbox.put(Failed(error))
            self._drop(Ending.FAILED)

    def _drop(self, ending: Ending) -> None:
        """Stop decoding."""
        self.ending = ending
        if ending is Ending.ABANDONED:
            self._outbox.clear()
        self._end_events()
        self._buffer.clear()
        self._utterance.give_up()
        if self._waits_in_line and self._pump:
            self._pump.cancel()

    def _end_events(self) -> None:
        self._enter(State.ENDED)
        self._outbox.end()
