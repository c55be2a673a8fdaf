"""Classify failed requests to Triton, and decide whether they are retried.

A request that was in flight when a backend died may be the cause: it may have taken all memory, or crashed a kernel. So retries
after a death are limited (the poison rule):

- A recording is large enough to exhaust memory. If it was the only request in flight at a death, it is not retried. Otherwise
  it is retried once, alone, and given up at a second death.
- The windows of a live stream are small, so a stream is retried after the first death. After the second one it is given up if
  no other request was in flight at both. Otherwise each of these requests is retried alone, and the one that is in flight at a
  third death is given up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import grpc

from gateway.errors import ApiError, ErrorKind

UNAVAILABLE, DEADLINE_EXCEEDED, INVALID_ARGUMENT, INTERNAL = (
    str(code)
    for code in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.INTERNAL,
    )
)

UNRESOLVED = ("resolution failed", "name resolution", "domain name not found")
"""Parts of gRPC's messages about an unknown host name, in lower case."""

REFUSALS = (
    *UNRESOLVED,
    "failed to connect",  # gRPC: no connection, so nothing was sent
    "server is stopping",  # Triton, during its shutdown
    "server not ready",
    "unknown model",
    "is not ready",
)
"""Parts of UNAVAILABLE messages that show that no model got the request, in lower case. Others may be due to a death."""

DEAD_PROCESS = "stub process"
"""Part of Triton's message about a Python model whose process died or sent no heartbeat for 1 s, in lower case."""

SHARED_MEMORY = "shared memory pool"
"""Part of Triton's message about a Python model that could not enlarge its shared memory, in lower case."""

MAX_PATIENCE = 4
"""Maximum timeout of a request, as a multiple of ``inference_timeout_secs``."""

MAX_DEATHS = 3
"""Number of backend deaths with the same audio in flight after which a stream is given up."""

MAX_RECORDING_DEATHS = 2
"""The same for a recording; 1 if no other request was in flight."""

MAX_SOLE_DEATHS = 2
"""The same for a stream if no other request was in flight at all of the deaths."""


class Fault(Enum):
    """Meaning of an error of Triton."""

    ABSENT = "no Triton responded, or it refused the request before any model got it"
    DISCONNECTED = "the connection ended with the request in flight: the network failed, or Triton died"
    BACKEND_DIED = "a model's process died or stalled with the request in flight"
    LATE = "there was no response within the timeout"
    UNKNOWN_SEQUENCE = "Triton no longer has the sequence, or the request is invalid"
    FOREIGN_STATE = "the state to restore is not of this model"
    NO_SHARED_MEMORY = "Triton's machine or container has too little shared memory for the request"
    FAILED = "a model returned an error"


def classify(status: str, message: str, *, restores: bool) -> Fault:
    """Return the meaning of an error of Triton.

    Args:
        status: gRPC status in tritonclient's spelling, such as ``StatusCode.UNAVAILABLE``.
        message: text of the error.
        restores: whether the request starts a sequence with a saved state.
    """
    text = message.lower()
    if status == UNAVAILABLE:
        return Fault.ABSENT if any(part in text for part in REFUSALS) else Fault.DISCONNECTED
    if status == DEADLINE_EXCEEDED:
        return Fault.LATE
    if status == INVALID_ARGUMENT:
        return Fault.FOREIGN_STATE if restores else Fault.UNKNOWN_SEQUENCE
    if DEAD_PROCESS in text:
        return Fault.BACKEND_DIED
    return Fault.NO_SHARED_MEMORY if SHARED_MEMORY in text else Fault.FAILED


def is_unresolved(message: str) -> bool:
    """Return whether an error message of gRPC is about an unknown host name."""
    return any(part in message.lower() for part in UNRESOLVED)


@dataclass(frozen=True)
class Death:
    """A backend's death, for one of the requests in flight.

    Attributes:
        backend: the backend; equal for all requests that were in flight at the death.
        sole: whether no other request in flight was also in flight at an earlier death.
        alone: whether no other request was in flight at all.
    """

    backend: tuple[str, int]
    sole: bool
    alone: bool


class TritonError(ApiError):
    """Triton failed a request.

    Attributes:
        fault: meaning of the error.
        death: the backend's death at which the request was in flight; None if there was none.
    """

    def __init__(self, kind: ErrorKind, message: str, fault: Fault, death: Death | None = None) -> None:
        super().__init__(kind, message)
        self.fault = fault
        self.death = death


@dataclass(frozen=True)
class Failures:
    """Failed attempts of one request.

    Attributes:
        count: number of attempts that failed at Triton; attempts without a Triton do not count.
        deaths: number of backends that died with the request in flight.
        last_death: the last death.
    """

    count: int = 0
    deaths: int = 0
    last_death: Death | None = None

    def after(self, fault: Fault, death: Death | None) -> Failures:
        """Return the failures with one more failed attempt.

        Args:
            fault: meaning of the error.
            death: the death at which the attempt was in flight; None if there was none. Each death counts once.
        """
        counted = fault not in (Fault.ABSENT, Fault.DISCONNECTED)
        known = self.last_death is not None and death is not None and death.backend == self.last_death.backend
        if death is None or known:
            return replace(self, count=self.count + counted)
        return Failures(self.count + counted, self.deaths + 1, death)


@dataclass(frozen=True)
class RetryPolicy:
    """Limits on the attempts of a request.

    Attributes:
        attempts: number of failures after which the request is given up. It is smaller than the number that opens a breaker,
            since the cause of failures may be the audio instead of the endpoint.
        whole: whether the request is a recording.
    """

    attempts: int
    whole: bool

    def patience(self, failures: Failures) -> int:
        """Return the timeout of the next attempt, as a multiple of ``inference_timeout_secs``.

        The timeout grows with each attempt: when many streams are retried at once, decoding takes longer, and audio that is
        given up too early is decoded twice. For a recording this would cost much, so its first attempt has the maximum timeout.
        """
        return MAX_PATIENCE if self.whole else min(1 + failures.count, MAX_PATIENCE)

    def retries(self, failures: Failures, fault: Fault) -> bool:
        """Return whether a request that has just failed is retried, if there is time left."""
        if fault is Fault.FOREIGN_STATE or self.poisoned(failures):
            return False
        if self.whole and fault in (Fault.LATE, Fault.NO_SHARED_MEMORY):  # another attempt would add to the overload
            return False
        return failures.count < self.attempts

    def poisoned(self, failures: Failures) -> bool:
        """Return whether the request must be treated as the cause of the deaths at which it was in flight."""
        if self.whole:
            alone = failures.last_death is not None and failures.last_death.alone
            return failures.deaths >= (1 if alone else MAX_RECORDING_DEATHS)
        sole = failures.last_death is not None and failures.last_death.sole
        return failures.deaths >= (MAX_SOLE_DEATHS if sole else MAX_DEATHS)

    def isolates(self, failures: Failures) -> bool:
        """Return whether the request must be the only one of its kind in flight, to find the cause of the next death."""
        return failures.deaths >= (1 if self.whole else MAX_SOLE_DEATHS)
