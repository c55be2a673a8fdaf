"""Recognise text, which clients send by mistake instead of audio."""

from __future__ import annotations

import re
import string
from unicodedata import category

from gateway.audio.body import Slices

MIN_BYTES, MIN_HEAD_BYTES = 16, 64
"""Minimum size of text, of a whole body and of a body's beginning; shorter text may be raw PCM by chance."""

MIN_LEGACY_BYTES = 64
"""The same for 8-bit encodings, where more bytes are printable."""

MIN_ASCII_SHARE = 0.8
"""Minimum share of ASCII in text of an 8-bit encoding."""

MIN_MARKED_CHARS = 16
"""Minimum length of text after a byte order mark, which is also the sample -2 or -257."""

MIN_UNMARKED_CHARS, MIN_SPACE_SHARE = 32, 0.02
"""Minimum length of UTF-16 text without a byte order mark, and its minimum share of white space.

A quiet recording with a DC offset has the same range of values as UTF-16 text, but a recording rarely takes the values of
white space (9 to 13, and 32) while it takes no other below 32 and none above 126."""

MIN_DISTINCT_CHARS = 5
"""Minimum number of different characters in text; a square wave has up to four different bytes."""

HEAD_BYTES = 1024
"""Number of bytes that are checked first."""

MAX_BYTES = 64 * 2**10
"""Maximum number of bytes that are checked: two seconds of raw PCM. That takes up to 3 ms, in the event loop."""

WHITE = b"\t\n\v\f\r"
CONTROLS = bytes(set(range(0x20)) - set(WHITE)) + b"\x7f"
NOT_ASCII = bytes(range(0x80, 0x100))

BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\0\0", "utf-32-le"),
    (b"\0\0\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
KINDS = (
    (r"WEBVTT", "WebVTT"),
    (r"(?s)<(!doctype html|html|head|body)\b", "HTML"),
    (r"<(\?xml|[a-z!])", "XML"),
    (r"#EXTM3U|\[playlist\]", "playlist"),
    (r"data:[a-z]+/", "data URL"),
    (r"\d+\s+\d\d:\d\d:\d\d,\d\d\d -->", "SubRip"),
    (r"[{\[]", "JSON"),
    (r"[A-Za-z0-9+/\s]+={0,2}\s*$", "Base64"),
)
"""Patterns at the start of text, and the kind that they show; the last one matches the whole head."""


def describe_text(body: Slices, *, complete: bool = True) -> str | None:
    """Return the kind of text of a body, such as "JSON text"; None if it may be audio.

    Args:
        body: the body, or its beginning.
        complete: whether it is the whole body; otherwise the last character may be cut.
    """
    if len(body) < (MIN_BYTES if complete else MIN_HEAD_BYTES):
        return None
    text = _decode(body[:HEAD_BYTES], complete=complete and len(body) <= HEAD_BYTES)
    if (
        text is None
        or len(set(text)) < MIN_DISTINCT_CHARS
        or (len(body) > HEAD_BYTES and _decode(body[:MAX_BYTES], complete=complete and len(body) <= MAX_BYTES) is None)
    ):
        return None
    head = text[:HEAD_BYTES].lstrip()
    kind = next((name for pattern, name in KINDS if re.match(pattern, head, re.IGNORECASE)), None)
    if kind == "Base64" and (len(head.split()) > 1 + len(head) // 60 or len(head) < MIN_LEGACY_BYTES):
        kind = None  # words, not lines of Base64
    return f"{kind} text" if kind else "text"


def _decode(data: bytes, *, complete: bool) -> str | None:
    """Decode text in any common encoding; return None if it is not text."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            text = _printable(data[len(mark) :], encoding, complete=complete)
            if text and len(text) >= MIN_MARKED_CHARS:
                return text
    if len(data.translate(None, CONTROLS)) == len(data):
        if (text := _printable(data, "utf-8", complete=complete)) is not None:
            return text
        ascii_bytes = len(data.translate(None, NOT_ASCII))
        return data.decode("latin-1") if len(data) >= MIN_LEGACY_BYTES and ascii_bytes >= MIN_ASCII_SHARE * len(data) else None
    for encoding in ("utf-16-le", "utf-16-be"):
        text = _printable(data, encoding, complete=complete)
        if text and text.isascii() and len(text) >= MIN_UNMARKED_CHARS:
            spaces = sum(map(text.count, string.whitespace))
            if spaces >= MIN_SPACE_SHARE * len(text):
                return text
    return None


def _printable(data: bytes, encoding: str, *, complete: bool) -> str | None:
    """Decode text without control, private and unassigned characters; drop the cut last character of an incomplete text."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if complete or len(data) - error.start > 3:  # noqa: PLR2004 (a character has at most 4 bytes)
            return None
        text = data[: error.start].decode(encoding)
    return (
        text if all(char.isprintable() or char in string.whitespace or category(char) == "Cf" for char in set(text)) else None
    )
