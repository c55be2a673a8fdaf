"""pipecat's OpenAI services in a pipeline: recordings, and realtime sessions with either turn detection."""

from __future__ import annotations

import math
from typing import Any

import pytest
from conftest import RATE, Samples, Server
from pipecat.frames.frames import (
    ErrorFrame,
    Frame,
    InputAudioRawFrame,
    InterimTranscriptionFrame,
    ProposedUserStartedSpeakingFrame,
    ProposedUserStoppedSpeakingFrame,
    TranscriptionFrame,
    VADUserStartedSpeakingFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.pipeline.worker import PipelineParams
from pipecat.services.openai.stt import OpenAIRealtimeSTTService, OpenAISTTService
from pipecat.tests.utils import SleepFrame, run_test

FRAME_SAMPLES = RATE // 50
PARAMS = PipelineParams(audio_in_sample_rate=RATE)
LAST_SECS = 6.0
"""Time that the server has for the last transcript."""


def audio(samples: Samples) -> list[Frame]:
    """Return a microphone's frames."""
    frames: list[Frame] = []
    for at in range(0, len(samples), FRAME_SAMPLES):
        frames += [InputAudioRawFrame(samples[at : at + FRAME_SAMPLES].tobytes(), RATE, 1), SleepFrame(FRAME_SAMPLES / RATE)]
    return frames


async def run(service: Any, frames: list[Frame]) -> tuple[list[Frame], list[Frame]]:
    """Return the frames that came out downstream and upstream; no error is among them."""
    down, up = await run_test(service, frames_to_send=[*frames, SleepFrame(LAST_SECS)], pipeline_params=PARAMS)
    assert not [frame for frame in (*down, *up) if isinstance(frame, ErrorFrame)]
    return list(down), list(up)


def texts(frames: list[Frame]) -> list[str]:
    return [frame.text for frame in frames if type(frame) is TranscriptionFrame]


@pytest.mark.parametrize("model", ["gpt-transcribe", "gpt-4o-transcribe", "whisper-1"])
async def test_recording_of_each_turn(server: Server, speech: Samples, model: str) -> None:
    service = OpenAISTTService(
        base_url=server.openai,
        api_key=server.key,
        include_prob_metrics=True,
        settings=OpenAISTTService.Settings(model=model, keywords=["america"] if model == "gpt-transcribe" else None),
    )
    turn = audio(speech[: 11 * RATE // 2])
    down, _ = await run(service, [VADUserStartedSpeakingFrame(), *turn, VADUserStoppedSpeakingFrame()])
    (frame,) = (frame for frame in down if isinstance(frame, TranscriptionFrame))
    assert "fellow" in frame.text
    entries = frame.result.segments if model == "whisper-1" else frame.result.logprobs
    probabilities = [math.exp(entry.avg_logprob if model == "whisper-1" else entry.logprob) for entry in entries]
    assert all(0 < probability <= 1 for probability in probabilities)


async def test_turns_of_the_pipeline(server: Server, speech: Samples) -> None:
    """Its default: the model gpt-realtime-whisper, no turn detection, a commit at each stop."""
    service = OpenAIRealtimeSTTService(api_key=server.key, base_url=realtime(server))
    half = 11 * RATE // 2
    turns = [
        frame
        for turn in (speech[:half], speech[half:])
        for frame in (VADUserStartedSpeakingFrame(), *audio(turn), VADUserStoppedSpeakingFrame())
    ]
    down, _ = await run(service, turns)
    first, second = texts(down)
    assert "fellow" in first
    assert second
    assert any(isinstance(frame, InterimTranscriptionFrame) for frame in down)


@pytest.mark.parametrize("detection", [{"type": "server_vad"}, {"type": "semantic_vad", "eagerness": "high"}, None])
async def test_turns_of_the_server(server: Server, speech: Samples, detection: dict[str, Any] | None) -> None:
    service = OpenAIRealtimeSTTService(
        api_key=server.key,
        base_url=realtime(server),
        turn_detection=detection,
        settings=OpenAIRealtimeSTTService.Settings(model="gpt-transcribe", noise_reduction="near_field", prompt="names"),
    )
    down, _ = await run(service, audio(speech))
    first, *others = texts(down)
    assert "fellow" in first
    assert others
    kinds = [type(frame) for frame in down]
    started, stopped = ProposedUserStartedSpeakingFrame, ProposedUserStoppedSpeakingFrame
    assert kinds.count(started) == kinds.count(stopped) >= 2
    assert kinds.index(started) < kinds.index(stopped)


def realtime(server: Server) -> str:
    return f"{server.openai.replace('http', 'ws', 1)}/realtime"
