"""Coverage-guided fuzzing of what a WebSocket's client says: ``python tests/fuzz/frames.py DIRECTORY|FILE [options]``.

An input's first byte says whether a binary frame, a text frame, or a session (mutated from one that is good) follows.
Anything but acceptance or an ``ApiError`` is a crash, and so is a session that is taken though it is not one that was issued.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import atheris
from pydantic import SecretStr

sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(include=["gateway.api.native_websocket", "gateway.live.resume", "itsdangerous"]):
    from gateway.api.native_websocket import KEEPALIVE, Session
    from gateway.live.resume import Ticket, Tickets
from gateway.limits.access import Admission

from gateway.config.settings import Settings
from gateway.errors import ApiError
from gateway.service import BufferUsage
from gateway.triton.endpoint import Recogniser, Windows
from gateway.triton.pool import Utterance
from tests.fuzz.guided import main

SETTINGS = Settings(session_key=SecretStr("a key for the fuzzer"), max_frame_bytes=4096, max_stream_audio_secs=1)
RECOGNISER = Recogniser("asr_ensemble", (), {"balanced": Windows(64_512, 15_360, 7_680)}, 60.0, 60.0, 256)
TICKETS = Tickets(SETTINGS)
ISSUED = [
    Ticket("amira", "balanced"),
    Ticket("amira", "balanced", 61_440, "c3RhdGU=", 41, 13, 8),
    Ticket("other", "balanced", 15_360, "", 0, 0, 0),
]
SESSIONS = [TICKETS.issue(ticket) for ticket in ISSUED]
BINARY, TEXT, SESSION, BYTES_OF_A_CHANGE = 0, 1, 2, 3


def session(*, resumable: bool) -> Any:
    """A session whose socket and Triton are never asked."""
    service: Any = SimpleNamespace(
        settings=SETTINGS,
        tickets=TICKETS,
        triton=SimpleNamespace(stream=lambda recogniser, _: Utterance(None, recogniser, {"latency": "balanced"}, 1)),  # type: ignore[arg-type]
        options={},
        buffer_usage=BufferUsage(1),
        last_call=None,
        admission=Admission(SETTINGS),
    )
    socket: Any = None
    return Session(socket, service, "amira", RECOGNISER, lambda _: None, resumable=resumable)


def fuzz(data: bytes) -> None:
    """Take one frame."""
    if not data:
        return
    kind, resumable, said = data[0] % 3, data[0] < 0x80, data[1:]
    stream = session(resumable=resumable)
    try:
        if kind == BINARY:
            if said not in (KEEPALIVE, b"\0"):
                stream._check(said)
                assert 2 <= len(said) <= SETTINGS.max_frame_bytes
                assert len(said) % 2 == 0
        elif kind == TEXT:
            stream._resume(said.decode("utf-8", "replace"))
            assert stream._resumed in ISSUED
        else:
            changed = bytearray(SESSIONS[said[0] % len(SESSIONS)].encode() if said else b"")
            for turn in range(1, len(said) - 2, BYTES_OF_A_CHANGE):
                place = int.from_bytes(said[turn : turn + 2], "big") % (len(changed) or 1)
                changed[place : place + 1] = said[turn + 2 : turn + 3]
            assert TICKETS.redeem(changed.decode("utf-8", "replace"), "amira")[0] in ISSUED
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
