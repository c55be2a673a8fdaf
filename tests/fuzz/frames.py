"""Coverage-guided fuzzing of what a WebSocket's client says: ``python tests/fuzz/frames.py DIRECTORY|FILE [options]``.

An input's first byte says whether a binary frame, a text frame, or a session (mutated from one that is good) follows.
Anything but acceptance or an ``ApiError`` is a crash, and so is a session that is taken though it is not one that was issued.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import atheris
from pydantic import SecretStr

sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(include=["gateway.api.native_websocket", "gateway.live.resume", "itsdangerous"]):
    from gateway.api.native_websocket import Control, read_frame, read_resume
    from gateway.live.resume import SessionToken, SessionTokens
from gateway.config.settings import Settings
from gateway.errors import ApiError
from tests.fuzz.guided import main

SETTINGS = Settings(session_key=SecretStr("a key for the fuzzer"), max_frame_bytes=4096)
TOKENS = SessionTokens(SETTINGS)
ISSUED = [
    SessionToken("amira", "balanced"),
    SessionToken("amira", "balanced", 61_440, "c3RhdGU=", 41, 13, 8),
    SessionToken("other", "balanced", 15_360, "", 0, 0, 0),
]
SESSIONS = [TOKENS.issue(token) for token in ISSUED]
BINARY, TEXT, SESSION, BYTES_OF_A_CHANGE = 0, 1, 2, 3


def fuzz(data: bytes) -> None:
    """Take one frame."""
    if not data:
        return
    kind, said = data[0] % 3, data[1:]
    try:
        if kind == BINARY:
            content = read_frame(said, SETTINGS.max_frame_bytes)
            if isinstance(content, Control):
                assert content.value == said
            else:
                assert content.tobytes() == said
                assert 2 <= len(said) <= SETTINGS.max_frame_bytes
        elif kind == TEXT:
            assert TOKENS.redeem(read_resume(said.decode("utf-8", "replace")), "amira")[0] in ISSUED
        else:
            changed = bytearray(SESSIONS[said[0] % len(SESSIONS)].encode() if said else b"")
            for turn in range(1, len(said) - 2, BYTES_OF_A_CHANGE):
                place = int.from_bytes(said[turn : turn + 2], "big") % (len(changed) or 1)
                changed[place : place + 1] = said[turn + 2 : turn + 3]
            assert TOKENS.redeem(changed.decode("utf-8", "replace"), "amira")[0] in ISSUED
    except ApiError:
        return


def seeds() -> Iterator[bytes]:
    """Frames as they are meant to be, and a session with a byte changed."""
    yield b"\0" + bytes(640)
    for text in SESSIONS:
        yield b'\1{"type":"resume","session":"' + text.encode() + b'"}'
    yield b"\2\1"
    yield b"\2\1\0\5x"
    yield b"\2\0\0\x20."


if __name__ == "__main__":
    main(fuzz, seeds)
