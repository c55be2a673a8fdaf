"""Traces of a real gateway and a real Triton, received by OTLP over HTTP."""

from __future__ import annotations

import asyncio
import gzip
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import httpx
import numpy as np
import orjson
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from riva.client.proto import riva_asr_pb2
from tritonclient.grpc import InferInput
from tritonclient.grpc import aio as grpcclient

from amira.paths import SPEECH
from amira.ports import LOOPBACK
from gateway.config.settings import ConfigError, Settings
from gateway.tracing import Tracing, headers, otlp_url, trace_id, triton_options
from tests.support.chaos import Backend, Proxy, speak
from tests.support.clients import END, decoder_metric, listen, open_socket, transcribe
from tests.support.repositories import served_repository
from tests.support.riva import stub_of
from tests.support.servers import Gateway, Recordings, Samples, run_gateway

CLIENTS_SPAN = "b7ad6b7169203331"
T = TypeVar("T")

MODELS = {"asr_ensemble", "rnnt_greedy_bls", "preprocessor", "encoder", "decoder_joint", "detokenizer"}


@dataclass(frozen=True)
class Span:
    """The parts of a span that the tests compare."""

    service: str
    trace: str
    id: str
    parent: str
    name: str
    attributes: dict[str, Any] = field(hash=False, compare=False)
    events: Sequence[str] = field(hash=False, compare=False)
    error: bool


class Receiver:
    """Receives OTLP over HTTP: protobuf from the gateway, JSON from Triton."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers["Content-Encoding"] == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces"
                receiver.take(body, self.headers["Content-Type"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self.url = f"http://{LOOPBACK}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def take(self, body: bytes, content_type: str) -> None:
        if content_type == "application/x-protobuf":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = {item.key: item.value.string_value for item in resource.resource.attributes}["service.name"]
                self.spans += [
                    Span(
                        service,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.name,
                        {item.key: getattr(item.value, str(item.value.WhichOneof("value"))) for item in span.attributes},
                        [event.name for event in span.events],
                        span.status.code == span.status.STATUS_CODE_ERROR,
                    )
                    for scope in resource.scope_spans
                    for span in scope.spans
                ]
            return
        for resource in orjson.loads(body)["resourceSpans"]:
            service = {item["key"]: item["value"].get("stringValue") for item in resource["resource"]["attributes"]}[
                "service.name"
            ]
            self.spans += [
                Span(
                    service,
                    span["traceId"],
                    span["spanId"],
                    span["parentSpanId"],
                    span["name"].removesuffix("_exclusive"),
                    {},
                    [],
                    False,
                )
                for scope in resource["scopeSpans"]
                for span in scope["spans"]
            ]

    async def comes(self, trace: str, service: str = "triton") -> bool:
        """Return whether a service sends spans of a trace."""
        for _ in range(100):
            if any((span.trace, span.service) == (trace, service) for span in self.spans):
                return True
            await asyncio.sleep(0.1)
        return False

    async def until_traced(self, send: Callable[[str], Awaitable[T]]) -> tuple[str, T]:
        """Send requests with new trace ids until Triton traces one; return its trace id, and the result of the request.

        Triton 2.51 does not trace one in fifty requests that it should.
        """
        for _ in range(5):
            trace = secrets.token_hex(16)
            result = await send(trace)
            if await self.comes(trace):
                return trace, result
        raise AssertionError("Triton traced none of five")

    async def trace(self, root: str, spans_named: set[str]) -> tuple[Span, list[Span]]:
        """Return the gateway's newest span of a name, and its trace when it has spans of all these names."""
        for _ in range(100):
            for top in reversed([span for span in self.spans if span.name == root]):
                trace = [span for span in self.spans if span.trace == top.trace]
                if spans_named <= {span.name for span in trace}:
                    return top, trace
            await asyncio.sleep(0.1)
        raise AssertionError(f"no {root} over {spans_named} in {[(span.name, span.trace) for span in self.spans]}")


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    running = Receiver()
    yield running
    running.close()


