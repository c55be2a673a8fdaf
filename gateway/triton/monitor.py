"""Monitor an address: whether a Triton responds, which models it has loaded, and whether they recognise speech."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from enum import Enum
from functools import partial

import structlog
from tritonclient.utils import InferenceServerException

from gateway.config.settings import Address, Settings
from gateway.triton.background import Background
from gateway.triton.canary import MAX_FAILURES, Canary, Health, ask
from gateway.triton.connection import Connection
from gateway.triton.ensemble import Ensemble, NoRecogniserError, read_ensemble
from gateway.triton.retry import MAX_PATIENCE, is_unresolved

INSPECTION_TIMEOUT_SECS = 2.0
"""Timeout of a request about readiness. A connection without a response for this time is replaced."""

READY_POLL_SECS = 1.0
UNREADY_POLL_SECS = 0.2
ABSENT_POLL_SHARE = 0.02
MAX_ABSENT_POLL_SECS = 5.0
MAX_UNRESOLVED_POLL_SECS = 30.0
"""Pauses between inspections of a ready Triton, and of one that is not ready. While no Triton responds, the pause is a share of
the time since the last response, up to a limit. An inspection of an unknown host name sends a dozen DNS queries."""

CANARY_PATIENCE = MAX_PATIENCE / MAX_FAILURES
"""Timeout of a canary, as a multiple of ``inference_timeout_secs``. Failed rounds then take as long as the longest timeout of a
request."""

MIN_CANARY_TIMEOUT_SECS = 2.0
"""Minimum timeout of a canary."""

log = structlog.get_logger()


class ModelState(Enum):
    """State of a model in Triton's repository index."""

    READY = "ready"
    UNAVAILABLE = "unavailable"
    UNKNOWN = "unknown"


def poll_pause_secs(*, loaded: bool, absent_secs: float, unresolved: bool) -> float:
    """Return the pause before the next inspection.

    Args:
        loaded: whether an ensemble is loaded.
        absent_secs: time since a Triton last responded.
        unresolved: whether the host name is unknown.
    """
    if loaded:
        return READY_POLL_SECS
    longest = MAX_UNRESOLVED_POLL_SECS if unresolved else MAX_ABSENT_POLL_SECS
    return min(max(UNREADY_POLL_SECS, ABSENT_POLL_SHARE * absent_secs), longest)


