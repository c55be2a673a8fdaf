"""Write containers that libsndfile does not write, by PyAV; and read files as the gateway does."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import av
import numpy as np
import soxr
from numpy.typing import NDArray

from gateway.audio import RATE
from gateway.audio.pool import FilePool
from gateway.audio.raw import DEFAULT

FRAME = 960
NO_OPTIONS: Mapping[str, str] = MappingProxyType({})
RECORDER = {"live": "1", "cluster_time_limit": "100"}
"""Options for WebM as browsers' MediaRecorder writes it: clusters of 0.1 s, and no length."""


def encode_container(
    samples: NDArray[np.int16],
    container: str,
    codec: str,
    rate: int = 48_000,
    channels: int = 1,
    options: Mapping[str, str] = NO_OPTIONS,
) -> bytes:
    """Return 16 kHz samples [n] as a file, the same on each channel."""
    audio = samples.astype(np.float32) / 0x8000
    if rate != RATE:
        audio = soxr.resample(audio, RATE, rate)
    layout: Any = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
    with tempfile.NamedTemporaryFile() as target, av.open(target.name, "w", format=container, options=dict(options)) as output:
        stream: Any = output.add_stream(codec, rate=rate, layout=layout)
        stream.bit_rate = 12_200 if "amrnb" in codec else 64_000 * channels
        convert = av.AudioResampler(stream.codec_context.format, layout, rate)
        for at in range(0, len(audio), FRAME):
            block = np.repeat(audio[None, at : at + FRAME], channels, axis=0)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate, at
            for converted in convert.resample(frame):
                output.mux(stream.encode(converted))
        output.mux(stream.encode(None))
        output.close()
        return target.read()


async def decode_body(files: FilePool, body: bytes, content_type: str, max_secs: float) -> NDArray[np.int16]:
    """Return all samples [n] of a body, mixed to 16 kHz mono; see ``FilePool.read``."""
    async with files.read(body, content_type, raw=DEFAULT, separate=False, max_secs=max_secs) as reader:
        return np.concatenate([block[0] async for block in reader])
