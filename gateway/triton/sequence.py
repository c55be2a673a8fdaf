"""A sequence of requests to one Triton, whose decoder has the state of the stream."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
from tritonclient.utils import InferenceServerException

from gateway import metrics, tracing
from gateway.errors import ErrorKind
from gateway.transcript.transcript import Answer
from gateway.triton.answers import decoded_frames, parse_answer
from gateway.triton.canary import MIN_ID
from gateway.triton.connection import ConnectionGivenUpError, Samples
from gateway.triton.retry import DEADLINE_EXCEEDED, UNAVAILABLE, Death, Fault, TritonError, classify

if TYPE_CHECKING:
    from gateway.triton.endpoint import Endpoint

ABANDON_PAUSES_SECS = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Pauses before the attempts to end a sequence on a Triton that does not respond, in seconds."""

SLOW_SHARE = 0.8
"""Share of the timeout from which a successful call counts as a failure for the circuit breaker."""

NO_SHARED_MEMORY = "the recogniser is short of shared memory; please retry"
"""Message for the client while audio of its length cannot be decoded."""

ERRORS = {
    Fault.FOREIGN_STATE: (
        ErrorKind.INVALID_SESSION,
        "the recogniser has changed since the stream began, and cannot continue it; begin a new stream",
    ),
    Fault.LATE: (ErrorKind.BACKEND_TIMEOUT, "the recogniser took longer than {timeout_secs:g} s; please retry"),
    Fault.NO_SHARED_MEMORY: (ErrorKind.NO_CAPACITY, NO_SHARED_MEMORY),
    Fault.ABSENT: (ErrorKind.BACKEND_FAILED, "the recogniser is gone; please retry"),
    Fault.DISCONNECTED: (ErrorKind.BACKEND_FAILED, "the connection to the recogniser was lost; please retry"),
}
OTHER_ERROR = (ErrorKind.BACKEND_FAILED, "the recogniser failed; please retry")
"""Error for the client by fault, if the request is not retried."""

log = structlog.get_logger()


class RemoteSequence:
    """A sequence on one endpoint. Only one request is in flight at a time, since Triton may reorder the requests of a sequence.

    Args:
        endpoint: the endpoint.
        ensemble: name of the ensemble.
        options: request parameters of the first request.
        timeout_secs: ``inference_timeout_secs``.
        suspect: whether its audio was in flight at a backend's death.

    Attributes:
        endpoint: the endpoint.
        suspect: whether its audio was in flight at a backend's death.
        sent_at: start of its last request, in seconds of ``time.perf_counter``.
    """

    def __init__(
        self, endpoint: Endpoint, ensemble: str, options: Mapping[str, str | int], timeout_secs: float, *, suspect: bool
    ) -> None:
        self.endpoint = endpoint
        self.suspect = suspect
        self.sent_at = 0.0
        self._ensemble = ensemble
        self._options = dict(options)
        # The duration of a recording depends on its length and on other recordings more than on Triton.
        self._may_be_slow = options.get("context") == "whole"
        self._timeout_secs = timeout_secs
        self._id = secrets.randbelow(MIN_ID - 1) + 1  # 0 means no sequence; random, so that gateways can share a Triton
        self._alive = False
        self._frames = 0

    async def send(self, samples: Samples, *, end: bool, patience: int = 1) -> Answer:
        """Send new audio, and return the decoder's answer.

        Args:
            samples: 16 kHz audio [n]; may be empty.
            end: whether the sequence ends with this audio.
            patience: timeout, as a multiple of ``inference_timeout_secs``.

        Raises:
            TritonError: Triton is not available, failed or took too long; the state of the sequence is then unknown.
        """
        start, timeout_secs = not self._alive, patience * self._timeout_secs
        restores = start and "restore" in self._options
        self._live(True)  # from now on the decoder may have state, even if the request fails
        self.sent_at = time.perf_counter()
        self.endpoint.in_flight.add(self)
        try:
            with metrics.TRITON_DURATION.labels(self._ensemble).time():
                result = await self.endpoint.monitor.connection.infer(
                    self._ensemble,
                    samples,
                    timeout_secs,
                    partial(self._note_progress, restored=restores),
                    sequence_id=self._id,
                    sequence_start=start,
                    sequence_end=end,
                    parameters=self._options if start else None,
                    headers=tracing.headers(),
                )
        except ConnectionGivenUpError as error:
            raise _error(Fault.DISCONNECTED, timeout_secs) from error  # Triton responds on another connection
        except InferenceServerException as error:
            fault = classify(error.status(), error.message(), restores=restores)
            log.warning(
                "inference failed",
                endpoint=self.endpoint.address,
                sequence=self._id,
                fault=fault.name.lower(),
                status=error.status(),
                reason=error.message(),
            )
            raise _error(fault, timeout_secs, await self._report(fault, len(samples))) from error
        finally:
            self.endpoint.in_flight.discard(self)
        fast = time.perf_counter() - self.sent_at < SLOW_SHARE * timeout_secs
        self.endpoint.breaker.record(success=self._may_be_slow or fast)
        if end:
            self._live(False)
        return parse_answer(result)

    async def abandon(self) -> None:
        """Free the decoder's state if there may be any. If this fails, the state expires."""
        if not self._alive:
            return
        for pause_secs in ABANDON_PAUSES_SECS:
            await asyncio.sleep(pause_secs)
            try:
                await self.endpoint.monitor.connection.infer(
                    self._ensemble, np.zeros(0, np.int16), self._timeout_secs, sequence_id=self._id, sequence_end=True
                )
            except ConnectionGivenUpError:
                continue
            except InferenceServerException as error:
                if error.status() in (UNAVAILABLE, DEADLINE_EXCEEDED):
                    continue
            break
        self._live(False)

    async def _report(self, fault: Fault, samples: int) -> Death | None:
        """Report a failed request to the endpoint; return the death at which it was in flight, or None.

        Args:
            fault: meaning of the error.
            samples: length of the request's audio.
        """
        endpoint = self.endpoint
        if fault is Fault.NO_SHARED_MEMORY:
            endpoint.monitor.see_shortage(self._ensemble, samples)
            return None
        if fault not in (Fault.UNKNOWN_SEQUENCE, Fault.FOREIGN_STATE) and not (fault is Fault.LATE and self._may_be_slow):
            endpoint.breaker.record(success=False)
            endpoint.monitor.see_failure(self._ensemble)
        if fault is Fault.ABSENT:
            endpoint.monitor.mark_stale()
        if fault is Fault.BACKEND_DIED:
            endpoint.monitor.see_death(self._ensemble)  # or retries there would fail until canaries do
        if fault in (Fault.DISCONNECTED, Fault.BACKEND_DIED):
            return await endpoint.find_death(self, fault)
        return None

    def _note_progress(self, result: Any, *, restored: bool) -> None:
        """Report progress to the monitor if frames were decoded. The count of a restored sequence includes earlier frames."""
        frames = decoded_frames(result)
        if frames > self._frames and not restored:
            self.endpoint.monitor.see_progress(self._ensemble)
        self._frames = frames

    def _live(self, alive: bool) -> None:
        self.endpoint.sequences += alive - self._alive
        self._alive = alive


def _error(fault: Fault, timeout_secs: float, death: Death | None = None) -> TritonError:
    kind, message = ERRORS.get(fault, OTHER_ERROR)
    return TritonError(kind, message.format(timeout_secs=timeout_secs), fault, death)
