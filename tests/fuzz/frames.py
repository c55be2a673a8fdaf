"""Coverage-guided fuzzing of a WebSocket client's frames: ``python tests/fuzz/frames.py DIRECTORY|FILE [options]``.

The first byte of an input chooses a binary frame, a text frame, a session token (mutated from a good one), or the start of a
stream. Anything but acceptance or an ``ApiError`` is a crash, and so is a token that is accepted but was not issued.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import atheris
from pydantic import SecretStr

sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(
    include=["gateway.api.native_websocket", "gateway.audio", "gateway.live.resume", "itsdangerous"]
):
    from gateway.api.native_websocket import Control, read_frame, read_resume
    from gateway.audio.sniff import StreamStart
    from gateway.live.resume import SessionToken, SessionTokens
from gateway.config.settings import Settings
from gateway.errors import ApiError
from tests.fuzz.guided import main
from tests.fuzz.recordings import files, pcm

MAX_FRAME_BYTES = 4096
TOKENS = SessionTokens(Settings(session_key=SecretStr("a key for the fuzzer")))
ISSUED = [
    SessionToken("amira", "balanced"),
    SessionToken("amira", "balanced", 61_440, "c3RhdGU=", 41, 13, 8),
    SessionToken("other", "balanced", 15_360, "", 0, 0, 0),
]
TEXTS = [TOKENS.issue(token) for token in ISSUED]
BINARY, TEXT, TOKEN, START = range(4)
CHANGE_BYTES = 3
"""A change of a token: two bytes of position, and the new byte."""


def fuzz(data: bytes) -> None:
    """Read one frame."""
    if not data:
        return
    kind, content = data[0] % 4, data[1:]
    try:
        if kind == BINARY:
            taken = read_frame(content, MAX_FRAME_BYTES)
            assert isinstance(taken, Control) or (taken == content and 2 <= len(content) <= MAX_FRAME_BYTES)
        elif kind == TEXT:
            assert TOKENS.redeem(read_resume(content.decode("utf-8", "replace")), "amira")[0] in ISSUED
        elif kind == TOKEN:
            changed = bytearray(TEXTS[content[0] % len(TEXTS)].encode() if content else b"")
            for at in range(1, len(content) - 2, CHANGE_BYTES):
                place = int.from_bytes(content[at : at + 2], "big") % (len(changed) or 1)
                changed[place : place + 1] = content[at + 2 : at + 3]
            assert TOKENS.redeem(changed.decode("utf-8", "replace"), "amira")[0] in ISSUED
        elif content:
            start, frame_bytes = StreamStart(), 1 + content[0]
            for at in range(1, len(content), frame_bytes):
                start.check(content[at : at + frame_bytes])
            start.end()
    except ApiError:
        return


def seeds() -> Iterator[bytes]:
    """Yield good frames, tokens with a byte changed, and starts of streams."""
    yield b"\0" + bytes(640)
    for text in TEXTS:
        yield b'\1{"type":"resume","session":"' + text.encode() + b'"}'
    yield b"\2\1"
    yield b"\2\1\0\5x"
    yield b"\2\0\0\x20."
    for start in (*files(), pcm(), b"WEBVTT\n\n00:00.000 --> 00:02.000\n" * 9, "<p>text of a page</p>".encode("utf-16") * 9):
        yield b"\3\xff" + start


if __name__ == "__main__":
    main(fuzz, seeds)
