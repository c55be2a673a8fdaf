"""State machine of a WebSocket client in any order of messages; it checks the server's answers against docs/API.md."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import numpy.typing as npt
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from gateway.server import MAX_EVENT_BYTES

END, KEEPALIVE = b"\x00", b"\x01"
ANSWER_SECS = 120.0
"""Time limit for an answer; a busy machine decodes some seconds of audio in tens of seconds."""

FREED_SECS = 30.0
"""Time limit for the release of what a client held."""

MAX_SAMPLES = 16_000 * 8
DIALOGUES_A_ROUND = 20
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of 0 s: a close is a reset."""


FIELDS = {"type", "text", "tokens", "confidence", "words", "audio_processed_ms", "stable_chars"}


class Server(NamedTuple):
    """The server under test.

    Attributes:
        url: URL of the gateway.
        max_frame_bytes: setting of the gateway.
        speech: 16 kHz audio.
        transcribe: returns the final text of the first samples of it, sent in one piece.
    """

    url: str
    max_frame_bytes: int
    speech: npt.NDArray[np.int16]
    transcribe: Callable[[int], str]


class Ticket(NamedTuple):
    """An ``ack`` from which a stream can continue.

    Attributes:
        session: session token.
        samples: position of the token.
        text: text before the position.
        heard: number of samples sent by then; the text may depend on them.
    """

    session: str
    samples: int
    text: str
    heard: int


