"""Canaries: tiny utterances that show whether a Triton recognises speech, which its own readiness does not.

Triton calls a model ready as long as it is loaded, also when the model's process is dead, stopped or out of memory. A canary is
a sequence of one request with one sample of silence. The decoder pads it to one encoder frame, so a canary calls every model
of the ensemble. A round is one canary alone, and then as many at once as the decoder calls the encoder. Alone
it goes to the encoder for lone windows, if there is one; together they reach every instance of the other encoder.

A canary that is answered with an error is a failure: nothing is wrong with its audio. A canary that is not answered in time is
a failure only if Triton has not decoded anything else meanwhile: a slow Triton answers late, a dead one never does.
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

MAX_FAILURES = 2
"""Failed rounds after which the ensemble counts as broken."""

CLEARING_ANSWERS = 4
"""Answered rounds in a row that clear errors. Where one of two instances is broken, half of the rounds are answered."""

REPEAT_SECS = 0.5
"""Pause before the next round after a failed one, and minimum interval between rounds."""

MIN_ID, MAX_ID = 2**62, 2**63 - 1
"""Range of the canaries' sequence ids; those of streams are smaller, so they never meet. gRPC's parameter takes 63 bits."""

log = structlog.get_logger()


class Outcome(Enum):
    """What became of a round."""

    ANSWERED = "answered"
    FAILED = "failed"
    LATE = "late"


@dataclass(frozen=True)
class Health:
    """What the rounds so far have shown of one ensemble.

    Attributes:
        last: outcome of the newest round; None before the first one has ended.
        failures: rounds that failed or were late, since they were last cleared.
        failing_since: when the first of them ended, in seconds of the canary's clock.
        erred: whether one of them was answered with an error. A late one is cleared by the next answer.
        answers: answered rounds since the newest failure.
        answered: whether any round was ever answered.
    """

    last: Outcome | None = None
    failures: int = 0
    failing_since: float = 0.0
    erred: bool = False
    answers: int = 0
    answered: bool = False

    @property
    def well(self) -> bool:
        """Whether speech can be recognised, as far as is known."""
        return self.answered and self.failures < MAX_FAILURES

    def after(self, outcome: Outcome, now: float) -> Health:
        """Return the health after one more round, which has ended now."""
        if outcome is not Outcome.ANSWERED:
            since = self.failing_since if self.failures else now
            erred = self.erred or outcome is Outcome.FAILED
            return replace(self, last=outcome, failures=self.failures + 1, failing_since=since, erred=erred, answers=0)
        if self.erred and self.answers + 1 < CLEARING_ANSWERS:
            return replace(self, last=outcome, answers=self.answers + 1, answered=True)
        return Health(outcome, answered=True)

    def failing_secs(self, now: float) -> float:
        """Return how long ago the first failure was that is not cleared."""
        return now - self.failing_since if self.failures else 0.0


class CanaryError(RuntimeError):
    """A canary was answered with an error."""


Ask = Callable[[], Awaitable[None]]
"""Send one canary and wait for its answer, however long it takes.

Raises:
    CanaryError: the answer is an error.
"""


class Canary:
    """The rounds of one ensemble on one Triton.

    Args:
        ask: sends one canary.
        name: what the log calls it.
        timeout_secs: a canary that takes longer is late.
        interval_secs: pause between rounds while all is well.
        clock: returns monotonic seconds.

    Attributes:
        health: what the rounds have shown.
        judged: set once a round has ended.
        ever_answered: whether any round was ever answered, by this Triton or one before it.
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
        self._due = asyncio.Event()
        self._asked: set[asyncio.Task[None]] = set()
        self.health = Health()
        self.judged = asyncio.Event()
        self.ever_answered = False

    def see_progress(self) -> None:
        """Take note that Triton has just decoded a client's audio, so that it is slow at worst."""
        self._progress_at = self._busy_at = self._clock()

    def hurry(self) -> None:
        """Let the next round begin at once: something failed, or the models have just become ready."""
        self._due.set()

    def forget(self) -> None:
        """Forget all rounds: the Triton is gone, and another one may come."""
        self.health = Health()

    async def run(self, loaded: Callable[[], bool], together: Callable[[], int]) -> None:
        """Make rounds until cancelled.

        Args:
            loaded: whether the ensemble's models are loaded; no rounds are made while they are not.
            together: how many canaries reach every instance of the encoder.
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
        """Make one round, and note what it shows."""
        before = self.health
        outcome, reason = await self._round(together)
        self.judged.set()
        if self.health is not before:
            return  # forgotten meanwhile
        self.ever_answered |= outcome is Outcome.ANSWERED
        self.health = before.after(outcome, self._clock())
        if outcome is not Outcome.ANSWERED:
            log.warning("canary failed", name=self._name, outcome=outcome.value, failures=self.health.failures, reason=reason)
        if before.well and not self.health.well:
            log.error("recognition lost", name=self._name)
        elif self.health.well and not before.well:
            log.info("recognition restored", name=self._name)

    @property
    def _undisturbed(self) -> bool:
        return self.health.well and not self.health.failures

    async def _pause(self, long: bool) -> bool:
        """Wait until the next round is due; return whether something has made it hurry."""
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
            tasks = [asyncio.create_task(self._send(), name="canary") for _ in range(count)]
            # One that is late goes on: Triton would serve it though it were cancelled, and its answer shows progress.
            done, late = await asyncio.wait(tasks, timeout=self._timeout_secs)
            for task in done:
                error = None if task.cancelled() else task.exception()
                if error or task.cancelled():
                    return Outcome.FAILED, str(error or "the connection was closed")
            if late and self._progress_at < asked_at:
                return Outcome.LATE, f"no answer within {self._timeout_secs:g} s"
        return Outcome.ANSWERED, ""

    async def _send(self) -> None:
        task = asyncio.current_task()
        assert task  # noqa: S101 (create_task made it)
        self._asked.add(task)
        task.add_done_callback(self._forget_task)
        await self._ask()
        self._progress_at = self._clock()

    def _forget_task(self, task: asyncio.Task[None]) -> None:
        self._asked.discard(task)
        if not task.cancelled():
            task.exception()  # of one that is late nobody else would ask


async def ask(client: grpcclient.InferenceServerClient, ensemble: str) -> None:
    """Send one canary to an ensemble, and wait for its answer, however long it takes.

    Raises:
        CanaryError: the answer is an error.
    """
    audio = InferInput("AUDIO", [1, 1], "INT16")
    audio.set_data_from_numpy(np.zeros((1, 1), np.int16))
    number = MIN_ID + secrets.randbelow(MAX_ID - MIN_ID)
    try:
        await client.infer(ensemble, [audio], sequence_id=number, sequence_start=True, sequence_end=True)
    except InferenceServerException as error:
        raise CanaryError(error.message()) from error
