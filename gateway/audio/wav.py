"""Repair the missing or wrong sizes in WAV headers (RIFF, RIFX, RF64, BW64), as players do.

A WAV file is a list of chunks (Multimedia Programming Interface and Data Specifications 1.0, 1991). Recorders that write to a
pipe, or that crash, leave sizes of 0 or of the maximum. libsndfile relies on the sizes, so it gets a new minimal header with
the right ones before the audio.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum

from gateway.audio import mp3
from gateway.audio.body import Body, Part, Parts
from gateway.audio.convert import check_format
from gateway.audio.errors import undecodable, unsupported
from gateway.audio.raw import Encoding, RawFormat

STREAMED = 0x7FFF0000
"""Minimum of sizes that mean an unknown size."""

MAX_STREAM_HEADER_BYTES = 64 * 2**10
"""Maximum size of what comes before the audio of a stream: pictures and edit lists of tens of kilobytes occur."""

RIFF_HEADER_BYTES, CHUNK_HEADER_BYTES = 12, 8
MAX_CHUNKS = 128
"""Maximum number of chunks up to the audio. Recorders and editors write up to about 20; a million empty ones cost seconds."""

MIN_FORMAT_BYTES = 16
DS64_DATA_SIZE = slice(8, 16)
"""Offset of the data's size in a ds64 chunk (EBU Tech 3306)."""

EXTENSIBLE, EXTENSIBLE_BYTES = 0xFFFE, 40
GUID = slice(24, 40)
GUID_TAILS = (bytes.fromhex("0000 1000 8000 00aa00389b71"), bytes.fromhex("2107 d311 8644 c8c1ca000000"))
"""Last 12 bytes of a codec's GUID (KSDATAFORMAT_SUBTYPE, and ambisonics); the codec's number precedes it."""


class Payload(Enum):
    """Decoder of the audio of a WAV file."""

    WAV = "WAV"
    MP3 = "MP3"


@dataclass(frozen=True)
class Codec:
    """An audio codec of WAV files.

    Attributes:
        name: name of the codec.
        payload: decoder of the audio; None if there is none.
        samples: whether it is a sequence of plain samples, whose format has only 16 bytes.
    """

    name: str
    payload: Payload | None = None
    samples: bool = False


CODECS = {
    0x0001: Codec("PCM", Payload.WAV, samples=True),
    0x0002: Codec("MS ADPCM", Payload.WAV),
    0x0003: Codec("float", Payload.WAV, samples=True),
    0x0006: Codec("A-law", Payload.WAV, samples=True),
    0x0007: Codec("µ-law", Payload.WAV, samples=True),
    0x0011: Codec("IMA ADPCM", Payload.WAV),
    0x0031: Codec("GSM 6.10", Payload.WAV),
    0x0038: Codec("NMS ADPCM", Payload.WAV),
    0x0040: Codec("G.721 ADPCM", Payload.WAV),
    0x0050: Codec("MPEG", Payload.MP3),
    0x0055: Codec("MP3", Payload.MP3),
    0x0014: Codec("G.723 ADPCM"),
    0x0017: Codec("Dialogic ADPCM"),
    0x0022: Codec("TrueSpeech"),
    0x0042: Codec("G.723.1"),
    0x0045: Codec("G.726 ADPCM"),
    0x0064: Codec("G.726 ADPCM"),
    0x0065: Codec("G.722 ADPCM"),
    0x0083: Codec("G.729"),
    0x0092: Codec("AC-3"),
    0x00FF: Codec("AAC"),
    0x0130: Codec("ACELP"),
    0x0160: Codec("WMA"),
    0x0161: Codec("WMA 2"),
    0x0162: Codec("WMA Pro"),
    0x0163: Codec("WMA lossless"),
    0x0270: Codec("ATRAC3"),
    0x1600: Codec("AAC (ADTS)"),
    0x1602: Codec("AAC (LOAS)"),
    0x1610: Codec("HE-AAC"),
    0x2000: Codec("AC-3"),
    0x2001: Codec("DTS"),
    0x566F: Codec("Vorbis"),
    0x674F: Codec("Vorbis"),
    0x704F: Codec("Opus"),
    0xA109: Codec("Speex"),
    0xF1AC: Codec("FLAC"),
}
"""Codecs by their number (RFC 2361, and Microsoft's mmreg.h)."""


