"""Streams of cached encoders: decoded as sherpa-onnx and NeMo do it, however they are cut, shared, ended and restored."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amira.models.configs import read_config
from amira.models.front_ends import nemo_log_mel
from amira.models.importing import ImportOptions, import_model
from gateway.triton.geometry import read_windows
from greedy import JointOutputs, PredictorState, Row, decode
from parameters import ParameterError
from stream import Stream
from tests.support.published import (
    NEMO,
    NEMO_560,
    STREAMING,
    TAIL,
    as_sherpa_onnx,
    imported,
    published,
    sherpa_at_once,
    sherpa_streamed,
)
from tests.support.recogniser import Recogniser, check_when_chunks_are_due, open_graph
from tests.support.servers import read_recordings
from tests.support.streaming_models import NemoShape
from windows import Samples

RECORDINGS = read_recordings()
EVERY = ("nemo", "nemo560", "nemo-int8", "zipformer-int8", "prompted", "nemotron", "eou", "zipformer", "zipformer640")
HOP = 160


@pytest.fixture(scope="module")
def recogniser() -> Any:
    """Imported models by name, each loaded once."""
    loaded: dict[str, Recogniser] = {}

    def load(name: str) -> Recogniser:
        if name not in loaded:
            loaded[name] = Recogniser(imported(name), name)
        loaded[name].calls.clear()
        return loaded[name]

    return load


def texts(repository: Path, name: str, ids: Sequence[int]) -> list[str]:
    """The pieces of tokens, as sherpa-onnx shows them."""
    lines = (repository / f"{name}_decoder" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    pieces = [line.rpartition(" ")[0] for line in lines]
    return [pieces[index].replace("▁", " ") for index in ids]


def random_cuts(samples: Samples, seed: int, cuts: int = 40) -> list[Samples]:
    places = np.random.default_rng(seed).integers(0, len(samples), cuts)
    return np.split(samples, np.sort(places).tolist())


@pytest.mark.parametrize("recording", RECORDINGS)
@pytest.mark.parametrize("name", STREAMING)
async def test_stream_equals_sherpa_onnx(name: str, recording: str) -> None:
    """Token by token and frame by frame, up to where sherpa-onnx stops, since it does not flush the encoder."""
    samples = np.concatenate([RECORDINGS[recording], TAIL])
    tokens, times = sherpa_streamed(published(name), samples)
    repository = as_sherpa_onnx(name)
    ours = Recogniser(repository, name)
    result = await ours.recognise([samples])
    frame_secs = ours.parameters.frame_samples / 16_000
    decoded = [(token.id, token.frame * frame_secs) for token in result.tokens]
    assert len(set(tokens)) >= 4, "too few tokens to tell"
    assert texts(repository, name, [index for index, _ in decoded[: len(tokens)]]) == tokens
    assert [at for _, at in decoded[: len(tokens)]] == pytest.approx(times, abs=1e-3)
    assert all(at > times[-1] for _, at in decoded[len(tokens) :])
    assert all(at > len(samples) / 16_000 - 1.5 for _, at in decoded[len(tokens) :]), (
        "tokens that sherpa-onnx lacks before its end"
    )


@pytest.mark.parametrize("language", ["auto", "en-US", "de-DE"])
async def test_language_equals_sherpa_onnx(language: str) -> None:
    samples = np.concatenate([RECORDINGS["jfk"], TAIL])
    tokens, _ = sherpa_streamed(published("prompted"), samples, language)
    repository = as_sherpa_onnx("prompted")
    result = await Recogniser(repository, "prompted").recognise([samples], language=language)
    assert texts(repository, "prompted", [token.id for token in result.tokens][: len(tokens)]) == tokens


@pytest.mark.parametrize("recording", RECORDINGS)
async def test_offline_icefall_equals_sherpa_onnx(recording: str) -> None:
    samples = RECORDINGS[recording]
    tokens, times = sherpa_at_once(published("offline"), samples)
    repository = imported("offline")
    result = await Recogniser(repository, "offline").recognise([samples], context="whole", endpoint_silence_ms=0)
    assert len(set(tokens)) >= 5
    assert texts(repository, "offline", [token.id for token in result.tokens]) == tokens
    assert [token.frame * 0.04 for token in result.tokens] == pytest.approx(times, abs=1e-3)


async def test_offline_icefall_takes_any_length(recogniser: Any) -> None:
    """Its subsampling takes nine feature frames at least."""
    ours = recogniser("offline")
    for count in (0, 1, 640, 1280, 1440, 3000):
        for context in ("whole", "window"):
            result = await ours.recognise([RECORDINGS["jfk"][8000 : 8000 + count]], context=context)
            assert result.answers[-1].samples == count


@pytest.mark.parametrize(("name", "shape"), [("nemo560", NEMO_560), ("nemo-int8", NEMO)])
async def test_first_chunk_follows_nemo(tmp_path: Path, name: str, shape: NemoShape) -> None:
    """A plain loop over the published graphs: NeMo's features of the whole recording, nine zeros before them.

    Dynamic quantisation rounds a cache of frames otherwise than one of keys and values, so the former is imported in int8.
    """
    samples = RECORDINGS["jfk"]
    source = published(name)
    import_model(str(source), name, tmp_path, ImportOptions(cache_type="fp32", projected="int8" not in name))
    ours = Recogniser(tmp_path, name)
    result = await ours.recognise([samples], endpoint_silence_ms=0, max_total_tokens=100_000)

    encoder, decoder, joiner = (open_graph(next(source.glob(f"{part}*.onnx"))) for part in ("encoder", "decoder", "joiner"))
    front_end = open_front_end(shape.features)
    count = len(samples) // HOP
    waveform = samples[None].astype(np.float32) / np.float32(32768)
    features = front_end.run(["features"], {"waveforms": waveform, "waveforms_lens": np.array([len(samples)], np.int64)})[0]
    padded = np.concatenate([np.zeros((1, shape.features, 9), np.float32), features[:, :, :count]], axis=2)
    channel = np.zeros((1, shape.layers, shape.context, shape.size), np.float32)
    time = np.zeros((1, shape.layers, shape.size, shape.kernel), np.float32)
    length = np.zeros(1, np.int64)
    encoded = []
    for begin in range(0, count, shape.chunk_features):
        window = padded[:, :, begin : begin + shape.window_features]
        real = window.shape[2]
        window = np.pad(window, ((0, 0), (0, 0), (0, shape.window_features - real)))
        made, lengths, channel, time, length = encoder.run(
            None,
            {
                "audio_signal": window,
                "length": np.array([real], np.int64),
                "cache_last_channel": channel,
                "cache_last_time": time,
                "cache_last_channel_len": length,
            },
        )
        encoded.append(made[0, :, : lengths[0]])

    def step(frames: Any, last_tokens: Any, states: Any) -> Any:
        feeds = {
            "targets": last_tokens[:, None],
            "target_length": np.ones(len(last_tokens), np.int32),
            "states.1": states[0],
            "onnx::LSTM_3": states[1],
        }
        fed, _, *after = decoder.run(None, feeds)
        return joiner.run(None, {"encoder_outputs": frames, "decoder_outputs": fed})[0][:, :, 0], tuple(after)

    zeros, expected, before = np.zeros((1, shape.hidden), np.float32), [], 0
    predictor = PredictorState(shape.pieces, (zeros, zeros))
    for frames in encoded:  # in the decoder's blocks: an int8 joint network rounds frames that are scored together alike
        row = Row(frames, predictor, 10, 10**6)
        decode(step, JointOutputs(shape.pieces), [row], ours.parameters.block_frames)
        expected += [(token.id, before + token.frame) for token in row.tokens]
        before += frames.shape[1]
    assert len({index for index, _ in expected}) >= 5
    assert result.emitted == expected


def open_front_end(bins: int) -> Any:
    import onnxruntime  # noqa: PLC0415

    return onnxruntime.InferenceSession(nemo_log_mel(bins, gpu=False).proto.SerializeToString())


@pytest.mark.parametrize("name", EVERY)
async def test_cuts_change_nothing(recogniser: Any, name: str) -> None:
    samples = RECORDINGS["jfk"]
    ours = recogniser(name)
    at_once = await ours.recognise([samples])
    assert at_once.emitted
    for pieces in (random_cuts(samples, 1), np.split(samples, range(320, len(samples), 320))):
        cut = await ours.recognise(pieces)
        assert cut.emitted == at_once.emitted
        assert cut.answers[-1].frames == at_once.answers[-1].frames


@pytest.mark.parametrize("name", ["nemo", "nemo560", "prompted", "zipformer"])
async def test_streams_that_share_calls_equal_single_ones(recogniser: Any, name: str) -> None:
    """32 streams of different audio, interleaved; some begin late."""
    ours = recogniser(name)
    audio = [np.roll(RECORDINGS["jfk"], 1600 * i)[: 40_000 + 997 * i] for i in range(32)]
    alone = [await ours.recognise([samples]) for samples in audio]
    ours.calls.clear()
    ours.parameters = replace(ours.parameters, encoder_batch=16)
    networks = ours.networks()

    async def one(samples: Samples, i: int) -> Any:
        for _ in range(i % 5):
            await asyncio.sleep(0)
        return await ours.recognise(np.split(samples, range(3200, len(samples), 3200)), networks)

    together = await asyncio.gather(*(one(samples, i) for i, samples in enumerate(audio)))
    assert max(map(len, ours.calls)) >= 8, "few windows shared a call"
    assert [result.emitted for result in together] == [result.emitted for result in alone]


async def test_graph_of_one_stream_gets_one_window_a_call(recogniser: Any) -> None:
    ours = recogniser("nemotron")
    assert ours.parameters.encoder_batch == 1
    networks = ours.networks()
    await asyncio.gather(*(ours.recognise([RECORDINGS["jfk"][:20_000]], networks) for _ in range(4)))
    assert {len(call) for call in ours.calls} == {1}


@pytest.mark.parametrize("name", ["nemo", "nemo560", "zipformer"])
async def test_stream_may_end_at_each_phase_of_a_chunk(recogniser: Any, name: str) -> None:
    """Every feature frame of the audio becomes part of an encoder frame; the frames before the end do not depend on it."""
    ours = recogniser(name)
    samples, cached = RECORDINGS["jfk"], ours.parameters.cached
    whole = await ours.recognise([samples])
    factor = ours.parameters.frame_samples // HOP
    chunk = cached.encoders["balanced"].chunk_features
    for features in (0, 1, *range(3 * chunk - 1, 4 * chunk + 2)):
        for extra in (0, 1, 159):
            count = features * HOP + extra
            result = await ours.recognise([samples[:count]])
            padding = cached.final_padding_samples // HOP if count else 0
            answer = result.answers[-1]
            assert answer.samples == count
            needed = max(features + padding, min(1, count))  # audio that is shorter than a feature frame has one
            assert answer.frames == -(-needed // factor)
            safe = max(0, features - 2 * chunk) // factor
            assert [t for t in result.emitted if t[1] < safe] == [t for t in whole.emitted if t[1] < safe]


def with_silences() -> Samples:
    """Speech with pauses, in which segments end."""
    pause = np.zeros(48_000, np.int16)
    speech = list(RECORDINGS.values())
    return np.concatenate([speech[0], pause, speech[1], pause, speech[2][:60_000], pause[:8000]])


@pytest.mark.parametrize("name", ["nemo", "nemo560", "prompted", "zipformer"])
async def test_restored_stream_goes_on_alike(recogniser: Any, name: str) -> None:
    """From any answer: with the audio behind the last endpoint, the tokens are those of a stream that was never lost."""
    ours = recogniser(name)
    samples = with_silences()
    pieces = np.split(samples, range(8000, len(samples), 8000))
    whole = await ours.recognise(pieces)
    anchors = {json.loads(state)["anchor"] for state in whole.states}
    assert name == "zipformer" or len(anchors) >= 2, "no endpoint: the test shows nothing"
    options = replace(ours.parameters.options)
    sent = np.cumsum([len(piece) for piece in pieces])
    for at in range(0, len(pieces) - 1, 3):
        state = json.loads(whole.states[at])
        needed = state["needed_from"]
        stream = Stream.restore(ours.parameters, options, whole.states[at], needed)
        result = await ours.go_on(stream, [samples[needed : sent[at + 1]], *pieces[at + 2 :]])
        segments = [answer for answer in whole.answers[: at + 1] if answer.final]
        before = [(token.id, token.frame) for answer in segments for token in answer.tokens]
        assert before + result.emitted == whole.emitted, f"restored behind answer {at}"


async def test_restoring_beyond_what_is_kept_warms_up(recogniser: Any) -> None:
    """With less audio than the anchor asks for, the cache is filled from what there is; decoded frames stay in order."""
    ours = recogniser("nemo560")
    samples = RECORDINGS["2033-164914-0000"]
    begun = await ours.go_on(Stream(ours.parameters, ours.parameters.options), [samples[:100_000]], end=False)
    state = json.loads(begun.states[-1])
    late = 41_000
    assert late > state["needed_from"]
    stream = Stream.restore(ours.parameters, ours.parameters.options, begun.states[-1], late)
    result = await ours.go_on(stream, [samples[late:]])
    assert result.answers[-1].frames == -(-(len(samples) // HOP) // 8)
    assert all(token.frame >= begun.answers[-1].frames for token in result.answers[-1].tokens[len(state["tokens"]) :])
    with pytest.raises(ParameterError, match="audio from sample 99000 on instead of"):
        Stream.restore(ours.parameters, ours.parameters.options, begun.states[-1], 99_000)


async def test_endpoint_begins_a_fresh_cache(recogniser: Any) -> None:
    ours = recogniser("nemo")
    await ours.recognise([with_silences()])
    fresh = [i for i, (window,) in enumerate(ours.calls) if window.carried.cache is None]
    assert fresh[0] == 0
    assert len(fresh) >= 2
    assert {ours.calls[i][0].carried.zeros for i in fresh} == {9}
    kept = replace(ours.parameters, cached=replace(ours.parameters.cached, reset_at_endpoint=False))
    ours.calls.clear()
    await ours.go_on(Stream(kept, kept.options), [with_silences()])
    assert [i for i, (window,) in enumerate(ours.calls) if window.carried.cache is None] == [0]


async def test_end_of_utterance_ends_a_segment(recogniser: Any) -> None:
    ours = recogniser("eou")
    (token,) = ours.parameters.endpoint_tokens
    assert token == 38
    chosen = (await ours.recognise([RECORDINGS["jfk"]])).tokens[3].id  # random weights do not emit the real one
    ours.parameters = replace(ours.parameters, endpoint_tokens=frozenset({chosen}))
    pieces = np.split(RECORDINGS["jfk"], range(2560, len(RECORDINGS["jfk"]), 2560))
    result = await ours.recognise(pieces, max_total_tokens=100_000)
    ended = [answer for answer in result.answers if answer.final]
    assert len(ended) >= 2
    for answer in ended[:-1]:
        assert answer.tokens[-1].id == chosen


def test_unknown_language_is_refused(recogniser: Any) -> None:
    p = recogniser("prompted").parameters
    assert p.cached.prompt("") == 5
    assert p.cached.prompt("de") == p.cached.prompt("DE-de") == 1
    with pytest.raises(ParameterError, match="language is 'xx'; allowed are auto, en-US, de-DE"):
        Stream(p, p.options.override({"language": "xx"}))


@pytest.mark.parametrize("name", EVERY)
def test_gateway_knows_when_a_chunk_is_due(recogniser: Any, name: str) -> None:
    """Sample by sample: its geometry is computed from the same parameters by code of its own."""
    p = recogniser(name).parameters
    config = read_config(imported(name) / f"{name}_decoder" / "config.pbtxt")
    windows = read_windows({key: value.string_value for key, value in config.parameters.items()})["balanced"]
    stream = Stream(p, p.options)
    check_when_chunks_are_due(stream, windows)
