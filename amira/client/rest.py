"""Transcribe recordings over REST."""

from __future__ import annotations

import asyncio
import os
import random
import time
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote

import httpx

from amira.client.types import RequestError, Transcript

if TYPE_CHECKING:
    from typing_extensions import Self

BASE_URL_VARIABLE = "AMIRA_BASE_URL"
API_KEY_VARIABLE = "AMIRA_API_KEY"
DEFAULT_BASE_URL = "http://localhost:8057"
DEFAULT_MODEL = "amira"
DEFAULT_TIMEOUT_SECS = 120.0
"""A server under load answers a recording of the longest kind after a minute, and lets it wait for 30 s before that."""

DEFAULT_RETRY_SECS = 60.0
CONNECT_TIMEOUT_SECS = 10.0
PAUSE_RANGE_SECS = (0.5, 8.0)
"""Pauses between tries where the server names none: the first and the longest; they double."""

RETRYABLE_STATUSES = frozenset((408, 429, 502, 503, 504))
"""Statuses that something before the server answers, without the API's body, while the server is away or overloaded."""

Audio = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
"""A path, the bytes of a recording, or a file that is open for reading bytes."""


class _Service:
    """The server that both clients speak to."""

    def __init__(self, base_url: str | None, api_key: str | None, timeout_secs: float, retry_secs: float) -> None:
        url = base_url or os.environ.get(BASE_URL_VARIABLE) or DEFAULT_BASE_URL
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"base_url (or {BASE_URL_VARIABLE}) is {url!r}; expected http://… or https://…")
        key = api_key or os.environ.get(API_KEY_VARIABLE)
        self.base_url = url.rstrip("/")
        self.retry_secs = retry_secs
        self.timeout = httpx.Timeout(timeout_secs, connect=CONNECT_TIMEOUT_SECS, pool=None)
        self.headers = {
            "User-Agent": f"amira-asr/{version('amira-asr')}",
            "Content-Type": "application/octet-stream",  # the server recognises files by their content
            **({"Authorization": f"Bearer {key}"} if key else {}),
        }

    def begin(self, model: str) -> _Exchange:
        """Begin to transcribe a recording with a model."""
        return _Exchange(self, f"{self.base_url}/v2/decode/batch/{quote(model, safe='')}")


class _Exchange:
    """One recording's requests: decides what each answer means, and when to send the next request.

    Attributes:
        url: where to post the recording.
    """

    def __init__(self, service: _Service, url: str) -> None:
        self.url = url
        self._service = service
        self._deadline = time.monotonic() + service.retry_secs
        self._pause, self._longest_pause = PAUSE_RANGE_SECS

    def take(self, answer: httpx.Response | httpx.TransportError) -> Transcript | float:
        """Return the transcript, or the seconds until the next request.

        Args:
            answer: the last request's, or what prevented one.

        Raises:
            RequestError: another request is of no use or would begin too late.
        """
        try:
            if isinstance(answer, httpx.Response):
                return _read(answer)
            raise self._failure(answer) from answer
        except RequestError as error:
            pause = self._next_pause(answer)
            if not error.retryable or time.monotonic() + pause > self._deadline:
                raise
            return pause

    def _failure(self, error: httpx.TransportError) -> RequestError:
        server = self._service.base_url
        if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):  # a second request would double a slow server's work
            return RequestError("timeout", f"no answer from {server} within {self._service.timeout.read:g} s")
        return RequestError("unreachable", f"no server at {server}: {error}", retryable=True)

    def _next_pause(self, answer: httpx.Response | httpx.TransportError) -> float:
        """Return the pause that the answer asks for; a date (RFC 9110, 10.2.3) or none counts as not asked for."""
        asked = answer.headers.get("Retry-After", "") if isinstance(answer, httpx.Response) else ""
        if asked.isascii() and asked.isdecimal():
            return float(asked)
        pause = self._pause * random.uniform(0.5, 1.0)  # noqa: S311 (so that clients that failed together don't return together)
        self._pause = min(2 * self._pause, self._longest_pause)
        return pause