STREAM_ENCODINGS = {
    (0x0001, 16): Encoding.LINEAR16,
    (0x0003, 32): Encoding.FLOAT32,
    (0x0006, 8): Encoding.ALAW,
    (0x0007, 8): Encoding.MULAW,
}
"""Encodings of raw audio by number and bits per sample of the codec."""

STREAM_CODECS = "16-bit PCM, 32-bit float, A-law or µ-law, little-endian"


@dataclass(frozen=True)
class Chunk:
    """A part of a WAV file.

    Attributes:
        name: four characters.
        start: offset of its content.
        size: declared size of its content, in bytes.
    """

    name: bytes
    start: int
    size: int

    @property
    def end(self) -> int:
        """Offset after its content."""
        return self.start + self.size

    @property
    def next(self) -> int:
        """Offset of the next chunk; content of odd size is padded."""
        return self.end + self.size % 2


def repair(file: Body) -> tuple[Payload, Parts]:
    """Return a WAV file's audio in a form that libsndfile reads to its end.

    Args:
        file: the whole file.

    Returns:
        The decoder of the audio, and a WAV file with a minimal header or the MP3 stream in the file.

    Raises:
        ApiError: the file is damaged or cut short, or its codec is not supported.
    """
    big = file.startswith(b"RIFX")
    order = ">" if big else "<"
    chunks = _chunks(file, order)
    form = next((file[chunk.start : chunk.end] for chunk in chunks if chunk.name == b"fmt "), b"")
    data = next((chunk for chunk in chunks if chunk.name == b"data"), None)
    if len(form) < MIN_FORMAT_BYTES or not data:
        raise undecodable("The WAV file is damaged or cut short: it has no format, or no audio.")
    codec, form = _codec(form, order)
    end = _end_of_audio(file, order, chunks, data)
    if codec.payload is Payload.MP3:
        return Payload.MP3, mp3.repair(file.part(data.start, end))
    audio = file.view(data.start, end)
    fact = next((file[chunk.start : chunk.end] for chunk in chunks if chunk.name == b"fact" and not codec.samples), b"")
    parts: list[tuple[bytes, Part]] = [(b"fmt ", form), *([(b"fact", fact)] if fact else []), (b"data", audio)]
    pieces = [
        piece for name, part in parts for piece in (name, struct.pack(f"{order}I", len(part)), part, bytes(len(part) % 2))
    ]
    size = struct.pack(f"{order}I", len(b"WAVE") + sum(map(len, pieces)))
    return Payload.WAV, [b"RIFX" if big else b"RIFF", size, b"WAVE", *pieces]


@dataclass(frozen=True)
class StreamHeader:
    """The header of a WAV stream.

    Attributes:
        format: format of the samples.
        start: offset of the first sample.
        size: size of the audio in bytes; None if the recorder did not know it.
    """

    format: RawFormat
    start: int
    size: int | None


def read_stream_header(head: bytes) -> StreamHeader | int:
    """Read the header of a WAV stream.

    Args:
        head: beginning of the stream.

    Returns:
        The number of bytes that the header has at least, where ``head`` does not have all of it.

    Raises:
        ApiError: the stream is damaged, its header too large, or its codec not one of raw audio.
    """
    order = ">" if head.startswith(b"RIFX") else "<"
    file = Body(head)
    chunks = _chunks(file, order)
    data = next((chunk for chunk in chunks if chunk.name == b"data"), None)
    needed = data.start if data else (chunks[-1].next if chunks else RIFF_HEADER_BYTES) + CHUNK_HEADER_BYTES
    if needed > MAX_STREAM_HEADER_BYTES:
        raise undecodable(f"The WAV stream's header has more than {MAX_STREAM_HEADER_BYTES} bytes.")
    if not data:
        return needed
    form = next((head[chunk.start : chunk.end] for chunk in chunks if chunk.name == b"fmt "), b"")
    if len(form) < MIN_FORMAT_BYTES:
        raise undecodable("The WAV stream is damaged: it has no format.")
    codec, form = _codec(form, order)
    number, channels, rate, _, _, bits = struct.unpack(f"{order}HHIIHH", form[:MIN_FORMAT_BYTES])
    encoding = STREAM_ENCODINGS.get((number, bits))
    if not encoding or order == ">":
        raise unsupported(
            f"The WAV stream's codec, {bits}-bit {codec.name}, isn't supported; streams may have {STREAM_CODECS}."
        )
    check_format(channels, rate)
    size = None if data.size == 0 or data.size >= STREAMED else data.size
    return StreamHeader(RawFormat(encoding, rate, channels), data.start, size)


