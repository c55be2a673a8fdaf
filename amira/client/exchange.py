"""Requests for one transcript, without input and output: their content, the meaning of a response, and retries."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Literal
from urllib.parse import quote, urlencode

import httpx

from amira.client.types import RequestError, Segment, Transcript
from amira.client.upload import Audio, Progress, Upload

BASE_URL_VARIABLE = "AMIRA_BASE_URL"
API_KEY_VARIABLE = "AMIRA_API_KEY"
DEFAULT_BASE_URL = "http://localhost:8057"
DEFAULT_MODEL = "amira"
DEFAULT_TIMEOUT_SECS = 120.0
"""Default timeout of a response: a server under load takes a minute for a recording of 30 s, after a wait of up to 30 s."""

DEFAULT_RETRY_SECS = 60.0
CONNECT_TIMEOUT_SECS = 10.0
PAUSE_RANGE_SECS = (0.5, 8.0)
"""First and maximum pause between attempts in seconds, if the server does not name one; it doubles."""

RETRYABLE_STATUSES = frozenset((408, 429, 502, 503, 504))
"""Statuses of proxies, without the API's body, while the server is away or overloaded."""

Format = Literal["text", "json", "verbose_json", "srt", "vtt"]
"""Formats of a transcript that the server writes, with OpenAI's names."""

OnSegment = Callable[[Segment], object]


class Server:
    """Address and access of a server.

    Attributes:
        base_url: base URL without a slash at its end.
        headers: headers of every request.
        retry_secs: time in which a retryable request is sent again, in seconds.
        timeout: timeout of one request.
    """

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
            **({"Authorization": f"Bearer {key}"} if key else {}),
        }

    def stream_url(self, model: str) -> str:
        """Return the URL of a model's live streams."""
        return f"{self.base_url.replace('http', 'ws', 1)}/v2/decode/stream/{quote(model, safe='')}"


class Exchange:
    """The requests for one transcript.

    Args:
        server: the server.
        audio: the recording.
        model: public name of the model.
        output: format that the server writes; None for a ``Transcript``.
        phrases: boosted while decoding.
        on_segment: called with each segment as it comes.
        on_progress: called while the recording is sent.

    Attributes:
        url: URL of the POST request.
        upload: its body and headers.

    Raises:
        OSError: the recording cannot be read.
        ValueError: ``on_segment`` is given with a format without segments.
    """

    def __init__(
        self,
        server: Server,
        audio: Audio,
        model: str,
        output: Format | None,
        phrases: Sequence[str],
        on_segment: OnSegment | None,
        on_progress: Progress | None,
    ) -> None:
        if output and on_segment:
            raise ValueError(f"on_segment needs format=None, but format is {output!r}; omit one of them")
        self._server = server
        self._on_segment = on_segment
        self._written = output is not None
        self._segments: list[Segment] = []
        self._last_line: dict[str, Any] = {}
        self._deadline = time.monotonic() + server.retry_secs
        self._pause, self._longest_pause = PAUSE_RANGE_SECS
        if output:
            fields = [("model", model), ("response_format", output), *(("keywords[]", phrase) for phrase in phrases)]
            self.url = f"{server.base_url}/v1/audio/transcriptions"
            self.upload = Upload(audio, fields, on_progress)
        else:
            query = [("phrases", phrase) for phrase in phrases] + ([("format", "ndjson")] if on_segment else [])
            path = f"{server.base_url}/v2/decode/batch/{quote(model, safe='')}"
            self.url = f"{path}?{urlencode(query)}" if query else path
            self.upload = Upload(audio, None, on_progress)

    def take_line(self, line: str) -> None:
        """Handle a line of JSON of a response that is sent line by line."""
        self._last_line = content = json.loads(line)
        if content.get("type") == "segment":
            segment = Segment.read(content)
            self._segments.append(segment)
            if self._on_segment:
                self._on_segment(segment)

    def take(self, answer: httpx.Response | httpx.TransportError) -> Transcript | str | float:
        """Return the transcript, or the seconds until the next request.

        Args:
            answer: response to the last request, or the error that prevented one.

        Raises:
            RequestError: the error is not retryable, or the next request would begin too late.
        """
        try:
            if isinstance(answer, httpx.Response):
                return self._read(answer)
            raise self._failure(answer) from answer
        except RequestError as error:
            pause = self._next_pause(answer)
            again = error.retryable and not self._segments  # the caller would get segments twice
            if not again or time.monotonic() + pause > self._deadline:
                raise
            return pause

    def _read(self, response: httpx.Response) -> Transcript | str:
        """Read a response.

        Raises:
            RequestError: the response is an error.
        """
        request_id = response.headers.get("X-Request-ID")
        try:
            if response.is_success and self._written:
                return response.text
            body = self._last_line if comes_in_lines(response) else response.json()
            if response.is_success and "error" not in body:
                return Transcript.read(body, self._segments, request_id)
            error = body["error"]
            code, message, retryable = error["code"], error["message"], error["retryable"]
        except (ValueError, KeyError, TypeError):
            code, retryable = "http", response.status_code in RETRYABLE_STATUSES
            message = f"{response.url} answered {response.status_code} {response.reason_phrase} without a body of this API"
        raise RequestError(code, message, retryable=retryable, status=response.status_code, request_id=request_id)

    def _failure(self, error: httpx.TransportError) -> RequestError:
        server = self._server.base_url
        if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):  # a second request would double a slow server's work
            return RequestError("timeout", f"no answer from {server} within {self._server.timeout.read:g} s")
        return RequestError("unreachable", f"no server at {server}: {error}", retryable=True)

    def _next_pause(self, answer: httpx.Response | httpx.TransportError) -> float:
        """Return the pause that the response names; a date (RFC 9110, 10.2.3) is ignored."""
        asked = answer.headers.get("Retry-After", "") if isinstance(answer, httpx.Response) else ""
        if asked.isascii() and asked.isdecimal():
            return float(asked)
        pause = self._pause * random.uniform(0.5, 1.0)  # noqa: S311 (it spreads the retries of clients)
        self._pause = min(2 * self._pause, self._longest_pause)
        return pause


def comes_in_lines(response: httpx.Response) -> bool:
    """Return whether a response is sent line by line, as segments are decoded."""
    return str(response.headers.get("Content-Type", "")).startswith("application/x-ndjson")
