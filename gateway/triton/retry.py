"""Failed requests to Triton: what an error means, and whether the request is sent again.

A request that was in flight when a backend died may be the cause: it took all memory, or crashed a kernel. So it is not sent
again at will (the poison rule). A recording is large enough to exhaust memory. If it was the only request in flight at a death,
it is given up. Where others were in flight too, any of them may be the cause: the recording is sent once more, by itself, and
given up at a second death. The windows of a live stream are small, so a stream survives the first death. After the second one
it is given up if no other request was in flight at both. Where others were, each is then sent by itself, and the one that is in
flight at a third death is given up.
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
"""Parts of gRPC's messages, in lower case, about a name that the DNS does not know."""

REFUSALS = (
    *UNRESOLVED,
    "failed to connect",  # gRPC: no connection, so nothing was sent
    "server is stopping",  # Triton, while it shuts down
    "server not ready",
    "unknown model",
    "is not ready",
)
"""Parts of UNAVAILABLE's messages, in lower case, that show that no model got the request. Any other may come from a death."""

DEAD_PROCESS = "stub process"
"""Part of Triton's message, in lower case, about a Python model whose process died or gave no sign of life for 1 s."""

MAX_PATIENCE = 4
"""Longest wait for an answer, as a multiple of ``inference_timeout_secs``."""

MAX_DEATHS = 3
"""Backend deaths with the same audio in flight after which a stream is given up."""

MAX_RECORDING_DEATHS = 2
"""The same for a recording; one is enough if no other request was in flight."""

MAX_SOLE_DEATHS = 2
"""The same for a stream where no other request was in flight at all of them."""


class Fault(Enum):
    """What an error of Triton's means."""

    ABSENT = "no Triton was there, or it refused the request before any model got it"
    DISCONNECTED = "the connection ended with the request in flight: the network failed, or Triton died"
    BACKEND_DIED = "a model's process died or stood still with the request in flight"
    LATE = "no answer within the time limit"
    UNKNOWN_SEQUENCE = "Triton does not have the sequence any more, or the request is invalid"
    FOREIGN_STATE = "the state to restore is not of this model"
    FAILED = "a model answered with an error"


def classify(status: str, message: str, *, restores: bool) -> Fault:
    """Return what an error of Triton's means.

    Args:
        status: gRPC status as tritonclient spells it, such as ``StatusCode.UNAVAILABLE``.
        message: its text.
        restores: whether the request begins a sequence with a saved state.
    """
    text = message.lower()
    if status == UNAVAILABLE:
        return Fault.ABSENT if any(part in text for part in REFUSALS) else Fault.DISCONNECTED
    if status == DEADLINE_EXCEEDED:
        return Fault.LATE
    if status == INVALID_ARGUMENT:
        return Fault.FOREIGN_STATE if restores else Fault.UNKNOWN_SEQUENCE
    return Fault.BACKEND_DIED if DEAD_PROCESS in text else Fault.FAILED


def is_unresolved(message: str) -> bool:
    """Return whether an error of gRPC's says that the address has a name that is not known."""
    return any(part in message.lower() for part in UNRESOLVED)


@dataclass(frozen=True)
class Death:
    """A backend's death, as one of the requests in flight sees it.

    Attributes:
        backend: what died; equal for all requests that one death hit.
        sole: whether no other request in flight was also in flight at an earlier death.
        alone: whether no other request was in flight at all.
    """

    backend: tuple[str, int]
    sole: bool
    alone: bool


class TritonError(ApiError):
    """Triton failed a request.

    Attributes:
        fault: what its error means.
        death: the backend's death that the request was in flight at, if any.
    """

    def __init__(self, kind: ErrorKind, message: str, fault: Fault, death: Death | None = None) -> None:
        super().__init__(kind, message)
        self.fault = fault
        self.death = death


@dataclass(frozen=True)
class Failures:
    """What happened to one request so far.

    Attributes:
        count: attempts that Triton failed; those for which no Triton was there don't count.
        deaths: backends that died with the request in flight.
        last_death: the newest of them.
    """

    count: int = 0
    deaths: int = 0
    last_death: Death | None = None

    def after(self, fault: Fault, death: Death | None) -> Failures:
        """Return these and one more failed attempt.

        Args:
            fault: what went wrong.
            death: the death that the attempt was in flight at, if any; one that is known already counts once.
        """
        counted = fault not in (Fault.ABSENT, Fault.DISCONNECTED)
        known = self.last_death is not None and death is not None and death.backend == self.last_death.backend
        if death is None or known:
            return replace(self, count=self.count + counted)
        return Failures(self.count + counted, self.deaths + 1, death)


@dataclass(frozen=True)
class RetryPolicy:
    """How often a request is sent.

    Attributes:
        attempts: after this many failures the request is given up; fewer than open a breaker, since audio on which the decoder
            fails is no endpoint's fault.
        whole: the request is a recording.
    """

    attempts: int
    whole: bool

    def patience(self, failures: Failures) -> int:
        """Return how long the next attempt may take, as a multiple of ``inference_timeout_secs``.

        Each attempt may take longer than the one before: when many streams come back at once their audio takes its time, and
        what is given up too early is decoded for nothing, and then once more. Of a recording that would be much, so the first
        attempt gets all the patience.
        """
        return MAX_PATIENCE if self.whole else min(1 + failures.count, MAX_PATIENCE)

    def retries(self, failures: Failures, fault: Fault) -> bool:
        """Return whether a request that has just failed is sent again, time permitting."""
        if fault is Fault.FOREIGN_STATE or self.poisoned(failures):
            return False
        if self.whole and fault is Fault.LATE:  # there were too many recordings already
            return False
        return failures.count < self.attempts

    def poisoned(self, failures: Failures) -> bool:
        """Return whether the request must be taken for the cause of the deaths that it was in flight at."""
        if self.whole:
            alone = failures.last_death is not None and failures.last_death.alone
            return failures.deaths >= (1 if alone else MAX_RECORDING_DEATHS)
        sole = failures.last_death is not None and failures.last_death.sole
        return failures.deaths >= (MAX_SOLE_DEATHS if sole else MAX_DEATHS)

    def isolates(self, failures: Failures) -> bool:
        """Return whether the request must be the only one of its kind in flight, so that the next death shows its cause."""
        return failures.deaths >= (1 if self.whole else MAX_SOLE_DEATHS)
