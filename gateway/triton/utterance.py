"""The audio of one stream or recording at Triton, with retries on other sequences and endpoints."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping

import numpy as np
import orjson
import structlog

from gateway import metrics, tracing
from gateway.audio import RATE
from gateway.errors import ApiError, ErrorKind
from gateway.transcript.transcript import Answer
from gateway.triton.connection import Samples
from gateway.triton.endpoint import Endpoint
from gateway.triton.ensemble import MAX_REPLAY_SECS, Ensemble
from gateway.triton.geometry import Windows
from gateway.triton.retry import Failures, RetryPolicy, TritonError
from gateway.triton.sequence import RemoteSequence

RETRY_PAUSE_SECS = (0.05, 0.25)
"""Range of the random pause between two attempts in seconds, so that streams of a failed Triton do not all retry at once."""

POISONED = "the recogniser died while it worked on this audio; the audio may be the cause, so it is not sent again"

Place = Callable[[str], Endpoint]
"""Returns the endpoint for a new sequence of an ensemble.

Raises:
    TritonError: no endpoint accepts it.
"""

log = structlog.get_logger()


class Utterance:
    """A stream or recording at Triton: one sequence, or several after failures.

    It keeps the decoder's state after the last answer, and the audio that this state does not cover. So a new sequence on any
    endpoint can continue where the lost one was, with the same results. Final segments are not decoded again.

    Args:
        place: returns the endpoint of a new sequence.
        isolation: lock for requests that must be in flight without other suspects.
        ensemble: the ensemble.
        options: options of the decoder.
        retries: limits on attempts; attempts without a Triton are limited only by time.
        recovery_secs: time during which a failed request is retried.
    """

    def __init__(
        self,
        place: Place,
        isolation: asyncio.Lock,
        ensemble: Ensemble,
        options: Mapping[str, str | int],
        retries: RetryPolicy,
        recovery_secs: float,
    ) -> None:
        self._place = place
        self._isolation = isolation
        self._ensemble = ensemble
        self._options = dict(options)
        self._retries = retries
        self._recovery_secs = recovery_secs
        self._sequence: RemoteSequence | None = None
        self._state = ""
        self._kept: Samples = np.empty(0, np.int16)
        self._kept_from = 0  # samples before the first that is kept
        self._given_up = False

    @property
    def restart(self) -> tuple[str, int]:
        """State of the decoder, and position of the first sample that it needs to continue."""
        return self._state, self._kept_from

    @property
    def latency(self) -> str:
        """Latency that selects the windows."""
        return str(self._options["latency"])

    @property
    def language(self) -> str:
        """Language of the speech; empty if the model decides."""
        return str(self._options.get("language", ""))

    @property
    def windows(self) -> Windows:
        """Windows of this utterance."""
        return self._ensemble.windows[self.latency]

    def resume(self, state: str, samples: int, latency: str, language: str) -> None:
        """Continue another utterance.

        Args:
            state: state of the decoder.
            samples: position of the next audio.
            latency: latency of the other utterance.
            language: language of the other utterance; empty if the model decides.
        """
        self._state, self._kept_from = state, samples
        self._options |= {"latency": latency, "language": language}

    async def send(self, samples: Samples, *, end: bool) -> Answer:
        """Send new audio, and return the decoder's answer; use a new sequence if the current one is lost.

        Args:
            samples: 16 kHz audio [n]; may be empty.
            end: whether the utterance ends with this audio.

        Raises:
            ApiError: all attempts failed, or the audio may be the cause of backend deaths.
        """
        self._kept = np.concatenate((self._kept, samples)) if len(self._kept) else samples
        deadline, failures = 0.0, Failures()
        while True:
            try:
                answer = await self._try(samples, end, failures)
            except TritonError as error:
                now = time.monotonic()
                deadline = deadline or now + self._recovery_secs
                failures = failures.after(error.fault, error.death)
                self._leave()
                if self._given_up:  # no client is affected, so it is not counted
                    raise
                if not self._retries.retries(failures, error.fault) or now >= deadline:
                    self._count(metrics.FAILED)
                    if self._retries.poisoned(failures):
                        log.error("audio given up", backend_deaths=failures.deaths)
                        raise ApiError(ErrorKind.BACKEND_DIED, POISONED) from error
                    raise
                await asyncio.sleep(random.uniform(*RETRY_PAUSE_SECS) * (1 + failures.count))  # noqa: S311 (it spreads load)
            else:
                break
        if deadline:
            self._count(metrics.RECOVERED)
        self._keep(answer)
        return answer

    def give_up(self) -> None:
        """Stop retrying: no client waits for an answer any more."""
        self._given_up = True

    async def abandon(self) -> None:
        """Free the decoder's state: no client waits for an answer any more."""
        if self._sequence:
            await self._sequence.abandon()

    async def _try(self, samples: Samples, end: bool, failures: Failures) -> Answer:
        """Send the audio once, alone if required."""
        if not self._retries.isolates(failures):
            return await self._send_once(samples, end, failures)
        async with self._isolation:
            return await self._send_once(samples, end, failures)

    async def _send_once(self, samples: Samples, end: bool, failures: Failures) -> Answer:
        patience = self._retries.patience(failures)
        if self._sequence:
            self._sequence.suspect = False
            return await self._sequence.send(samples, end=end, patience=patience)
        options = self._options
        if self._state:
            options = {**options, "restore": self._state}
            if self._ensemble.cached:
                options["restore_samples"] = self._kept_from
        endpoint = self._place(self._ensemble.name)
        self._sequence = endpoint.open(self._ensemble.name, options, suspect=failures.deaths > 0)
        metrics.REPLAYED_AUDIO.inc((len(self._kept) - len(samples)) / RATE)
        return await self._sequence.send(self._kept, end=end, patience=patience)

    def _leave(self) -> None:
        if self._sequence:
            self._sequence.endpoint.abandon(self._sequence)
            self._sequence = None

    def _keep(self, answer: Answer) -> None:
        """Keep the state and the audio that are needed to continue after this answer."""
        if not answer.state:
            return
        self._state = answer.state
        needed_from = max(0, answer.samples - self.windows.left)
        if self._ensemble.cached:  # the decoder fills its cache from the audio since the cache was last fresh
            oldest = answer.samples - int(MAX_REPLAY_SECS * RATE)
            needed_from = max(self._kept_from, oldest, int(orjson.loads(answer.state)["needed_from"]))
        self._kept = self._kept[needed_from - self._kept_from :]
        self._kept_from = needed_from

    def _count(self, outcome: str) -> None:
        tracing.event("recovery", outcome=outcome)
        if not self._retries.whole:
            metrics.STREAM_RECOVERIES.labels(outcome).inc()
            log.info("stream recovery", outcome=outcome)
