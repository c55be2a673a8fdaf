"""Configurations of realtime sessions, as clients give them in parts."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.api.realtime_config import EventError, SessionConfig
from gateway.audio.raw import Encoding, RawFormat
from gateway.live.speech import Detection


def audio(**fields: Any) -> dict[str, Any]:
    return {"type": "transcription", "audio": {"input": fields}}


def rendered(config: SessionConfig) -> dict[str, Any]:
    part: dict[str, Any] = config.render("sess_1")["audio"]["input"]
    return part


@pytest.mark.parametrize("model", ["gpt-realtime-whisper", "gpt-live-transcribe"])
def test_model_without_turn_detection_leaves_turns_to_the_client(model: str) -> None:
    config = SessionConfig().merge(audio(transcription={"model": model}))
    assert (config.detection, config.padding, rendered(config)["turn_detection"]) == (None, None, None)
    assert SessionConfig().with_model(model) == config
    chosen = config.merge(audio(turn_detection={"type": "server_vad"}))
    assert chosen.detection == Detection()
    assert chosen.merge(audio(transcription={"model": model})).detection == Detection(), "an update takes the choice back"


def test_other_model_detects_turns_until_the_client_turns_it_off() -> None:
    config = SessionConfig().merge(audio(transcription={"model": "gpt-transcribe"}))
    assert (config.detection, config.padding) == (Detection(), 4800)
    assert rendered(config)["turn_detection"]["silence_duration_ms"] == 500
    off = config.merge(audio(turn_detection=None))
    assert off.merge(audio(transcription={"model": "whisper-1"})).detection is None


def test_update_keeps_what_it_does_not_name() -> None:
    config = SessionConfig().merge(audio(format={"type": "audio/pcma"}, transcription={"model": "amira", "language": "en"}))
    config = config.merge(audio(turn_detection={"threshold": 0.7, "prefix_padding_ms": 100}))
    config = config.merge({"include": ["item.input_audio_transcription.logprobs"]})
    config = config.merge(audio(transcription={"prompt": "names", "delay": "minimal"}))
    assert config.raw_format == RawFormat(Encoding.ALAW, 8000)
    assert config.detection == Detection(0.7)
    assert (config.padding, config.latency, config.model) == (1600, "low", "amira")
    assert config.include == ("item.input_audio_transcription.logprobs",)
    assert rendered(config)["transcription"] == {"model": "amira", "language": "en", "prompt": "names", "delay": "minimal"}


@pytest.mark.parametrize(
    ("eagerness", "silence_ms"), [("low", 1200), ("medium", 700), ("auto", 700), ("high", 350), (None, 700)]
)
def test_eagerness_is_a_silence(eagerness: str | None, silence_ms: int) -> None:
    config = SessionConfig().merge(audio(turn_detection={"type": "semantic_vad", "eagerness": eagerness}))
    assert config.detection == Detection(silence_ms=silence_ms)


def test_null_is_the_default() -> None:
    given = {"type": "server_vad", "threshold": None, "silence_duration_ms": None, "idle_timeout_ms": None}
    config = SessionConfig().merge(audio(turn_detection=given, format={"type": "audio/pcm", "rate": None}))
    assert (config.detection, config.raw_format.rate) == (Detection(), 24_000)
    assert SessionConfig().merge({"audio": None, "include": None}) == SessionConfig()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"format": {"type": "audio/pcm", "rate": 44_100}}, "format.rate"),
        ({"format": {"type": "audio/opus"}}, "format"),
        ({"turn_detection": {"type": "none"}}, "turn_detection"),
        ({"turn_detection": {"silence_duration_ms": -1}}, "turn_detection.silence_duration_ms"),
        ({"transcription": {"delay": "never"}}, "transcription.delay"),
    ],
)
def test_value_that_is_not_allowed_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(EventError) as refused:
        SessionConfig().merge(audio(**fields))
    assert refused.value.param == f"session.audio.input.{param}"
