"""Choose a Triton for each new sequence."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial

from gateway import metrics
from gateway.config.settings import Settings
from gateway.errors import ErrorKind
from gateway.triton.breaker import BreakerState
from gateway.triton.endpoint import Endpoint
from gateway.triton.ensemble import Ensemble
from gateway.triton.retry import Fault, RetryPolicy, TritonError
from gateway.triton.sequence import NO_SHARED_MEMORY
from gateway.triton.utterance import Utterance

RECORDING_RETRIES = RetryPolicy(attempts=2, whole=True)
STREAM_RETRIES = RetryPolicy(attempts=4, whole=False)


class TritonPool:
    """The configured Triton servers.

    Attributes:
        endpoints: all servers, in any state.
    """

    def __init__(self, settings: Settings) -> None:
        self._recovery_secs = settings.recovery_timeout_secs
        self._isolation = asyncio.Lock()
        self.endpoints = [Endpoint(address, settings) for address in settings.triton_addresses]
        for endpoint in self.endpoints:
            metrics.BACKEND_DEATHS.labels(endpoint.address)
            metrics.TRITON_READY.labels(endpoint.address).set_function(partial(_readiness, endpoint, settings))
            metrics.BREAKER_STATE.labels(endpoint.address).set_function(partial(_reported_state, endpoint))

    async def start(self) -> None:
        """Inspect each endpoint once, then continue in the background."""
        await asyncio.gather(*(endpoint.start() for endpoint in self.endpoints))

    async def close(self) -> None:
        """Stop inspecting, and close the connections."""
        await asyncio.gather(*(endpoint.close() for endpoint in self.endpoints))

    def ready(self, name: str) -> bool:
        """Return whether any endpoint can serve the ensemble."""
        return any(endpoint.ready(name) for endpoint in self.endpoints)

    def ensemble(self, name: str) -> Ensemble:
        """Return an ensemble that can be served.

        Raises:
            TritonError: no endpoint accepts new sequences of it.
        """
        for endpoint in self.endpoints:
            if endpoint.takes(name):
                return endpoint.monitor.ensemble(name)
        raise self._not_ready(name)

    def place(self, name: str) -> Endpoint:
        """Return the endpoint for a new sequence of an ensemble: the one with the fewest sequences of those that accept it.

        Raises:
            TritonError: no endpoint accepts it.
        """
        takers = [endpoint for endpoint in self.endpoints if endpoint.takes(name)]
        if not takers:
            raise self._not_ready(name)
        chosen = min(takers, key=lambda endpoint: endpoint.sequences)
        chosen.breaker.allow()
        return chosen

    def stream(self, ensemble: Ensemble, options: Mapping[str, str | int]) -> Utterance:
        """Return an utterance for a stream."""
        return self._utterance(ensemble, {"save_state": 1, **options}, STREAM_RETRIES)

    def recording(self, ensemble: Ensemble, options: Mapping[str, str | int]) -> Utterance:
        """Return an utterance for a recording that is decoded whole, in one request."""
        return self._utterance(ensemble, {"context": "whole", **options}, RECORDING_RETRIES)

    def _not_ready(self, name: str) -> TritonError:
        short = any(endpoint.monitor.short(name) for endpoint in self.endpoints)
        message = NO_SHARED_MEMORY if short else "the recogniser is not ready; please retry"
        return TritonError(ErrorKind.NOT_READY, message, Fault.ABSENT)

    def _utterance(self, ensemble: Ensemble, options: Mapping[str, str | int], retries: RetryPolicy) -> Utterance:
        return Utterance(self.place, self._isolation, ensemble, options, retries, self._recovery_secs)


def _readiness(endpoint: Endpoint, settings: Settings) -> bool:
    return all(map(endpoint.ready, settings.models.values()))


def _reported_state(endpoint: Endpoint) -> BreakerState:
    """Return the breaker's state for the metric; CLOSED while no Triton responds, since there are no new sequences then.

    Such a Triton may be gone for ever, as after a scale-down, and no probe would ever close its breaker.
    """
    return BreakerState.CLOSED if endpoint.monitor.latency_secs is None else endpoint.breaker.state
