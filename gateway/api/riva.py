"""``nvidia.riva.asr.RivaSpeechRecognition``: the face of both engines for clients of NVIDIA Riva, over gRPC."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, BinaryIO

import grpc

from gateway.api.riva_call import Call, Context, read_first, serve
from gateway.api.riva_config import Options, read_config
from gateway.api.riva_results import recording_response
from gateway.api.riva_schema import (
    ConfigRequest,
    ConfigResponse,
    RecognizeRequest,
    RecognizeResponse,
    StreamingRecognizeRequest,
    StreamingRecognizeResponse,
)
from gateway.api.riva_stream import RivaStream
from gateway.api.streaming import read_segments
from gateway.api.uploads import MEMORY_BYTES, unstored_refused
from gateway.audio import RATE
from gateway.errors import ApiError, ErrorKind
from gateway.limits.places import Place
from gateway.service import Service

MAX_MESSAGE_BYTES = 64 * 2**20
"""Maximum size of a message, which gRPC holds in memory: 35 minutes of raw PCM, and the default limit of Riva's clients."""

MAX_RECEIVING = 16
"""Maximum number of recordings that are received at once, because of their memory."""

RECEIVE_SECS = 60.0
"""Maximum time in which a recording is received, in seconds."""


class SpeechRecognition:
    """The service's methods.

    Args:
        service: the gateway's.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._receiving = asyncio.Semaphore(MAX_RECEIVING)

    def handlers(self) -> Mapping[str, grpc.RpcMethodHandler]:
        """Return the handlers by name of the method.

        ``Recognize`` is handled as a stream of one message, which is the same on the wire: so its message is not received
        before the caller is known and has a place.
        """
        return {
            "Recognize": grpc.stream_unary_rpc_method_handler(
                self.recognize, RecognizeRequest.FromString, RecognizeResponse.SerializeToString
            ),
            "StreamingRecognize": grpc.stream_stream_rpc_method_handler(
                self.streaming_recognize,
                StreamingRecognizeRequest.FromString,
                StreamingRecognizeResponse.SerializeToString,
            ),
            "GetRivaSpeechRecognitionConfig": grpc.unary_unary_rpc_method_handler(
                self.get_config, ConfigRequest.FromString, ConfigResponse.SerializeToString
            ),
        }

    async def recognize(self, _requests: Any, context: Context) -> Any:
        """Answer one recording."""
        return await serve(self._service, context, "Recognize", "batch", self._recognize)

    async def streaming_recognize(self, _requests: Any, context: Context) -> None:
        """Serve one stream."""
        await serve(self._service, context, "StreamingRecognize", "stream", self._stream)

    async def get_config(self, request: Any, context: Context) -> Any:
        """Answer with the models."""

        async def describe(_call: Call, _caller: int) -> Any:
            return self._models(request.model_name)

        return await serve(self._service, context, "GetRivaSpeechRecognitionConfig", "other", describe)

    async def _recognize(self, call: Call, caller: int) -> Any:
        service = self._service
        async with AsyncExitStack() as held:
            held.enter_context(service.quotas.batch(caller, call.address))
            with service.places.batch():  # refused before the recording is received, if it can be
                options, body, request_id = await self._receive(call, held)
            recording = held.enter_context(service.transcriber.admit(options.model, caller, options.decoder))
            segments = read_segments(
                service.files, recording, body, options.content_type, options.raw, separate=options.separate
            )
            async with aclosing(segments):
                async for _ in segments:
                    pass
        call.audio_secs = recording.transcription.samples / RATE
        await call.accept()
        response = recording_response(recording.transcription, words=options.words)
        if request_id:
            response.id.value = request_id
        return response

    async def _receive(self, call: Call, held: AsyncExitStack) -> tuple[Options, bytes | BinaryIO, str]:
        """Receive a recording; return its options, its audio, and the client's id of the request.

        Raises:
            ApiError: it does not come, or is not allowed.
        """

        async def receive() -> Any | None:
            async with self._receiving:
                return await read_first(call.context)

        try:
            request = await asyncio.wait_for(receive(), RECEIVE_SECS)
        except asyncio.TimeoutError:
            message = f"the recording did not come within {RECEIVE_SECS:g} s; please retry, or stream it"
            raise ApiError(ErrorKind.BODY_TOO_SLOW, message) from None
        if request is None:
            raise ApiError(ErrorKind.INVALID_BODY, "the request has no message")
        options = self._read_config(call, request.config, live=False)
        return options, await held.enter_async_context(_spooled(request.audio)), request.id.value

    async def _stream(self, call: Call, caller: int) -> None:
        service = self._service
        with service.sessions.admit(caller, call.address) as place:
            options, request_id = await self._receive_config(call)
            await self._serve_stream(call, caller, place, options, request_id)

    async def _serve_stream(self, call: Call, caller: int, place: Place, options: Options, request_id: str) -> None:
        service = self._service
        session = service.sessions.open(options.model, caller, place=place, options=options.decoder)
        async with session:
            await call.accept()
            try:
                await RivaStream(call.context, session, options, service.files, service.settings, request_id).serve()
            finally:
                call.audio_secs = session.received_secs

    async def _receive_config(self, call: Call) -> tuple[Options, str]:
        """Receive the first message of a stream; return its options, and the client's id of the request.

        Raises:
            ApiError: it does not come, or is not a configuration that is allowed.
        """
        timeout_secs = self._service.settings.stream_timeout_secs
        try:
            first = await asyncio.wait_for(read_first(call.context), timeout_secs)
        except asyncio.TimeoutError:
            raise ApiError(ErrorKind.STREAM_IDLE, f"no streaming_config came for {timeout_secs:g} s") from None
        if first is None or not first.HasField("streaming_config"):
            message = "the first message has no streaming_config; send it before the audio"
            raise ApiError(ErrorKind.INVALID_VALUE, message, "streaming_config")
        config = first.streaming_config
        options = self._read_config(call, config.config, live=True, interim=config.interim_results)
        return options, first.id.value

    def _read_config(self, call: Call, config: Any, *, live: bool, interim: bool = False) -> Options:
        options = read_config(config, self._service, live=live, interim=interim)
        call.model, call.ignored = options.model, options.ignored
        return options

    def _models(self, name: str) -> Any:
        """Return the models, or the one of a name, each for streams (``online``) and for recordings (``offline``)."""
        service = self._service
        response = ConfigResponse()
        for model in (service.resolve_model(name),) if name else service.settings.models:
            for kind in ("online", "offline"):
                parameters = {
                    "type": kind,
                    "streaming": str(kind == "online"),
                    "language_code": service.settings.model_languages.get(model, ""),
                    "sample_rate": str(RATE),
                }
                response.model_config.add(model_name=model, parameters=parameters)
        return response


@asynccontextmanager
async def _spooled(audio: bytes) -> AsyncIterator[bytes | BinaryIO]:
    """Hold audio: a little in memory, more in a temporary file.

    Raises:
        ApiError: the disk has no room.
    """
    if len(audio) <= MEMORY_BYTES:
        yield audio
        return
    with tempfile.TemporaryFile() as file:
        with unstored_refused():
            await asyncio.to_thread(_fill, file, audio)
        del audio
        yield file


def _fill(file: BinaryIO, audio: bytes) -> None:
    file.write(audio)
    file.flush()  # it is read by its descriptor
