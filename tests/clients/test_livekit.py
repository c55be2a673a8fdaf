"""livekit-agents with its OpenAI plugin: recordings, and realtime sessions with its own or the server's turn detection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from conftest import RATE, Samples, Server
from livekit import rtc
from livekit.agents import APIConnectOptions, stt
from livekit.agents.utils import http_context
from livekit.plugins import openai

FRAME_SAMPLES = RATE // 20
Kind = stt.SpeechEventType


@pytest.fixture(autouse=True)
async def http() -> AsyncIterator[None]:
    async with http_context.open():
        yield


def frames(samples: Samples) -> list[rtc.AudioFrame]:
    pieces = [samples[at : at + FRAME_SAMPLES] for at in range(0, len(samples), FRAME_SAMPLES)]
    return [rtc.AudioFrame(piece.tobytes(), RATE, 1, len(piece)) for piece in pieces]


@pytest.mark.parametrize("model", ["whisper-1", "gpt-4o-mini-transcribe", "gpt-transcribe"])
async def test_recording(server: Server, speech: Samples, model: str) -> None:
    client = openai.STT(base_url=server.openai, api_key=server.key, model=model)
    event = await client.recognize(frames(speech))
    assert event.type is Kind.FINAL_TRANSCRIPT
    assert "fellow" in event.alternatives[0].text
    assert event.alternatives[0].language == "en"


async def test_wrong_key_is_an_error_of_the_program(server: Server, speech: Samples) -> None:
    client = openai.STT(base_url=server.openai, api_key="wrong", model="whisper-1")
    with pytest.raises(Exception, match="key") as refused:
        await client.recognize(frames(speech), conn_options=APIConnectOptions(max_retry=0))
    assert getattr(refused.value, "status_code", None) == 401


@pytest.mark.parametrize("model", ["gpt-4o-transcribe", "gpt-transcribe"])
async def test_turns_of_the_server(server: Server, speech: Samples, model: str) -> None:
    hints = {"keywords": ["america"]} if model == "gpt-transcribe" else {}
    client = openai.STT(base_url=server.openai, api_key=server.key, model=model, use_realtime=True, **hints)
    check(await events_of(client, speech))


@pytest.mark.parametrize("model", ["gpt-realtime-whisper", "gpt-live-transcribe"])
async def test_turns_of_its_own_detector(server: Server, speech: Samples, model: str) -> None:
    """It leaves turn_detection out for these models, and ends the session at any error, such as of a commit without audio."""
    check(await events_of(openai.STT(base_url=server.openai, api_key=server.key, model=model), speech))


async def test_session_goes_on_with_other_options(server: Server, speech: Samples) -> None:
    client = openai.STT(base_url=server.openai, api_key=server.key, model="gpt-transcribe", use_realtime=True)
    half = len(speech) // 2
    async with client.stream() as stream:
        finals = asyncio.create_task(collect(stream))
        await push(stream, speech[:half])
        client.update_options(prompt="names", turn_detection={"type": "server_vad", "silence_duration_ms": 300})
        await push(stream, speech[half:])
        events = await finals
    check(events)


async def events_of(client: openai.STT, speech: Samples) -> list[stt.SpeechEvent]:
    async with client.stream(conn_options=APIConnectOptions(max_retry=0)) as stream:
        collected = asyncio.create_task(collect(stream))
        await push(stream, speech)
        return await collected


async def push(stream: stt.SpeechStream, samples: Samples) -> None:
    """Send audio at the pace of a microphone: its own detector looks at the clock."""
    for frame in frames(samples):
        stream.push_frame(frame)
        await asyncio.sleep(FRAME_SAMPLES / RATE)


async def collect(stream: stt.SpeechStream) -> list[stt.SpeechEvent]:
    """Return the events up to the second transcript."""
    events: list[stt.SpeechEvent] = []
    async with asyncio.timeout(60):
        async for event in stream:
            events.append(event)
            if [each.type for each in events].count(Kind.FINAL_TRANSCRIPT) == 2:
                break
    return events


def check(events: list[stt.SpeechEvent]) -> None:
    kinds = [event.type for event in events]
    first = kinds.index(Kind.FINAL_TRANSCRIPT)
    assert kinds.index(Kind.START_OF_SPEECH) < kinds.index(Kind.INTERIM_TRANSCRIPT) < first
    assert Kind.END_OF_SPEECH in kinds[:first]
    transcripts: list[Any] = [event.alternatives[0].text for event in events if event.type is Kind.FINAL_TRANSCRIPT]
    assert "fellow" in transcripts[0]
    assert all(transcripts)
