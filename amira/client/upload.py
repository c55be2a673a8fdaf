"""Body of a request: a recording, alone or as the file of a form."""

from __future__ import annotations

import asyncio
import io
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

Audio = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
"""A path, the bytes of a recording, or a file opened for reading bytes."""

Progress = Callable[[int, int], object]
"""Called with the number of bytes sent and the number of all bytes."""

CHUNK_BYTES = 64 * 2**10


class Upload:
    """A body that can be sent more than once.

    Args:
        audio: the recording. A file that is not seekable, such as a pipe, is read into memory.
        fields: names and values of the form; None: the body is the recording alone.
        on_progress: called after each chunk.

    Attributes:
        headers: headers of the body.
        size: size in bytes.

    Raises:
        OSError: the recording cannot be read.
    """

    def __init__(self, audio: Audio, fields: Sequence[tuple[str, str]] | None, on_progress: Progress | None) -> None:
        self._audio = audio if isinstance(audio, str | os.PathLike | bytes | bytearray | memoryview) else _rewindable(audio)
        self._on_progress = on_progress
        self._head, self._tail, content_type = b"", b"", "application/octet-stream"  # files are recognised by their content
        if fields is not None:
            boundary = secrets.token_hex(16)
            content_type = f"multipart/form-data; boundary={boundary}"
            self._head, self._tail = _form_around_file(boundary, fields)
        with self._open() as file:
            self._start = file.tell()
            self.size = len(self._head) + file.seek(0, os.SEEK_END) - self._start + len(self._tail)
        self.headers = {"Content-Type": content_type, "Content-Length": str(self.size)}

    def __iter__(self) -> Iterator[bytes]:
        """Iterate over the body's chunks from its start."""
        sent = 0
        for chunk in self._chunks():
            yield chunk
            sent += len(chunk)
            self._report(sent)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Iterate as ``__iter__`` does; the recording is read in a thread."""
        sent, chunks = 0, self._chunks()
        while chunk := await asyncio.to_thread(next, chunks, b""):
            yield chunk
            sent += len(chunk)
            self._report(sent)

    def _report(self, sent: int) -> None:
        if self._on_progress:
            self._on_progress(sent, self.size)

    def _chunks(self) -> Iterator[bytes]:
        if self._head:
            yield self._head
        with self._open() as file:
            file.seek(self._start)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
        if self._tail:
            yield self._tail

    def _open(self) -> AbstractContextManager[BinaryIO]:
        if isinstance(self._audio, bytes | bytearray | memoryview):
            return io.BytesIO(self._audio)
        if isinstance(self._audio, str | os.PathLike):
            return Path(self._audio).open("rb")
        return nullcontext(self._audio)  # the caller's file stays open


def _rewindable(file: BinaryIO) -> bytes | BinaryIO:
    return file if file.seekable() else file.read()


def _form_around_file(boundary: str, fields: Sequence[tuple[str, str]]) -> tuple[bytes, bytes]:
    """Return the bytes before and after the file of a form (RFC 7578)."""
    begin = f"--{boundary}\r\nContent-Disposition: form-data; name="
    parts = [f'{begin}"{name}"\r\n\r\n{value}\r\n' for name, value in fields]
    head = "".join(parts) + f'{begin}"file"; filename="recording"\r\nContent-Type: application/octet-stream\r\n\r\n'
    return head.encode(), f"\r\n--{boundary}--\r\n".encode()
