"""Repair the sizes in AU and CAF headers: a program that writes to a pipe does not know them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from gateway.audio.body import Body, Parts
from gateway.audio.errors import undecodable

UNKNOWN = b"\xff" * 4

AU_DATA_SIZE = slice(8, 12)

CAF_HEADER_BYTES = 8
CAF_CHUNK = struct.Struct(">4sq")
"""Name and size of a chunk (Apple Core Audio Format Specification 1.0)."""

MAX_CAF_CHUNKS = 128
"""Maximum number of chunks up to the audio."""


def repair_au(file: Body) -> Parts:
    """Return an AU file in which a size of 0 is replaced by the value for unknown, with which libsndfile reads to the end."""
    if any(file[AU_DATA_SIZE]):
        return [file.view()]
    return [file[: AU_DATA_SIZE.start], UNKNOWN, file.view(AU_DATA_SIZE.stop)]


def repair_caf(file: Body) -> Parts:
    """Return a CAF file in which an unknown size of the audio is the rest of the file.

    Raises:
        ApiError: there are more than ``MAX_CAF_CHUNKS`` chunks before the audio.
    """
    for at, name, size in _chunks(file):
        start = at + CAF_CHUNK.size
        if name == b"data" and size in (-1, 0):
            return [file[:at], CAF_CHUNK.pack(name, len(file) - start), file.view(start)]
    return [file.view()]


def _chunks(file: Body) -> Iterator[tuple[int, bytes, int]]:
    """Yield offset, name and size of each chunk up to the audio."""
    at, chunks = CAF_HEADER_BYTES, 0
    while at + CAF_CHUNK.size <= len(file):
        if chunks == MAX_CAF_CHUNKS:
            raise undecodable(f"The CAF file has more than {MAX_CAF_CHUNKS} chunks before its audio.")
        chunks += 1
        name, size = CAF_CHUNK.unpack(file[at : at + CAF_CHUNK.size])
        yield at, name, size
        if size < 0 or name == b"data":
            return
        at += CAF_CHUNK.size + size
