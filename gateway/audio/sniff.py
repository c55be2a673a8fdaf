"""Identify a body by its content: a file format, text, or raw PCM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from gateway.audio.body import Slices
from gateway.audio.frames import find_frames
from gateway.audio.text import describe_text
from gateway.errors import ApiError, ErrorKind


@dataclass(frozen=True)
class Format:
    """Format of a body.

    Attributes:
        name: name in messages.
        decodable: whether ``files`` decodes it.
        demuxer: FFmpeg's name, if only FFmpeg decodes it.
    """

    name: str
    decodable: bool = False
    demuxer: str = ""


RAW = Format("raw PCM")
WAV = Format("WAV", decodable=True)
W64 = Format("W64", decodable=True)
AIFF = Format("AIFF", decodable=True)
AU = Format("AU", decodable=True)
CAF = Format("CAF", decodable=True)
FLAC = Format("FLAC", decodable=True)
OGG = Format("Ogg", decodable=True)
MP3 = Format("MP3", decodable=True)
MP4 = Format("MP4", decodable=True, demuxer="mov")
QUICKTIME = Format("QuickTime", decodable=True, demuxer="mov")
WEBM = Format("WebM or Matroska", decodable=True, demuxer="matroska")
ADTS = Format("AAC (ADTS)", decodable=True, demuxer="aac")
AMR = Format("AMR", decodable=True, demuxer="amr")
ASF = Format("ASF or WMA", decodable=True, demuxer="asf")

DECODABLE = {
    format_.name: format_ for format_ in (WAV, W64, AIFF, AU, CAF, FLAC, OGG, MP3, MP4, QUICKTIME, WEBM, ADTS, AMR, ASF)
}
"""The formats that ``files`` decodes, by name."""


LIVE_DEMUXERS = {OGG: "ogg", WEBM: "matroska", FLAC: "flac"}
"""FFmpeg's names of the containers that are decoded as they come."""


LIVE_MAGICS = (b"RIFF", b"RF64", b"OggS", b"fLaC", b"\x1a\x45\xdf\xa3")
"""First bytes of what a stream may be besides raw audio."""


class Content(NamedTuple):
    """A body's format, and where it begins.

    Attributes:
        format: the format.
        start: offset of the format's first byte, after tags.
    """

    format: Format
    start: int = 0


class Signature(NamedTuple):
    """Bytes that identify a format.

    Attributes:
        format: the format.
        parts: offsets and bytes. The first part must match wholly, the others as far as the body goes.
    """

    format: Format
    parts: tuple[tuple[int, bytes], ...]


def _at_start(format_: Format | str, *magics: bytes) -> list[Signature]:
    return [Signature(Format(format_) if isinstance(format_, str) else format_, ((0, magic),)) for magic in magics]


def _riff(format_: Format | str, form: bytes, *containers: bytes) -> list[Signature]:
    kind = Format(format_) if isinstance(format_, str) else format_
    return [Signature(kind, ((0, container), (8, form))) for container in containers]


def _box(format_: Format, *kinds: bytes) -> list[Signature]:
    return [Signature(format_, ((4, kind),)) for kind in kinds]


