"""Streams of the bundled model: the same words however they are cut, shared, ended and restored; their look-ahead is a tail."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from itertools import cycle
from typing import Any

import jiwer
import numpy as np
import pytest
from google.protobuf import json_format

from amira.models.configs import read_config
from amira.paths import MODEL_REPOSITORY, SPEECH
from gateway.triton.geometry import read_windows
from parameters import LATENCIES
from perf.labelled import normalise, read_speech
from stream import Decoded, Stream
from tests.support.recogniser import Recogniser, check_when_chunks_are_due, open_graph
from tests.support.servers import read_recordings
from vocabulary import read_vocabulary
from windows import Cache, Samples
from words import text_of, words_of

RECORDINGS = read_recordings()
DECODER = "rnnt_greedy_bls"
FRAME, FEATURE = 1536, 384
MAX_CACHE_SECS = 17.3
"""Length of the audio that a cache depends on, as docs/API.md states it for acknowledgements."""


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
def test_a_step_is_the_same_whatever_shares_its_call(bundled: Recogniser, latency: str) -> None:
    """Bit for bit, over several steps."""
    assert bundled.parameters.cached
    window, size = (
        bundled.parameters.cached.encoders[latency].window_features,
        bundled.parameters.cached.encoders[latency].cache_size,
    )
    step = open_graph(MODEL_REPOSITORY / "encoder_stream" / "1" / "model.onnx")
    random, rows = np.random.default_rng(0), 5
    cache, length = np.zeros((rows, size), np.float16), np.full(rows, window, np.int64)
    for _ in range(3):
        signal = random.normal(0, 0.05, (rows, FEATURE, window)).astype(np.float32)
        outputs, _, following = step.run(None, {"audio_signal": signal, "length": length, "cache": cache})
        for row in range(rows):
            alone = slice(row, row + 1)
            own = step.run(None, {"audio_signal": signal[alone], "length": length[alone], "cache": cache[alone]})
            assert np.array_equal(own[0], outputs[alone])
            assert np.array_equal(own[2], following[alone])
        cache = following


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


def long_speech(secs: float, pause_secs: float = 2.0) -> Samples:
    """Speech with a pause behind each recording."""
    pause = np.zeros(round(16_000 * pause_secs), np.int16)
    pieces = [part for recording in RECORDINGS.values() for part in (recording, pause)]
    return np.resize(np.concatenate(pieces), round(secs * 16_000))


def decoded_caches(bundled: Recogniser) -> list[Cache | None]:
    """Caches of a single stream before each window whose frames were decoded."""
    return [window.carried.cache for (window,) in bundled.calls if window.carried and window.carried.decode]


@pytest.mark.parametrize("pause_secs", [2.0, 0.0], ids=["endpoints", "no endpoints"])
@pytest.mark.parametrize(
    "latency", [pytest.param(latency, marks=[] if latency == "balanced" else [pytest.mark.slow]) for latency in LATENCIES]
)
async def test_restored_stream_goes_on_alike(bundled: Recogniser, latency: str, pause_secs: float) -> None:
    """From any answer, with the audio that the state asks for: caches and confidences are equal bit for bit."""
    samples = long_speech(50, pause_secs)
    pieces = np.split(samples, range(16_000, len(samples), 16_000))
    bundled.calls.clear()
    whole = await bundled.recognise(pieces, latency=latency)
    caches = decoded_caches(bundled)
    options = replace(bundled.parameters.options, latency=latency)
    limited = 0
    for at in range(2, len(pieces) - 1, 6):
        needed = json.loads(whole.states[at])["needed_from"]
        limited += needed > 0
        stream = Stream.restore(bundled.parameters, options, whole.states[at], needed)
        bundled.calls.clear()
        result = await bundled.go_on(stream, [samples[needed : 16_000 * (at + 1)], *pieces[at + 1 :]])
        before = [token for answer in whole.answers[: at + 1] if answer.final for token in answer.tokens]
        assert before + result.tokens == whole.tokens, f"restored behind answer {at}"
        assert result.answers[-1].spans == whole.answers[-1].spans
        again = decoded_caches(bundled)
        for ours, theirs in zip(again, caches[-len(again) :], strict=True):
            same = (ours is theirs) if ours is None or theirs is None else np.array_equal(ours, theirs)
            assert same, "the cache was not refilled bit for bit"
    assert limited >= 3, "all audio was needed"


@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("kind", ["speech", "silence"])
async def test_little_audio_is_needed_to_restore_a_stream(bundled: Recogniser, latency: str, kind: str) -> None:
    """Also in a stream that has no endpoint."""
    samples = long_speech(60, 0) if kind == "speech" else np.zeros(60 * 16_000, np.int16)
    result = await bundled.recognise(np.split(samples, range(16_000, len(samples), 16_000)), latency=latency)
    lags = [
        answer.samples - json.loads(state)["needed_from"] for answer, state in zip(result.answers, result.states, strict=True)
    ]
    assert max(lags) < MAX_CACHE_SECS * 16_000


def at_level(samples: Samples, level_db: float) -> Samples:
    """Return louder or weaker samples."""
    return np.rint(np.clip(samples * 10 ** (level_db / 20), -32768, 32767)).astype(np.int16)


LEVELS_DB = 0, -20, -20, 0, 6
"""Levels of the recordings of a long stream."""


@pytest.mark.parametrize("secs", [120, pytest.param(3600, marks=pytest.mark.slow)])
async def test_long_stream_has_the_error_rate_of_its_pieces(bundled: Recogniser, secs: int) -> None:
    """Recordings at changing levels, joined with pauses, against a stream for each that begins at the same place of a chunk."""
    vocabulary, chunk = read_vocabulary(MODEL_REPOSITORY / "vocab.txt"), chunk_of(bundled, "balanced")

    async def transcribe(samples: Samples) -> str:
        tokens = (await bundled.recognise(np.split(samples, range(16_000, len(samples), 16_000)))).tokens
        bundled.calls.clear()
        times = [float(i) for i in range(len(tokens) + 1)]
        words = words_of([vocabulary[token.id] for token in tokens], times[:-1], times[1:], [1.0] * len(tokens))
        return normalise(text_of(words, segment=0))

    parts, references, alone = [np.zeros(0, np.int16)], [], []
    for recording, level in zip(cycle(read_speech(SPEECH)), cycle(LEVELS_DB), strict=False):
        start = sum(map(len, parts))
        if start > secs * 16_000:
            break
        spoken = np.concatenate([at_level(recording.samples, level), np.zeros(24_000, np.int16)])
        alone.append(await transcribe(np.concatenate([np.zeros(start % chunk, np.int16), spoken])))
        parts.append(spoken)
        references.append(recording.text)
    joined = await transcribe(np.concatenate(parts))
    expected, found = jiwer.wer(references, alone), jiwer.wer(" ".join(references), joined)
    assert abs(found - expected) < 0.03, f"{found:.3f} instead of {expected:.3f}"


@pytest.mark.parametrize("latency", LATENCIES)
def test_gateway_knows_when_a_chunk_is_due(bundled: Recogniser, latency: str) -> None:
    """Sample by sample: its geometry is computed from the same parameters by code of its own."""
    config = json_format.MessageToDict(
        read_config(MODEL_REPOSITORY / DECODER / "config.pbtxt"), preserving_proto_field_name=True
    )
    windows = read_windows({name: entry["string_value"] for name, entry in config["parameters"].items()})[latency]
    assert windows.right == 5 * FRAME
    stream = Stream(bundled.parameters, replace(bundled.parameters.options, latency=latency))
    check_when_chunks_are_due(stream, windows)
