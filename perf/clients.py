"""Clients that return the tokens of a recording: over gRPC from Triton, and over REST from the gateway."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
from tritonclient.grpc import InferInput
from tritonclient.grpc import aio as grpcclient

from gateway.triton.geometry import Windows
from perf.peers import FRAME_SYNCHRONOUS
from perf.recogniser import MODEL
from perf.speech import Samples

PATH = "/v2/decode/batch/amira"


class GrpcClient:
    """Sends requests to Triton over gRPC.

    Args:
        endpoint: host and port.
    """

    def __init__(self, endpoint: str) -> None:
        self._client = grpcclient.InferenceServerClient(endpoint)

    async def ours(self, samples: Samples) -> list[int]:
        """Return the tokens of a recording from the ensemble, decoded greedily and without a language model, as peers do."""
        options: dict[str, str | int] = {"context": "whole", "beam": 1, "language_model": "off"}
        result = await self.request(samples, new_sequence(), start=True, end=True, **options)
        return _tokens(result)

    async def frame_synchronous(self, samples: Samples) -> list[int]:
        """Return the tokens of a recording from the frame-synchronous model."""
        return _tokens(await self._client.infer(FRAME_SYNCHRONOUS, _audio(samples)))

    async def request(self, samples: Samples, sequence: int, *, start: bool, end: bool, **options: str | int) -> Any:
        """Send one request of a sequence to the ensemble, and return all its outputs.

        Args:
            samples: audio [n].
            sequence: id of the sequence, not 0.
            start: whether the request is the first of its sequence.
            end: whether it is the last.
            options: options of the decoder.
        """
        flags = {"sequence_id": sequence, "sequence_start": start, "sequence_end": end}
        return await self._client.infer(MODEL, _audio(samples), **flags, parameters=options)

    async def chunks(self, samples: Samples, windows: Windows, **options: str | int) -> AsyncIterator[Any]:
        """Send audio chunk by chunk as the gateway does, and yield each response.

        Args:
            samples: audio [n].
            windows: geometry of the stream's windows.
            options: options of the decoder.
        """
        sequence, sent = new_sequence(), 0
        for chunk in range(windows.complete(len(samples))):
            piece, sent = samples[sent : windows.chunk_due(chunk)], windows.chunk_due(chunk)
            yield await self.request(piece, sequence, start=chunk == 0, end=False, save_state=1, **options)
        await self.request(samples[:0], sequence, start=sent == 0, end=True)

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()


def new_sequence() -> int:
    """Return a random sequence id, 1 or more."""
    return secrets.randbelow(2**63 - 1) + 1


def _audio(samples: Samples) -> list[InferInput]:
    audio = InferInput("AUDIO", [1, len(samples)], "INT16")
    audio.set_data_from_numpy(samples[None])
    return [audio]


def _tokens(result: Any) -> list[int]:
    tokens: list[int] = result.as_numpy("TOKENS")[0].tolist()
    return tokens


class RestClient:
    """Sends recordings to the gateway over persistent connections. Uses aiohttp: httpx takes more time than the gateway.

    Args:
        url: base URL of the gateway.
    """

    def __init__(self, url: str) -> None:
        self._url = f"{url}{PATH}?beam=1&language_model=off"  # as ``GrpcClient.ours``
        self._client = aiohttp.ClientSession(raise_for_status=True, headers={"Content-Type": "application/octet-stream"})

    async def transcribe(self, samples: Samples) -> list[int]:
        """Return the tokens of a recording, sent as raw PCM."""
        async with self._client.post(self._url, data=samples.tobytes()) as answer:
            tokens: list[int] = orjson.loads(await answer.read())["tokens"]
            return tokens

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
