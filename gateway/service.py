"""Objects that all routes share: settings, Triton, limits and engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

from gateway import metrics
from gateway.audio.pool import FilePool
from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.languages import LanguageError, choose_language
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

    def languages(self, model: str) -> Sequence[str]:
        """Return the languages that a stream of a model can choose; empty if there is no choice.

        Raises:
            ApiError: no Triton can serve the model now.
        """
        return self.triton.ensemble(self.settings.models[model]).languages

    def language_options(
        self, model: str, wanted: Sequence[str], refusal: ErrorKind = ErrorKind.UNACCEPTABLE
    ) -> dict[str, str | int]:
        """Return the decoder's options for a language that a client names.

        Args:
            model: public name of the model.
            wanted: tags in order of preference; empty if the client names none.
            refusal: kind of the error.

        Raises:
            ApiError: the model recognises none of them, or no Triton can serve it now.
        """
        if not wanted:
            return {}
        spoken = self.settings.model_languages.get(model)
        try:
            language = choose_language(model, wanted, self.languages(model), spoken)
        except LanguageError as error:
            raise ApiError(refusal, str(error), "language") from None
        return {"language": language} if language else {}

    def check_alternatives(
        self, model: str, options: Mapping[str, str | int], *, live: bool, refusal: ErrorKind = ErrorKind.UNACCEPTABLE
    ) -> None:
        """Check that several texts of a segment are only asked for with a beam.

        Args:
            model: public name of the model.
            options: options of the decoder.
            live: whether they are a stream's.
            refusal: kind of the error.

        Raises:
            ApiError: they are asked for without a beam, or no Triton can serve the model now.
        """
        wanted = options.get("alternatives", 1)
        if wanted != 1 and options.get("beam", self.beam(model, live=live)) == 1:
            message = f"alternatives is {wanted}, but the beam is 1, which finds one text; leave it out, or add beam=4"
            raise ApiError(refusal, message, "alternatives")

    def beam(self, model: str, *, live: bool) -> int:
        """Return the default number of hypotheses of a model's streams or recordings.

        Raises:
            ApiError: no Triton can serve the model now.
        """
        ensemble = self.triton.ensemble(self.settings.models[model])
        return ensemble.stream_beam if live else ensemble.beam

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
