"""Messages between ``pool``, in the gateway's process, and ``worker``, in the decoding processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

STARTED, OPENED, SAMPLES, PAUSED, DONE, FAILED, DIED = b"B", b"O", b"S", b"P", b"D", b"F", b"X"
"""First byte of each message of an answer.

``STARTED`` is first, as soon as the server takes the job. ``OPENED`` is followed by the number of channels; ``SAMPLES`` by
16-bit samples of interleaved channels. After ``PAUSED`` there is no message until the other side requests more. ``FAILED`` is
followed by a ``Failure`` as JSON, ``DIED`` by the exit code."""

MORE = b"M"
"""Request of the other side for the next batch of samples."""

MAX_MESSAGE_BYTES = 64 * 2**10
"""Maximum size of a message. Linux limits it by net.core.wmem_default, usually 208 KiB."""


@dataclass(frozen=True)
class Job:
    """A file to decode, and the limits.

    Attributes:
        format: name of the file's format.
        start: offset of the format's first byte in the file.
        live: whether the file is the end of a pipe, and is decoded as it arrives.
        separate: whether to keep the channels instead of mixing them down to one.
        max_secs: maximum length of the audio in seconds.
        cpu_secs: limit of CPU time before the first audio, in seconds.
        min_speed: minimum speed of decoding, relative to real time; it limits CPU time after the first audio.
        memory_bytes: limit of memory in addition to that of the server.
    """

    format: str
    start: int
    live: bool
    separate: bool
    max_secs: float
    cpu_secs: float
    min_speed: float
    memory_bytes: int

    def cpu_limit(self, decoded_secs: float) -> int:
        """Return the limit of CPU time in seconds after ``decoded_secs`` of decoded audio."""
        return math.ceil(self.cpu_secs + decoded_secs / self.min_speed)


@dataclass(frozen=True)
class Failure:
    """Reason why a file is not decodable: the parts of an ``ApiError``."""

    kind: str
    message: str
    param: str | None = None
