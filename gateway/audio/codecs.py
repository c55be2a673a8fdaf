"""Name the codec of a file that libsndfile refuses."""

from __future__ import annotations

from gateway.audio.body import Parts, Pieces

AIFF_CODECS = frozenset(
    b"NONE none sowt twos raw  in24 42ni in32 23ni fl32 FL32 fl64 FL64 ulaw ULAW alaw ALAW ima4 GSM  DWVW"[at : at + 4]
    for at in range(0, 100, 5)
)
"""Compression types of AIFF-C that libsndfile decodes."""

CAF_CODECS = {b"lpcm", b"alac", b"ulaw", b"alaw"}
"""Format ids of CAF that libsndfile decodes."""

AU_CODECS = frozenset({1, 2, 3, 4, 5, 6, 7, 23, 25, 26, 27})
"""Encodings of AU that libsndfile decodes."""

CAF_FORMAT_ID = slice(28, 32)
"""Offset of the format id in a CAF file, whose description is always the first chunk."""

AU_ENCODING = slice(12, 16)


SEARCHED_BYTES = 64 * 2**10
"""Size of the beginning of a file in which its codec is searched."""


def unsupported_codec(parts: Parts) -> str:
    """Return the name of the codec of an AIFF-C, CAF or AU file; empty if libsndfile decodes it."""
    file = Pieces(parts).read(SEARCHED_BYTES) or b""
    if file.startswith(b"FORM") and file[8:12] == b"AIFC":
        at = file.find(b"COMM")
        kind = file[at + 26 : at + 30] if at >= 0 else b""
        return _shown(kind) if kind not in AIFF_CODECS else ""
    if file.startswith(b"caff"):
        kind = file[CAF_FORMAT_ID]
        return _shown(kind) if kind not in CAF_CODECS else ""
    if file.startswith((b".snd", b"dns.")):
        encoding = int.from_bytes(file[AU_ENCODING], "big" if file.startswith(b".snd") else "little")
        return f"encoding {encoding}" if encoding not in AU_CODECS else ""
    return ""


def _shown(kind: bytes) -> str:
    return repr(kind.decode("latin-1")) if kind else ""