def _read(response: httpx.Response) -> Transcript:
    """Read an answer.

    Raises:
        RequestError: it is an error.
    """
    request_id = response.headers.get("X-Request-ID")
    try:
        body = response.json()
        if response.is_success:
            return Transcript.read(body, request_id)
        error = body["error"]
        code, message, retryable = error["code"], error["message"], error["retryable"]
    except (ValueError, KeyError, TypeError):
        code, retryable = "http", response.status_code in RETRYABLE_STATUSES
        message = f"{response.url} answered {response.status_code} {response.reason_phrase} without a body of this API"
    raise RequestError(code, message, retryable=retryable, status=response.status_code, request_id=request_id)


def _read_audio(audio: Audio) -> bytes:
    if isinstance(audio, bytes | bytearray | memoryview):
        return bytes(audio)
    if isinstance(audio, str | os.PathLike):
        return Path(audio).read_bytes()
    return audio.read()


class Client:
    """Transcribes recordings; may be shared by threads, and is best closed or used as a context.

        with Client() as client:
            print(client.transcribe("meeting.flac").text)

    Args:
        base_url: the server's; if not given, ``AMIRA_BASE_URL`` of the environment, or ``http://localhost:8057``.
        api_key: sent as ``Authorization: Bearer``; if not given, ``AMIRA_API_KEY`` of the environment, or none.
        timeout_secs: longest wait for one answer.
        retry_secs: time in which a request that may succeed later is sent again; 0 for never.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_secs: float = DEFAULT_TIMEOUT_SECS,
        retry_secs: float = DEFAULT_RETRY_SECS,
    ) -> None:
        self._service = _Service(base_url, api_key, timeout_secs, retry_secs)
        self._http = httpx.Client(timeout=self._service.timeout, headers=self._service.headers)

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def transcribe(self, audio: Audio, *, model: str = DEFAULT_MODEL) -> Transcript:
        """Transcribe a recording.

        Args:
            audio: a path, bytes or a file: WAV, FLAC, Ogg, or raw 16-bit little-endian PCM, 16 kHz, mono. Held in memory.
            model: public name of the model.

        Raises:
            RequestError: the server refuses the recording, or fails or can't be reached for ``retry_secs``.
            OSError: the file can't be read.
        """
        body, exchange = _read_audio(audio), self._service.begin(model)
        while True:
            answer: httpx.Response | httpx.TransportError
            try:
                answer = self._http.post(exchange.url, content=body)
            except httpx.TransportError as error:
                answer = error
            outcome = exchange.take(answer)
            if isinstance(outcome, Transcript):
                return outcome
            time.sleep(outcome)


class AsyncClient:
    """Transcribes recordings in asyncio; best closed or used as a context.

        async with AsyncClient() as client:
            transcript = await client.transcribe("meeting.flac")

    Args:
        base_url: the server's; if not given, ``AMIRA_BASE_URL`` of the environment, or ``http://localhost:8057``.
        api_key: sent as ``Authorization: Bearer``; if not given, ``AMIRA_API_KEY`` of the environment, or none.
        timeout_secs: longest wait for one answer.
        retry_secs: time in which a request that may succeed later is sent again; 0 for never.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_secs: float = DEFAULT_TIMEOUT_SECS,
        retry_secs: float = DEFAULT_RETRY_SECS,
    ) -> None:
        self._service = _Service(base_url, api_key, timeout_secs, retry_secs)
        self._http = httpx.AsyncClient(timeout=self._service.timeout, headers=self._service.headers)

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

    async def transcribe(self, audio: Audio, *, model: str = DEFAULT_MODEL) -> Transcript:
        """Transcribe a recording, as ``Client.transcribe`` does."""
        body, exchange = await asyncio.to_thread(_read_audio, audio), self._service.begin(model)
        while True:
            answer: httpx.Response | httpx.TransportError
            try:
                answer = await self._http.post(exchange.url, content=body)
            except httpx.TransportError as error:
                answer = error
            outcome = exchange.take(answer)
            if isinstance(outcome, Transcript):
                return outcome
            await asyncio.sleep(outcome)
