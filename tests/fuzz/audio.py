"""Coverage-guided fuzzing of audio decoding: ``python tests/fuzz/audio.py DIRECTORY|FILE [libFuzzer options]``.

The first byte of an input chooses the content type, the rest is the body. Anything but samples or an ``ApiError`` is a crash.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(include=["gateway.audio", "soundfile"]):
    from gateway.audio import RATE
    from gateway.audio.files import decode_audio
    from gateway.audio.json_form import unpack_json
from gateway.errors import ApiError
from tests.fuzz.guided import main
from tests.fuzz.recordings import files, pcm

MAX_SECS = 2.0
JSON = "application/json"
CONTENT_TYPES = ("application/octet-stream", "audio/wav", "audio/flac", "audio/ogg", "audio/pcm", "", "audio/mpeg", JSON)
SPARE_SAMPLES = 64
"""Excess over the limit because of rounding and resampling, per link of a chain."""


def fuzz(data: bytes) -> None:
    """Decode one body."""
    content_type, body = CONTENT_TYPES[data[0] % len(CONTENT_TYPES)] if data else "", data[1:]
    try:
        if content_type == JSON:
            body, opaque = unpack_json(body)
            assert set(opaque) <= {"opaque"}
            content_type = CONTENT_TYPES[0]
        samples = decode_audio(body, content_type, MAX_SECS)
    except ApiError:
        return
    assert samples.dtype == "int16"
    assert samples.ndim == 1
    assert 1 <= len(samples) <= MAX_SECS * RATE + SPARE_SAMPLES


def seeds() -> Iterator[bytes]:
    """Yield the first inputs."""
    for file in files():
        yield b"\0" + file
    ogg = [file for file in files() if file.startswith(b"OggS")]
    yield b"\0" + b"".join(ogg)
    for file in files():
        if file.startswith((b"fLaC", b"OggS", b"\xff")):
            yield b"\0ID3\4\0\0\0\0\0\x10" + bytes(16) + file
    yield b"\4" + pcm()
    yield b'\7{"audio_buffer":[1,0,255,127],"opaque":{"id":[1,null]},"description":""}'


if __name__ == "__main__":
    main(fuzz, seeds)
