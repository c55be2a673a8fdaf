"""What the RPCs of the gRPC face share: identity, errors, and what is counted, logged and traced of each."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeAlias, TypeVar
from urllib.parse import unquote

import grpc
import grpc.aio
import structlog
from asgi_correlation_id import correlation_id
from google.protobuf.message import DecodeError

from gateway import metrics, tracing
from gateway.api.riva_schema import SPEECH_RECOGNITION
from gateway.api.sockets import count_request
from gateway.errors import ApiError, ErrorKind
from gateway.limits.auth import check_key
from gateway.logs import REQUEST_ID_HEADER, is_request_id
from gateway.service import Service

Context: TypeAlias = grpc.aio.ServicerContext
Response = TypeVar("Response")

REQUEST_ID_KEY = REQUEST_ID_HEADER.lower()
ERROR_CODE_KEY = "error-code"
"""Trailing metadata: code of the error, as in the body of REST's errors."""
PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata: delay before a retry in milliseconds, which gRPC's clients obey (gRFC A6)."""
IGNORED_KEY = "x-ignored-options"
"""Initial metadata: fields of the request that have no effect, with commas."""

CANCELLATION_SECS = 0.1
"""Time in which the cancellation of an RPC follows the end of its messages, which a lost client causes too, in seconds."""

CODES = {
    HTTPStatus.UNAUTHORIZED: grpc.StatusCode.UNAUTHENTICATED,
    HTTPStatus.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    HTTPStatus.REQUEST_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    HTTPStatus.TOO_MANY_REQUESTS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.INTERNAL_SERVER_ERROR: grpc.StatusCode.INTERNAL,
}
"""gRPC codes of errors by HTTP status, besides the rules of ``code_of``."""

log = structlog.get_logger()


def code_of(kind: ErrorKind) -> grpc.StatusCode:
    """Return the gRPC code of an error.

    An unknown model is an invalid argument, as at Riva. Clients retry UNAVAILABLE.
    """
    if kind.status > HTTPStatus.INTERNAL_SERVER_ERROR:
        return grpc.StatusCode.UNAVAILABLE if kind.retryable else grpc.StatusCode.INTERNAL
    return CODES.get(HTTPStatus(kind.status), grpc.StatusCode.INVALID_ARGUMENT)


def address_of(peer: str) -> str | None:
    """Return the address of a peer such as ``ipv6:%5B::1%5D:50000``; None if it has none."""
    family, _, rest = peer.partition(":")
    return unquote(rest).rpartition(":")[0].strip("[]") if family in ("ipv4", "ipv6") else None


async def read(context: Context) -> Any | None:
    """Return the client's next message; None after the last one.

    Raises:
        ApiError: ``INVALID_BODY``, it cannot be parsed.
    """
    try:
        message = await context.read()
    except DecodeError:
        raise ApiError(ErrorKind.INVALID_BODY, "the message is not valid protobuf of its type") from None
    return None if message is grpc.aio.EOF else message


async def read_first(context: Context) -> Any | None:
    """Return the client's first message; None if it sends none.

    Raises:
        ApiError: as ``read``.
    """
    message = await read(context)
    if message is None:
        await asyncio.sleep(CANCELLATION_SECS)
    return message


@dataclass
class Call:
    """One RPC.

    Attributes:
        context: gRPC's.
        headers: the request's metadata.
        request_id: id of the request, for logs.
        address: address of the client; None if it has none.
        model: public name of the model, or the label for unknown ones.
        audio_secs: audio received, in seconds.
        ignored: fields of the request that have no effect.
    """

    context: Context
    headers: Mapping[str, str]
    request_id: str
    address: str | None
    model: str = metrics.UNKNOWN_MODEL
    audio_secs: float = 0.0
    ignored: tuple[str, ...] = field(default_factory=tuple)

    @classmethod
    def of(cls, context: Context) -> Call:
        """Return the call of a context, with the client's request id or a new one."""
        headers = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        given = headers.get(REQUEST_ID_KEY, "")
        return cls(context, headers, given if is_request_id(given) else uuid.uuid4().hex, address_of(context.peer()))

    async def accept(self) -> None:
        """Send the initial metadata: the request is admitted."""
        ignored = ((IGNORED_KEY, ", ".join(self.ignored)),) if self.ignored else ()
        await self.context.send_initial_metadata(((REQUEST_ID_KEY, self.request_id), *ignored))

    async def fail(self, error: ApiError) -> None:
        """End the RPC with an error.

        Raises:
            grpc.aio.AbortError: always; gRPC handles it.
        """
        metadata = [(REQUEST_ID_KEY, self.request_id), (ERROR_CODE_KEY, error.kind.code)]
        if error.retry_after_secs is not None:
            metadata.append((PUSHBACK_KEY, str(round(error.retry_after_secs * 1000))))
        await self.context.abort(code_of(error.kind), error.message, tuple(metadata))


async def serve(
    service: Service, context: Context, method: str, endpoint: str, work: Callable[[Call, int], Awaitable[Response]]
) -> Response | None:
    """Serve an RPC of a caller with a valid key, and count, log and trace it.

    Args:
        service: the gateway's.
        context: gRPC's.
        method: name of the method.
        endpoint: label of the metrics.
        work: serves the call of a caller; what it returns is the response.

    Raises:
        grpc.aio.AbortError: the RPC failed; gRPC handles it.
    """
    call = Call.of(context)
    correlation_id.set(call.request_id)
    began = time.monotonic()
    status, code = metrics.CLIENT_GONE, grpc.StatusCode.CANCELLED
    response: Response | None = None
    failure: ApiError | None = None
    lost: grpc.aio.BaseError | None = None
    try:
        with service.tracing.span(f"{SPEECH_RECOGNITION}/{method}", call.headers):
            try:
                response = await work(call, check_key(call.headers, service.settings))
                status, code = HTTPStatus.OK, grpc.StatusCode.OK
            except grpc.aio.BaseError as error:  # the connection is lost, or the server stops
                lost = error
            except ApiError as error:
                failure = error
            except Exception as error:
                log.error("request failed", exc_info=error)
                failure = ApiError(ErrorKind.INTERNAL, "internal error")
            finally:
                if failure:
                    status, code = failure.kind.status, code_of(failure.kind)
                    metrics.REJECTIONS.labels(failure.kind.code).inc()
                    tracing.fail(failure.kind)
                tracing.describe(model=call.model, grpc_status=code.value[0], audio_secs=call.audio_secs)
    finally:
        count_request(endpoint, call.model, status, began)
        log.info(
            "rpc ended",
            method=method,
            model=call.model,
            status=code.name,
            audio_secs=round(call.audio_secs, 3),
            duration_secs=round(time.monotonic() - began, 3),
            **({"code": failure.kind.code} if failure else {}),
            **({"ignored": call.ignored} if call.ignored else {}),
        )
    if lost:
        raise lost
    if failure:
        await call.fail(failure)
    return response
