"""Check with canaries whether a Triton recognises speech. Its own readiness does not show this.

Triton reports a model as ready while it is loaded, even if its process is dead, stopped or out of memory. A canary is a
sequence of one request with one sample of silence. The decoder pads it to one encoder frame, so a canary calls every model of
the ensemble. A round is one canary alone, and then several at once. A lone canary calls the exclusive encoder, if there is one;
several at once reach every instance of the other encoder.

A canary with an error response is a failure, since its audio is valid. A canary without a response in time is a failure only if
Triton has decoded nothing else in this time: a slow Triton responds late, a dead one never.

Models' processes enlarge their shared memory for long audio, so one sample of silence does not show that it is exhausted. After
a request failed for this reason, canaries are as long as the request until one succeeds. The gateway cannot see the shared
memory of a Triton in another container, so this is all that it knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import structlog
from tritonclient.grpc import InferInput
from tritonclient.grpc import aio as grpcclient
from tritonclient.utils import InferenceServerException

from gateway.audio import RATE

MAX_FAILURES = 2
"""Number of failed rounds after which the ensemble is not ready."""

CLEARING_ANSWERS = 4
"""Number of consecutive successful rounds that clear errors. If one of two instances is broken, half of the rounds succeed."""

REPEAT_SECS = 0.5
"""Pause before the next round after a failed one, and minimum interval between rounds."""

MIN_ID, MAX_ID = 2**62, 2**63 - 1
"""Range of the canaries' sequence ids. Ids of streams are smaller, so they never collide. gRPC's parameter has 63 bits."""

CANARY_SAMPLES = 1
"""Length of a canary."""

AS_RECORDING = {"context": "whole"}
"""Options of a canary. As a live stream it would keep an encoder call free of recordings for two seconds each time."""

log = structlog.get_logger()


class Outcome(Enum):
    """Outcome of a round."""

    ANSWERED = "answered"
    FAILED = "failed"
    LATE = "late"


@dataclass(frozen=True)
class Health:
    """Health of one ensemble, as shown by its rounds.

    Attributes:
        last: outcome of the last round; None before the first one has ended.
        failures: number of failed or late rounds since failures were cleared.
        failing_since: end of the first of them, in seconds of the canary's clock.
        erred: whether one of them had an error response. Late rounds are cleared by the next success.
        answers: number of successful rounds since the last failure.
        answered: whether any round was ever successful.
    """

    last: Outcome | None = None
    failures: int = 0
    failing_since: float = 0.0
    erred: bool = False
    answers: int = 0
    answered: bool = False

    @property
    def well(self) -> bool:
        """Whether the ensemble recognises speech, as far as known."""
        return self.answered and self.failures < MAX_FAILURES

    def after(self, outcome: Outcome, now: float) -> Health:
        """Return the health after one more round.

        Args:
            outcome: outcome of the round.
            now: end of the round.
        """
        if outcome is not Outcome.ANSWERED:
            since = self.failing_since if self.failures else now
            erred = self.erred or outcome is Outcome.FAILED
            return replace(self, last=outcome, failures=self.failures + 1, failing_since=since, erred=erred, answers=0)
        if self.erred and self.answers + 1 < CLEARING_ANSWERS:
            return replace(self, last=outcome, answers=self.answers + 1, answered=True)
        return Health(outcome, answered=True)

    def failing_secs(self, now: float) -> float:
        """Return the time since the first failure that is not cleared, in seconds; 0 without failures."""
        return now - self.failing_since if self.failures else 0.0


class CanaryError(RuntimeError):
    """A canary got an error response."""


Ask = Callable[[int], Awaitable[None]]
"""Sends one canary with this number of samples, and waits for its response without a timeout.

Raises:
    CanaryError: the response is an error.
