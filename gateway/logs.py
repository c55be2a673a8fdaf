"""Structured logs: one line an event, JSON or for a console; never a transcript, audio or a key."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog
from asgi_correlation_id import correlation_id

from gateway.config.settings import Settings
from gateway.tracing import trace_id

REQUEST_ID_HEADER = "X-Request-ID"


def current_request_id() -> str | None:
    """Id of the request or stream that this task serves."""
    return correlation_id.get()


def configure_logging(settings: Settings) -> None:
    """Send this process's logs, and the libraries' warnings, to standard error in the form that the settings name."""
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
    root.setLevel(max(level, logging.WARNING))  # libraries' lines may hold what ours never do: headers with keys, say
    for ours in ("gateway", "amira"):
        logging.getLogger(ours).setLevel(level)
    logging.getLogger("uvicorn.error").addFilter(_is_no_denial)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def _is_no_denial(record: logging.LogRecord) -> bool:
    """False for what uvicorn takes for a fault: a WebSocket refused by an HTTP response, which is as it should be."""
    return record.getMessage() != "ASGI callable returned without completing handshake."


def _add_ids(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    ids = {"request_id": current_request_id(), "trace_id": trace_id()}
    return event | {name: value for name, value in ids.items() if value}
