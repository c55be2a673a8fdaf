"""Body limits, access log and metrics, around a small application."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from prometheus_client import REGISTRY
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send
from structlog.testing import capture_logs

from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.middleware import AccessLog, BodyLimit, BodyLimits
from gateway.tracing import Tracing


def http_scope(path: str = "/v2/decode/batch/amira", method: str = "POST", **headers: str) -> Scope:
    return {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }


def parts(*bodies: bytes) -> list[Message]:
    return [{"type": "http.request", "body": body, "more_body": i < len(bodies) - 1} for i, body in enumerate(bodies)]


def limits(max_bytes: int, *, patience_secs: float = 1.0, json_bytes: int = 10, total_bytes: int = 1000) -> BodyLimits:
    return BodyLimits(max_bytes, json_bytes, total_bytes, patience_secs)


class Client:
    """Sends its parts, then nothing more, and collects the responses."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.messages = list(messages)
        self.got: list[Message] = []

    async def receive(self) -> Message:
        if not self.messages:
            await asyncio.Event().wait()
        return self.messages.pop(0)

    async def send(self, message: Message) -> None:
        self.got.append(message)


async def read_all(_scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await answer(_scope, receive, send)


async def answer(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


async def test_body_up_to_the_limit_is_answered() -> None:
    client = Client(parts(bytes(60), bytes(40)))
    await BodyLimit(read_all, limits(100))(http_scope(transfer_encoding="chunked"), client.receive, client.send)
    assert [message["type"] for message in client.got] == ["http.response.start", "http.response.body"]
    assert client.got[0]["headers"] == []


@pytest.mark.parametrize("headers", [{"content_length": "101"}, {"transfer_encoding": "chunked"}])
async def test_body_over_the_limit_is_refused(headers: dict[str, str]) -> None:
    client = Client(parts(bytes(60), bytes(41)))
    with pytest.raises(ApiError, match="100") as error:
        await BodyLimit(read_all, limits(100))(http_scope(**headers), client.receive, client.send)
    assert error.value.kind is ErrorKind.BODY_TOO_LARGE
    assert len(client.messages) == (2 if "content_length" in headers else 0)  # the declared size is enough


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8"])
async def test_json_has_a_limit_of_its_own(content_type: str) -> None:
    client = Client(parts(bytes(11)))
    scope = http_scope(content_type=content_type, content_length="11")
    with pytest.raises(ApiError, match="at most 10") as error:
        await BodyLimit(read_all, limits(100))(scope, client.receive, client.send)
    assert error.value.kind is ErrorKind.BODY_TOO_LARGE


@pytest.mark.parametrize("coding", ["br", "gzip", "Deflate", "identity, gzip"])
async def test_compressed_body_is_refused(coding: str) -> None:
    """Its bytes would be decoded as raw PCM."""
    client = Client(parts(bytes(60)))
    with pytest.raises(ApiError, match="Content-Encoding") as error:
        await BodyLimit(read_all, limits(100))(http_scope(content_encoding=coding), client.receive, client.send)
    assert error.value.kind is ErrorKind.UNSUPPORTED_MEDIA


async def test_identity_coding_is_accepted() -> None:
    client = Client(parts(bytes(60)))
    await BodyLimit(read_all, limits(100))(http_scope(content_encoding="Identity"), client.receive, client.send)
    assert client.got[0]["status"] == 200


async def test_bodies_in_flight_have_a_total_limit() -> None:
    limited = BodyLimit(read_all, limits(100, total_bytes=150))
    waiting = Client([{"type": "http.request", "body": bytes(90), "more_body": True}])
    scope = http_scope(content_length="100")
    first = asyncio.create_task(limited(scope, waiting.receive, waiting.send))
    await asyncio.sleep(0.05)
    second = Client(parts(bytes(70)))
    with pytest.raises(ApiError) as error:
        await limited(scope, second.receive, second.send)
    assert error.value.kind is ErrorKind.NO_CAPACITY
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    third = Client(parts(bytes(70)))
    await limited(scope, third.receive, third.send)
    assert third.got


async def test_missing_body_is_refused() -> None:
    client = Client([{"type": "http.request", "body": bytes(1600), "more_body": True}])
    loop = asyncio.get_running_loop()
    began = loop.time()
    limited = BodyLimit(read_all, limits(10_000, patience_secs=0.1, total_bytes=10_000))
    with pytest.raises(ApiError, match="1600 bytes") as error:
        await limited(http_scope(content_length="3200"), client.receive, client.send)
    assert error.value.kind is ErrorKind.BODY_TOO_SLOW
    assert loop.time() - began > 0.19  # its bytes give it 0.1 s more


async def test_answer_before_the_end_of_the_body_closes_the_connection() -> None:
    client = Client(parts(bytes(10), bytes(10)))
    await BodyLimit(answer, limits(100))(http_scope(content_length="20"), client.receive, client.send)
    assert (b"connection", b"close") in client.got[0]["headers"]


async def test_request_without_a_body_keeps_its_connection() -> None:
    client = Client([])
    await BodyLimit(answer, limits(100))(http_scope(method="GET"), client.receive, client.send)
    assert client.got[0]["headers"] == []


async def test_websockets_are_not_limited() -> None:
    seen: list[Any] = []

    async def application(_scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((receive, send))

    client = Client([])
    scope = {"type": "websocket", "headers": []}
    receive, send = client.receive, client.send
    await BodyLimit(AccessLog(application, Settings(), Tracing(Settings(), {})), limits(1))(scope, receive, send)
    assert seen == [(receive, send)]


def requests_total(endpoint: str, model: str, status: int) -> float:
    labels = {"endpoint": endpoint, "model": model, "status": str(status)}
    return REGISTRY.get_sample_value("asr_requests_total", labels) or 0.0


@pytest.mark.parametrize(
    ("path", "endpoint", "model"),
    [
        ("/v2/decode/batch/amira", "batch", "amira"),
        ("/v2/decode/batch/no/such", "batch", "unknown"),
        ("/health/live", "health", "unknown"),
        ("/metrics", "metrics", "unknown"),
        ("/x" * 100, "other", "unknown"),
    ],
)
async def test_labels_come_from_closed_sets(path: str, endpoint: str, model: str) -> None:
    client = Client(parts(bytes(60), bytes(41)))
    before = requests_total(endpoint, model, 200)
    with capture_logs() as events:
        await AccessLog(read_all, Settings(), Tracing(Settings(), {}))(http_scope(path), client.receive, client.send)
    assert requests_total(endpoint, model, 200) == before + 1
    (event,) = events
    assert event.pop("duration_ms") >= 0
    assert event == {
        "event": "request",
        "log_level": "info" if endpoint in ("batch", "other") else "debug",
        "method": "POST",
        "endpoint": endpoint,
        "model": model,
        "status": 200,
        "body_bytes": 101,
    }


async def test_client_that_leaves_is_counted_as_499() -> None:
    async def leave(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ClientDisconnect

    before = requests_total("batch", "amira", 499)
    client = Client([])
    await AccessLog(leave, Settings(), Tracing(Settings(), {}))(http_scope(), client.receive, client.send)
    assert requests_total("batch", "amira", 499) == before + 1


async def test_crash_is_counted_as_500() -> None:
    async def crash(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise RuntimeError

    before = requests_total("batch", "amira", 500)
    client = Client([])
    with pytest.raises(RuntimeError):
        await AccessLog(crash, Settings(), Tracing(Settings(), {}))(http_scope(), client.receive, client.send)
    assert requests_total("batch", "amira", 500) == before + 1