"""


class Canary:
    """Makes the rounds of one ensemble on one Triton.

    Args:
        ask: sends one canary.
        name: name in log events.
        timeout_secs: time after which a canary is late.
        interval_secs: pause between rounds while the ensemble is healthy.
        clock: returns monotonic seconds.

    Attributes:
        health: result of the rounds.
        judged: set after the first round.
        ever_answered: whether any round was ever successful, on this Triton or an earlier one at its address.
    """

    def __init__(
        self, ask: Ask, name: str, timeout_secs: float, interval_secs: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ask = ask
        self._name = name
        self._timeout_secs = timeout_secs
        self._interval_secs = interval_secs
        self._clock = clock
        self._progress_at = self._busy_at = -float("inf")
        self._samples = CANARY_SAMPLES
        self._due = asyncio.Event()
        self._asked: set[asyncio.Task[None]] = set()
        self.health = Health()
        self.judged = asyncio.Event()
        self.ever_answered = False

    def see_progress(self) -> None:
        """Record that Triton has just decoded audio of a client, so it is not dead."""
        self._progress_at = self._busy_at = self._clock()

    def hurry(self) -> None:
        """Start the next round at once, after a failure or when the models have become ready."""
        self._due.set()

    def see_death(self) -> None:
        """Record that a model's process has died or stalled: nothing is decoded until canaries show the contrary."""
        self._fail()

    def _fail(self) -> None:
        """Record that nothing is recognised until canaries show the contrary."""
        if self.health.well:
            log.error("recognition lost", name=self._name)
            now = self._clock()
            self.health = replace(
                self.health, last=Outcome.FAILED, failures=MAX_FAILURES, failing_since=now, erred=True, answers=0
            )
        self.hurry()

    def see_shortage(self, samples: int) -> None:
        """Record that there was too little shared memory for audio of this length; canaries have this length from now on."""
        if not self.short:
            log.error("shared memory exhausted", name=self._name, audio_secs=round(samples / RATE, 1))
        self._samples = max(self._samples, samples)
        self._fail()

    @property
    def short(self) -> bool:
        """Whether there is too little shared memory for audio that clients have sent."""
        return self._samples > CANARY_SAMPLES

    def forget(self) -> None:
        """Reset the health: this Triton is gone, and another one may replace it."""
        self.health = Health()
        self._samples = CANARY_SAMPLES

    async def run(self, loaded: Callable[[], bool], together: Callable[[], int]) -> None:
        """Make rounds until cancelled.

        Args:
            loaded: returns whether the ensemble's models are loaded; there are no rounds while they are not.
            together: returns the number of canaries at once that reach every instance of the encoder.
        """
        hurried = True
        try:
            while True:
                idle_secs = self._clock() - self._busy_at
                if loaded() and (hurried or not self._undisturbed or idle_secs >= self._interval_secs):
                    await self.make_round(together())
                hurried = await self._pause(self._undisturbed or not loaded())
        finally:
            for task in self._asked:
                task.cancel()

    async def make_round(self, together: int) -> None:
        """Make one round, and update the health."""
        before = self.health
        outcome, reason = await self._round(together)
        self.judged.set()
        if self.health is not before:
            return  # reset, or a death seen, during the round
        self.ever_answered |= outcome is Outcome.ANSWERED
        self.health = before.after(outcome, self._clock())
        if outcome is not Outcome.ANSWERED and not self.short:  # a shortage is logged once
            log.warning("canary failed", name=self._name, outcome=outcome.value, failures=self.health.failures, reason=reason)
        if before.well and not self.health.well:
            log.error("recognition lost", name=self._name)
        elif self.health.well and not before.well:
            log.info("recognition restored", name=self._name)

    @property
    def _undisturbed(self) -> bool:
        return self.health.well and not self.health.failures

    async def _pause(self, long: bool) -> bool:
        """Wait until the next round is due; return whether ``hurry`` was called."""
        await asyncio.sleep(REPEAT_SECS)
        if long:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._due.wait(), self._interval_secs - REPEAT_SECS)
        hurried = self._due.is_set()
        self._due.clear()
        return hurried

    async def _round(self, together: int) -> tuple[Outcome, str]:
        for count in (1, together) if together > 1 else (1,):
            asked_at = self._clock()
            length = self._samples if count == 1 else CANARY_SAMPLES
            tasks = [asyncio.create_task(self._send(length), name="canary") for _ in range(count)]
            # Late canaries are not cancelled: Triton would serve them anyway, and their responses show progress.
            done, late = await asyncio.wait(tasks, timeout=self._timeout_secs)
            for task in done:
                error = None if task.cancelled() else task.exception()
                if error or task.cancelled():
                    return Outcome.FAILED, str(error or "the connection was closed")
            if late and self._progress_at < asked_at:
                return Outcome.LATE, f"no answer within {self._timeout_secs:g} s"
            if length == self._samples and not late:
                self._samples = CANARY_SAMPLES
        return Outcome.ANSWERED, ""

    async def _send(self, samples: int) -> None:
        task = asyncio.current_task()
        assert task  # noqa: S101 (started by create_task)
        self._asked.add(task)
        task.add_done_callback(self._forget_task)
        await self._ask(samples)
        self._progress_at = self._clock()

    def _forget_task(self, task: asyncio.Task[None]) -> None:
        self._asked.discard(task)
        if not task.cancelled():
            task.exception()  # mark it as retrieved; nothing awaits a late canary


async def ask(client: grpcclient.InferenceServerClient, ensemble: str, samples: int = CANARY_SAMPLES) -> None:
    """Send one canary to an ensemble, and wait for its response without a timeout.

    Args:
        client: client of the Triton.
        ensemble: name of the ensemble.
        samples: length of the canary.

    Raises:
        CanaryError: the response is an error.
    """
    audio = InferInput("AUDIO", [1, samples], "INT16")
    audio.set_data_from_numpy(np.zeros((1, samples), np.int16))
    number = MIN_ID + secrets.randbelow(MAX_ID - MIN_ID)
    try:
        await client.infer(
            ensemble, [audio], sequence_id=number, sequence_start=True, sequence_end=True, parameters=AS_RECORDING
        )
    except InferenceServerException as error:
        raise CanaryError(error.message()) from error