def _chunks(file: Body, order: str) -> list[Chunk]:
    """List the chunks up to the audio.

    Raises:
        ApiError: there are more than ``MAX_CHUNKS``.
    """
    chunks: list[Chunk] = []
    at = RIFF_HEADER_BYTES
    while at + CHUNK_HEADER_BYTES <= len(file):
        if len(chunks) == MAX_CHUNKS:
            raise undecodable(f"The WAV file has more than {MAX_CHUNKS} chunks before its audio.")
        name, size = struct.unpack(f"{order}4sI", file[at : at + CHUNK_HEADER_BYTES])
        chunk = Chunk(name, at + CHUNK_HEADER_BYTES, size)
        chunks.append(chunk)
        if name == b"data":
            break
        at = chunk.next
    return chunks


def _end_of_audio(file: Body, order: str, chunks: list[Chunk], data: Chunk) -> int:
    """Return the offset after the last byte of audio.

    Raises:
        ApiError: the file is cut short: all its sizes agree on a larger size.
    """
    (riff_size,) = struct.unpack(f"{order}I", file[4:8])
    size = data.size
    if file[:4] in (b"RF64", b"BW64"):
        ds64 = next((file[chunk.start : chunk.end] for chunk in chunks if chunk.name == b"ds64"), b"")
        if size == 2**32 - 1 and len(ds64) >= DS64_DATA_SIZE.stop:
            size = int.from_bytes(ds64[DS64_DATA_SIZE], "little")
            riff_size = int.from_bytes(ds64[:8], "little")
    if size == 0 and not _are_chunks(file, order, data.start):
        return len(file)  # the recorder stopped before it wrote the size
    declared_end = data.start + size
    if declared_end <= len(file) or size >= STREAMED:
        return min(declared_end, len(file))
    # Some sizes include the header; in a file that lacks its end, both sizes are too large.
    if declared_end > len(file) + data.start and riff_size + CHUNK_HEADER_BYTES > len(file):
        raise undecodable(f"The WAV file is cut short: it declares {declared_end} bytes, but has {len(file)}.")
    return len(file)


def _are_chunks(file: Body, order: str, at: int) -> bool:
    """Return whether a list of chunks, or nothing, fills the rest of a file; the last padding may be missing."""
    for _ in range(MAX_CHUNKS):
        if at + CHUNK_HEADER_BYTES > len(file):
            return at in (len(file), len(file) + 1)
        name, size = struct.unpack(f"{order}4sI", file[at : at + CHUNK_HEADER_BYTES])
        if not name.isascii() or not name.decode("ascii").isprintable():
            return False
        at = Chunk(name, at + CHUNK_HEADER_BYTES, size).next
    return False


def _codec(form: bytes, order: str) -> tuple[Codec, bytes]:
    """Return the codec of a format, and the format converted from the extensible form.

    Raises:
        ApiError: the codec is not supported.
    """
    (number,) = struct.unpack_from(f"{order}H", form)
    extension = form[MIN_FORMAT_BYTES:]
    if number == EXTENSIBLE:
        if len(form) < EXTENSIBLE_BYTES:
            raise undecodable("The WAV file is damaged: its format is extensible, but names no codec.")
        guid = form[GUID]
        (number,) = struct.unpack_from(f"{order}I", guid)
        if guid[4:] not in GUID_TAILS:
            raise unsupported(f"The WAV file's codec, GUID {guid.hex()}, isn't supported.")
        rest = form[EXTENSIBLE_BYTES:]
        extension = struct.pack(f"{order}H", len(rest)) + rest
    codec = CODECS.get(number)
    if not codec or not codec.payload:
        named = f" ({codec.name})" if codec else ""
        raise unsupported(f"The WAV file's codec, 0x{number:04x}{named}, isn't supported.")
    plain = struct.pack(f"{order}H", number) + form[2:MIN_FORMAT_BYTES]
    return codec, plain if codec.samples else plain + extension