SIGNATURES: tuple[Signature, ...] = (
    # Audio that is decoded
    *_riff(WAV, b"WAVE", b"RIFF", b"RIFX", b"RF64", b"BW64"),
    *_at_start(W64, b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"),
    *_riff(AIFF, b"AIFF", b"FORM"),
    *_riff(AIFF, b"AIFC", b"FORM"),
    *_at_start(AU, b".snd", b"dns."),
    *_at_start(CAF, b"caff"),
    *_at_start(FLAC, b"fLaC"),
    *_at_start(OGG, b"OggS"),
    *_at_start(WEBM, b"\x1a\x45\xdf\xa3"),
    *_box(MP4, b"ftyp", b"styp", b"moof", b"moov", b"mdat", b"sidx", b"emsg"),
    *_box(QUICKTIME, b"wide", b"free", b"skip", b"pnot"),
    *_at_start(AMR, b"#!AMR\n", b"#!AMR-WB\n"),
    *_at_start(ASF, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
    # Other audio and video
    *_at_start("WebM or Matroska without its beginning", b"\x1f\x43\xb6\x75"),
    *_at_start("AMR with several channels", b"#!AMR"),
    *_riff("AVI", b"AVI ", b"RIFF"),
    *_riff("WebP", b"WEBP", b"RIFF"),
    *_riff("RIFF MIDI", b"RMID", b"RIFF"),
    *_at_start("RIFF other than WAV", b"RIFF", b"RIFX"),
    *_at_start("RF64 other than WAV", b"RF64", b"BW64"),
    *_at_start("IFF other than AIFF", b"FORM"),
    *_at_start("AAC (ADIF)", b"ADIF"),
    *_at_start("FLV", b"FLV\x01"),
    *_at_start("MIDI", b"MThd"),
    *_at_start("RealMedia", b".RMF", b".ra\xfd"),
    *_at_start("MPEG program stream", b"\0\0\x01\xba"),
    *_at_start("MPEG video", b"\0\0\x01\xb3"),
    *_at_start("Monkey's Audio", b"MAC "),
    *_at_start("WavPack", b"wvpk"),
    *_at_start("True Audio", b"TTA1", b"TTA2"),
    *_at_start("Musepack", b"MPCK", b"MP+"),
    *_at_start("TAK", b"tBaK"),
    *_at_start("OptimFROG", b"OFR "),
    *_at_start("Shorten", b"ajkg"),
    *_at_start("DSD", b"DSD ", b"FRM8"),
    *_at_start("DTS", b"\x7f\xfe\x80\x01", b"\xfe\x7f\x01\x80", b"\x1f\xff\xe8\x00", b"\xff\x1f\x00\xe8"),
    *_at_start("SILK", b"#!SILK", b"\x02#!SILK"),
    *_at_start("VOC", b"Creative Voice File"),
    *_at_start("NIST SPHERE", b"NIST_1A"),
    *_at_start("QOA", b"qoaf"),
    *_at_start("NUT", b"nut/multimedia container\0"),
    *_at_start("SoX", b".SoX", b"XoS."),
    *_at_start("IRCAM", *(bytes((0x64, 0xA3, machine, 0)) for machine in range(1, 5)), b"\0\x03\xa3\x64", b"\0\x02\xa3\x64"),
    *_at_start("Flash", b"FWS", b"CWS", b"ZWS"),
    *_at_start("WTV", b"\xb7\xd8\x00\x20\x37\x49\xda\x11"),
    *_at_start("Codec 2", b"\xc0\xde\xc2"),
    *_at_start("MMF", b"MMMD"),
    *_at_start("SMJPEG", b"\0\nSMJPEG"),
    *_at_start("S/PDIF", b"\x72\xf8\x1f\x4e"),
    *_at_start("audio of a game", b"KVAG", b"STRM", b"ASF\0"),
    Signature(Format("MLP or TrueHD"), ((4, b"\xf8\x72\x6f\xba"),)),
    Signature(Format("MLP or TrueHD"), ((4, b"\xf8\x72\x6f\xbb"),)),
    Signature(Format("stream of ASF"), ((12, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),)),
    *_at_start("tracker module", b"Extended Module: ", b"IMPM"),
    *_at_start("SoundFont", b"sfbk"),
    # Not audio
    *_at_start("ZIP", b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08"),
    *_at_start("gzip", b"\x1f\x8b\x08"),
    *_at_start("bzip2", b"BZh"),
    *_at_start("xz", b"\xfd7zXZ\0"),
    *_at_start("7-Zip", b"7z\xbc\xaf\x27\x1c"),
    *_at_start("Zstandard", b"\x28\xb5\x2f\xfd"),
    *_at_start("LZ4", b"\x04\x22\x4d\x18"),
    *_at_start("RAR", b"Rar!\x1a\x07"),
    Signature(Format("tar"), ((257, b"ustar"),)),
    *_at_start("PDF", b"%PDF"),
    *_at_start("PNG", b"\x89PNG"),
    *_at_start("JPEG", b"\xff\xd8\xff"),
    *_at_start("GIF", b"GIF87a", b"GIF89a"),
    *_at_start("TIFF", b"II*\0", b"MM\0*"),
    *_at_start("Office document", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
    *_at_start("SQLite", b"SQLite format 3\0"),
    *_at_start("HDF5", b"\x89HDF\r\n"),
    *_at_start("NumPy array", b"\x93NUMPY"),
    *_at_start("Python pickle", b"\x80\x04\x95", b"\x80\x05\x95"),
    *_at_start("Parquet", b"PAR1"),
    *_at_start("Arrow", b"ARROW1\0\0"),
    *_at_start("ELF program", b"\x7fELF"),
    *_at_start("WebAssembly", b"\0asm\x01\0\0\0"),
    *_at_start("packet capture", b"\xd4\xc3\xb2\xa1\x02\0", b"\x0a\x0d\x0d\x0a"),
)
"""All signatures; the first match counts. Shorter ones would match raw PCM by chance."""

ID3, ID3_HEADER_BYTES, ID3_FOOTER_FLAG = b"ID3", 10, 0x10
MAX_TAGS = 16
"""Maximum number of ID3v2 tags at the start of a file that are skipped."""

HEAD_BYTES = 8192
"""Size of the beginning that is searched for frames of MP3, AAC and other formats without a signature."""


MIN_STREAM_BYTES = 16
"""Size of the beginning of a stream by which it is identified."""

RECHECK_GROWTH = 2
"""Growth of a stream's beginning after which it is checked again, so that not every tiny frame costs a check."""


def identify(body: Slices, *, complete: bool = True) -> Content:
    """Identify a body by its content.

    Args:
        body: the body, or its beginning.
        complete: whether it is the whole body.

    Returns:
        Its format; ``RAW`` if it may be raw PCM.
    """
    start = skip_tags(body)
    head = body[start : start + HEAD_BYTES]
    for format_, parts in SIGNATURES:
        if _matches(head, parts, complete=complete):
            return Content(format_, start)
    if found := find_frames(head, complete=complete and len(body) - start <= HEAD_BYTES):
        name, at = found
        return Content(DECODABLE.get(name) or Format(name), start + at)
    if start:
        return Content(MP3, start)  # almost all files with ID3 tags are MP3
    if kind := describe_text(body, complete=complete):
        return Content(Format(kind))
    return Content(RAW)


def skip_tags(body: Slices) -> int:
    """Return the offset after all ID3v2 tags (id3.org, ID3v2.4, section 3.1)."""
    start = 0
    for _ in range(MAX_TAGS):
        header = body[start : start + ID3_HEADER_BYTES]
        if len(header) < ID3_HEADER_BYTES or not header.startswith(ID3) or any(byte & 0x80 for byte in header[6:]):
            break
        size = header[6] << 21 | header[7] << 14 | header[8] << 7 | header[9]
        start += ID3_HEADER_BYTES * (2 if header[5] & ID3_FOOTER_FLAG else 1) + size
    return start


def _matches(head: bytes, parts: tuple[tuple[int, bytes], ...], *, complete: bool) -> bool:
    (first_offset, first), *others = parts
    if not head.startswith(first, first_offset):
        return False
    for offset, magic in others:
        there = head[offset : offset + len(magic)]
        if not (magic.startswith(there) if complete else there == magic):
            return False
    return True


class StreamStart:
    """Identifies a stream by its first bytes."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._checked_bytes = 0

    @property
    def complete(self) -> bool:
        """Whether the stream is identified finally."""
        return self._checked_bytes >= HEAD_BYTES

    def check(self, audio: bytes) -> Format | None:
        """Check the next bytes of the stream; after the first ``HEAD_BYTES`` this costs nothing.

        Returns:
            The stream's format so far: ``RAW``, or a container that is decoded as it arrives; None if more bytes are needed.

        Raises:
            ApiError: ``UNSUPPORTED_MEDIA``, the stream is another file, text or another encoding.
        """
        if self.complete:
            return RAW
        self._head += audio[: HEAD_BYTES - len(self._head)]
        if len(self._head) >= min(HEAD_BYTES, max(MIN_STREAM_BYTES, self._checked_bytes * RECHECK_GROWTH)):
            return self._identify(complete=False)
        return RAW if self._checked_bytes else None

    @property
    def may_be_container(self) -> bool:
        """Whether the received bytes are the beginning of a container, or may become one."""
        return any(magic.startswith(self._head[: len(magic)]) for magic in LIVE_MAGICS)

    def end(self) -> Format:
        """Check a stream at its end.

        Raises:
            ApiError: as ``check``.
        """
        if len(self._head) > self._checked_bytes:
            return self._identify(complete=len(self._head) < HEAD_BYTES)
        return RAW

    def _identify(self, *, complete: bool) -> Format:
        self._checked_bytes = len(self._head)
        found = identify(bytes(self._head), complete=complete)
        if found.format == RAW or (found.format in (WAV, *LIVE_DEMUXERS) and not found.start):
            return found.format
        message = (
            f"The stream starts like {found.format.name}; streams must be raw audio, WAV, FLAC, Ogg (Opus, Vorbis) or WebM."
        )
        raise ApiError(ErrorKind.UNSUPPORTED_MEDIA, message)
