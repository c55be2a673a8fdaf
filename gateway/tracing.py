"""OpenTelemetry traces: one span for each recording and each stream, with Triton's spans below it.

Tracing is off unless the settings or OpenTelemetry's environment variables name an endpoint. While it is off, the SDK is not
imported, and each call only reads a context variable. OpenTelemetry's packages read the other variables (headers, sampling,
resource attributes).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gateway import __version__
from gateway.config.settings import ConfigError, Settings
from gateway.errors import ErrorKind

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

TRACES_ENDPOINT, ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"
OTLP_HTTP_PORT = 4318
OTLP_PATH = "/v1/traces"
JAEGER_THRIFT_PATH = "/api/traces"

CONVENTIONAL = {
    "status": "http.response.status_code",
    "body_bytes": "http.request.body.size",
    "grpc_status": "rpc.grpc.status_code",
}
"""Names of attributes in OpenTelemetry's semantic conventions; other attributes get the prefix ``asr``."""

_span: ContextVar[Span | None] = ContextVar("span", default=None)


class Tracing:
    """Creates spans, and exports them if tracing is on.

    Args:
        settings: settings of the gateway.
        environ: environment variables.

    Raises:
        ConfigError: an endpoint is set, but the packages for tracing are missing.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str] = os.environ) -> None:
        self._provider: TracerProvider | None = None
        if not _wanted(settings, environ):
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 (optional)
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        except ImportError:
            raise ConfigError("tracing is on, but not installed: pip install 'amira-asr[tracing]'") from None
        attributes = {"service.version": __version__}
        if not environ.get("OTEL_SERVICE_NAME"):
            attributes["service.name"] = settings.service_name
        self._provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
        endpoint = otlp_url(settings.jaeger_endpoint) if settings.jaeger_endpoint else None
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))

    @contextmanager
    def span(self, name: str, headers: Mapping[str, str], **attributes: str) -> Iterator[None]:
        """Run the context in a new span; its parent is the client's span if the headers have one (W3C ``traceparent``)."""
        if self._provider is None:
            yield
            return
        from opentelemetry.trace import SpanKind  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        parent = TraceContextTextMapPropagator().extract(headers)
        span = self._provider.get_tracer("gateway").start_span(name, parent, SpanKind.SERVER, _named(attributes))
        token = _span.set(span)
        try:
            yield
        except Exception:
            fail(ErrorKind.INTERNAL)
            raise
        finally:
            _span.reset(token)
            span.end()

    async def close(self) -> None:
        """Send the remaining spans."""
        if self._provider:
            await asyncio.to_thread(self._provider.shutdown)


def event(name: str, **attributes: str | float) -> None:
    """Add an event to the current span."""
    if span := _span.get():
        span.add_event(name, _named(attributes))


def describe(**attributes: str | float) -> None:
    """Add attributes to the current span."""
    if span := _span.get():
        span.set_attributes(_named(attributes))


def fail(kind: ErrorKind) -> None:
    """Add an error to the current span; only a server error sets the status of the span."""
    if span := _span.get():
        from opentelemetry.trace import StatusCode  # noqa: PLC0415

        span.set_attribute("error.type", kind.code)
        if kind.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            span.set_status(StatusCode.ERROR, kind.code)


def headers() -> dict[str, str] | None:
    """Return headers that make Triton's spans children of the current span; None if it is not sampled."""
    span = _span.get()
    if not span or not span.get_span_context().trace_flags.sampled:  # Triton ignores the sampled flag
        return None
    context = span.get_span_context()
    given = {"traceparent": f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"}
    return given | ({"tracestate": context.trace_state.to_header()} if context.trace_state else {})


def trace_id() -> str | None:
    """Return the trace id of the current span, for the logs."""
    span = _span.get()
    return f"{span.get_span_context().trace_id:032x}" if span else None


def otlp_url(endpoint: str) -> str:
    """Return the URL for OTLP over HTTP. Convert the URL of Jaeger's Thrift collector to that of its OTLP port."""
    url = urlsplit(endpoint)
    if url.path == JAEGER_THRIFT_PATH:
        return f"{url.scheme}://{url.hostname}:{OTLP_HTTP_PORT}{OTLP_PATH}"
    return endpoint if url.path.strip("/") else endpoint.rstrip("/") + OTLP_PATH


def triton_options(settings: Settings, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return Triton's options for exporting the traces of requests with a trace header to the same endpoint."""
    if not _wanted(settings, environ):
        return []
    general = environ.get(ENDPOINT, "").rstrip("/") + OTLP_PATH
    url = otlp_url(settings.jaeger_endpoint) if settings.jaeger_endpoint else environ.get(TRACES_ENDPOINT) or general
    chosen = ("mode=opentelemetry", "level=TIMESTAMPS", "rate=0", f"opentelemetry,url={url}")
    return [f"--trace-config={option}" for option in (*chosen, "opentelemetry,resource=service.name=triton")]


def _wanted(settings: Settings, environ: Mapping[str, str]) -> bool:
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return bool(settings.jaeger_endpoint or environ.get(TRACES_ENDPOINT) or environ.get(ENDPOINT))


def _named(attributes: Mapping[str, str | float]) -> dict[str, Any]:
    return {CONVENTIONAL.get(name, f"asr.{name}"): value for name, value in attributes.items()}
