"""The REST clients against a server with scripted answers: retries, errors, and requests."""

from __future__ import annotations

import asyncio
import email
import io
import json
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from amira import AsyncClient, Client, RequestError, Segment, Transcript, Word
from amira.ports import LOOPBACK, free_ports

WORD = {"word": "yes", "start": 0.25, "end": 0.5, "confidence": 0.9}
ANSWER = {
    "text": "yes",
    "tokens": [7],
    "audio_length_samples": 16_000,
    "features_length": 100,
    "encoded_length": 12,
    "confidence": 0.9,
    "words": [WORD],
}
Ask = Callable[..., Awaitable[Any]]


class Answer(NamedTuple):
    """One answer of the script."""

    status: int
    body: bytes
    headers: Mapping[str, str] = MappingProxyType({})
    after_secs: float = 0


def success(**fields: Any) -> Answer:
    return Answer(200, json.dumps(ANSWER | fields).encode(), {"X-Request-ID": "of the answer"})


def failure(status: int, code: str, *, retryable: bool, **headers: str) -> Answer:
    error = {"message": f"it is {code}", "type": "", "code": code, "param": None, "retryable": retryable}
    return Answer(status, json.dumps({"error": error}).encode(), {"X-Request-ID": "of the error", **headers})


BUSY = failure(503, "no_capacity", retryable=True, **{"Retry-After": "0"})


class Script(NamedTuple):
    """A running server: its address, and the requests that it received, as method and path, headers and body."""

    url: str
    requests: list[tuple[str, dict[str, str], bytes]]


