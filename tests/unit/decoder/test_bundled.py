"""Streams of the bundled model: the same words however they are cut, shared, ended and restored; their look-ahead is a tail."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

from amira.models.configs import read_config
from amira.paths import MODEL_REPOSITORY
from gateway.triton.geometry import read_windows
from parameters import LATENCIES
from stream import Decoded, Stream
from tests.support.recogniser import Recogniser
from tests.support.servers import read_recordings
from windows import Samples

RECORDINGS = read_recordings()
DECODER = "rnnt_greedy_bls"
FRAME, FEATURE = 1536, 384


@pytest.fixture(scope="module")
def bundled() -> Recogniser:
    return Recogniser(MODEL_REPOSITORY, "asr_ensemble", DECODER)


def chunk_of(bundled: Recogniser, latency: str) -> int:
    """Samples of a chunk."""
    assert bundled.parameters.cached
    return bundled.parameters.cached.encoders[latency].chunk_features * FEATURE


def ids(answer: Decoded) -> list[tuple[int, int]]:
    return [(token.id, token.frame) for token in answer.tokens]


@pytest.mark.parametrize("latency", LATENCIES)
async def test_cuts_change_nothing(bundled: Recogniser, latency: str) -> None:
    samples = RECORDINGS["2033-164914-0000"]
    at_once = await bundled.recognise([samples], latency=latency)
    assert len(at_once.emitted) >= 15
    random = np.sort(np.random.default_rng(0).integers(0, len(samples), 30)).tolist()
    for places in (range(320, len(samples), 320), random, range(0, len(samples), 40_000)):
        cut = await bundled.recognise(np.split(samples, places), latency=latency)
        assert cut.emitted == at_once.emitted
        assert cut.answers[-1].frames == at_once.answers[-1].frames == -(-len(samples) // FRAME)


async def test_streams_that_share_calls_equal_single_ones(bundled: Recogniser) -> None:
    """16 streams of different audio and latencies, interleaved; some begin late."""
    audio = [np.roll(RECORDINGS["jfk"], 9600 * i)[: 70_000 + 997 * i] for i in range(16)]
    alone = [await bundled.recognise([samples], latency=LATENCIES[i % 3]) for i, samples in enumerate(audio)]
    bundled.calls.clear()
    networks = bundled.networks()

    async def one(samples: Samples, i: int) -> Any:
        for _ in range(i % 5):
            await asyncio.sleep(0)
        return await bundled.recognise(np.split(samples, range(3200, len(samples), 3200)), networks, latency=LATENCIES[i % 3])

    together = await asyncio.gather(*(one(samples, i) for i, samples in enumerate(audio)))
    assert max(map(len, bundled.calls)) >= 3, "few windows shared a call"
    assert [result.emitted for result in together] == [result.emitted for result in alone]


@pytest.mark.parametrize("latency", LATENCIES)
async def test_look_ahead_is_shown_as_a_tail(bundled: Recogniser, latency: str) -> None:
    """The tail lies behind the chunk, and later answers may change it; what is stable stays."""
    samples, chunk = RECORDINGS["2033-164914-0000"], chunk_of(bundled, latency)
    pieces = np.split(samples, range(3200, len(samples), 3200))
    result = await bundled.recognise(pieces, latency=latency, endpoint_silence_ms=0, beam=1)
    tails = 0
    for answer, following in zip(result.answers, result.answers[1:], strict=False):
        assert answer.frames % (chunk // FRAME) == 0
        stable, tail = answer.tokens[: answer.stable], answer.tokens[answer.stable :]
        assert all(answer.frames <= token.frame < answer.frames + 5 for token in tail)
        assert following.tokens[: len(stable)] == stable
        tails += len(tail)
    assert tails >= 5, "no look-ahead was decoded"


@pytest.mark.parametrize("latency", LATENCIES)
async def test_stream_may_end_at_each_phase_of_a_chunk(bundled: Recogniser, latency: str) -> None:
    """All audio becomes frames, and the frames before the last look-ahead and chunk do not depend on the end."""
    samples, chunk = RECORDINGS["2033-164914-0000"], chunk_of(bundled, latency)
    whole = await bundled.recognise([samples], latency=latency)
    step = chunk // 8
    for count in (1000, *range(2 * chunk, 3 * chunk + 1, step)):
        result = await bundled.recognise([samples[:count]], latency=latency)
        later = await bundled.recognise([samples[:count], samples[:0]], latency=latency)
        assert later.emitted == result.emitted, "the end came with the audio, and behind it"
        assert result.answers[-1].samples == count
        assert result.answers[-1].frames == -(-count // FRAME)
        safe = max(0, (count - 5 * FRAME) // chunk) * chunk // FRAME
        assert [t for t in result.emitted if t[1] < safe] == [t for t in whole.emitted if t[1] < safe]


async def test_last_look_ahead_is_encoded_once(bundled: Recogniser) -> None:
    samples, chunk = RECORDINGS["jfk"], chunk_of(bundled, "balanced")
    for extra, calls in ((0, 3), (FEATURE, 3), (chunk - FEATURE, 3), (chunk, 4)):
        bundled.calls.clear()
        await bundled.recognise([samples[: 2 * chunk + 5 * FRAME + extra]])
        assert len(bundled.calls) == calls, f"{extra} samples behind the look-ahead of the second chunk"


async def test_recordings_are_decoded_whole(bundled: Recogniser) -> None:
    """In one window, by the encoder without a cache."""
    bundled.calls.clear()
    result = await bundled.recognise([RECORDINGS["jfk"]], context="whole")
    assert len(result.emitted) >= 15
    assert [(window.carried, len(window.samples)) for (window,) in bundled.calls] == [(None, len(RECORDINGS["jfk"]))]


def long_speech(secs: float) -> Samples:
    """Speech with a pause behind each recording."""
    pause = np.zeros(32_000, np.int16)
    pieces = [part for recording in RECORDINGS.values() for part in (recording, pause)]
    return np.resize(np.concatenate(pieces), round(secs * 16_000))


@pytest.mark.parametrize("latency", LATENCIES)
async def test_restored_stream_goes_on_alike(bundled: Recogniser, latency: str) -> None:
    """From any answer, with the audio that the state asks for."""
    samples = long_speech(40)
    pieces = np.split(samples, range(16_000, len(samples), 16_000))
    whole = await bundled.recognise(pieces, latency=latency)
    options = replace(bundled.parameters.options, latency=latency)
    limited = 0
    for at in range(2, len(pieces) - 1, 6):
        needed = json.loads(whole.states[at])["needed_from"]
        limited += needed > 0
        stream = Stream.restore(bundled.parameters, options, whole.states[at], needed)
        result = await bundled.go_on(stream, [samples[needed : 16_000 * (at + 1)], *pieces[at + 1 :]])
        segments = [answer for answer in whole.answers[: at + 1] if answer.final]
        before = [token for answer in segments for token in ids(answer)]
        assert before + result.emitted == whole.emitted, f"restored behind answer {at}"
    assert limited >= 3, "all audio was needed"


@pytest.mark.parametrize("latency", LATENCIES)
def test_gateway_knows_when_a_chunk_is_due(bundled: Recogniser, latency: str) -> None:
    """Sample by sample: its geometry is computed from the same parameters by code of its own."""
    config = json_format.MessageToDict(
        read_config(MODEL_REPOSITORY / DECODER / "config.pbtxt"), preserving_proto_field_name=True
    )
    windows = read_windows({name: entry["string_value"] for name, entry in config["parameters"].items()})[latency]
    assert windows.right == 5 * FRAME
    stream = Stream(bundled.parameters, replace(bundled.parameters.options, latency=latency))
    sent = 0
    for chunk in range(5):
        due = windows.chunk_due(chunk)
        stream.push(np.zeros(due - 1 - sent, np.int16))
        assert stream.next_window(end=False) is None
        stream.push(np.zeros(1, np.int16))
        assert stream.next_window(end=False) is not None
        sent = due
    assert windows.complete(sent) == 5