class Monitor:
    """Inspects one address in the background.

    Attributes:
        connection: current connection to the address.
        models: state of every model that an ensemble needs, as of the last inspection.
        latency_secs: duration of the last inspection; None if no Triton responded.
        generation: counts the Tritons at the address; increased when one responds after an inspection without a response.
    """

    def __init__(self, address: Address, settings: Settings) -> None:
        self._address = address
        self._settings = settings
        self.connection = Connection(address)
        self.models: dict[str, ModelState] = {}
        self.latency_secs: float | None = None
        self.generation = 0
        self._wanted = sorted(set(settings.models.values()))
        self._ensembles: dict[str, Ensemble] = {}
        self._rejected: dict[str, str] = {}  # reasons by model
        self._left: list[Connection] = []  # replaced connections, until Triton responds on the current one
        self._stale = asyncio.Event()
        self._begun = self._done = 0  # inspections
        self._inspected = asyncio.Event()  # replaced after each inspection
        self._absent_since = time.monotonic()
        self._unresolved = False
        timeout_secs = max(MIN_CANARY_TIMEOUT_SECS, CANARY_PATIENCE * settings.inference_timeout_secs)
        self._canaries = {
            name: Canary(
                partial(self._send_canary, name), f"{address.target} {name}", timeout_secs, settings.canary_interval_secs
            )
            for name in self._wanted
        }
        self._background = Background()

    async def start(self) -> None:
        """Inspect the address and send canaries once, then continue in the background."""
        await self._inspect()
        self._background.start(self._poll())
        for name, canary in self._canaries.items():
            self._background.start(canary.run(partial(self.loaded, name), partial(self._encoder_calls, name)))
        judged = [asyncio.create_task(self._canaries[name].judged.wait()) for name in self._wanted if self.loaded(name)]
        if judged:
            _, late = await asyncio.wait(judged, timeout=INSPECTION_TIMEOUT_SECS)
            for task in late:
                task.cancel()

    async def close(self) -> None:
        """Stop inspecting, and close the connections."""
        await self._background.close()
        await self.connection.close()

    def ensemble(self, name: str) -> Ensemble:
        """Return a loaded ensemble."""
        return self._ensembles[name]

    def loaded(self, name: str) -> bool:
        """Return whether every model that the ensemble needs was loaded at the last inspection."""
        ensemble = self._ensembles.get(name)
        return ensemble is not None and all(self.models.get(model) is ModelState.READY for model in ensemble.models)

    def ready(self, name: str) -> bool:
        """Return whether the ensemble is loaded and recognises speech."""
        return self.loaded(name) and self._canaries[name].health.well

    @property
    def any_loaded(self) -> bool:
        """Whether any configured ensemble is loaded."""
        return any(map(self.loaded, self._wanted))

    @property
    def was_ready(self) -> bool:
        """Whether any ensemble has ever recognised speech."""
        return any(canary.ever_answered for canary in self._canaries.values())

    @property
    def health(self) -> Mapping[str, Health]:
        """Health of each configured ensemble, from its canaries."""
        return {name: canary.health for name, canary in self._canaries.items()}

    def see_progress(self, name: str) -> None:
        """Record that the ensemble has just decoded audio."""
        self._canaries[name].see_progress()

    def see_failure(self, name: str) -> None:
        """Send canaries at once, after a failed request to the ensemble."""
        self._canaries[name].hurry()

    def see_death(self, name: str) -> None:
        """Record that a process of the ensemble's models has died or stalled; the ensemble is not ready from now on."""
        self._canaries[name].see_death()

    def see_shortage(self, name: str, samples: int) -> None:
        """Record that Triton had too little shared memory for audio of this length; see ``Canary.see_shortage``."""
        self._canaries[name].see_shortage(samples)

    def short(self, name: str) -> bool:
        """Return whether the ensemble is not ready since Triton has too little shared memory."""
        return self.loaded(name) and self._canaries[name].short

    def mark_stale(self) -> None:
        """Treat all models as not loaded until the next inspection, and start it at once."""
        self.models = dict.fromkeys(self.models, ModelState.UNKNOWN)
        self._stale.set()

    async def inspect_anew(self) -> None:
        """Start an inspection, and wait for its end."""
        self.mark_stale()
        begun = self._begun
        while self._done <= begun:
            await self._inspected.wait()

    async def _poll(self) -> None:
        while True:
            absent_secs = time.monotonic() - self._absent_since if self.latency_secs is None else 0.0
            pause_secs = poll_pause_secs(loaded=self.any_loaded, absent_secs=absent_secs, unresolved=self._unresolved)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stale.wait(), pause_secs)
            self._stale.clear()
            await self._inspect()

    async def _inspect(self) -> None:
        """Inspect the address once, log changes, and update the canaries."""
        self._begun += 1
        number, before, started = self._begun, self.models, time.perf_counter()
        try:
            states = await self._read_index()
            await self._discover(states)
        except InferenceServerException as error:
            self._note_absence(error)
        else:
            self._note_presence(states, time.perf_counter() - started)
        if before != self.models:
            states_by_name = {name: state.value for name, state in self.models.items()}
            log.info("triton models", endpoint=self._address.target, **states_by_name)
        self._update_canaries()
        self._done = number
        self._inspected.set()
        self._inspected = asyncio.Event()

    async def _read_index(self) -> dict[str, ModelState]:
        index = await self.connection.client.get_model_repository_index(client_timeout=INSPECTION_TIMEOUT_SECS)
        return {model.name: ModelState.READY if model.state == "READY" else ModelState.UNAVAILABLE for model in index.models}

    async def _discover(self, states: Mapping[str, ModelState]) -> None:
        """Read the configurations of newly loaded ensembles."""
        for name in self._wanted:
            if name in self._ensembles or states.get(name) is not ModelState.READY:
                continue
            try:
                ensemble = await read_ensemble(self.connection.client, name, INSPECTION_TIMEOUT_SECS)
            except NoRecogniserError as error:
                if self._rejected.get(name) != str(error):
                    self._rejected[name] = str(error)
                    log.error("ensemble is no recogniser", ensemble=name, reason=str(error))
                continue
            self._ensembles[name] = ensemble
            for event, fields in ensemble.misfits(self._settings):
                log.warning(event, **fields)

    def _note_presence(self, states: Mapping[str, ModelState], latency_secs: float) -> None:
        needed = {model for ensemble in self._ensembles.values() for model in ensemble.models} | set(self._wanted)
        self.models = {model: states.get(model, ModelState.UNKNOWN) for model in sorted(needed)}
        self.generation += self.latency_secs is None
        self.latency_secs = latency_secs
        self._unresolved = False
        for connection in self._left:
            if connection.in_use:
                self._background.start(connection.give_up_if_lost())
        self._left.clear()

    def _note_absence(self, error: InferenceServerException) -> None:
        before = self.models
        self.models = dict.fromkeys(before or self._wanted, ModelState.UNKNOWN)
        if self.latency_secs is not None:
            self._absent_since = time.monotonic()
        self.latency_secs = None
        self._unresolved = is_unresolved(error.message())
        self._ensembles.clear()  # the next Triton may have another configuration
        self._rejected.clear()
        if time.monotonic() - self.connection.began_at >= INSPECTION_TIMEOUT_SECS:
            self._reconnect()
        if before != self.models:
            log.warning("triton unreachable", endpoint=self._address.target, reason=error.message())

    def _reconnect(self) -> None:
        """Replace a connection without a response.

        With a silent network, gRPC would keep the connection for minutes, and it resolves an unknown name less and less often.
        """
        left, self.connection = self.connection, Connection(self._address)
        self._left = [connection for connection in (*self._left, left) if connection.in_use]
        self._background.start(left.close(delay_secs=MAX_PATIENCE * self._settings.inference_timeout_secs))

    def _update_canaries(self) -> None:
        for name, canary in self._canaries.items():
            if not self.loaded(name):
                canary.forget()
            elif not canary.health.answered:
                canary.hurry()

    async def _send_canary(self, name: str, samples: int) -> None:
        await ask(self.connection.client, name, samples)

    def _encoder_calls(self, name: str) -> int:
        return self._ensembles[name].encoder_calls
