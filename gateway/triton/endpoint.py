"""One Triton server: admission of new sequences, sequences in flight, and deaths."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from gateway import metrics
from gateway.config.settings import Address, Settings
from gateway.triton.background import Background
from gateway.triton.breaker import Breaker
from gateway.triton.monitor import Monitor
from gateway.triton.retry import Death, Fault
from gateway.triton.sequence import RemoteSequence

log = structlog.get_logger()


@dataclass(eq=False)
class _NoticedDeath:
    """The death of a Triton or of a model's process.

    Attributes:
        generation: generation of the Triton; see ``Monitor``.
        noticed_at: first failure of a request, in seconds of ``time.perf_counter``.
        suspects: number of requests in flight at that time that were also in flight at an earlier death.
        alone: whether only one request was in flight at that time.
        confirmed: whether the network is excluded as the cause.
    """

    generation: int
    noticed_at: float
    suspects: int
    alone: bool
    confirmed: bool = False


class Endpoint:
    """One Triton server.

    Attributes:
        address: its ``host:port`` for gRPC.
        monitor: inspects the server at the address.
        breaker: circuit breaker for new sequences.
        sequences: number of the gateway's sequences that are open on this server.
        in_flight: sequences with a request in flight.
    """

    def __init__(self, address: Address, settings: Settings) -> None:
        self.address = address.target
        self.monitor = Monitor(address, settings)
        self.breaker = Breaker()
        self.sequences = 0
        self.in_flight: set[RemoteSequence] = set()
        self._timeout_secs = settings.inference_timeout_secs
        self._death: _NoticedDeath | None = None  # of this generation
        self._background = Background()

    async def start(self) -> None:
        """Inspect the address once, then continue in the background."""
        await self.monitor.start()

    async def close(self) -> None:
        """Stop the background tasks, and close the connection."""
        await self._background.close()
        await self.monitor.close()

    def ready(self, ensemble: str) -> bool:
        """Return whether the ensemble is loaded and recognises speech."""
        return self.monitor.ready(ensemble)

    def takes(self, ensemble: str) -> bool:
        """Return whether this server accepts a new sequence of the ensemble."""
        return self.ready(ensemble) and self.breaker.would_allow

    def open(self, ensemble: str, options: Mapping[str, str | int], *, suspect: bool = False) -> RemoteSequence:
        """Return a new sequence, whose first request creates its state in the decoder.

        Args:
            ensemble: name of the ensemble.
            options: request parameters of the first request.
            suspect: whether its audio was in flight at a backend's death.
        """
        return RemoteSequence(self, ensemble, options, self._timeout_secs, suspect=suspect)

    def abandon(self, sequence: RemoteSequence) -> None:
        """Free the decoder's state of a sequence in the background. If this fails, the state expires."""
        self._background.start(sequence.abandon())

    async def find_death(self, sequence: RemoteSequence, fault: Fault) -> Death | None:
        """Return the backend's death at which a failed request was in flight; None if there was none.

        A broken connection is a death unless Triton is ready at the next inspection: a new Triton needs longer to load its
        models. A process that has died or stalled fails all later requests too; these were not in flight at its death.

        Args:
            sequence: sequence of the failed request; still in ``in_flight``.
            fault: meaning of the request's error.
        """
        generation = self.monitor.generation
        if not self._death or self._death.generation != generation:
            suspects = sum(other.suspect for other in self.in_flight)
            self._death = _NoticedDeath(generation, time.perf_counter(), suspects, alone=len(self.in_flight) == 1)
        death = self._death
        if fault is Fault.DISCONNECTED and not death.confirmed:
            await self.monitor.inspect_anew()
            if generation == self.monitor.generation and self.monitor.any_loaded:
                if self._death is death:
                    self._death = None
                return None
        if not death.confirmed:
            death.confirmed = True
            metrics.BACKEND_DEATHS.labels(self.address).inc()
            log.error("backend died", endpoint=self.address, requests_in_flight=len(self.in_flight))
        if sequence.sent_at > death.noticed_at:
            return None
        return Death((self.address, generation), sole=sequence.suspect and death.suspects == 1, alone=death.alone)
