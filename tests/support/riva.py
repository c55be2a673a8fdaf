"""Clients of the gRPC API: NVIDIA's own, and its messages over asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import riva.client
from riva.client.proto import riva_asr_pb2, riva_asr_pb2_grpc

from amira.ports import LOOPBACK
from tests.support.servers import Gateway

Requests = Iterable[Any]
Metadata = Sequence[tuple[str, str]]


def target_of(gateway: Gateway) -> str:
    return f"{LOOPBACK}:{gateway.server._app.state.riva.port}"


def service_of(gateway: Gateway, key: str) -> riva.client.ASRService:
    """Return NVIDIA's client of a gateway; it blocks."""
    metadata = [["authorization", f"Bearer {key}"]]
    return riva.client.ASRService(riva.client.Auth(uri=target_of(gateway), metadata_args=metadata))


@asynccontextmanager
async def stub_of(gateway: Gateway, options: Sequence[tuple[str, int]] = ()) -> AsyncIterator[Any]:
    """Yield NVIDIA's stub over asyncio."""
    async with grpc.aio.insecure_channel(target_of(gateway), options=list(options)) as channel:
        yield riva_asr_pb2_grpc.RivaSpeechRecognitionStub(channel)


def bearer(key: str) -> Metadata:
    return (("authorization", f"Bearer {key}"),)


def opening(*, interim: bool = True, **config: Any) -> Any:
    """Return the first message of a stream of raw 16 kHz audio."""
    given = {"encoding": "LINEAR_PCM", "sample_rate_hertz": 16_000, "language_code": "en-US", **config}
    streaming_config = riva_asr_pb2.StreamingRecognitionConfig(
        config=riva_asr_pb2.RecognitionConfig(**given), interim_results=interim
    )
    return riva_asr_pb2.StreamingRecognizeRequest(streaming_config=streaming_config)


def audio(data: bytes) -> Any:
    return riva_asr_pb2.StreamingRecognizeRequest(audio_content=data)


def pieces(data: bytes, size: int) -> list[Any]:
    """Return messages with at most ``size`` bytes of audio each."""
    return [audio(data[at : at + size]) for at in range(0, len(data), size)]


async def stream(stub: Any, requests: Requests, metadata: Metadata, pause_secs: float = 0.0) -> list[Any]:
    """Send messages, and return all responses."""
    call = stub.StreamingRecognize(metadata=metadata)

    async def send() -> None:
        for request in requests:
            await call.write(request)
            if pause_secs:
                await asyncio.sleep(pause_secs)
        await call.done_writing()

    sender = asyncio.create_task(send())
    try:
        return [response async for response in call]
    finally:
        sender.cancel()
        await asyncio.gather(sender, return_exceptions=True)


def finals(responses: Iterable[Any]) -> list[Any]:
    return [result for response in responses for result in response.results if result.is_final]


def text_of(responses: Iterable[Any]) -> str:
    """Return the transcript as clients join it."""
    return "".join(result.alternatives[0].transcript for result in finals(responses))
