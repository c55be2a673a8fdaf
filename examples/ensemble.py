"""Call the Triton ensemble directly: python examples/ensemble.py [RECORDING] [HOST:PORT].

The recording is raw PCM: 16-bit little-endian, 16 kHz, one channel. This needs tritonclient[grpc].
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput

PIECE = 2 * 16000
"""Samples per request of the stream."""


def main(recording: str = "speech.pcm", server: str = "localhost:8001") -> None:
    """Print the transcript of the recording sent whole, then the segments of the same recording sent as a stream."""
    samples = np.fromfile(recording, "<i2")
    client = InferenceServerClient(server)

    def infer(sequence_id: int, audio: Any, **flags_and_options: Any) -> tuple[str, int, int]:
        """Return the segment's text, its index, and whether it is final."""
        tensor = InferInput("AUDIO", [1, len(audio)], "INT16")
        tensor.set_data_from_numpy(audio[None])
        answer = client.infer("asr_ensemble", [tensor], sequence_id=sequence_id, **flags_and_options)
        index, final = answer.as_numpy("SEGMENT")[0]
        return answer.as_numpy("TEXT")[0, 0].decode(), int(index), int(final)

    # A whole recording: one request with both flags.
    print(infer(1, samples, sequence_start=True, sequence_end=True, parameters={"context": "whole"}))

    # A stream: options go with the first request; final segments joined are the transcript.
    options, transcript = {"endpoint_silence_ms": 600}, ""
    for start in range(0, len(samples), PIECE):
        piece, first, last = samples[start : start + PIECE], start == 0, start + PIECE >= len(samples)
        text, index, final = infer(2, piece, sequence_start=first, sequence_end=last, parameters=options if first else None)
        print(index, final, repr(text))
        transcript += text if final else ""
    print(transcript)


if __name__ == "__main__":
    main(*sys.argv[1:])
