"""Set up structured logs: one line per event, as JSON or for a console. Transcripts, audio and keys are never logged."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog
from asgi_correlation_id import correlation_id

from gateway.config.settings import Settings
from gateway.tracing import trace_id

REQUEST_ID_HEADER = "X-Request-ID"
MAX_REQUEST_ID_CHARS = 128


def is_request_id(given: str) -> bool:
    """Return whether a client's text can be the id of its request."""
    return 0 < len(given) <= MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable()


def current_request_id() -> str | None:
    """Return the id of the request or stream that the current task serves."""
    return correlation_id.get()


def configure_logging(settings: Settings) -> None:
    """Write the logs of this process and the warnings of libraries to standard error, with the format of the settings."""
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_ids,
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    level = getattr(logging, settings.log_level.upper())
    root.setLevel(max(level, logging.WARNING))  # lines of libraries may contain API keys, as part of headers
    for ours in ("gateway", "amira"):
        logging.getLogger(ours).setLevel(level)
    logging.getLogger("uvicorn.error").addFilter(_is_fault)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


NO_FAULTS = {
    "ASGI callable returned without completing handshake.",  # a WebSocket refused by an HTTP response
    "Invalid UTF-8 sequence received from client.",  # closed by 1007
}
"""Messages that uvicorn logs as errors although the client is the cause."""


def _is_fault(record: logging.LogRecord) -> bool:
    """Return whether a log record of uvicorn is an error of the server."""
    return record.getMessage() not in NO_FAULTS


def _add_ids(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    ids = {"request_id": current_request_id(), "trace_id": trace_id()}
    return event | {name: value for name, value in ids.items() if value}