@pytest.fixture(scope="module")
async def traced_triton(receiver: Receiver) -> AsyncIterator[Backend]:
    """Return a Triton that sends its spans to the receiver."""
    options = [*triton_options(Settings(jaeger_endpoint=receiver.url)), "--trace-config=opentelemetry,bsp_schedule_delay=100"]
    backend = Backend("traced", served_repository(warm=False), options)
    await backend.start()
    yield backend
    await backend.stop()


@pytest.fixture(scope="module")
def settings(receiver: Receiver) -> Iterator[dict[str, Any]]:
    """Return settings of gateways that send their spans to the receiver at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        yield {"jaeger_endpoint": receiver.url, "service_name": "asr-test"}


@pytest.fixture(scope="module")
async def traced(traced_triton: Backend, settings: dict[str, Any]) -> AsyncIterator[Gateway]:
    """Return a gateway and a Triton that send their spans to the receiver."""
    async with run_gateway(triton_endpoint=traced_triton.target, max_concurrent_streams=1, **settings) as running:
        yield running


def tree(top: Span, spans: Sequence[Span], depth: int = 0) -> Iterator[str]:
    """Return the trace as lines; calls of the same model at the same place are one line."""
    yield f"{'  ' * depth}{top.service}: {top.name} {' '.join(top.events)}".rstrip()
    children = [span for span in spans if span.parent == top.id]
    for name in dict.fromkeys(child.name for child in children):
        same = [child for child in children if child.name == name]
        first, *rest = tree(same[0], spans, depth + 1)
        yield first + (f" × {len(same)}" if len(same) > 1 else "")
        yield from rest


def below(top: Span, spans: Sequence[Span]) -> set[str]:
    """Return the names of all spans below a span."""
    children = [span for span in spans if span.parent == top.id]
    return {span.name for span in children}.union(*(below(child, spans) for child in children))


async def test_one_tree_from_the_client_to_the_decoder(traced: Gateway, receiver: Receiver, http: httpx.AsyncClient) -> None:
    async def send(trace: str) -> None:
        answer = await http.post(
            traced.batch_url(),
            content=(SPEECH / "jfk.flac").read_bytes(),
            headers={"traceparent": f"00-{trace}-{CLIENTS_SPAN}-01"},
        )
        assert answer.status_code == 200

    trace, _ = await receiver.until_traced(send)
    top, spans = await receiver.trace("POST /v2/decode/batch/{model}", MODELS)
    print("\n".join(tree(top, spans)))
    assert (top.service, top.trace, top.parent) == ("asr-test", trace, CLIENTS_SPAN)
    assert top.attributes["http.response.status_code"] == 200
    assert top.attributes["asr.model"] == "amira"
    assert below(top, spans) >= MODELS
    (decoder,) = (span for span in spans if span.name == "rnnt_greedy_bls")
    assert below(decoder, spans) >= {"preprocessor", "encoder", "decoder_joint"}
    assert {span.service for span in spans} == {"asr-test", "triton"}


async def infer(triton: Backend, sequence: int, samples: Samples, trace: str | None, flags: str) -> float:
    """Decode a recording without the gateway; return the time of the answer."""
    audio = InferInput("AUDIO", [1, len(samples)], "INT16")
    audio.set_data_from_numpy(samples[None])
    given = {"traceparent": f"00-{trace}-{CLIENTS_SPAN}-{flags}"} if trace else None
    options: dict[str, Any] = {"sequence_start": True, "sequence_end": True, "parameters": {"context": "whole"}}
    async with grpcclient.InferenceServerClient(triton.target) as client:
        await client.infer("asr_ensemble", [audio], sequence_id=sequence, headers=given, **options)
    return time.monotonic()


@pytest.mark.parametrize("is_traced", [False, True])
async def test_traced_request_delays_others(
    traced_triton: Backend, receiver: Receiver, recordings: Recordings, is_traced: bool
) -> None:
    """This is the cost of tracing. If this test fails, the documentation need no longer warn of it."""
    long, short = np.tile(recordings["jfk"], 5), recordings["jfk"][:8000]

    async def is_held_up(trace: str | None) -> bool:
        first = asyncio.create_task(infer(traced_triton, 1, long, trace, "01"))
        while not first.done() and not await decoder_metric(traced_triton.ports, "asr_decoder_sequences"):
            pass
        began = time.monotonic()
        answered = await infer(traced_triton, 2, short, None, "00")
        print(f"beside a recording of 55 s that is {'traced' if trace else 'not traced'}: {answered - began:.2f} s")
        return answered > await first

    held_up = (await receiver.until_traced(is_held_up))[1] if is_traced else await is_held_up(None)
    assert held_up is is_traced


async def test_stream_is_one_span_with_events(traced: Gateway, receiver: Receiver, recordings: Recordings) -> None:
    await transcribe(traced.stream_url(), recordings["jfk"])
    top, spans = await receiver.trace("GET /v2/decode/stream/{model}", MODELS)
    print("\n".join(tree(top, spans)))
    assert top.parent == ""
    assert top.events[-1] == "final"
    assert top.events.count("final") == 1
    assert "partial" in top.events
    assert top.attributes["asr.close_code"] == 1000
    assert top.attributes["asr.audio_secs"] == 11
    assert below(top, spans) >= MODELS
    assert not top.error


async def test_failures_are_on_the_span(traced: Gateway, receiver: Receiver, http: httpx.AsyncClient) -> None:
    await http.post(traced.batch_url(), content=b"\x00\x00\x00")
    await http.get(traced.batch_url())
    async with open_socket(traced.stream_url()) as socket:
        with pytest.raises(Exception, match="503"):
            await open_socket(traced.stream_url())
        await socket.send(END)
        await listen(socket)
    crashing = Tracing(Settings(jaeger_endpoint=receiver.url))
    with pytest.raises(ZeroDivisionError), crashing.span("crash", {}):
        _ = 1 / 0
    await crashing.close()
    for _ in range(50):
        found = {span.attributes.get("error.type"): span.error for span in receiver.spans}
        if {"odd_length", "method_not_allowed", "no_capacity", "internal"} <= set(found):
            break
        await asyncio.sleep(0.1)
    names = {span.attributes.get("error.type"): span.name for span in receiver.spans}
    assert names["method_not_allowed"] == "GET /v2/decode/batch/{model}"
    assert found["odd_length"] is False, "a client's mistake is no error of ours"
    assert found["no_capacity"] is True
    assert found["internal"] is True


async def test_unsampled_requests_are_not_traced(traced: Gateway, receiver: Receiver, http: httpx.AsyncClient) -> None:
    """A trace that the client does not sample is traced neither by the gateway nor by Triton."""
    await asyncio.sleep(0.3)
    before = len(receiver.spans)
    unsampled = {"traceparent": f"00-{'1' * 32}-{CLIENTS_SPAN}-00"}
    answer = await http.post(traced.batch_url(), content=bytes(32_000), headers=unsampled)
    assert answer.status_code == 200
    await asyncio.sleep(0.5)
    assert [span for span in receiver.spans[before:] if span.trace == "1" * 32] == []


async def test_sampler_limits_traces(
    traced_triton: Backend,
    settings: dict[str, Any],
    receiver: Receiver,
    http: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the gateway and in Triton; a client's own decision takes precedence."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    sampled = []
    async with run_gateway(triton_endpoint=traced_triton.target, **settings) as gateway:

        async def send(trace: str = "") -> None:
            sampled.append(trace)
            given = {"traceparent": f"00-{trace}-{CLIENTS_SPAN}-01"} if trace else {}
            answer = await http.post(gateway.batch_url(), content=bytes(32_000), headers=given)
            assert answer.status_code == 200

        before = len(receiver.spans)
        await send()
        trace, _ = await receiver.until_traced(send)
        assert await receiver.comes(trace, "asr-test")
    assert {span.trace for span in receiver.spans[before:]} == set(sampled) - {""}


async def test_recovery_is_on_the_span_and_in_the_log(
    traced_triton: Backend,
    settings: dict[str, Any],
    receiver: Receiver,
    recordings: Recordings,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A log line has the id of its trace."""
    proxy = Proxy(traced_triton.ports)
    async with (
        proxy.running(),
        run_gateway(triton_endpoint=f"{LOOPBACK}:{proxy.port}", inference_timeout_secs=1, **settings) as gateway,
    ):
        stream = asyncio.create_task(speak(gateway.stream_url(), recordings["jfk"]))
        await asyncio.sleep(3)
        proxy.silent = True
        await asyncio.sleep(2)
        proxy.silent = False
        proxy.reset()
        said = await stream
    assert said.close_code == 1000
    lines = [orjson.loads(line) for line in capsys.readouterr().err.splitlines()]
    recoveries = [line for line in lines if line["event"] == "stream recovery"]  # one, or more on a busy machine
    assert {line["outcome"] for line in recoveries} == {"recovered"}
    (trace,) = {line["trace_id"] for line in recoveries}
    (top,) = (span for span in receiver.spans if span.trace == trace and span.service == "asr-test")
    assert top.events.count("recovery") == len(recoveries)
    (closed,) = (line for line in lines if line["event"] == "stream closed")
    assert closed["trace_id"] == top.trace
    assert "trace_id" not in next(line for line in lines if line["event"] == "triton models"), "that belongs to no request"


