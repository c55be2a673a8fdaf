"""A stand-in for Triton that responds at once, or after a fixed time, to measure the gateway alone.

    python -m perf.standin PORT [--delay-ms MS]

It implements the part of Triton's gRPC protocol that the gateway uses, with the configurations of the bundled models. A stream
gets one word per window, so every window changes the text. A segment ends after ``SEGMENT_WORDS`` words.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
from collections import defaultdict
from typing import Any

import grpc
import numpy as np
import orjson
import uvloop
from tritonclient.grpc import service_pb2, service_pb2_grpc

from amira.models.configs import read_config
from amira.paths import MODEL_REPOSITORY
from amira.ports import LOOPBACK
from gateway.triton.geometry import Windows
from perf.recogniser import MODEL, windows_of

SEGMENT_WORDS = 20
"""Number of words in a segment, about the number in a segment of 20 s."""

STATE = b"." * 4000
"""Saved state of a stream, about as long as the recogniser's."""


class StandIn(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # generated code has no types
    """Implements the three calls that the gateway makes.

    Args:
        windows: geometry of the recogniser's windows.
        delay_secs: time of an inference.
    """

    def __init__(self, windows: Windows, delay_secs: float) -> None:
        self._windows = windows
        self._delay_secs = delay_secs
        self._samples: defaultdict[int | str, int] = defaultdict(int)

    async def RepositoryIndex(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        """Report every model of the repository as ready."""
        names = [path.parent.name for path in MODEL_REPOSITORY.glob("*/config.pbtxt")]
        index = service_pb2.RepositoryIndexResponse.ModelIndex
        return service_pb2.RepositoryIndexResponse(models=[index(name=name, version="1", state="READY") for name in names])

    async def ModelConfig(self, request: Any, _context: Any) -> Any:  # noqa: N802
        """Return a model's configuration from its file."""
        return service_pb2.ModelConfigResponse(config=read_config(MODEL_REPOSITORY / request.name / "config.pbtxt"))

    async def ModelInfer(self, request: Any, _context: Any) -> Any:  # noqa: N802
        """Add one word for each window that the audio completes."""
        chosen = request.parameters["sequence_id"]
        sequence = chosen.string_param or chosen.int64_param
        end = request.parameters["sequence_end"].bool_param
        before = self._windows.complete(self._samples[sequence])
        self._samples[sequence] += int(request.inputs[0].shape[1])
        samples = self._samples[sequence]
        words = self._windows.complete(samples)
        if end:
            del self._samples[sequence]
        if self._delay_secs:
            await asyncio.sleep(self._delay_secs)
        segment = before // SEGMENT_WORDS
        final = end or words // SEGMENT_WORDS > segment
        return _response(
            words - segment * SEGMENT_WORDS,
            segment,
            final,
            samples if end else words * self._windows.chunk,
            b"" if end else STATE,
        )


def _response(words: int, segment: int, final: bool, samples: int, state: bytes) -> Any:
    timed = [{"word": "word", "start": float(i), "end": i + 0.5, "confidence": 0.9} for i in range(words)]
    text = " word" * words
    tensors: dict[str, tuple[str, bytes, int]] = {
        "TEXT": ("BYTES", _string(text.encode()), 1),
        "TOKENS": ("INT32", np.arange(words, dtype=np.int32).tobytes(), words),
        "WORDS": ("BYTES", _string(orjson.dumps(timed)), 1),
        "CONFIDENCE": ("FP32", np.float32(0.9).tobytes(), 1),
        "STABLE": ("INT32", np.int32(words).tobytes(), 1),
        "STABLE_CHARS": ("INT32", np.int32(len(text)).tobytes(), 1),
        "SEGMENT": ("INT32", np.array([segment, final], np.int32).tobytes(), 2),
        "LENGTHS": ("INT64", np.array([samples, samples // 160, samples // 1536], np.int64).tobytes(), 3),
        "STATE": ("BYTES", _string(state), 1),
    }
    output = service_pb2.ModelInferResponse.InferOutputTensor
    return service_pb2.ModelInferResponse(
        model_name=MODEL,
        outputs=[output(name=name, datatype=kind, shape=[1, size]) for name, (kind, _, size) in tensors.items()],
        raw_output_contents=[raw for _, raw, _ in tensors.values()],
    )


def _string(value: bytes) -> bytes:
    """Encode a string as an element of a BYTES tensor."""
    return len(value).to_bytes(4, "little") + value


async def serve(port: int, delay_secs: float) -> None:
    """Serve until cancelled."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(StandIn(windows_of(MODEL_REPOSITORY), delay_secs), server)
    server.add_insecure_port(f"{LOOPBACK}:{port}")
    await server.start()
    await server.wait_for_termination()


def main() -> None:
    """Parse the command line, and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int, help="port to listen on")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="time of an inference")
    arguments = parser.parse_args()
    gc.disable()  # a full collection takes 130 ms, which would count as the gateway's time
    uvloop.run(serve(arguments.port, arguments.delay_ms / 1000))


if __name__ == "__main__":
    main()
