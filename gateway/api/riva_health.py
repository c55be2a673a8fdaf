"""``grpc.health.v1.Health`` and server reflection, beside the gRPC face. Neither needs a key.

The packages grpcio-health-checking and grpcio-reflection are bound to versions of protobuf, their newest to one that
tritonclient does not allow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc

from gateway.api.riva_call import Context, read
from gateway.api.riva_schema import (
    HEALTH,
    POOL,
    REFLECTION,
    SPEECH_RECOGNITION,
    HealthCheckRequest,
    HealthCheckResponse,
    ReflectionRequest,
    ReflectionResponse,
)
from gateway.errors import ApiError

POLL_SECS = 1.0
"""Interval at which a watched state is looked at, in seconds."""

MAX_OPEN = 100
"""Maximum number of open watches, and of open reflections; each holds a task for as long as its client wants."""

WHOLE_SERVER = ""
"""Name by which clients ask for the health of the whole server."""


class _Limit:
    """Limits the number of open RPCs."""

    def __init__(self) -> None:
        self._open = 0

    @contextmanager
    def hold(self) -> Iterator[bool]:
        """Hold a place; yield False if there is none."""
        self._open += 1
        try:
            yield self._open <= MAX_OPEN
        finally:
            self._open -= 1


class Health:
    """The health service (gRPC's health checking protocol).

    Args:
        ready: returns whether new work is accepted.
    """

    def __init__(self, ready: Callable[[], bool]) -> None:
        self._ready = ready
        self._limit = _Limit()

    def handlers(self) -> Mapping[str, grpc.RpcMethodHandler]:
        """Return the handlers by name of the method."""
        coding = HealthCheckRequest.FromString, HealthCheckResponse.SerializeToString
        return {
            "Check": grpc.unary_unary_rpc_method_handler(self.check, *coding),
            "Watch": grpc.unary_stream_rpc_method_handler(self.watch, *coding),
        }

    async def check(self, request: Any, context: Context) -> Any:
        """Answer with the current state."""
        status = self._status(request.service)
        if status == HealthCheckResponse.SERVICE_UNKNOWN:
            known = f"known: {SPEECH_RECOGNITION} and the empty name"
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service {request.service[:128]!r} is not known; {known}")
        return HealthCheckResponse(status=status)

    async def watch(self, request: Any, context: Context) -> None:
        """Send the state, and then each change of it."""
        with self._limit.hold() as held:
            if not held:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"all {MAX_OPEN} watches are in use; use Check")
            sent = None
            while True:
                status = self._status(request.service)
                if status != sent:
                    await context.write(HealthCheckResponse(status=status))
                    sent = status
                await asyncio.sleep(POLL_SECS)

    def _status(self, name: str) -> int:
        if name not in (WHOLE_SERVER, SPEECH_RECOGNITION):
            return int(HealthCheckResponse.SERVICE_UNKNOWN)
        return int(HealthCheckResponse.SERVING if self._ready() else HealthCheckResponse.NOT_SERVING)


class Reflection:
    """Server reflection (gRPC's server reflection protocol): lists the services, and describes their messages."""

    def __init__(self) -> None:
        self._limit = _Limit()

    def handlers(self) -> Mapping[str, grpc.RpcMethodHandler]:
        """Return the handlers by name of the method."""
        handler = grpc.stream_stream_rpc_method_handler(
            self.describe, ReflectionRequest.FromString, ReflectionResponse.SerializeToString
        )
        return {"ServerReflectionInfo": handler}

    async def describe(self, _requests: Any, context: Context) -> None:
        """Answer each request of a stream."""
        with self._limit.hold() as held:
            if not held:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"all {MAX_OPEN} reflections are in use; please retry")
            try:
                while (request := await read(context)) is not None:
                    await context.write(_describe(request))
            except ApiError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)


def _describe(request: Any) -> Any:
    """Return the response to one request of reflection."""
    response = ReflectionResponse(valid_host=request.host, original_request=request)
    kind = request.WhichOneof("message_request")
    if kind == "list_services":
        for name in (SPEECH_RECOGNITION, HEALTH, REFLECTION):
            response.list_services_response.service.add(name=name)
        return response
    try:
        if kind == "file_by_filename":
            file = POOL.FindFileByName(request.file_by_filename)
        elif kind == "file_containing_symbol":
            file = _file_of(request.file_containing_symbol)
        else:
            return _failed(response, grpc.StatusCode.NOT_FOUND, "there are no extensions in proto3")
    except KeyError:
        return _failed(response, grpc.StatusCode.NOT_FOUND, "the name is not known here; list_services lists the services")
    response.file_descriptor_response.file_descriptor_proto.extend(one.serialized_pb for one in (file, *file.dependencies))
    return response


def _file_of(symbol: str) -> Any:
    """Return the descriptor of the file that defines a symbol.

    Raises:
        KeyError: none does.
    """
    try:
        return POOL.FindFileContainingSymbol(symbol)
    except KeyError:  # the pool finds no methods
        service, _, method = symbol.rpartition(".")
        return POOL.FindServiceByName(service).methods_by_name[method].containing_service.file


def _failed(response: Any, code: grpc.StatusCode, message: str) -> Any:
    response.error_response.error_code = code.value[0]
    response.error_response.error_message = message
    return response
