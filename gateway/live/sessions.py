"""Admit, open and drain live sessions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Protocol

import structlog

from gateway import metrics
from gateway.audio import BYTES_PER_SAMPLE
from gateway.limits.places import Place
from gateway.limits.priority import Priority
from gateway.limits.reclaim import longest_silent
from gateway.live.buffer import BufferUsage
from gateway.live.resume import SessionTokens
from gateway.live.session import Session
from gateway.live.shared import Shared
from gateway.live.speech import Detection, SpeechDetector
from gateway.live.states import State
from gateway.resources import Resources

log = structlog.get_logger()


class Connection(Protocol):
    """Connection of a client that holds a place itself, and opens one session after the other."""

    @property
    def silent_secs(self) -> float:
        """Time since its last audio, or since its start, in seconds."""

    def reclaim(self) -> None:
        """End, and release the place at once: another stream needs it, and this one has sent no audio for a long time."""

    def drain(self) -> None:
        """End, because the server shuts down."""


class Sessions:
    """Engine of live streams.

    Args:
        resources: resources of the gateway.
    """

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        settings = resources.settings
        usage = BufferUsage(settings.max_concurrent_streams * settings.audio_buffer_capacity // BYTES_PER_SAMPLE)
        self._shared = Shared(settings, Priority(), SessionTokens(settings), usage)
        self._connections: set[Connection] = set()
        metrics.BUFFER_USAGE.set_function(usage.share)

    @contextlib.contextmanager
    def admit(self, caller: int, address: str | None = None) -> Iterator[Place]:
        """Hold a place for a stream. If all are in use, a silent stream loses its place.

        Args:
            caller: caller whose quota the stream counts against.
            address: client address whose quota it counts against.

        Raises:
            ApiError: the caller, the address or the gateway has no free place, or the gateway drains.
        """
        places = self._resources.places
        with self._resources.quotas.stream(caller, address):
            if places.full and not places.draining:
                self._reclaim()
            with places.stream() as place:
                yield place

    def open(
        self,
        model: str,
        caller: int,
        *,
        place: Place | None = None,
        resumable: bool = False,
        detection: Detection | None = None,
        options: Mapping[str, str | int] | None = None,
    ) -> Session:
        """Return a new session; entering it as a context starts it.

        Args:
            model: public name of the model, one of the settings'.
            caller: caller who is charged for the audio.
            place: place from ``admit``, which the session releases early if it is reclaimed.
            resumable: whether the client can resume the stream by session tokens.
            detection: rules for the start and stop of speech; None: they are not published.
            options: options of the decoder, which override those of every stream; ``latency`` names the windows.

        Raises:
            ApiError: no Triton can serve the model now.
        """
        triton, settings = self._resources.triton, self._resources.settings
        ensemble = triton.ensemble(settings.models[model])
        utterance = triton.stream(ensemble, {**self._resources.options, **(options or {})})
        spend = partial(self._resources.quotas.spend, caller)
        return Session(self._shared, model, ensemble, utterance, spend, resumable=resumable, place=place, detection=detection)

    def detector(self, detection: Detection, start: int) -> SpeechDetector:
        """Return a detector of speech for a connection whose next sample has the number ``start``."""
        return SpeechDetector(detection, self._shared.voices, start)

    @contextlib.contextmanager
    def connected(self, connection: Connection) -> Iterator[None]:
        """Reclaim and drain a connection with the sessions, until the context is left."""
        self._connections.add(connection)
        try:
            yield
        finally:
            self._connections.discard(connection)

    def _reclaim(self) -> None:
        """End the stream that was silent for the longest time, if it was for at least ``reclaim_silent_secs``."""
        least_secs = self._resources.settings.reclaim_silent_secs
        sessions = [session for session in self._shared.running if session.place and session.state is not State.ENDED]
        holders: list[Connection] = [*sessions, *self._connections]
        if holder := longest_silent(holders, least_secs):
            log.info("stream reclaimed", silent_secs=round(holder.silent_secs, 1))
            holder.reclaim()

    def drain(self) -> None:
        """End every connection and session, because the server shuts down."""
        for connection in [*self._connections, *self._shared.running]:
            connection.drain()

    async def close(self, timeout_secs: float) -> None:
        """Abandon all sessions, and wait until the decoder's states are freed or the timeout has passed."""
        left = list(self._shared.running)
        for session in left:
            session.abandon()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(session.wait_freed() for session in left)), timeout_secs)
