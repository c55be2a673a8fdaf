"""Recognise formats without a signature by the chain of their frames: each frame's header has the frame's size."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple


class Frame(NamedTuple):
    """A frame's header.

    Attributes:
        size: size of the whole frame, in bytes.
        key: values that all frames of a stream have in common.
    """

    size: int
    key: tuple[int, ...]


MIN_HEADERS_AT_START = 3
MIN_HEADERS_ELSEWHERE = 5
"""Number of consecutive headers that recognise a format, at the start of a body and after it."""

MIN_HEADERS_WHOLE = 2
"""The same if the last frame ends with the body."""

SEARCHED_BYTES = 2048
"""Size of the beginning in which the first frame is searched."""

BITRATES = {
    (3, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (3, 1): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 1): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""Bit rates in kbit/s by the header's version (3 is MPEG-1, 2 stands for all others) and layer (2 is II, 1 is III).

Layer I is omitted: it is not in use, and its header equals the sample -1, which is frequent in quiet recordings."""

MPEG_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
MPEG_1, MPEG_2, LAYER_III = 3, 2, 1

AC3_KBPS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640)
AC3_RATES = (48_000, 44_100, 32_000)
MAX_AC3_STREAM_ID, MAX_EAC3_STREAM_ID = 10, 16

ADTS_RATES = 13
"""Number of sample rates in ADTS."""

TS_PACKET_BYTES = 188


def parse_mpeg(head: bytes, at: int) -> Frame | None:
    """Parse a header of MPEG audio, layer II or III (ISO/IEC 11172-3, 2.4.1.3; 13818-3; version 2.5)."""
    _, b1, b2, b3 = head[at : at + 4]
    version, layer, bitrate, rate = b1 >> 3 & 3, b1 >> 1 & 3, b2 >> 4, b2 >> 2 & 3
    kbps_table = BITRATES.get((MPEG_1 if version == MPEG_1 else MPEG_2, layer))
    if b1 < 0xE0 or version not in MPEG_RATES or not kbps_table or bitrate in (0, 15) or rate == 3 or b3 & 3 == 2:  # noqa: PLR2004
        return None
    bits_per_kbps = 72_000 if layer == LAYER_III and version != MPEG_1 else 144_000
    size = bits_per_kbps * kbps_table[bitrate - 1] // MPEG_RATES[version][rate] + (b2 >> 1 & 1)
    return Frame(size, (b1 & 0xFE, b2 & 0x0C))


def _adts(head: bytes, at: int) -> Frame | None:
    """AAC in ADTS (ISO/IEC 13818-7, 6.2)."""
    _, b1, b2, b3, b4, b5 = head[at : at + 6]
    size = (b3 & 3) << 11 | b4 << 3 | b5 >> 5
    if b1 & 0xF6 != 0xF0 or b2 >> 2 & 15 >= ADTS_RATES or size <= 7:  # noqa: PLR2004
        return None
    return Frame(size, (b1, b2 & 0xFD, b3 & 0xC0))


def _loas(head: bytes, at: int) -> Frame | None:
    """AAC in LOAS (ISO/IEC 14496-3, 1.7.2)."""
    _, b1, b2 = head[at : at + 3]
    return Frame(((b1 & 0x1F) << 8 | b2) + 3, ()) if b1 >= 0xE0 else None  # noqa: PLR2004


def _ac3(head: bytes, at: int) -> Frame | None:
    """AC-3 and E-AC-3 (ATSC A/52, 5.3 and E.1.2)."""
    _, b1, b2, b3, b4, b5 = head[at : at + 6]
    rate, code, stream_id = b4 >> 6, b4 & 0x3F, b5 >> 3
    if b1 != 0x77 or stream_id > MAX_EAC3_STREAM_ID:  # noqa: PLR2004
        return None
    if stream_id > MAX_AC3_STREAM_ID:
        return Frame(2 * (((b2 & 7) << 8 | b3) + 1), (stream_id,))
    if rate >= len(AC3_RATES) or code // 2 >= len(AC3_KBPS):
        return None
    words = AC3_KBPS[code // 2] * 96_000 // AC3_RATES[rate]
    return Frame(2 * (words + (code & 1 if AC3_RATES[rate] == AC3_RATES[1] else 0)), (stream_id, rate))


def _transport(head: bytes, at: int) -> Frame | None:
    """MPEG transport stream (ISO/IEC 13818-1, 2.4.3)."""
    return Frame(TS_PACKET_BYTES, ()) if head[at + 3] & 0x30 else None


class Framing(NamedTuple):
    """A format made of frames.

    Attributes:
        name: name of the format.
        start: pattern of a frame's first bytes; few other places match it.
        header_bytes: number of bytes that ``parse`` needs.
        parse: returns the header at an offset; None if there is none.
        searched: whether the first frame may start later, as in a recording that was cut from a broadcast.
    """

    name: str
    start: re.Pattern[bytes]
    header_bytes: int
    parse: Callable[[bytes, int], Frame | None]
    searched: bool = False


FRAMINGS = (
    Framing("MP3", re.compile(rb"\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd][\x10-\xef]"), 4, parse_mpeg, searched=True),
    Framing("AAC (ADTS)", re.compile(rb"\xff[\xf0\xf1\xf8\xf9]"), 6, _adts, searched=True),
    Framing("AAC (LOAS)", re.compile(rb"\x56[\xe0-\xff]"), 3, _loas),
    Framing("AC-3", re.compile(rb"\x0b\x77"), 6, _ac3),
    Framing("MPEG transport stream", re.compile(rb"\x47"), 4, _transport),
)


def find_frames(head: bytes, *, complete: bool) -> tuple[str, int] | None:
    """Find a chain of frames near the start of a body.

    Args:
        head: the beginning of the body.
        complete: whether the head is the whole body; a chain that reaches the end then needs fewer frames.

    Returns:
        The format's name and the offset of its first frame; None if there is no chain.
    """
    for framing in FRAMINGS:
        starts = (
            framing.start.finditer(head, 0, SEARCHED_BYTES) if framing.searched else filter(None, [framing.start.match(head)])
        )
        for found in starts:
            if _is_chain(head, found.start(), framing, complete=complete):
                return framing.name, found.start()
    return None


def _is_chain(head: bytes, start: int, framing: Framing, *, complete: bool) -> bool:
    """Return whether there are enough consecutive frames with the same key."""
    first = framing.parse(head, start) if start + framing.header_bytes <= len(head) else None
    if not first or ((start or not framing.searched) and _repeats(head, start, first.size)):
        return False
    at, headers = start + first.size, 1
    needed = MIN_HEADERS_ELSEWHERE if start else MIN_HEADERS_AT_START
    while headers < needed and at + framing.header_bytes <= len(head):
        frame = framing.parse(head, at) if framing.start.match(head, at) else None
        if not frame or frame.key != first.key:
            return False
        at, headers = at + frame.size, headers + 1
    return headers >= needed or (complete and start == 0 and at == len(head) and headers >= MIN_HEADERS_WHOLE)


def _repeats(head: bytes, start: int, size: int) -> bool:
    """Return whether a frame equals the next one: a tone's period may fit a frame's size."""
    return head[start : start + size] == head[start + size : start + 2 * size]
