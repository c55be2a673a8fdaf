"""Coverage-guided fuzzing of the file processes: ``python tests/fuzz/containers.py DIRECTORY|FILE [libFuzzer options]``.

Each input is decoded by the processes that a server has; FFmpeg itself is not instrumented. Anything but samples or an
``ApiError`` is a crash, and so is a good file that is not decoded beside it. FFmpeg may end its own process: that is what the
processes are for.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import atheris
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(include=["gateway.audio.sniff", "gateway.audio.frames", "gateway.audio.pool"]):
    from gateway.audio import RATE
    from gateway.audio.pool import FilePool
from gateway.errors import ApiError
from tests.fuzz.guided import main
from tests.fuzz.recordings import containers, files
from tests.support.media import decode_body

MAX_SECS = 2.0
SPARE_SAMPLES = 64
GOOD = next(containers())
loop = asyncio.new_event_loop()
pool = FilePool()
good_samples = loop.run_until_complete(decode_body(pool, GOOD, "", MAX_SECS))


async def decode(data: bytes) -> None:
    """Decode an input beside a good file."""
    bad, good = await asyncio.gather(
        decode_body(pool, data, "", MAX_SECS), decode_body(pool, GOOD, "", MAX_SECS), return_exceptions=True
    )
    assert isinstance(good, np.ndarray), good
    np.testing.assert_array_equal(good, good_samples)
    if isinstance(bad, ApiError):
        assert bad.kind.status in (400, 413, 415, 422), bad
    elif isinstance(bad, BaseException):
        raise bad
    else:
        assert 1 <= len(bad) <= MAX_SECS * RATE + SPARE_SAMPLES


def fuzz(data: bytes) -> None:
    """Decode one input."""
    loop.run_until_complete(decode(data))


def seeds() -> Iterator[bytes]:
    """Yield the first inputs."""
    yield from containers()
    yield from (file for file in files() if file.startswith((b"ID3", b"\xff", b"OggS")))


if __name__ == "__main__":
    main(fuzz, seeds)
