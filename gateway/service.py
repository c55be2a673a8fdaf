"""What the routes share: settings, Triton, and the places to be had."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from gateway import metrics
from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.limits.access import Admission, Quotas
from gateway.live.resume import Tickets
from gateway.tracing import Tracing
from gateway.triton.pool import Triton


@dataclass
class BufferUsage:
    """Audio that waits in the buffers of all streams.

    Attributes:
        capacity_bytes: what they could hold together.
        used_bytes: what they hold.
    """

    capacity_bytes: int
    used_bytes: int = 0

    def share(self) -> float:
        """Part in use, 0 to 1."""
        return self.used_bytes / self.capacity_bytes


class Service:
    """One gateway process.

    Attributes:
        settings: its settings.
        triton: the server behind it.
        quotas: what each key may use.
        tickets: with which streams go on after a lost connection.
        admission: places for streams and batches.
        tracing: where spans go.
        options: decoding options that the settings give every stream.
        buffer_usage: audio that waits in the streams' buffers.
        last_call: set when live streams must end, at the end of a drain.
        started_at: Unix time in seconds.
    """

    def __init__(self, settings: Settings, tracing: Tracing) -> None:
        self.settings = settings
        self.triton = Triton(settings)
        self.admission = Admission(settings)
        self.quotas = Quotas(settings)
        self.tickets = Tickets(settings)
        self.tracing = tracing
        self.options: dict[str, str | int] = {
            name: value
            for name in ("latency", "max_symbols_per_step", "max_total_tokens")
            if (value := getattr(settings, name)) is not None
        }
        self.buffer_usage = BufferUsage(settings.max_concurrent_streams * settings.audio_buffer_capacity)
        metrics.BUFFER_USAGE.set_function(self.buffer_usage.share)
        metrics.EVENT_LOOP_TASKS.set_function(lambda: len(asyncio.all_tasks()))
        self.last_call = asyncio.Event()
        self.started_at = time.time()

    def ensemble(self, model: str) -> str:
        """The Triton ensemble behind a public model name.

        Raises:
            ApiError: the name is not known.
        """
        try:
            return self.settings.models[model]
        except KeyError:
            known = ", ".join(sorted(self.settings.models))
            raise ApiError(ErrorKind.MODEL_NOT_FOUND, f"model {model[:64]!r} is not known; known: {known}", "model") from None

    def ready(self) -> bool:
        """Whether new work can be taken: some model can be served, and no drain has begun."""
        return not self.admission.draining and any(map(self.triton.ready, self.settings.models.values()))

    async def drain(self) -> None:
        """Refuse new work, let the old finish for as long as the settings allow, then end the live streams."""
        self.admission.drain()
        if not await self.admission.wait_idle(self.settings.drain_timeout_secs):
            self.last_call.set()
            await self.admission.wait_idle(2 * self.settings.inference_timeout_secs)
