"""Client programs of other projects, with their defaults."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import orjson
import pytest
import websocket

from tests.support.clients import END, cut, transcribe
from tests.support.servers import Gateway, Recordings

pytestmark = pytest.mark.usefixtures("no_sequence_left")


def speak(url: str, frames: list[bytes]) -> tuple[list[dict[str, Any]], int]:
    """Stream by websocket-client, which sends the server's address as ``Origin``; return the messages and the close code."""
    messages: list[dict[str, Any]] = []
    with contextlib.closing(websocket.create_connection(url, timeout=30)) as socket:
        for frame in frames:
            socket.send_binary(frame)
        while True:
            opcode, data = socket.recv_data()
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                socket.shutdown()  # type: ignore[no-untyped-call]  # the library leaves this to the program then
                return messages, int.from_bytes(data[:2], "big")
            messages.append(orjson.loads(data))


async def test_websocket_client_streams_a_recording(gateway: Gateway, recordings: Recordings) -> None:
    jfk = recordings["jfk"]
    messages, close_code = await asyncio.to_thread(speak, gateway.stream_url(), [*cut(jfk, 1600), END])
    assert close_code == 1000
    assert [message["type"] for message in messages[:-1]] == ["partial"] * (len(messages) - 1)
    assert messages[-1] == (await transcribe(gateway.stream_url(), jfk)).final


async def test_websocket_app_streams_a_recording(gateway: Gateway, recordings: Recordings) -> None:
    """Its interface with callbacks does not close the socket."""
    jfk, finals, closes, sockets = recordings["jfk"], [], [], []

    def on_open(app: Any) -> None:
        sockets.append(app.sock.sock)
        for frame in [*cut(jfk, 1600), END]:
            app.send(frame, websocket.ABNF.OPCODE_BINARY)

    def on_message(_app: Any, message: str) -> None:
        if (content := orjson.loads(message))["type"] == "final":
            finals.append(content)

    def on_close(_app: Any, code: int, _reason: str) -> None:
        closes.append(code)

    app = websocket.WebSocketApp(gateway.stream_url(), on_open=on_open, on_message=on_message, on_close=on_close)
    failed = await asyncio.to_thread(app.run_forever)
    for socket in sockets:
        socket.close()
    assert not failed
    assert closes == [1000]
    assert finals == [(await transcribe(gateway.stream_url(), jfk)).final]
