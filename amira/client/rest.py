"""Clients of a server: recordings over REST, and live streams."""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar, overload

import httpx

from amira.client.blocking import SyncLiveStream
from amira.client.exchange import (
    DEFAULT_MODEL,
    DEFAULT_RETRY_SECS,
    DEFAULT_TIMEOUT_SECS,
    Exchange,
    Format,
    OnSegment,
    Server,
    comes_in_lines,
)
from amira.client.live import RECONNECT_SECS, LiveStream
from amira.client.types import Transcript
from amira.client.upload import Audio, Progress

if TYPE_CHECKING:
    from typing_extensions import Self

Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)


class _Client(Generic[Http]):
    """Constructor of both clients."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_secs: float = DEFAULT_TIMEOUT_SECS,
        retry_secs: float = DEFAULT_RETRY_SECS,
    ) -> None:
        """Create a client.

        Args:
            base_url: base URL of the server; default: ``AMIRA_BASE_URL`` of the environment, or ``http://localhost:8057``.
            api_key: key sent as ``Authorization: Bearer``; default: ``AMIRA_API_KEY`` of the environment, or none.
            timeout_secs: timeout of a response, or with ``on_segment`` of the next segment, in seconds.
            retry_secs: time in which a retryable request is sent again, in seconds; 0: never.

        Raises:
            ValueError: the base URL does not begin with http:// or https://.
        """
        self._server = Server(base_url, api_key, timeout_secs, retry_secs)
        self._http: Http = self._connect()

    @abstractmethod
    def _connect(self) -> Http:
        """Return the HTTP client, for ``self._server``."""


class Client(_Client[httpx.Client]):
    """Transcribes recordings. Threads may share it; close it, or use it as a context.

    Example:
        with Client() as client:
            print(client.transcribe("meeting.flac").text)
    """

    def _connect(self) -> httpx.Client:
        return httpx.Client(timeout=self._server.timeout, headers=self._server.headers)

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @overload
    def transcribe(
        self,
        audio: Audio,
        *,
        model: str = ...,
        format: None = None,
        phrases: Sequence[str] = ...,
        on_segment: OnSegment | None = None,
        on_progress: Progress | None = None,
    ) -> Transcript: ...

    @overload
    def transcribe(
        self,
        audio: Audio,
        *,
        model: str = ...,
        format: Format,
        phrases: Sequence[str] = ...,
        on_progress: Progress | None = None,
    ) -> str: ...

    def transcribe(
        self,
        audio: Audio,
        *,
        model: str = DEFAULT_MODEL,
        format: Format | None = None,  # noqa: A002 (the server's name of it)
        phrases: Sequence[str] = (),
        on_segment: OnSegment | None = None,
        on_progress: Progress | None = None,
    ) -> Transcript | str:
        """Transcribe a recording.

        Args:
            audio: a path, bytes, or a file: any format that the server decodes, or raw 16-bit little-endian PCM, 16 kHz, mono.
            model: public name of the model.
            format: ``text``, ``json``, ``verbose_json``, ``srt`` or ``vtt`` for the text of that format, which the server
                writes; None for a ``Transcript``.
            phrases: words and phrases that the recording may have, which the server boosts if its model can.
            on_segment: called with each ``Segment`` as it comes; only without ``format``.
            on_progress: called with the number of bytes sent and of all, while the recording is sent.

        Raises:
            RequestError: the server refuses the recording, or fails or is not reachable for ``retry_secs``.
            OSError: the file cannot be read.
            ValueError: ``on_segment`` is given with ``format``.
        """
        exchange = Exchange(self._server, audio, model, format, phrases, on_segment, on_progress)
        while True:
            outcome = exchange.take(self._post(exchange))
            if not isinstance(outcome, float):
                return outcome
            time.sleep(outcome)

    def live(self, *, model: str = DEFAULT_MODEL, reconnect_secs: float = RECONNECT_SECS) -> SyncLiveStream:
        """Return a live stream, to be used as a context; it fails after ``reconnect_secs`` without a server."""
        url, headers = self._server.stream_url(model), self._server.headers
        return SyncLiveStream(url, headers=headers, reconnect_secs=reconnect_secs)

    def _post(self, exchange: Exchange) -> httpx.Response | httpx.TransportError:
        upload = exchange.upload
        try:
            with self._http.stream("POST", exchange.url, content=iter(upload), headers=upload.headers) as answer:
                if comes_in_lines(answer):
                    for line in answer.iter_lines():
                        exchange.take_line(line)
                else:
                    answer.read()
        except httpx.TransportError as error:
            return error
        return answer


class AsyncClient(_Client[httpx.AsyncClient]):
    """Transcribes recordings in asyncio. Close it, or use it as a context.

    Example:
        async with AsyncClient() as client:
            transcript = await client.transcribe("meeting.flac")
    """

    def _connect(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(timeout=self._server.timeout, headers=self._server.headers)

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @overload
    async def transcribe(
        self,
        audio: Audio,
        *,
        model: str = ...,
        format: None = None,
        phrases: Sequence[str] = ...,
        on_segment: OnSegment | None = None,
        on_progress: Progress | None = None,
    ) -> Transcript: ...

    @overload
    async def transcribe(
        self,
        audio: Audio,
        *,
        model: str = ...,
        format: Format,
        phrases: Sequence[str] = ...,
        on_progress: Progress | None = None,
    ) -> str: ...

    async def transcribe(
        self,
        audio: Audio,
        *,
        model: str = DEFAULT_MODEL,
        format: Format | None = None,  # noqa: A002 (the server's name of it)
        phrases: Sequence[str] = (),
        on_segment: OnSegment | None = None,
        on_progress: Progress | None = None,
    ) -> Transcript | str:
        """Transcribe a recording, as ``Client.transcribe`` does; the callbacks are plain functions."""
        exchange = await asyncio.to_thread(Exchange, self._server, audio, model, format, phrases, on_segment, on_progress)
        while True:
            outcome = exchange.take(await self._post(exchange))
            if not isinstance(outcome, float):
                return outcome
            await asyncio.sleep(outcome)

    def live(self, *, model: str = DEFAULT_MODEL, reconnect_secs: float = RECONNECT_SECS) -> LiveStream:
        """Return a live stream, to be used as an asynchronous context, as ``Client.live`` does."""
        url, headers = self._server.stream_url(model), self._server.headers
        return LiveStream(url, headers=headers, reconnect_secs=reconnect_secs)

    async def _post(self, exchange: Exchange) -> httpx.Response | httpx.TransportError:
        upload = exchange.upload
        try:
            async with self._http.stream("POST", exchange.url, content=upload.chunks(), headers=upload.headers) as answer:
                if comes_in_lines(answer):
                    async for line in answer.aiter_lines():
                        exchange.take_line(line)
                else:
                    await answer.aread()
        except httpx.TransportError as error:
            return error
        return answer
