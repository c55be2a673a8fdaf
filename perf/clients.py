"""Clients that send a whole recording and give its tokens: by gRPC straight to Triton, and by REST to the gateway."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np
import orjson
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc import aio as grpcclient

from gateway.triton import OUTPUTS
from perf.peers import FRAME_SYNCHRONOUS
from perf.recogniser import MODEL
from perf.speech import Samples

PATH = "/v2/decode/batch/amira"


class GrpcClient:
    """Triton's own client."""

    def __init__(self, endpoint: str) -> None:
        self._client = grpcclient.InferenceServerClient(endpoint)

    async def ours(self, samples: Samples) -> list[int]:
        """Tokens by the ensemble."""
        sequence = {"sequence_id": secrets.randbelow(2**63 - 1) + 1, "sequence_start": True, "sequence_end": True}
        return await self._infer(MODEL, samples, OUTPUTS, **sequence, parameters={"context": "whole"})

    async def frame_synchronous(self, samples: Samples) -> list[int]:
        """Tokens by the peer."""
        return await self._infer(FRAME_SYNCHRONOUS, samples, ("TOKENS",))

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()

    async def _infer(self, model: str, samples: Samples, outputs: Sequence[str], **options: Any) -> list[int]:
        audio = InferInput("AUDIO", [1, len(samples)], "INT16")
        audio.set_data_from_numpy(samples[None])
        result = await self._client.infer(model, [audio], outputs=list(map(InferRequestedOutput, outputs)), **options)
        tokens: list[int] = np.asarray(result.as_numpy("TOKENS"))[0].tolist()
        return tokens


class RestClient:
    """A client of the gateway that keeps its connections; aiohttp, since httpx takes longer than the gateway does."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}{PATH}"
        self._client = aiohttp.ClientSession(raise_for_status=True, headers={"Content-Type": "application/octet-stream"})

    async def transcribe(self, samples: Samples) -> list[int]:
        """Tokens of a recording, sent as raw PCM."""
        async with self._client.post(self._url, data=samples.tobytes()) as answer:
            tokens: list[int] = orjson.loads(await answer.read())["tokens"]
            return tokens

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