@contextmanager
def script(*answers: Answer, port: int = 0) -> Iterator[Script]:
    remaining = list(answers)
    requests: list[tuple[str, dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((self.requestline.rpartition(" ")[0], dict(self.headers.items()), body))
            answer = remaining.pop(0)
            time.sleep(answer.after_secs)
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    with ThreadingHTTPServer((LOOPBACK, port), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Script(f"http://{LOOPBACK}:{server.server_port}", requests)
        finally:
            server.shutdown()
            thread.join()
    assert not remaining, "it was asked less often than expected"


@pytest.fixture(params=["Client", "AsyncClient"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Transcribe with either client; ``asked`` are arguments of the call, the others those of the client."""

    async def of_sync(url: str | None, audio: Any = b"\0\0", asked: Any = None, **options: Any) -> Any:
        with Client(url, **options) as client:
            return await asyncio.to_thread(partial(client.transcribe, audio, **(asked or {})))

    async def of_async(url: str | None, audio: Any = b"\0\0", asked: Any = None, **options: Any) -> Any:
        async with AsyncClient(url, **options) as client:
            return await client.transcribe(audio, **(asked or {}))

    return of_sync if request.param == "Client" else of_async


async def test_answer_becomes_a_transcript(ask: Ask) -> None:
    with script(success()) as server:
        transcript = await ask(server.url)
    word = Word("yes", 0.25, 0.5, 0.9)
    segment = Segment("yes", 0.25, 0.5, (word,), 0.9)
    assert transcript == Transcript("yes", (segment,), (word,), (7,), 0.9, 1.0, "of the answer")
    assert hash(transcript)


async def test_silence_has_no_segments(ask: Ask) -> None:
    with script(success(text="", tokens=[], confidence=None, words=[])) as server:
        transcript = await ask(server.url)
    assert (transcript.text, transcript.segments, transcript.confidence) == ("", (), None)


async def test_segments_of_the_server_are_kept(ask: Ask) -> None:
    segments: list[dict[str, Any]] = [
        {"id": number, "start": start, "end": start + 0.5, "text": text, "words": [], "confidence": None}
        for number, (start, text) in enumerate([(0.0, "yes"), (0.5, " no")])
    ]
    with script(success(segments=segments)) as server:
        transcript = await ask(server.url)
    assert transcript.segments == (Segment("yes", 0.0, 0.5, (), None), Segment(" no", 0.5, 1.0, (), None))


async def test_path_file_and_bytes_are_sent_alike(ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "recording"
    path.write_bytes(b"RIFF of it")
    given = [path, str(path), b"RIFF of it", bytearray(b"RIFF of it"), io.BytesIO(b"RIFF of it")]
    with script(*[success()] * len(given)) as server:
        for audio in given:
            await ask(server.url, audio)
    assert {body for _, _, body in server.requests} == {b"RIFF of it"}


async def test_url_and_key_come_from_the_environment(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    with script(success(), success()) as server:
        monkeypatch.setenv("AMIRA_BASE_URL", f"{server.url}/")
        monkeypatch.setenv("AMIRA_API_KEY", "key of the environment")
        await ask(None, asked={"model": "a/b"})
        await ask(None, api_key="key of the call")
    (first, headers, _), (second, others, _) = server.requests
    assert (first, second) == ("POST /v2/decode/batch/a%2Fb", "POST /v2/decode/batch/amira")
    assert headers["Authorization"] == "Bearer key of the environment"
    assert others["Authorization"] == "Bearer key of the call"


async def test_base_url_without_a_scheme_is_refused(ask: Ask) -> None:
    with pytest.raises(ValueError, match="is 'localhost:8057'; expected http://"):
        await ask("localhost:8057")


async def test_retryable_error_is_retried_with_the_same_body(ask: Ask) -> None:
    html = Answer(502, b"<html>", {"Retry-After": "0"})
    with script(BUSY, html, BUSY, success()) as server:
        assert (await ask(server.url, b"body")).text == "yes"
    assert [body for _, _, body in server.requests] == [b"body"] * 4


async def test_retry_after_sets_the_pause(ask: Ask) -> None:
    busy = failure(503, "draining", retryable=True, **{"Retry-After": "1"})
    with script(busy, success()) as server:
        began = time.monotonic()
        await ask(server.url)
        assert 1.0 <= time.monotonic() - began < 3


async def test_pauses_double_without_retry_after(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amira.client.exchange.PAUSE_RANGE_SECS", (0.1, 0.2))
    failed = failure(502, "backend_failed", retryable=True)
    with script(failed, failed, failed, failed, success()) as server:
        began = time.monotonic()
        await ask(server.url)
        assert 0.35 <= time.monotonic() - began < 2, "of 0.1, 0.2, 0.2 and 0.2 s each half to all"


async def test_no_attempt_begins_after_retry_secs(ask: Ask) -> None:
    busy = failure(503, "no_capacity", retryable=True, **{"Retry-After": "5"})
    with script(busy, busy) as server:
        began = time.monotonic()
        for retry_secs in (0, 4):
            with pytest.raises(RequestError, match="it is no_capacity") as raised:
                await ask(server.url, retry_secs=retry_secs)
            assert raised.value.retryable
        assert time.monotonic() - began < 3


async def test_other_errors_are_raised_at_once(ask: Ask) -> None:
    with script(failure(404, "model_not_found", retryable=False), Answer(413, b"<html>")) as server:
        with pytest.raises(RequestError, match="it is model_not_found") as refused:
            await ask(server.url)
        with pytest.raises(RequestError, match=f"{server.url}/v2/decode/batch/amira answered 413 .* without a body") as foreign:
            await ask(server.url)
    found = [(error.value.code, error.value.status, error.value.request_id) for error in (refused, foreign)]
    assert found == [("model_not_found", 404, "of the error"), ("http", 413, None)]


async def test_success_without_the_api_body_is_an_error(ask: Ask) -> None:
    with script(Answer(200, b"<html>welcome"), Answer(200, b"[]")) as server:
        for _ in range(2):
            with pytest.raises(RequestError, match="without a body of this API") as raised:
                await ask(server.url)
            assert raised.value.code == "http"


async def test_slow_answer_is_a_timeout_and_not_retried(ask: Ask) -> None:
    with script(success()._replace(after_secs=0.5)) as server:
        with pytest.raises(RequestError, match=r"no answer from .* within 0.2 s") as raised:
            await ask(server.url, timeout_secs=0.2)
        assert (raised.value.code, raised.value.retryable) == ("timeout", False)


async def test_unreachable_server_is_retried(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amira.client.exchange.PAUSE_RANGE_SECS", (0.1, 0.2))
    (port,) = free_ports(LOOPBACK, 1)
    url = f"http://{LOOPBACK}:{port}"
    with pytest.raises(RequestError, match=f"no server at {url}") as raised:
        await ask(url, retry_secs=0.3)
    assert raised.value.code == "unreachable"
    asking = asyncio.ensure_future(ask(url))
    await asyncio.sleep(0.3)
    with script(success(), port=port):
        assert (await asking).text == "yes"


def lines(*contents: Any) -> Answer:
    body = b"".join(json.dumps(content).encode() + b"\n" for content in contents)
    return Answer(200, body, {"Content-Type": "application/x-ndjson", "X-Request-ID": "of the lines"})


SEGMENT = {"id": 0, "start": 0.25, "end": 0.5, "text": "yes", "words": [WORD], "confidence": 0.9}
SUMMARY = {"text": "yes yes", "tokens": [7, 7], "confidence": 0.9, "audio_length_samples": 32_000}


async def test_segments_are_reported_as_they_arrive(ask: Ask) -> None:
    told: list[Segment] = []
    answer = lines({"type": "segment", **SEGMENT}, {"type": "segment", **SEGMENT, "id": 1}, {"type": "transcript", **SUMMARY})
    with script(answer) as server:
        transcript = await ask(server.url, asked={"on_segment": told.append, "phrases": ["Ask not", "ü&"]})
    segment = Segment("yes", 0.25, 0.5, (Word("yes", 0.25, 0.5, 0.9),), 0.9)
    assert told == [segment, segment]
    assert transcript == Transcript("yes yes", (segment, segment), segment.words * 2, (7, 7), 0.9, 2.0, "of the lines")
    ((request, _, body),) = server.requests
    assert request == "POST /v2/decode/batch/amira?phrases=Ask+not&phrases=%C3%BC%26&format=ndjson"
    assert body == b"\0\0"


async def test_failure_after_a_segment_is_raised_and_not_retried(ask: Ask) -> None:
    told: list[Segment] = []
    error = {"message": "Triton failed", "code": "backend_failed", "retryable": True}
    with script(lines({"type": "segment", **SEGMENT}, {"error": error})) as server, pytest.raises(RequestError) as raised:
        await ask(server.url, asked={"on_segment": told.append})
    assert (raised.value.code, len(told)) == ("backend_failed", 1)


async def test_format_is_written_by_the_server(ask: Ask) -> None:
    with script(BUSY, Answer(200, "WEBVTT\n\nü".encode(), {"Content-Type": "text/plain; charset=utf-8"})) as server:
        written = await ask(server.url, b"RIFF", asked={"format": "vtt", "model": "a/b", "phrases": ["one", "two"]})
    assert written == "WEBVTT\n\nü"
    first, second = server.requests
    assert first == second, "a retry sends the same form"
    request, headers, body = first
    assert request == "POST /v1/audio/transcriptions"
    message = email.message_from_bytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body)
    fields = [(part.get_param("name", header="content-disposition"), part.get_payload(decode=True)) for part in message.walk()]
    assert fields[1:] == [
        ("model", b"a/b"),
        ("response_format", b"vtt"),
        ("keywords[]", b"one"),
        ("keywords[]", b"two"),
        ("file", b"RIFF"),
    ]


async def test_on_segment_with_a_text_format_is_refused(ask: Ask) -> None:
    with pytest.raises(ValueError, match="omit one of them"):
        await ask("http://localhost", asked={"format": "srt", "on_segment": print})


async def test_upload_reports_its_progress(ask: Ask, tmp_path: Path) -> None:
    path, told = tmp_path / "recording", list[tuple[int, int]]()
    path.write_bytes(bytes(200_000))
    with script(success()) as server:
        await ask(server.url, path, asked={"on_progress": lambda sent, size: told.append((sent, size))})
    assert told == [(65_536, 200_000), (131_072, 200_000), (196_608, 200_000), (200_000, 200_000)]
    assert server.requests[0][1]["Content-Length"] == "200000"


async def test_file_is_sent_from_its_position_and_stays_open(ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "recording"
    path.write_bytes(b"header body")
    with script(BUSY, success()) as server, path.open("rb") as file:
        file.seek(7)
        await ask(server.url, file)
        assert not file.closed
    assert [body for _, _, body in server.requests] == [b"body", b"body"]


async def test_pipe_can_be_resent(ask: Ask) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"piped")
    os.close(writing)
    with script(BUSY, success()) as server, os.fdopen(reading, "rb") as pipe:
        await ask(server.url, pipe)
    assert [body for _, _, body in server.requests] == [b"piped", b"piped"]


async def test_missing_file_is_an_os_error(ask: Ask, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await ask("http://localhost", tmp_path / "nothing")
