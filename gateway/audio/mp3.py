"""Give MP3 streams a header with their length.

An MP3 file is a sequence of frames. libsndfile takes the length from the Xing header in the first frame, or estimates it from
the first frame's bit rate, and reads no further. It therefore gets a Xing header with the number of frames that there are,
unless the file's own is right.
"""

from __future__ import annotations

import struct

from gateway.audio.frames import Frame, parse_mpeg

HEADER_BYTES = 4
LAYER_III = 1
MPEG_1, MONO = 3, 3
SIDE_INFO_BYTES = {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}
"""Size of what follows a frame's header, by whether it is MPEG-1 and mono (ISO/IEC 11172-3, 2.4.1.7)."""

XING, INFO = b"Xing", b"Info"
HAS_FRAMES = 1
XING_BITRATE = {True: 5 << 4, False: 8 << 4}
"""Bit rate in a header, 64 kbit/s, with which each frame has room for a Xing header."""


def repair(file: bytes) -> bytes:
    """Return the whole frames of an MP3 file, with a Xing header that has their number.

    Args:
        file: from the first frame on; what lies between frames is left out.
    """
    frames = _frames(file)
    if not frames or (frames[0][1] >> 1 & 3) != LAYER_III:
        return file
    header = bytes(frames[0][:HEADER_BYTES])
    is_mpeg_1, is_mono = header[1] >> 3 & 3 == MPEG_1, header[3] >> 6 == MONO
    side_info_bytes = SIDE_INFO_BYTES[is_mpeg_1, is_mono]
    at = HEADER_BYTES + side_info_bytes
    if bytes(frames[0][at : at + 4]) in (XING, INFO):
        flags, number = struct.unpack_from(">II", bytes(frames[0][at + 4 : at + 12]).ljust(8, b"\0"))
        if flags & HAS_FRAMES and number == len(frames) - 1:
            return b"".join(frames)
        frames = frames[1:]
    # Without a checksum, and with the bit rate that has room.
    head = bytes((header[0], header[1] | 1, XING_BITRATE[is_mpeg_1] | header[2] & 0x0C, header[3]))
    parsed = parse_mpeg(head, 0)
    assert parsed  # noqa: S101 (made from a header that was parsed)
    info = head + bytes(side_info_bytes) + XING + struct.pack(">II", HAS_FRAMES, len(frames))
    return b"".join([info.ljust(parsed.size, b"\0"), *frames])


def _frames(file: bytes) -> list[memoryview]:
    """Return the whole frames that have the first one's version, layer and sample rate."""
    view, frames, at = memoryview(file), [], 0
    first: Frame | None = None
    while 0 <= at <= len(file) - HEADER_BYTES:
        frame = parse_mpeg(file, at) if file[at] == 0xFF else None  # noqa: PLR2004
        follows = frame and _follows(file, at + frame.size)
        if frame and follows and (first is None or frame.key == first.key):
            first = first or frame
            frames.append(view[at : at + frame.size])
            at += frame.size
        else:
            at = file.find(b"\xff", at + 1)
    return frames


def _follows(file: bytes, at: int) -> bool:
    """Return whether a frame, a tag or nothing is at an offset, so that what is before it is a whole frame."""
    if at >= len(file) - HEADER_BYTES:
        return at <= len(file)
    return file.startswith((b"TAG", b"ID3", b"APETAGEX"), at) or (file[at] == 0xFF and parse_mpeg(file, at) is not None)  # noqa: PLR2004
