"""Add a header with the length to MP3 streams.

An MP3 file is a sequence of frames. libsndfile takes the length from the Xing header in the first frame, or estimates it from
the first frame's bit rate, and reads no further. So it gets a Xing header with the actual number of frames, unless the file's
own header is right.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from gateway.audio.body import Body, Parts
from gateway.audio.frames import Frame, parse_mpeg

HEADER_BYTES = 4
SYNC, SYNC_BYTE = 0xFF, b"\xff"
"""First byte of each header."""

WINDOW_BYTES, SPAN_BYTES = 2**20, 2**13
"""Size of the parts in which a file is searched, and of the least rest at each position: a frame has at most 1729 bytes."""

LAYER_III = 1
MPEG_1, MONO = 3, 3
SIDE_INFO_BYTES = {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}
"""Size of the side information after a frame's header, by whether it is MPEG-1 and mono (ISO/IEC 11172-3, 2.4.1.7)."""

XING, INFO = b"Xing", b"Info"
HAS_FRAMES = 1
XING_BITRATE = {True: 5 << 4, False: 8 << 4}
"""Bit rate in a header with which every frame is large enough for a Xing header: 64 kbit/s."""


class Run(NamedTuple):
    """Consecutive frames.

    Attributes:
        start, stop: offset of the first frame, and offset after the last.
        frames: number of frames.
    """

    start: int
    stop: int
    frames: int


def repair(file: Body) -> Parts:
    """Return the whole frames of an MP3 file, with a Xing header that has their number.

    Args:
        file: the file from its first frame on; data between frames is skipped.
    """
    runs = _runs(file)
    if not runs:
        return [file.view()]
    header = file[runs[0].start : runs[0].start + HEADER_BYTES]
    first = parse_mpeg(header, 0)
    if first is None or header[1] >> 1 & 3 != LAYER_III:
        return [file.view()]
    is_mpeg_1, is_mono = header[1] >> 3 & 3 == MPEG_1, header[3] >> 6 == MONO
    side_info_bytes = SIDE_INFO_BYTES[is_mpeg_1, is_mono]
    at = runs[0].start + HEADER_BYTES + side_info_bytes
    total = sum(run.frames for run in runs)
    own = file[at : at + 12] if first.size >= HEADER_BYTES + side_info_bytes + 4 else b""
    if own[:4] in (XING, INFO):
        flags, number = struct.unpack(">II", own[4:].ljust(8, b"\0"))
        if flags & HAS_FRAMES and number == total - 1:
            return [file.view(run.start, run.stop) for run in runs]
        runs[0] = Run(runs[0].start + first.size, runs[0].stop, runs[0].frames - 1)
        total -= 1
    # Without a checksum, and with the bit rate that has room.
    head = bytes((header[0], header[1] | 1, XING_BITRATE[is_mpeg_1] | header[2] & 0x0C, header[3]))
    parsed = parse_mpeg(head, 0)
    assert parsed  # noqa: S101 (made from a header that was parsed)
    info = head + bytes(side_info_bytes) + XING + struct.pack(">II", HAS_FRAMES, total)
    return [info.ljust(parsed.size, b"\0"), *(file.view(run.start, run.stop) for run in runs)]


def _runs(file: Body) -> list[Run]:
    """Return the whole frames with the version, layer and sample rate of the first."""
    runs: list[Run] = []
    window, base, at = b"", 0, 0  # the window is a copy of the file from base on, for speed
    first: Frame | None = None
    start, frames = 0, 0
    while 0 <= at <= len(file) - HEADER_BYTES:
        if at + SPAN_BYTES > base + len(window) and base + len(window) < len(file):
            window, base = file[at : at + WINDOW_BYTES], at
        frame = parse_mpeg(window, at - base) if window[at - base] == SYNC else None
        if frame and (first is None or frame.key == first.key) and _follows(window, at - base + frame.size):
            first = first or frame
            if not frames:
                start = at
            frames += 1
            at += frame.size
        else:
            if frames:
                runs.append(Run(start, at, frames))
                frames = 0
            at = file.find(SYNC_BYTE, at + 1)
    return [*runs, Run(start, at, frames)] if frames else runs


def _follows(window: bytes, at: int) -> bool:
    """Return whether a frame, a tag or the end is at an offset, so that a whole frame precedes it."""
    if at >= len(window) - HEADER_BYTES:
        return at <= len(window)
    return window.startswith((b"TAG", b"ID3", b"APETAGEX"), at) or (window[at] == SYNC and parse_mpeg(window, at) is not None)
