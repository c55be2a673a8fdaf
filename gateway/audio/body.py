"""Access to a recording's bytes without a copy: in memory, in a mapped file, or in parts of both."""

from __future__ import annotations

import bisect
import io
import itertools
import mmap
import os
from collections.abc import Sequence
from typing import Protocol

Part = bytes | memoryview
Parts = Sequence[Part]
"""Consecutive bytes."""


class Slices(Protocol):
    """Bytes that are read by slices: ``bytes``, ``Body``, ``OpenFile``."""

    def __len__(self) -> int:
        """Return the number of bytes."""

    def __getitem__(self, key: slice, /) -> bytes:
        """Return the bytes within a slice; fewer at the end."""


class OpenFile:
    """A file that is read slice by slice. A disk error raises an exception; with a mapped file it would end the process.

    Args:
        descriptor: descriptor of the file, which is not moved and not closed.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size

    def __len__(self) -> int:
        """Return the number of bytes."""
        return self._size

    def __getitem__(self, key: slice) -> bytes:
        """Return the bytes within a slice."""
        start, stop, _ = key.indices(self._size)
        return os.pread(self._descriptor, max(0, stop - start), start)


class Body:
    """Bytes in memory or in a mapped file.

    Args:
        data: the bytes.
        start: offset of the first byte; all other offsets are relative to it.
        stop: offset after the last byte; None: the end of the data.
    """

    def __init__(self, data: bytes | mmap.mmap, start: int = 0, stop: int | None = None) -> None:
        self._data = data
        self._stop = len(data) if stop is None else min(stop, len(data))
        self._start = min(start, self._stop)

    def __len__(self) -> int:
        """Return the number of bytes."""
        return self._stop - self._start

    def __getitem__(self, key: slice) -> bytes:
        """Return a copy of the bytes within a slice."""
        start, stop, _ = key.indices(len(self))
        return self._data[self._start + start : self._start + stop]

    def find(self, sought: bytes, at: int = 0) -> int:
        """Return the offset of the first occurrence from ``at`` on, or -1."""
        found = self._data.find(sought, self._start + at, self._stop)
        return found - self._start if found >= 0 else -1

    def startswith(self, prefix: bytes | tuple[bytes, ...], at: int = 0) -> bool:
        """Return whether bytes, or one of several, are at an offset."""
        return any(self[at : at + len(one)] == one for one in ((prefix,) if isinstance(prefix, bytes) else prefix))

    def view(self, start: int = 0, stop: int | None = None) -> memoryview:
        """Return the bytes within a slice without a copy."""
        return memoryview(self._data)[self._start : self._stop][start:stop]

    def part(self, start: int, stop: int) -> Body:
        """Return the bytes within a slice as another body."""
        return Body(self._data, self._start + start, min(self._start + stop, self._stop))


class Pieces(io.RawIOBase):
    """A file that is made of parts.

    Args:
        parts: the content.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._parts = [memoryview(part) for part in parts]
        self._ends = list(itertools.accumulate(map(len, self._parts)))
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, and return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._ends[-1] if self._ends else 0}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: memoryview | bytearray) -> int:  # type: ignore[override]
        """Read into a buffer from the position on, and return the number of bytes."""
        target = memoryview(buffer).cast("B")
        filled, index = 0, bisect.bisect_right(self._ends, self._at)
        while filled < len(target) and index < len(self._parts):
            part = self._parts[index]
            within = self._at - (self._ends[index] - len(part))
            piece = part[within : within + len(target) - filled]
            target[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._at += len(piece)
            index += 1
        return filled
