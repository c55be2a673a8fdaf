"""Dialects of the native WebSocket: short messages, and the start of speech."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from websockets.exceptions import InvalidStatus

from tests.support.clients import END, converse, cut, open_socket, transcribe
from tests.support.servers import Gateway, Recordings, Samples

RATE = 16_000
V3: dict[str, Any] = {"subprotocols": ["amira.v3", "amira.v2"]}


@pytest.fixture(scope="module")
def speech(recordings: Recordings) -> Samples:
    """Return audio of several segments."""
    pause = np.zeros(2 * RATE, np.int16)
    spoken: Samples = np.concatenate([part for samples in recordings.values() for part in (samples[: 6 * RATE], pause)])
    return spoken


def by_segment(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last message of each segment, after checks of their order."""
    latest: dict[int, dict[str, Any]] = {}
    for message in messages:
        if message["type"] not in ("partial", "final"):
            continue
        index = message["segment"]
        assert not latest.get(index, {}).get("segment_final"), "a final segment changed"
        assert index >= max(latest, default=0)
        assert 0 <= message["stable_chars"] <= len(message["text"])
        latest[index] = message
    assert all(message["segment_final"] for message in latest.values())
    return list(latest.values())


def joined(segments: list[dict[str, Any]], field: str) -> Any:
    whole = segments[0][field]
    for segment in segments[1:]:
        whole = whole + segment[field]
    return whole


async def test_v3_messages_have_the_current_segment_only(gateway: Gateway, speech: Samples) -> None:
    plain = (await transcribe(gateway.stream_url(), speech)).final
    conversation = await converse(gateway.stream_url(), [*cut(speech, 1600), END], pause_secs=0.01, **V3)
    segments = by_segment(conversation.messages)
    assert len(segments) > 2
    assert [segment["segment"] for segment in segments] == list(range(len(segments)))
    assert conversation.final is segments[-1]
    assert [joined(segments, field) for field in ("text", "tokens", "words")] == [
        plain[field] for field in ("text", "tokens", "words")
    ]


async def test_v3_resumes_within_any_segment(gateway: Gateway, speech: Samples) -> None:
    whole = await converse(gateway.stream_url(), [*cut(speech, 1600), END], pause_secs=0.01, **V3)
    before: dict[int, dict[str, Any]] = {}
    acks = []
    for message in whole.messages:
        if message["type"] == "ack":
            acks.append((message, [before[index] for index in range(message["settled"]["segments"])]))
        else:
            before[message["segment"]] = message
    chosen = acks[len(acks) // 4 :: len(acks) // 3]
    assert any(settled for _, settled in chosen)
    for ack, settled in chosen:
        resume = orjson.dumps({"type": "resume", "session": ack["session"]}).decode()
        resumed = await converse(gateway.stream_url(), [resume, *cut(speech[ack["samples"] :], 1600), END], **V3)
        segments = [*settled, *by_segment(resumed.messages)]
        assert [segment["segment"] for segment in segments] == list(range(len(segments)))
        for field in ("text", "tokens", "words"):
            assert joined(segments, field) == joined(by_segment(whole.messages), field)


@pytest.mark.parametrize("options", [{}, V3])
async def test_speech_events_on_request(gateway: Gateway, recordings: Recordings, options: dict[str, Any]) -> None:
    pause = np.zeros(2 * RATE, np.int16)
    speech = np.concatenate((pause, recordings["jfk"][: 3 * RATE], pause))
    url = f"{gateway.stream_url()}?events=speech"
    messages = (await converse(url, [*cut(speech, 1000), END], pause_secs=0.01, **options)).messages
    heard = [message for message in messages if message["type"] == "speech"]
    assert [message["state"] for message in heard][:2] == ["started", "stopped"]
    assert heard[0]["at_ms"] == pytest.approx(2300, abs=350)
    assert 3000 < heard[-1]["at_ms"] < 5300
    first = next(message for message in messages if message["type"] == "partial")
    assert messages.index(heard[0]) < messages.index(first)
    plain = (await converse(gateway.stream_url(), [*cut(speech, 1000), END], **options)).messages
    assert not [message for message in plain if message["type"] == "speech"]


async def test_unknown_events_are_refused(gateway: Gateway) -> None:
    with pytest.raises(InvalidStatus) as caught:
        async with open_socket(f"{gateway.stream_url()}?events=music"):
            pass
    assert caught.value.response.status_code == 422