async def test_triton_ignores_the_unsampled_flag(traced_triton: Backend, receiver: Receiver) -> None:
    """So the gateway does not pass on an unsampled trace. If this test fails, it need no longer do so."""
    await traced_triton.ready_again()
    await receiver.until_traced(lambda trace: infer(traced_triton, 1, np.zeros(1600, np.int16), trace, "00"))


def test_disabled_tracing_imports_no_sdk() -> None:
    code = """if True:
        import sys
        from gateway.app import create_app
        from gateway.config.settings import Settings
        create_app(Settings())
        assert not {"opentelemetry.sdk", "opentelemetry.exporter"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONWARNINGS": "error"})
    assert headers() is None
    assert trace_id() is None
    assert triton_options(Settings()) == []


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://jaeger:4318/v1/traces", "http://jaeger:4318/v1/traces"),
        ("http://jaeger:4318", "http://jaeger:4318/v1/traces"),
        ("https://traces.example.com/", "https://traces.example.com/v1/traces"),
        ("http://localhost:14268/api/traces", "http://localhost:4318/v1/traces"),
    ],
)
def test_addresses(given: str, url: str) -> None:
    assert otlp_url(given) == url


def test_opentelemetry_variables_are_used() -> None:
    for environ in (
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318/"},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"},
    ):
        assert "--trace-config=opentelemetry,url=http://collector:4318/v1/traces" in triton_options(Settings(), environ)
        assert triton_options(Settings(), {**environ, "OTEL_SDK_DISABLED": "true"}) == []
        assert triton_options(Settings(), {**environ, "OTEL_TRACES_EXPORTER": "none"}) == []


def test_missing_tracing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"amira-asr\[tracing\]"):
        Tracing(Settings(jaeger_endpoint="http://127.0.0.1:4318"))


async def test_riva(traced_triton: Backend, receiver: Receiver, settings: dict[str, Any], recordings: Recordings) -> None:
    """An RPC continues its client's trace."""
    request = riva_asr_pb2.RecognizeRequest(audio=recordings["jfk"][: 2 * 16_000].tobytes())
    async with run_gateway(triton_endpoint=traced_triton.target, riva_port=0, **settings) as gateway, stub_of(gateway) as stub:

        async def send(trace: str) -> None:
            await stub.Recognize(request, metadata=(("traceparent", f"00-{trace}-{CLIENTS_SPAN}-01"),))

        await receiver.until_traced(send)
        top, spans = await receiver.trace("nvidia.riva.asr.RivaSpeechRecognition/Recognize", {"asr_ensemble"})
    assert (top.parent, top.error) == (CLIENTS_SPAN, False)
    assert top.attributes["rpc.grpc.status_code"] == 0
    assert below(top, spans) >= MODELS
