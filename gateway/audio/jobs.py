"""The messages between ``pool``, in the server's process, and ``worker``, in those that decode."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.audio import BYTES_PER_SAMPLE

SAMPLES, DONE, FAILED, DIED = b"S", b"D", b"F", b"X"
"""First byte of each message of an answer. ``FAILED`` is followed by a ``Failure`` as JSON, ``DIED`` by the exit code."""

MAX_MESSAGE_BYTES = 64 * 2**10
"""Maximum size of a message. Linux limits it by net.core.wmem_default, as a rule 208 KiB."""

MAX_SAMPLES_BYTES = MAX_MESSAGE_BYTES - BYTES_PER_SAMPLE
"""Maximum size of the samples in a message."""


@dataclass(frozen=True)
class Job:
    """What to decode and what it may cost.

    Attributes:
        format: name of the file's format.
        start: offset of the format's first byte in the file.
        max_secs: maximum length of the audio in seconds.
        cpu_secs: limit of CPU time in seconds.
        memory_bytes: limit of memory beyond that of the server.
    """

    format: str
    start: int
    max_secs: float
    cpu_secs: int
    memory_bytes: int


@dataclass(frozen=True)
class Failure:
    """Why a file is not decodable; the parts of an ``ApiError``."""

    kind: str
    message: str
    param: str | None = None
