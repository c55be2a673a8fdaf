"""One Triton as a place for sequences: whether new ones may come, which are in flight, and which were when it died."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from gateway import metrics
from gateway.config.settings import Address, Settings
from gateway.triton.breaker import Breaker
from gateway.triton.monitor import Monitor
from gateway.triton.retry import Death, Fault
from gateway.triton.sequence import RemoteSequence

log = structlog.get_logger()


@dataclass(eq=False)
class _NoticedDeath:
    """The death of a Triton, or of one of its models' processes.

    Attributes:
        generation: of the Triton, as the monitor counts.
        noticed_at: when a request first failed by it, in seconds of ``time.perf_counter``.
        suspects: requests in flight then that had been in flight at an earlier death.
        alone: whether only one request was in flight then.
        confirmed: whether it is certain that the network was not the cause.
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
        monitor: what is behind the address.
        breaker: whether new sequences may come here.
        sequences: how many of the gateway's sequences are alive here.
        in_flight: sequences with a request that is not answered yet.
    """

    def __init__(self, address: Address, settings: Settings) -> None:
        self.address = address.target
        self.monitor = Monitor(address, settings)
        self.breaker = Breaker()
        self.sequences = 0
        self.in_flight: set[RemoteSequence] = set()
        self._timeout_secs = settings.inference_timeout_secs
        self._death: _NoticedDeath | None = None  # of this generation
        self._background: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Inspect the address once, and from then on in the background."""
        await self.monitor.start()

    async def close(self) -> None:
        """End what runs in the background, and close the connection."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.monitor.close()

    def ready(self, ensemble: str) -> bool:
        """Return whether the ensemble is loaded and recognises speech."""
        return self.monitor.ready(ensemble)

    def takes(self, ensemble: str) -> bool:
        """Return whether a new sequence of the ensemble may come here."""
        return self.ready(ensemble) and self.breaker.would_allow

    def open(self, ensemble: str, options: Mapping[str, str | int], *, suspect: bool = False) -> RemoteSequence:
        """Return a new sequence: the state of one stream in the decoder, made by its first request.

        Args:
            ensemble: its name.
            options: request parameters of the first request.
            suspect: whether its audio was in flight at a backend's death.
        """
        return RemoteSequence(self, ensemble, options, self._timeout_secs, suspect=suspect)

    def abandon(self, sequence: RemoteSequence) -> None:
        """Free the decoder's state of a sequence in the background; failures don't matter, since the state ages out."""
        self._in_background(sequence.abandon())

    async def find_death(self, sequence: RemoteSequence, fault: Fault) -> Death | None:
        """Return the backend's death that a request was in flight at, if it was one.

        A broken connection is a death unless Triton is ready at the next inspection: a new Triton takes longer to load its
        models. A process that died or stands still fails requests from then on; those that came afterwards are not involved.

        Args:
            sequence: its request has just failed, and is in ``in_flight`` still.
            fault: what its error means.
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

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
