"""Split a file that consists of several files in a row, such as the output of ``cat a.flac b.flac``.

libsndfile decodes the first file and ignores the rest, and so does FFmpeg 8 (WAV, W64, AIFF, CAF, MP4, ASF), or it decodes the
headers in between as audio (AU, AMR). So each file is decoded by itself. Ogg, MP3 and ADTS need no split: they are sequences of
pages and frames.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from gateway.audio.body import Body
from gateway.audio.sniff import AIFF, AMR, ASF, AU, CAF, FLAC, MP4, QUICKTIME, W64, WAV, WEBM, Format

HEADER_BYTES = 96
"""Maximum size of the part of a header that is compared, in bytes."""


WAV_HEADER_BYTES = 44
"""Size of the usual WAV header. Recorders that wrap a file write it twice; the first one has no audio."""


class Beginning(NamedTuple):
    """The beginning of a file within another one.

    Each pattern has at least 6 constant bytes, so audio matches by chance once in 2**48 positions.

    Attributes:
        literal: bytes that are searched for.
        offset: their offset from the beginning.
        header: pattern of the bytes from the beginning on.
    """

    literal: bytes
    offset: int
    header: re.Pattern[bytes]


def _beginning(literal: bytes, header: bytes | None = None, offset: int = 0) -> Beginning:
    return Beginning(literal, offset, re.compile(re.escape(literal) if header is None else header, re.DOTALL))


_ISO_MEDIA = _beginning(b"ftyp", rb"\0\0[\0-\3].ftyp[ -~]{4}", offset=4)

BEGINNINGS = {
    WAV.name: _beginning(b"WAVE", rb"(RIFF|RIFX|RF64|BW64).{4}WAVE[ -~]{4}", offset=8),
    W64.name: _beginning(b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"),
    AIFF.name: _beginning(b"AIF", rb"FORM.{4}AIF[FC][ -~]{4}", offset=8),
    AU.name: _beginning(b".snd", rb"\.snd\0\0.{6}\0\0\0.\0.{3}\0\0\0"),
    CAF.name: _beginning(b"caff\0\x01\0\0desc"),
    FLAC.name: _beginning(b"fLaC", rb"fLaC[\0\x80]\0\0\x22"),
    MP4.name: _ISO_MEDIA,
    QUICKTIME.name: _ISO_MEDIA,
    WEBM.name: _beginning(b"\x1a\x45\xdf\xa3", rb"\x1a\x45\xdf\xa3.{1,60}?\x42\x82.{1,8}?(webm|matroska)"),
    AMR.name: _beginning(b"#!AMR", rb"#!AMR(-WB)?\n"),
    ASF.name: _beginning(b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c"),
}
"""Beginnings of files by format.

FLAC's STREAMINFO comes first and has 34 bytes (RFC 9639, section 8.2), CAF's description comes first, and ISO media begin with
a small box ``ftyp`` (ISO/IEC 14496-12, 4.3).
"""


def split(format_: Format, file: Body) -> Iterator[Body]:
    """Yield each file of a file of one format; the whole file if it is only one.

    Args:
        format_: format of the first file.
        file: the whole file, from the first byte of the format on.
    """
    start = 0
    while (following := find_beginning(format_, file, start + 1)) >= 0:
        if format_ != WAV or following - start > WAV_HEADER_BYTES:
            yield file.part(start, following)
        start = following
    yield file.part(start, len(file))


def find_beginning(format_: Format, file: Body, at: int = 0) -> int:
    """Return the offset of the first beginning of a file of a format from ``at`` on, or -1."""
    if (sought := BEGINNINGS.get(format_.name)) is None:
        return -1
    found = file.find(sought.literal, at + sought.offset)
    while found >= 0:
        begin = found - sought.offset
        if sought.header.match(file[begin : begin + HEADER_BYTES]):
            return begin
        found = file.find(sought.literal, found + 1)
    return -1
