"""Split Ogg files (RFC 3533) into links and streams.

An Ogg file may be a chain of links, and each link may have several streams. libsndfile reads one stream of the first link, and
searches byte by byte for a missing page. So it gets the pages of one stream of one link at a time, and only whole pages with
the right checksum.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from gateway.audio.body import Body, Parts
from gateway.audio.errors import undecodable, unsupported

CAPTURE = b"OggS\0"
"""Pattern and version at the start of each page."""

HEADER = struct.Struct("<4sBBqIIIB")
"""Pattern, version, flags, position, serial number, sequence number, checksum, number of segments."""

FIRST, LAST = 2, 4
"""Flags of a stream's first and last page."""

CHECKSUM = slice(22, 26)
VAIN_BYTES = 2**20
"""Bytes with a wrong checksum that are read in addition to the file's size: junk in a small file can look like large pages."""

MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

CODECS = {
    b"\x01vorbis": "Vorbis",
    b"OpusHead": "Opus",
    b"\x7fFLAC": "FLAC",
    b"fLaC": "FLAC",
    b"Speex   ": "Speex",
    b"\x80theora": "Theora",
    b"fishead\0": "Skeleton",
    b"PCM     ": "PCM",
    b"CELT    ": "CELT",
    b"BBCD\0": "Dirac",
    b"\x80kate\0\0\0": "Kate",
    b"OVP80": "VP8",
    b"\x01video": "OGM",
    b"\x01audio": "OGM",
}
"""Codecs by the beginning of a stream's first packet."""

DECODABLE = ("Vorbis", "Opus")


class Page(NamedTuple):
    """A page of a file.

    Attributes:
        data: the whole page.
        flags: ``FIRST``, ``LAST``.
        serial: serial number of its stream.
        payload: offset of its packets in ``data``.
    """

    data: memoryview
    flags: int
    serial: int
    payload: int


class Link:
    """The first decodable stream of one link of a chain."""

    def __init__(self) -> None:
        self.codecs: list[str] = []
        self.serial: int | None = None
        self.pages: list[memoryview] = []
        self.flags = 0  # of the stream's last page

    def begin(self, page: Page) -> None:
        """Add a stream's first page."""
        packet = bytes(page.data[page.payload : page.payload + 8])
        codec = next((name for magic, name in CODECS.items() if packet.startswith(magic)), "unknown")
        self.codecs.append(codec)
        if codec in DECODABLE and self.serial is None:
            self.serial = page.serial
            self.append(page)

    def append(self, page: Page) -> None:
        """Add another page."""
        if page.serial == self.serial:
            self.pages.append(page.data)
            self.flags = page.flags


def split(file: Body) -> Iterator[Parts]:
    """Yield each link of an Ogg file as a file with one Vorbis or Opus stream.

    Raises:
        ApiError: the file is damaged or cut short, or a link has no decodable stream.
    """
    for number, link in enumerate(links := _links(file)):
        if link.serial is None:
            codecs = ", ".join(link.codecs)
            raise unsupported(f"The Ogg file's codec isn't supported: it is {codecs}, and must be Vorbis or Opus.")
        if number == len(links) - 1 and not link.flags & LAST:
            raise undecodable("The Ogg file is cut short: its last page is missing.")
        yield link.pages


def _links(file: Body) -> list[Link]:
    links: list[Link] = []
    in_head = False
    for page in _pages(file):
        if page.flags & FIRST:
            if not in_head:
                links.append(Link())
            links[-1].begin(page)
        elif links:
            links[-1].append(page)
        in_head = bool(page.flags & FIRST)
    if not links:
        raise undecodable("The Ogg file is damaged or cut short: it has no first page.")
    return links


def _pages(file: Body) -> Iterator[Page]:
    """Yield the whole pages with the right checksum.

    Raises:
        ApiError: too much of the file looks like pages, but is not.
    """
    view, at, vain = file.view(), file.find(CAPTURE), 0
    while at >= 0:
        page = _page(view, at)
        if page and _checksum(page.data) == page.data[CHECKSUM]:
            yield page
            at = file.find(CAPTURE, at + len(page.data))
            continue
        vain += len(page.data) if page else HEADER.size
        if vain > len(file) + VAIN_BYTES:
            raise undecodable("The Ogg file is damaged: too many of its pages have a wrong checksum.")
        at = file.find(CAPTURE, at + 1)


def _page(view: memoryview, at: int) -> Page | None:
    """Return the page at an offset, or None if it exceeds the file."""
    if at + HEADER.size > len(view):
        return None
    _, _, flags, _, serial, _, _, segments = HEADER.unpack_from(view, at)
    payload = HEADER.size + segments
    size = payload + sum(view[at + HEADER.size : at + payload])
    return Page(view[at : at + size], flags, serial, payload) if at + size <= len(view) else None


def _checksum(page: memoryview) -> bytes:
    """Return a page's CRC: zlib's polynomial, but neither mirrored nor inverted, with zeros in place of the checksum."""
    mirrored = b"".join((page[: CHECKSUM.start], bytes(4), page[CHECKSUM.stop :])).translate(MIRRORED)
    crc = zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return crc.to_bytes(4, "little").translate(MIRRORED)[::-1]
