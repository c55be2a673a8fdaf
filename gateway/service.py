"""Objects that all routes share: settings, Triton, limits and engines."""

from __future__ import annotations

import asyncio
import time

from gateway import metrics
from gateway.audio.pool import FilePool
from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.limits.client_secrets import ClientSecrets
from gateway.live.sessions import Sessions
from gateway.recordings.transcribe import Transcriber
from gateway.resources import Resources
from gateway.tracing import Tracing


class Service:
    """State of a gateway process.

    Attributes:
        settings: settings of the gateway.
        triton, places, quotas: those of ``Resources``.
        client_secrets: keys that callers make for their own clients.
        files: decodes audio files.
        sessions: the engine of live streams.
        transcriber: the engine of recordings.
        tracing: creates spans.
        started_at: start of the process, Unix time in seconds.
    """

    def __init__(self, settings: Settings, tracing: Tracing) -> None:
        self.settings = settings
        self.tracing = tracing
        resources = Resources.from_settings(settings)
        self.triton, self.places, self.quotas = resources.triton, resources.places, resources.quotas
        self.client_secrets = ClientSecrets(settings)
        self.files = FilePool()
        self.sessions = Sessions(resources)
        self.transcriber = Transcriber(resources)
        self.started_at = time.time()
        metrics.EVENT_LOOP_TASKS.set_function(lambda: len(asyncio.all_tasks()))

    def check_model(self, model: str) -> None:
        """Check that the settings have a model of this public name.

        Raises:
            ApiError: they do not.
        """
        if model not in self.settings.models:
            known = ", ".join(sorted(self.settings.models))
            raise ApiError(ErrorKind.MODEL_NOT_FOUND, f"model {model[:64]!r} is not known; known: {known}", "model")

    def resolve_model(self, name: str) -> str:
        """Return the public name of a model that is given by it or by an alias.

        Raises:
            ApiError: the name is not known.
        """
        model = name if name in self.settings.models else self.settings.model_aliases.get(name, name)
        self.check_model(model)
        return model

    def ready(self) -> bool:
        """Return whether new work is accepted: a model is ready, and no drain has begun."""
        return not self.places.draining and any(map(self.triton.ready, self.settings.models.values()))

    async def start(self) -> None:
        """Connect to Triton."""
        await self.triton.start()

    async def close(self) -> None:
        """End the remaining streams, and disconnect from Triton."""
        await self.sessions.close(self.settings.inference_timeout_secs)
        await self.files.close()
        await self.triton.close()

    async def drain(self) -> None:
        """Refuse new work, let the old finish for as long as the settings allow, then end live streams and long recordings."""
        self.places.drain()
        if not await self.places.wait_idle(self.settings.drain_timeout_secs):
            self.sessions.drain()
            self.places.end_recordings()
            await self.places.wait_idle(2 * self.settings.inference_timeout_secs)
