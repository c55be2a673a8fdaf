"""All Tritons behind the gateway: where a stream is placed, and how it moves on when its Triton fails."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from functools import partial

import numpy as np
import structlog

from gateway import metrics, tracing
from gateway.audio import RATE
from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.transcript.transcript import Answer
from gateway.triton.breaker import BreakerState
from gateway.triton.endpoint import MOST_PATIENCE, Endpoint, Recogniser, Samples, Sequence, TritonError, Windows
from gateway.triton.retry import Failures, Fault, RetryPolicy

RECORDING_RETRIES = RetryPolicy(attempts=2, max_patience=MOST_PATIENCE, whole=True)
STREAM_RETRIES = RetryPolicy(attempts=MOST_PATIENCE, max_patience=MOST_PATIENCE, whole=False)

RETRY_PAUSE_SECS = (0.05, 0.25)
"""Between two attempts, at random: the streams of a Triton that failed should not all come back in one moment."""

POISONED = "the recogniser died while it worked on this audio; the audio may be the cause, so it is not sent again"

log = structlog.get_logger()


class Triton:
    """The endpoints of the settings.

    Attributes:
        endpoints: all of them, whatever their state.
        recovery_secs: for how long work that failed is tried again.
        isolation: held by a request that must be in flight without others under the same suspicion.
    """

    def __init__(self, settings: Settings) -> None:
        self.recovery_secs = settings.recovery_timeout_secs
        self.isolation = asyncio.Lock()
        self.endpoints = [Endpoint(address, settings) for address in settings.triton_addresses]
        for endpoint in self.endpoints:
            metrics.BACKEND_DEATHS.labels(endpoint.address)
            metrics.TRITON_READY.labels(endpoint.address).set_function(partial(_readiness, endpoint, settings))
            metrics.BREAKER_STATE.labels(endpoint.address).set_function(partial(_told_state, endpoint))

    async def start(self) -> None:
        """Look at each endpoint once, and from then on in the background."""
        await asyncio.gather(*(endpoint.start() for endpoint in self.endpoints))

    async def close(self) -> None:
        """Stop looking and close the connections."""
        await asyncio.gather(*(endpoint.close() for endpoint in self.endpoints))

    def ready(self, ensemble: str) -> bool:
        """Whether some endpoint can serve the ensemble."""
        return any(endpoint.ready(ensemble) for endpoint in self.endpoints)

    def recogniser(self, ensemble: str) -> Recogniser:
        """What is known of an ensemble.

        Raises:
            TritonError: no endpoint can serve it now.
        """
        for endpoint in self.endpoints:
            if endpoint.ready(ensemble) and endpoint.breaker.would_allow:
                return endpoint.recogniser(ensemble)
        raise _not_ready()

    def place(self, ensemble: str) -> Endpoint:
        """The endpoint for a new sequence: of those that are well, the one with the fewest.

        Raises:
            TritonError: there is none.
        """
        well = [endpoint for endpoint in self.endpoints if endpoint.ready(ensemble) and endpoint.breaker.would_allow]
        if not well:
            raise _not_ready()
        chosen = min(well, key=lambda endpoint: endpoint.sequences)
        chosen.breaker.allow()
        return chosen

    def stream(self, recogniser: Recogniser, options: Mapping[str, str | int]) -> Utterance:
        """A stream whose audio comes bit by bit."""
        return Utterance(self, recogniser, {"save_state": 1, **options}, STREAM_RETRIES)

    def recording(self, recogniser: Recogniser, options: Mapping[str, str | int]) -> Utterance:
        """A recording that is decoded whole, in one request."""
        return Utterance(self, recogniser, {"context": "whole", **options}, RECORDING_RETRIES)


class Utterance:
    """What somebody says, from first to last: one sequence, or several in turn when Tritons fail.

    It keeps the decoder's state of the last answer and the audio that this state does not cover, so that any sequence on any
    endpoint can go on where the lost one was, and decodes the same. Nothing that was final is decoded again.

    Args:
        triton: where to be placed.
        recogniser: what is known of the ensemble.
        options: of the decoder.
        retries: how often a request is sent; while no Triton is there, only the time counts.
    """

    def __init__(self, triton: Triton, recogniser: Recogniser, options: Mapping[str, str | int], retries: RetryPolicy) -> None:
        self._triton = triton
        self._recogniser = recogniser
        self._options = dict(options)
        self._retries = retries
        self._sequence: Sequence | None = None
        self._state = ""
        self._kept: Samples = np.empty(0, np.int16)
        self._kept_from = 0  # samples before the first that is kept
        self._given_up = False

    async def send(self, samples: Samples, *, end: bool) -> Answer:
        """Send new audio and give the decoder's answer, on another sequence if this one is lost.

        Args:
            samples: 16 kHz audio [n]; may be empty.
            end: the utterance ends with it.

        Raises:
            ApiError: no Triton answered in the time or the attempts there are.
        """
        self._kept = np.concatenate((self._kept, samples)) if len(self._kept) else samples
        deadline, failures = 0.0, Failures()
        while True:
            try:
                if self._retries.isolates(failures):
                    async with self._triton.isolation:
                        answer = await self._try(samples, end, failures)
                else:
                    answer = await self._try(samples, end, failures)
            except TritonError as error:
                now = time.monotonic()
                deadline = deadline or now + self._triton.recovery_secs
                failures = failures.after(error.fault, error.death)
                self._leave()
                if self._given_up:  # nobody lost anything
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

    @property
    def restart(self) -> tuple[str, int]:
        """The decoder's state, and from which sample on it takes audio to go on from there."""
        return self._state, self._kept_from

    @property
    def latency(self) -> str:
        """Which of the recogniser's windows it has."""
        return str(self._options["latency"])

    @property
    def windows(self) -> Windows:
        """Those windows."""
        return self._recogniser.windows[self.latency]

    def resume(self, state: str, samples: int, latency: str) -> None:
        """Go on where another utterance of this latency was; the next audio begins at this sample."""
        self._state, self._kept_from = state, samples
        self._options["latency"] = latency

    def give_up(self) -> None:
        """Nobody waits for an answer any more: what fails from now on is not tried again."""
        self._given_up = True

    async def abandon(self) -> None:
        """Free the decoder's state of an utterance that nobody waits for any more."""
        if self._sequence:
            await self._sequence.abandon()

    async def _try(self, samples: Samples, end: bool, failures: Failures) -> Answer:
        patience = self._retries.patience(failures)
        if self._sequence:
            self._sequence.suspect = False
            return await self._sequence.send(samples, end=end, patience=patience)
        options = {**self._options, "restore": self._state} if self._state else self._options
        endpoint = self._triton.place(self._recogniser.ensemble)
        self._sequence = endpoint.open(self._recogniser.ensemble, options, suspect=failures.deaths > 0)
        metrics.REPLAYED_AUDIO.inc((len(self._kept) - len(samples)) / RATE)
        return await self._sequence.send(self._kept, end=end, patience=patience)

    def _leave(self) -> None:
        if self._sequence:
            self._sequence.endpoint.abandon(self._sequence)
            self._sequence = None

    def _keep(self, answer: Answer) -> None:
        """Keep what it takes to go on from this answer."""
        if not answer.state:
            return
        self._state = answer.state
        needed_from = max(0, answer.samples - self.windows.left)
        self._kept = self._kept[needed_from - self._kept_from :]
        self._kept_from = needed_from

    def _count(self, outcome: str) -> None:
        tracing.event("recovery", outcome=outcome)
        if not self._retries.whole:
            metrics.STREAM_RECOVERIES.labels(outcome).inc()
            log.info("stream recovery", outcome=outcome)


def _readiness(endpoint: Endpoint, settings: Settings) -> bool:
    return all(map(endpoint.ready, settings.models.values()))


def _told_state(endpoint: Endpoint) -> BreakerState:
    """The breaker's state as the metric tells it: closed where nobody answers, which keeps new work away by itself.

    Such a Triton may be gone for good, as a shard's that became smaller is, and no trial would ever close its breaker.
    """
    return BreakerState.CLOSED if endpoint.latency_secs is None else endpoint.breaker.state


def _not_ready() -> TritonError:
    return TritonError(ErrorKind.NOT_READY, "the recogniser is not ready; please retry", Fault.ABSENT)