class Dialogue(RuleBasedStateMachine):
    """One client; a subclass sets ``server``."""

    server: Server

    def __init__(self) -> None:
        super().__init__()
        self.connection: ClientConnection | None = None
        self.tickets: list[Ticket] = []
        self.said_audio = self.ended = False

    def _open(self, *, resumable: bool, before: str = "", position: int = 0, heard: int = 0) -> ClientConnection:
        url = f"{self.server.url.replace('http', 'ws', 1)}/v2/decode/stream/amira"
        chosen: dict[str, Any] = {"subprotocols": ["amira.v2"]} if resumable else {}
        connection = connect(url, compression=None, max_size=None, ping_interval=None, **chosen)
        self.connection = connection
        self.resumable, self.before, self.position, self.heard = resumable, before, position, heard
        self.said_audio = self.ended = False
        self.text: str | None = None
        self.finals: list[dict[str, Any]] = []
        self.acknowledged = position
        return connection

    def _hear(self, message: dict[str, Any]) -> None:
        """Check a message of the server."""
        assert not self.finals, f"{message} after the final"
        if message["type"] == "ack":
            assert self.resumable
            assert self.acknowledged <= message["samples"] <= self.position
            self.acknowledged = message["samples"]
            text = (self.before + (self.text or ""))[: message["settled"]["chars"]]
            assert len(text) == message["settled"]["chars"]
            self.heard = max(self.heard, self.position)
            self.tickets.append(Ticket(message["session"], message["samples"], text, self.heard))
            return
        assert set(message) == FIELDS
        assert 0 <= message["stable_chars"] <= len(message["text"])
        if message["type"] == "partial":
            assert message["text"] != (self.text or ""), "a partial without a change"
        else:
            assert message["type"] == "final"
            assert self.ended
            self.finals.append(message)
        self.text = message["text"]

    def _hear_what_is_there(self) -> None:
        with contextlib.suppress(TimeoutError):
            while True:
                self._hear(json.loads(self._socket.recv(timeout=0.005)))

    def _hear_all(self) -> tuple[dict[str, Any] | None, int | None]:
        """Read until the server closes; return the error, if there is one, and the close code."""
        error = None
        connection = self._socket
        with contextlib.suppress(ConnectionClosed):
            while True:
                message = json.loads(connection.recv(timeout=ANSWER_SECS))
                assert error is None, f"{message} after the error"
                if message["type"] == "error":
                    error = message
                else:
                    self._hear(message)
        self.connection = None
        return error, connection.protocol.close_code

    @property
    def _socket(self) -> ClientConnection:
        assert self.connection
        return self.connection

    def _is_refused(self, code: str | None, close_code: int) -> None:
        error, closed_with = self._hear_all()
        assert closed_with == close_code
        assert not self.finals
        if code:
            assert error
            assert error["error"]["code"] == code
            assert error["close_code"] == close_code
        else:
            assert error is None

    def _take(self, samples: int) -> bytes:
        start = self.position
        self.position = min(start + samples, MAX_SAMPLES)
        self.said_audio |= self.position > start
        return self.server.speech[start : self.position].tobytes()

    talking = precondition(lambda self: self.connection and not self.ended)
    silent = precondition(lambda self: not self.connection)

    @silent
    @rule(resumable=st.booleans())
    def opens(self, resumable: bool) -> None:
        self._open(resumable=resumable)

    # Draws must not depend on the number of tickets, which depends on the server's timing.

    @silent
    @rule(choice=st.integers(0, 99))
    def goes_on(self, choice: int) -> None:
        if not self.tickets:
            self._open(resumable=True)
            return
        ticket = self.tickets[choice % len(self.tickets)]
        connection = self._open(resumable=True, before=ticket.text, position=ticket.samples, heard=ticket.heard)
        connection.send(json.dumps({"type": "resume", "session": ticket.session}))

    @silent
    @rule(session=st.text(max_size=50), choice=st.integers(0, 99), place=st.integers(0, 9999), changed=st.booleans())
    def goes_on_with_what_is_no_session(self, session: str, choice: int, place: int, changed: bool) -> None:
        if changed and self.tickets:
            good = self.tickets[choice % len(self.tickets)].session
            place %= len(good) - 1  # the lowest bits of the last character have no meaning
            session = good[:place] + chr(ord(good[place]) ^ 1) + good[place + 1 :]
        self._open(resumable=True).send(json.dumps({"type": "resume", "session": session}))
        self._is_refused("invalid_session", 1007)

    @talking
    @rule(samples=st.one_of(st.integers(1, 100), st.integers(1000, 4000), st.integers(10_000, 60_000)))
    def says(self, samples: int) -> None:
        if audio := self._take(samples):
            self._socket.send(audio)
        self._hear_what_is_there()

    @talking
    @rule(cuts=st.lists(st.integers(0, 3000), min_size=1, max_size=6))
    def says_in_fragments(self, cuts: list[int]) -> None:
        """Send one message in several WebSocket frames, also cut within samples."""
        audio = self._take(sum(cuts) // 2)
        pieces = [audio[sum(cuts[:i]) : sum(cuts[: i + 1])] for i in range(len(cuts))]
        if audio:
            self._socket.send(pieces)

    @talking
    @rule(times=st.integers(1, 20))
    def keeps_alive(self, times: int) -> None:
        for _ in range(times):
            self._socket.send(KEEPALIVE)

    @talking
    @rule(payload=st.binary(max_size=125))
    def pings(self, payload: bytes) -> None:
        assert self._socket.ping(payload).wait(ANSWER_SECS)

    @talking
    @rule(
        case=st.one_of(
            st.tuples(st.binary(min_size=3, max_size=99).filter(lambda b: len(b) % 2), st.just("odd_length"), st.just(1007)),
            st.tuples(st.integers(2, 255).map(lambda b: bytes([b])), st.just("unknown_control"), st.just(1007)),
            st.just((b"", "empty_frame", 1007)),
            st.tuples(st.text(max_size=30), st.just("text_frame"), st.just(1003)),
        )
    )
    def breaks_the_rules(self, case: tuple[bytes | str, str, int]) -> None:
        frame, code, close_code = case
        self._socket.send(frame)
        self._is_refused(code, close_code)

    @talking
    @rule(over=st.sampled_from([2, 1000]))
    def says_too_much(self, over: int) -> None:
        self._socket.send(bytes(self.server.max_frame_bytes + over))
        self._is_refused("frame_too_large", 1009)

    @talking
    @rule()
    def says_far_too_much(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            self._socket.send(bytes(MAX_EVENT_BYTES + 1))
        self._is_refused(None, 1009)

    @talking
    @precondition(lambda self: self.said_audio)
    @rule(choice=st.integers(0, 99))
    def goes_on_too_late(self, choice: int) -> None:
        session = self.tickets[choice % len(self.tickets)].session if self.tickets else "none"
        self._socket.send(json.dumps({"type": "resume", "session": session}))
        self._is_refused("text_frame", 1003)

    @talking
    @rule(after=st.lists(st.sampled_from([END, KEEPALIVE, b"\x07", b"abc", b"", "text", bytes(640)]), max_size=4))
    def ends(self, after: list[bytes | str]) -> None:
        self._socket.send(END)
        self.ended = True
        with contextlib.suppress(ConnectionClosed):
            for frame in after:
                self._socket.send(frame)
        error, close_code = self._hear_all()
        assert error is None
        assert close_code == 1000
        (final,) = self.finals
        assert final["stable_chars"] == len(final["text"])
        assert final["audio_processed_ms"] == self.position * 1000 // 16_000
        if self.position >= self.heard:  # otherwise the client resumed before the audio of these words
            assert self.before + final["text"] == self.server.transcribe(self.position)

    @precondition(lambda self: self.connection)
    @rule(how=st.sampled_from(["close", "reset", "half"]), after_end=st.booleans())
    def vanishes(self, how: str, after_end: bool) -> None:
        connection, self.connection = self._socket, None
        if after_end:
            connection.send(END)
        if how == "close":
            connection.close()
        elif how == "reset":
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            connection.socket.shutdown(socket.SHUT_RD)  # the reading thread then closes it
        else:
            connection.socket.shutdown(socket.SHUT_RDWR)

    def teardown(self) -> None:
        """Check that the server holds nothing afterwards."""
        if self.connection:
            self.vanishes("reset", after_end=False)
        deadline = time.monotonic() + FREED_SECS
        with httpx.Client() as http:
            while (streams := http.get(f"{self.server.url}/health/detailed").json()["streams"]["active"]) > 0:
                assert time.monotonic() < deadline, f"{streams} streams are left"
                time.sleep(0.02)


def transcriber(url: str, speech: npt.NDArray[np.int16]) -> Callable[[int], str]:
    """Return a function that returns the expected text: that of the same audio in large frames."""

    @cache
    def transcribe(samples: int) -> str:
        socket_url = f"{url.replace('http', 'ws', 1)}/v2/decode/stream/amira"
        with connect(socket_url, compression=None, max_size=None, ping_interval=None) as connection:
            for start in range(0, samples, 60_000):
                connection.send(speech[start : min(start + 60_000, samples)].tobytes())
            connection.send(END)
            while (message := json.loads(connection.recv(ANSWER_SECS)))["type"] != "final":
                pass
        text: str = message["text"]
        return text

    return transcribe


def converse(server: Server, **chosen: Any) -> None:
    """Run dialogues with a server, with these settings of Hypothesis."""
    machine = type("Dialogue", (Dialogue,), {"server": server})
    run_state_machine_as_test(machine, settings=settings(deadline=None, suppress_health_check=[*HealthCheck], **chosen))


def converse_until(deadline: float, server: Server, directory: Path) -> None:
    """Run dialogues until a time in seconds of ``time.monotonic``; failures are kept in the directory.

    Raises:
        BaseException: a dialogue failed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    database = DirectoryBasedExampleDatabase(directory / "examples")
    dialogues = 0
    while time.monotonic() < deadline:
        try:
            converse(server, max_examples=DIALOGUES_A_ROUND, stateful_step_count=20, database=database, print_blob=True)
        except BaseException as error:
            failure = directory / f"failure-{int(time.time())}.txt"
            failure.write_text("\n".join([*getattr(error, "__notes__", ()), *traceback.format_exception(error)]))
            print(f"\n{failure} has the failed dialogue; the next run begins with it")  # noqa: T201
            raise
        dialogues += DIALOGUES_A_ROUND
        print(f"{dialogues} dialogues, {max(0, deadline - time.monotonic()):.0f} s left", flush=True)  # noqa: T201
