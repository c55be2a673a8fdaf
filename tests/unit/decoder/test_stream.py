from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import batching
from batching import Decoder, Encoded, Encoder
from beam import BeamOptions, BeamRow
from fusion import NO_FUSION, Fusion
from greedy import Floats, Row, Token, decode
from hypotheses import Hypotheses
from parameters import LATENCIES, Geometry, Options, ParameterError, Parameters, WindowMemory
from segments import MAX_WORD_TOKENS
from spans import token_spans
from stream import Decoded, Stream
from tests.support.languages import random_fusion
from tests.support.transducers import (
    DIMENSION,
    HIDDEN,
    LAYERS,
    VOCABULARY,
    RandomTransducer,
    assert_same,
    decode_frame_by_frame,
)
from windows import Samples, Window

FRAME_SAMPLES = 16  # so that a frame is a millisecond
FEATURES_A_FRAME = 8

NEVER_CLOSES = Options(max_symbols_per_step=4, max_total_tokens=100_000, endpoint_silence_ms=0)
WHOLE = replace(NEVER_CLOSES, context="whole")

lengths = st.integers(0, 45 * FRAME_SAMPLES)
seeds = st.integers(0, 10**6)


def parameters(**changes: Any) -> Parameters:
    defaults = {
        "preprocessor_model": "",
        "encoder_model": "",
        "exclusive_encoder_model": "",
        "decoder_joint_model": "",
        "kind": "rnnt",
        "blank": VOCABULARY,
        "durations": (),
        "blank_penalty": 0.0,
        "predictor_layers": LAYERS,
        "predictor_hidden": HIDDEN,
        "frame_samples": FRAME_SAMPLES,
        "geometries": dict.fromkeys(LATENCIES, Geometry(6, 4, 2)),
        "block_frames": 5,
        "encoder_calls": 2,
        "encoder_batch": 4,
        "max_segment_secs": 3600.0,
        "max_whole_secs": 60.0,
        "memory": WindowMemory(0, 0),
        "vocabulary": "",
        "options": NEVER_CLOSES,
    }
    return Parameters(**{**defaults, **changes})


def with_geometry(left_frames: int, chunk_frames: int, right_frames: int) -> Parameters:
    return parameters(geometries=dict.fromkeys(LATENCIES, Geometry(left_frames, chunk_frames, right_frames)))


def geometry_of(config: Parameters, options: Options | None = None) -> Geometry:
    return config.geometries[(options or config.options).latency]


kinds = st.sampled_from([(), (0, 1, 2, 3, 4)])
geometries = st.builds(Geometry, st.integers(0, 8), st.integers(1, 6), st.integers(0, 4))
latencies = st.sampled_from(LATENCIES)
configs = st.builds(
    lambda geometries, latency, block_frames: parameters(
        geometries=geometries, block_frames=block_frames, options=replace(NEVER_CLOSES, latency=latency)
    ),
    st.fixed_dictionaries(dict.fromkeys(LATENCIES, geometries)),
    latencies,
    st.integers(1, 8),
)


spelling_configs = st.builds(
    lambda config, continuations: replace(config, continuations=continuations),
    configs,
    st.sampled_from([frozenset[int](), frozenset({0, 2, 3}), frozenset(range(VOCABULARY))]),
)
"""Configurations in which no token, some tokens or every token continues a word."""


fusions = st.sampled_from([NO_FUSION, random_fusion(1), random_fusion(2, with_phrases=False)])


closing_options = st.builds(
    Options,
    latency=latencies,
    max_symbols_per_step=st.integers(1, 4),
    max_total_tokens=st.integers(1, 8),
    endpoint_silence_ms=st.sampled_from([0, 3, 5]),
)

beam_options = st.builds(
    lambda options, width: replace(options, stream_beam=width), closing_options, st.sampled_from([1, 2, 4])
)
"""Options of streams that are decoded greedily or with a beam."""


def audio(seed: int, samples: int) -> Samples:
    return np.random.default_rng(seed).integers(-64, 65, samples).astype(np.int16)


def frames_of(samples: Samples) -> Floats:
    """Encode without context: each frame depends only on its own samples, the last one on those that are left."""
    padded = np.pad(samples, (0, -len(samples) % FRAME_SAMPLES)).reshape(-1, FRAME_SAMPLES)
    return (padded[:, :DIMENSION].T / 32).astype(np.float32)


def features_of(samples: Samples) -> int:
    return -(-len(samples) * FEATURES_A_FRAME // FRAME_SAMPLES)


def seconds(frames: int) -> float:
    return frames / 1000


def reference(network: RandomTransducer, samples: Samples, max_symbols_per_step: int = 4, start: int = 0) -> list[Token]:
    """Return the tokens from a frame on, decoded frame by frame with a fresh predictor."""
    tokens = decode_frame_by_frame(network, frames_of(samples)[:, start:], max_symbols_per_step)
    return [token._replace(frame=token.frame + start) for token in tokens]


Encode = Callable[[Samples], Floats]


class Request(NamedTuple):
    stream: Stream
    samples: Samples
    end: bool


class RecordingEncoder(Encoder):
    """An encoder that records its windows."""

    def __init__(self, parameters: Parameters, encode: Encode, windows: list[Window]) -> None:
        super().__init__(self._call, parameters.encoder_calls, parameters.windows_per_call)
        self._frames_of = encode
        self._windows = windows

    async def encode(self, window: Window) -> Encoded:
        self._windows.append(window)
        return await super().encode(window)

    def _call(self, group: Sequence[Window], exclusive: bool) -> list[Encoded]:  # noqa: ARG002 (an ``Encode``)
        assert len({window.kind for window in group}) == 1
        return [Encoded(self._frames_of(window.samples), features_of(window.samples)) for window in group]


def execute(
    network: RandomTransducer,
    requests: Sequence[Request],
    windows: list[Window] | None = None,
    encode: Encode = frames_of,
) -> list[Decoded]:
    """Serve requests that arrive at once, as the model does."""

    async def serve() -> list[Decoded]:
        parameters = requests[0].stream.parameters
        encoder = RecordingEncoder(parameters, encode, [] if windows is None else windows)
        decoder = Decoder(network, network.joint, parameters.block_frames, encoder.is_busy)
        for request in requests:
            request.stream.push(request.samples)
        return await asyncio.gather(*(batching.recognise(r.stream, encoder, decoder, end=r.end) for r in requests))

    return asyncio.run(serve())


def recognise(
    network: RandomTransducer,
    config: Parameters,
    pieces: Sequence[Samples],
    options: Options | None = None,
    windows: list[Window] | None = None,
    fusion: Fusion = NO_FUSION,
) -> list[Decoded]:
    """Return the answers to a stream sent in pieces; the last piece ends it."""
    stream = Stream(config, options or config.options, fusion)
    requests = [Request(stream, piece, i == len(pieces)) for i, piece in enumerate(pieces, 1)]
    return [answer for request in requests for answer in execute(network, [request], windows)]


def final_tokens(answers: Sequence[Decoded]) -> list[Token]:
    return [token for answer in answers if answer.final for token in answer.tokens]


def counts(answer: Decoded) -> tuple[int, int, int]:
    return answer.samples, answer.features, answer.frames


def in_chunks(samples: Samples, config: Parameters, options: Options | None = None) -> list[Samples]:
    """Return pieces that each complete one window, and an empty one that ends the stream."""
    _, chunk, right = (frames * FRAME_SAMPLES for frames in geometry_of(config, options))
    return [*np.split(samples, range(chunk + right, len(samples) + 1, chunk)), samples[:0]]


@st.composite
def cuts(draw: st.DrawFn, samples: Samples) -> list[Samples]:
    """Draw pieces of the audio, some of them empty."""
    borders = draw(st.lists(st.integers(0, len(samples)), max_size=8))
    return np.split(samples, sorted(borders))


@pytest.mark.parametrize(("options", "first_call"), [(WHOLE, 2), (NEVER_CLOSES, 1)])
def test_recording_rows_gather_during_a_backlog(monkeypatch: pytest.MonkeyPatch, options: Options, first_call: int) -> None:
    monkeypatch.setattr(batching, "GATHER_SECS", 60.0)
    network, config, batches = RandomTransducer(1), parameters(encoder_calls=1, encoder_batch=1), list[int]()

    def step(frames: Floats, last_tokens: Any, states: Any) -> Any:
        batches.append(len(frames))
        return network(frames, last_tokens, states)

    async def serve() -> list[Decoded]:
        encoder = RecordingEncoder(config, frames_of, [])
        decoder = Decoder(step, network.joint, config.block_frames, encoder.is_busy)
        streams = [Stream(config, options) for _ in range(3)]
        for number, stream in enumerate(streams):
            stream.push(audio(number, 5 * FRAME_SAMPLES))
        return await asyncio.gather(*(batching.recognise(stream, encoder, decoder, end=True) for stream in streams))

    for number, answer in enumerate(asyncio.run(serve())):
        assert_same(answer.tokens, reference(network, audio(number, 5 * FRAME_SAMPLES)))
    assert batches[0] == first_call, "there was a backlog until the second window was encoded"


@given(seeds, lengths, configs, kinds, st.data())
def test_every_frame_is_decoded_once(
    seed: int, length: int, config: Parameters, durations: tuple[int, ...], data: st.DataObject
) -> None:
    network, samples = RandomTransducer(seed, durations, 4.0), audio(seed, length)
    windows: list[Window] = []
    answers = recognise(network, config, data.draw(cuts(samples)), windows=windows)
    assert_same(final_tokens(answers), reference(network, samples))
    lefts = [window.left_frames * FRAME_SAMPLES for window in windows]
    ends = [left + (window.chunk_frames or 1000) * FRAME_SAMPLES for left, window in zip(lefts, windows, strict=True)]
    chunks = [window.samples[left:end] for left, end, window in zip(lefts, ends, windows, strict=True)]
    np.testing.assert_array_equal(np.concatenate([samples[:0], *chunks])[:length], samples)
    assert [answer.final for answer in answers] == [False] * (len(answers) - 1) + [True]
    encoded = sum(map(len, chunks))  # with the last frame's padding
    assert counts(answers[-1]) == (length, -(-encoded * FEATURES_A_FRAME // FRAME_SAMPLES), -(-length // FRAME_SAMPLES))


@given(seeds, lengths, configs, st.data())
def test_windows_depend_on_the_samples_alone(seed: int, length: int, config: Parameters, data: st.DataObject) -> None:
    network, samples = RandomTransducer(seed), audio(seed, length)
    at_once: list[Window] = []
    recognise(network, config, [samples], windows=at_once)
    cut: list[Window] = []
    recognise(network, config, data.draw(cuts(samples)), windows=cut)
    assert [(w.samples.tolist(), *w[1:]) for w in at_once] == [(w.samples.tolist(), *w[1:]) for w in cut]
    left_frames, chunk_frames, right_frames = geometry_of(config)
    for i, window in enumerate(at_once):
        assert window.left_frames == min(i * chunk_frames, left_frames)
    for window in at_once[:-1]:
        assert window.chunk_frames == chunk_frames
        assert len(window.samples) == FRAME_SAMPLES * (window.left_frames + chunk_frames + right_frames)


@given(seeds, lengths, configs, kinds)
def test_partial_equals_its_windows_audio(seed: int, length: int, config: Parameters, durations: tuple[int, ...]) -> None:
    network, samples = RandomTransducer(seed, durations, 4.0), audio(seed, length)
    _, chunk_frames, right_frames = geometry_of(config)
    windows = max(0, length // FRAME_SAMPLES - right_frames) // chunk_frames
    for i, answer in enumerate(recognise(network, config, in_chunks(samples, config))[:-1], 1):
        assert answer.frames == min(i, windows) * chunk_frames
        heard = samples[: (answer.frames + right_frames) * FRAME_SAMPLES] if answer.frames else samples[:0]
        assert_same(answer.tokens, reference(network, heard))
        assert answer.stable == sum(token.frame < answer.frames for token in answer.tokens)
        assert answer.samples == answer.frames * FRAME_SAMPLES
        assert answer.features == answer.frames * FEATURES_A_FRAME


@example(0, 8 * FRAME_SAMPLES, with_geometry(6, 4, 0), Options(max_total_tokens=1), (), NO_FUSION, None)
@given(seeds, lengths, spelling_configs, beam_options, kinds, fusions, st.data())
def test_final_tokens_do_not_depend_on_cuts(
    seed: int,
    length: int,
    config: Parameters,
    options: Options,
    durations: tuple[int, ...],
    fusion: Fusion,
    data: st.DataObject | None,
) -> None:
    network, samples = RandomTransducer(seed, durations, 4.0), audio(seed, length)
    config = replace(config, max_segment_secs=seconds(20))
    at_once = recognise(network, config, [samples], options, fusion=fusion)
    for pieces in (data.draw(cuts(samples)) if data else [samples, samples[:0]], in_chunks(samples, config, options)):
        answers = recognise(network, config, pieces, options, fusion=fusion)
        assert final_tokens(answers) == final_tokens(at_once)
        assert counts(answers[-1]) == counts(at_once[-1])


@given(seeds, lengths, spelling_configs, closing_options, kinds, st.data())
def test_segment_end_loses_and_repeats_nothing(
    seed: int, length: int, config: Parameters, options: Options, durations: tuple[int, ...], data: st.DataObject
) -> None:
    """Without memory each frame decides alone, so a reset of the predictor has no effect."""
    network, samples = RandomTransducer(seed, durations, 1.0, memory=0.0), audio(seed, length)
    config = replace(config, max_segment_secs=seconds(20))
    answers = recognise(network, config, data.draw(cuts(samples)), options)
    assert_same(final_tokens(answers), reference(network, samples, options.max_symbols_per_step))


@given(seeds, lengths, spelling_configs, beam_options, kinds, st.data())
def test_stable_tokens_stay_and_finals_are_stable(
    seed: int, length: int, config: Parameters, options: Options, durations: tuple[int, ...], data: st.DataObject
) -> None:
    network, samples = RandomTransducer(seed, durations, 4.0), audio(seed, length)
    config = replace(config, max_segment_secs=seconds(20))
    answers = recognise(network, config, data.draw(cuts(samples)), options)
    for answer in answers:
        assert answer.stable == len(answer.tokens) if answer.final else answer.stable <= len(answer.tokens)
    for answer, following in pairwise(answers):
        assert following.segment == answer.segment + answer.final
        if following.segment == answer.segment:
            assert following.tokens[: answer.stable] == answer.tokens[: answer.stable]


@given(seeds, lengths, configs, st.integers(1, 8))
def test_segment_ends_at_max_total_tokens(seed: int, length: int, config: Parameters, max_total_tokens: int) -> None:
    network, samples = RandomTransducer(seed, blank_bias=4.0), audio(seed, length)
    expected = reference(network, samples, 10)
    # Then all segments end amid a frame, where the predictor goes on, and their tokens are those of one long segment.
    assume(max(Counter(token.frame for token in expected).values(), default=0) < 10)
    options = replace(config.options, max_symbols_per_step=10, max_total_tokens=max_total_tokens)
    answers = recognise(network, config, in_chunks(samples, config), options)
    assert_same(final_tokens(answers), expected)
    answered = 0
    for answer in answers[:-1]:
        decoded = sum(token.frame < answer.frames for token in expected) - answered
        full_segments = decoded // max_total_tokens
        assert answer.final == (full_segments > 0)
        assert answer.stable == (full_segments * max_total_tokens or decoded)
        assert len(answer.tokens) <= max(1, full_segments) * max_total_tokens
        answered += answer.stable if answer.final else 0


@given(seeds, lengths, configs, st.sampled_from([0, 3, 6]), st.sampled_from([10, 15, 1000]))
def test_segment_ends_by_silence_or_length_and_resets(
    seed: int, length: int, config: Parameters, silence_ms: int, max_frames: int
) -> None:
    network, samples = RandomTransducer(seed, blank_bias=6.0), audio(seed, length)
    config = replace(config, max_segment_secs=seconds(max_frames))
    answers = recognise(network, config, in_chunks(samples, config), replace(config.options, endpoint_silence_ms=silence_ms))
    start = 0
    for answer in answers[:-1]:
        expected = reference(network, samples[: answer.frames * FRAME_SAMPLES], start=start)
        assert_same(answer.tokens[: answer.stable], expected)
        silent_frames = answer.frames - expected[-1].frame - 1 if expected else 0
        silent = silence_ms > 0 and silent_frames >= silence_ms
        assert answer.final == (silent or answer.frames - start >= max_frames)
        start = answer.frames if answer.final else start
    assert_same(answers[-1].tokens, reference(network, samples, start=start))


@given(seeds, lengths, spelling_configs, st.integers(1, 4), st.sampled_from([1, 3]), kinds)
def test_full_segment_ends_between_words(
    seed: int, length: int, config: Parameters, max_total_tokens: int, width: int, durations: tuple[int, ...]
) -> None:
    network, samples = RandomTransducer(seed, durations, 4.0), audio(seed, length)
    options = replace(config.options, max_symbols_per_step=4, max_total_tokens=max_total_tokens, stream_beam=width)
    config = replace(config, max_segment_secs=seconds(20))
    finals = [answer for answer in recognise(network, config, in_chunks(samples, config, options), options) if answer.final]
    for answer, following in pairwise(finals):
        if following.tokens and following.tokens[0].id in config.continuations:
            assert len(answer.tokens) >= max_total_tokens + MAX_WORD_TOKENS


def decode_words(pieces: Sequence[tuple[int, int]], **changes: Any) -> list[list[int]]:
    """Return the tokens of each segment if these tokens are emitted on these frames; odd tokens continue a word."""
    config = parameters(continuations=frozenset({1, 3}), **{"frame_samples": 1600, "max_segment_secs": 2.0, **changes})
    stream = Stream(config, replace(NEVER_CLOSES, max_total_tokens=1000))
    segments: list[list[int]] = []
    for frame in range(80):
        stream.push(np.zeros(1600, np.int16))
        left, frames = [token for token, at in pieces if at == frame], np.zeros((DIMENSION, 1), np.float32)
        while frames.shape[1]:
            row = stream.row(frames)
            assert isinstance(row, Row)
            row.tokens += [Token(token, 0, 1, 0.5) for token in left[: row.max_tokens]]
            del left[: row.max_tokens]
            row.position = 0 if left else 1
            frames = stream.commit(row)
        if (answer := stream.finish_request(end=False)).final:
            segments.append([token.id for token in answer.tokens])
    return [*segments, [token.id for token in stream.finish_request(end=True).tokens]]


def test_long_segment_ends_before_the_next_word() -> None:
    """Frames take 0.1 s and segments 2 s; a word spoken at 2 s is completed first."""
    assert decode_words([(0, 5), (2, 19), (1, 21), (3, 24), (2, 26), (2, 30)])[0] == [0, 2, 1, 3]
    assert decode_words([(0, 5), (2, 19), (1, 21), (2, 21), (0, 30)])[0] == [0, 2, 1], "on one frame"
    assert decode_words([(0, 5), (2, 19), (1, 26)])[:2] == [[0, 2], [1]], "no word has a gap of half a second"
    assert decode_words([(0, 5), (2, 10), (0, 21)])[0] == [0, 2], "nothing is being spoken at 2 s"
    endless = [(0, 18), *((1, frame) for frame in range(19, 60, 3))]
    assert sum(map(len, decode_words(endless))) == len(endless)
    assert len(decode_words(endless)[0]) == 8, "no word takes longer than 2 s"


@given(seeds, lengths, spelling_configs, beam_options, kinds, st.data())
def test_spans_are_in_order_and_within_the_audio(
    seed: int, length: int, config: Parameters, options: Options, durations: tuple[int, ...], data: st.DataObject
) -> None:
    network, samples = RandomTransducer(seed, durations, 2.0), audio(seed, length)
    config = replace(config, max_segment_secs=seconds(20))
    answers = recognise(network, config, data.draw(cuts(samples)), options)
    for answer in answers:
        assert len(answer.spans) == len(answer.tokens)
        for token, (start, end) in zip(answer.tokens, answer.spans, strict=True):
            assert token.frame <= start < end <= max(token.frame + token.frames, token.frame + 1)
    spans = [span for answer in answers if answer.final for span in answer.spans]
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert not spans or spans[-1][1] <= length / FRAME_SAMPLES
    partial = [answer for answer in answers if not answer.final]
    assert all(end <= start for answer in partial for (_, end), (start, _) in pairwise(answer.spans))


def test_tokens_of_one_frame_share_it() -> None:
    tokens = [Token(0, 3, 1, 0.5), Token(1, 3, 1, 0.5), Token(2, 4, 3, 0.5), Token(3, 9, 1, 0.5)]
    assert token_spans(tokens, 0.0, 20.0) == [(3.0, 3.5), (3.5, 4.0), (4.0, 7.0), (9.0, 10.0)]
    assert token_spans(tokens[1:], 3.5, 20.0)[0] == (3.5, 4.0), "the frame's first half was answered before"


def test_tokens_behind_the_audio_belong_to_its_last_frame() -> None:
    tokens = [Token(0, 3, 1, 0.5), Token(1, 4, 2, 0.5), Token(2, 6, 1, 0.5)]
    assert token_spans(tokens, 0.0, 4.5) == [(3.0, 4.0), (4.0, 4.25), (4.25, 4.5)]
    assert token_spans(tokens, 0.0, 4.0) == [(3.0, 3.0 + 1 / 3), (3.0 + 1 / 3, 3.0 + 2 / 3), (3.0 + 2 / 3, 4.0)]


@given(
    seeds,
    st.lists(st.tuples(lengths, beam_options, st.integers(0, 3), fusions), min_size=2, max_size=4),
    configs,
    kinds,
    st.data(),
)
def test_streams_sharing_calls_are_independent(
    seed: int,
    kinds_of_streams: list[tuple[int, Options, int, Fusion]],
    config: Parameters,
    durations: tuple[int, ...],
    data: st.DataObject,
) -> None:
    network = RandomTransducer(seed, durations, 4.0)
    config = replace(config, max_segment_secs=seconds(20))
    all_options = [
        replace(options, context="whole" if beam else "window", beam=max(1, beam)) for _, options, beam, _ in kinds_of_streams
    ]
    all_pieces = [data.draw(cuts(audio(seed + i, length))) for i, (length, *_) in enumerate(kinds_of_streams)]
    all_fusions = [fusion for *_, fusion in kinds_of_streams]
    streams = [Stream(config, options, fusion) for options, fusion in zip(all_options, all_fusions, strict=True)]
    together: list[list[Decoded]] = [[] for _ in streams]
    for turn in range(max(map(len, all_pieces))):
        live = [i for i, pieces in enumerate(all_pieces) if turn < len(pieces)]
        requests = [Request(streams[i], all_pieces[i][turn], turn == len(all_pieces[i]) - 1) for i in live]
        for i, answer in zip(live, execute(network, requests), strict=True):
            together[i].append(answer)
    assert together == [
        recognise(network, config, pieces, options, fusion=fusion)
        for pieces, options, fusion in zip(all_pieces, all_options, all_fusions, strict=True)
    ]


@given(seeds, lengths, configs, kinds, st.data())
def test_whole_recording_is_one_window(
    seed: int, length: int, config: Parameters, durations: tuple[int, ...], data: st.DataObject
) -> None:
    network, samples = RandomTransducer(seed, durations, 4.0), audio(seed, length)
    config = replace(config, max_segment_secs=seconds(5))
    expected = reference(network, samples)
    network.calls = 0
    stream = Stream(config, replace(WHOLE, max_total_tokens=1, endpoint_silence_ms=1))
    for piece in data.draw(cuts(samples)):
        assert execute(network, [Request(stream, piece, end=False)]) == [Decoded([], [], 0, 0, False, 0, 0, 0)]
    assert network.calls == 0
    windows: list[Window] = []
    (answer,) = execute(network, [Request(stream, samples[:0], end=True)], windows)
    assert_same(answer.tokens, expected)
    assert [len(window.samples) for window in windows] == [max(length, FRAME_SAMPLES)] * bool(length)
    assert (answer.stable, answer.segment, answer.final, answer.samples) == (len(expected), 0, True, length)


def test_whole_recording_has_a_limit() -> None:
    config = parameters(max_whole_secs=2.0)
    stream = Stream(config, WHOLE)
    stream.push(audio(0, 20_000))
    stream.push(audio(0, 12_000))
    with pytest.raises(ParameterError, match=r"context=whole takes at most 2 s of audio; this has 2\.25 s; cut it"):
        stream.push(audio(0, 4_000))
    Stream(config, NEVER_CLOSES).push(audio(0, 36_000))


@pytest.mark.parametrize("options", [NEVER_CLOSES, WHOLE])
def test_no_audio_gives_an_empty_final(options: Options) -> None:
    network = RandomTransducer(0)
    nothing = audio(0, 0)
    answers = recognise(network, parameters(), [nothing, nothing], options)
    assert answers == [Decoded([], [], 0, 0, False, 0, 0, 0), Decoded([], [], 0, 0, True, 0, 0, 0)]
    assert network.calls == 0


@pytest.mark.parametrize("options", [NEVER_CLOSES, WHOLE])
def test_audio_shorter_than_a_frame_is_padded_to_one(options: Options) -> None:
    network, samples = RandomTransducer(0, blank_bias=-100.0), audio(0, 5)
    windows: list[Window] = []
    (answer,) = recognise(network, parameters(), [samples], options, windows)
    assert [window.samples.tolist() for window in windows] == [[*samples.tolist(), *[0] * 11]]
    assert_same(answer.tokens, reference(network, samples))
    assert answer.tokens
    assert (answer.samples, answer.frames) == (5, 1)


def receive_all(config: Parameters, samples: Samples, encode: Encode) -> Decoded:
    (answer,) = execute(RandomTransducer(0), [Request(Stream(config, config.options), samples, end=True)], encode=encode)
    return answer


def test_too_few_frames_are_refused() -> None:
    config = with_geometry(6, 4, 0)
    samples = audio(0, 12 * FRAME_SAMPLES)
    with pytest.raises(
        ValueError, match=r"gave 3 frames for a window of 64 samples, of which 4 are needed: frame_samples is 16"
    ):
        receive_all(config, samples, lambda window: frames_of(window)[:, 1:])
    with pytest.raises(
        ValueError, match=r"gave 0 frames for a window of 16 samples, of which 1 are needed: frame_samples is 16"
    ):
        receive_all(config, samples[:5], lambda window: frames_of(window)[:, 1:])
    config = with_geometry(6, 4, 1)
    assert receive_all(config, samples, lambda window: frames_of(window)[:, : len(window) // 17]).frames == 11
    with pytest.raises(ValueError, match=r"gave 6 frames for a window of 160 samples, of which 7 are needed"):
        receive_all(config, samples, lambda window: frames_of(window)[:, : 6 if len(window) == 160 else 100])


def test_too_many_frames_are_refused() -> None:
    """An encoder that takes 4 steps per frame gives too many frames if ``frame_samples`` stands for 8."""
    config = with_geometry(6, 4, 0)
    samples = audio(0, 12 * FRAME_SAMPLES + 1)

    def with_more(frames: int) -> Encode:
        return lambda window: np.pad(frames_of(window), ((0, 0), (0, frames)))

    assert receive_all(config, samples, with_more(2)).samples == len(samples)
    with pytest.raises(ValueError, match=r"gave 7 frames for a window of 64 samples, which has 6 at most: frame_samples is 16"):
        receive_all(config, samples, with_more(3))
    stream = Stream(config, WHOLE)
    with pytest.raises(ValueError, match=r"gave 26 frames for a window of 193 samples, which has 15 at most"):
        execute(RandomTransducer(0), [Request(stream, samples, end=True)], encode=lambda window: frames_of(window).repeat(2, 1))


def test_encoder_may_drop_a_cut_frame() -> None:
    config = with_geometry(6, 4, 0)
    samples = audio(0, 8 * FRAME_SAMPLES + 3)
    answer = receive_all(config, samples, lambda window: frames_of(window)[:, : len(window) // FRAME_SAMPLES])
    assert (answer.samples, answer.frames) == (len(samples), 8)


@given(seeds, lengths, spelling_configs, beam_options, kinds, fusions, st.data())
def test_restored_stream_continues_unchanged(
    seed: int,
    length: int,
    config: Parameters,
    options: Options,
    durations: tuple[int, ...],
    fusion: Fusion,
    data: st.DataObject,
) -> None:
    network, samples = RandomTransducer(seed, durations, 4.0), audio(seed, length)
    pieces = data.draw(cuts(samples))
    undisturbed = recognise(network, config, pieces, options, fusion=fusion)
    stream, disturbed, sent, kept = Stream(config, options, fusion), [], 0, 0
    for i, piece in enumerate(pieces, 1):
        sent += len(piece)
        disturbed += execute(network, [Request(stream, samples[kept:sent], i == len(pieces))])
        kept = sent
        if i < len(pieces) and data.draw(st.booleans()):
            kept = max(0, disturbed[-1].frames - geometry_of(config, options).left_frames) * FRAME_SAMPLES
            stream = Stream.restore(config, options, stream.save(), fusion=fusion)
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert_same(after.tokens[: after.stable], before.tokens[: before.stable])
        assert after.spans[: after.stable] == before.spans[: before.stable]
        assert after[2:] == before[2:]
    assert_same(final_tokens(disturbed), final_tokens(undisturbed))


@pytest.mark.parametrize("context", [[-1, 0], [10**6, 0], [0, 10**6], [0], "ab"])
def test_state_with_a_foreign_context_is_refused(context: object) -> None:
    fusion = random_fusion(1)
    state = json.loads(Stream(parameters(), NEVER_CLOSES, fusion).save())
    with pytest.raises(ValueError, match="the state to restore"):
        Stream.restore(parameters(), NEVER_CLOSES, json.dumps({**state, "context": context}), fusion=fusion)


def test_state_of_another_language_model_begins_anew() -> None:
    """A Triton with a newer language model takes over the streams of an older one."""
    saved = Stream(parameters(), NEVER_CLOSES, random_fusion(1)).save()
    assert json.loads(saved)["context"] != [0, 0]
    for fusion in (NO_FUSION, random_fusion(2)):
        restored = Stream.restore(parameters(), NEVER_CLOSES, saved, fusion=fusion)
        assert json.loads(restored.save())["context"] == [0, 0]


def encoded_state(value: float) -> str:
    return base64.b64encode(np.full((LAYERS, HIDDEN), value, "<f4").tobytes()).decode()


@pytest.mark.parametrize("saved", ["", "null", "[]", "{}", "?", '{"version": 1}'])
def test_malformed_state_is_refused(saved: str) -> None:
    with pytest.raises(ValueError, match="the state to restore"):
        Stream.restore(parameters(), NEVER_CLOSES, saved)


@pytest.mark.parametrize(
    "change",
    [
        {"states": [encoded_state(0.0)[:8]] * 2},
        {"states": [encoded_state(0.0)]},
        {"states": [encoded_state(0.0)] * 3},
        {"states": [encoded_state(0.0), encoded_state(np.nan)]},
        {"last_token": VOCABULARY + 1},
        {"tokens": [[0, 0, 1, 0.5], [VOCABULARY, 1, 1, 0.5]]},
        {"tokens": [[-1, 0, 1, 0.5]]},
        {"tokens": [["a", 0, 1, 0.5]]},
        {"frames": "many"},
        {"frames": np.inf},
        *({name: -1} for name in ("frames", "features", "segment", "segment_start_frame", "symbols", "surplus_frames")),
    ],
)
def test_impossible_state_is_refused(change: dict[str, Any]) -> None:
    """Such a state would fail the calls that other streams share."""
    config = parameters()
    state = json.loads(Stream(config, NEVER_CLOSES).save())
    Stream.restore(config, NEVER_CLOSES, json.dumps({**state, "tokens": [[VOCABULARY - 1, 0, 1, 0.5]]}))
    with pytest.raises(ValueError, match="the state to restore"):
        Stream.restore(config, NEVER_CLOSES, json.dumps({**state, **change}))


def test_state_of_other_windows_is_refused() -> None:
    config = parameters(geometries={"low": Geometry(6, 2, 1), "balanced": Geometry(6, 4, 2), "throughput": Geometry(6, 4, 2)})
    saved = Stream(config, replace(NEVER_CLOSES, latency="low")).save()
    with pytest.raises(ValueError, match=r"windows of \[6, 2, 1\] frames instead of \[6, 4, 2\]"):
        Stream.restore(config, NEVER_CLOSES, saved)
    Stream.restore(config, replace(NEVER_CLOSES, latency="throughput"), Stream(config, NEVER_CLOSES).save())


def test_whole_recording_has_no_state() -> None:
    config = parameters()
    saved = Stream(config, NEVER_CLOSES).save()
    with pytest.raises(ValueError, match="context=whole"):
        Stream.restore(config, WHOLE, saved)


def decode_with_beam(network: RandomTransducer, samples: Samples, width: int, added: Fusion = NO_FUSION) -> list[Token]:
    """Return the tokens of a beam over all frames at once."""
    predictor = network.fresh()
    predictor.context = added.fresh()
    hypotheses = Hypotheses(predictor)
    row = BeamRow(frames_of(samples), hypotheses, network.joint, BeamOptions(width), added)
    decode(network, network.joint, [row], 8)
    return list(hypotheses.tokens)


@given(seeds, lengths, configs, st.integers(2, 4), st.data())
def test_beam_of_a_stream_equals_a_beam_over_all_frames(
    seed: int, length: int, config: Parameters, width: int, data: st.DataObject
) -> None:
    network, samples = RandomTransducer(seed, (), 4.0), audio(seed, length)
    options = replace(config.options, stream_beam=width)
    expected = decode_with_beam(network, samples, width)
    (last,) = recognise(network, config, data.draw(cuts(samples)), options)[-1:]
    assert [token.id for token in last.tokens] == [token.id for token in expected]


@given(seeds, lengths, configs, kinds)
def test_partial_of_a_beam_shows_the_best_hypothesis_and_a_tail(
    seed: int, length: int, config: Parameters, durations: tuple[int, ...]
) -> None:
    network, samples = RandomTransducer(seed, durations, 4.0), audio(seed, length)
    answers = recognise(network, config, in_chunks(samples, config), replace(config.options, stream_beam=4))
    right_frames = geometry_of(config).right_frames
    for answer in answers[:-1]:
        frames = [token.frame for token in answer.tokens]
        assert frames == sorted(frames)
        assert all(frame < answer.frames + right_frames for frame in frames)
        assert all(token.frame < answer.frames for token in answer.tokens[: answer.stable])


def test_most_tokens_of_a_beam_settle_before_its_end() -> None:
    """The tests above would hold if nothing was settled before the end."""
    settled = tokens = 0
    for seed in range(6):
        network, samples, config = RandomTransducer(seed, (), 5.0), audio(seed, 400 * FRAME_SAMPLES), parameters()
        *partials, final = recognise(network, config, in_chunks(samples, config), replace(NEVER_CLOSES, stream_beam=4))
        settled += partials[-1].stable
        tokens += len(final.tokens)
    assert tokens > 50
    assert settled > 0.8 * tokens


@given(seeds, lengths, configs, st.integers(2, 4))
def test_greedy_state_goes_on_with_a_beam(seed: int, length: int, config: Parameters, width: int) -> None:
    """A Triton with another default takes over."""
    network, samples = RandomTransducer(seed, (), 4.0), audio(seed, length)
    chunks = in_chunks(samples, config)
    greedy, beam = config.options, replace(config.options, stream_beam=width)
    for before, after in ((greedy, beam), (beam, greedy)):
        stream = Stream(config, before)
        answers = [*execute(network, [Request(stream, chunks[0], end=False)])]
        left = geometry_of(config).left_frames
        kept = max(0, answers[0].frames - left) * FRAME_SAMPLES
        stream = Stream.restore(config, after, stream.save())
        rest = np.concatenate([chunks[0][kept:], *chunks[1:]])
        (final,) = execute(network, [Request(stream, rest, end=True)])
        assert final.tokens[: answers[0].stable] == answers[0].tokens[: answers[0].stable]
        assert final.frames == -(-length // FRAME_SAMPLES)


@pytest.mark.parametrize(
    "hypotheses",
    [
        [[0, 0.0, 0.0]],
        [[0, float("nan"), 0.0, []]],
        [[-1, 0.0, 0.0, []]],
        [[10**6, 0.0, 0.0, []]],
        [[0, 0.0, 0.0, [[VOCABULARY, 0, 1, 0.5]]]],
        [[0, 0.0, 0.0, [[0, 0, 1, 0.5]] * 25]],
        [[0, 0.0, 0.0, []]] * 257,
        "many",
        7,
    ],
)
def test_impossible_hypotheses_are_refused(hypotheses: object) -> None:
    config, options = parameters(), replace(NEVER_CLOSES, stream_beam=4)
    state = json.loads(Stream(config, options).save())
    Stream.restore(config, options, json.dumps({**state, "hypotheses": [[0, 0.0, 0.0, [[0, 0, 1, 0.5]]]]}))
    with pytest.raises(ValueError, match="the state to restore"):
        Stream.restore(config, options, json.dumps({**state, "hypotheses": hypotheses}))


def test_state_of_a_beam_is_hardly_larger() -> None:
    """The states of all hypotheses but the settled text are computed again."""
    network, samples, config = RandomTransducer(3, (), 3.0), audio(3, 40 * FRAME_SAMPLES), parameters()
    sizes = {}
    for width in (1, 16):
        stream = Stream(config, replace(NEVER_CLOSES, stream_beam=width))
        execute(network, [Request(stream, samples, end=False)])
        state = json.loads(stream.save())
        assert len(state.get("hypotheses", [])) == (16 if width > 1 else 0)
        sizes[width] = len(json.dumps(state["states"]))
    assert sizes[16] == sizes[1]


@given(seeds, lengths, configs, st.integers(2, 4), st.integers(2, 5), st.data())
def test_alternatives_are_the_best_texts_of_a_segment(
    seed: int, length: int, config: Parameters, width: int, wanted: int, data: st.DataObject
) -> None:
    network, samples = RandomTransducer(seed, (), 4.0), audio(seed, length)
    options = replace(config.options, stream_beam=width, alternatives=wanted, endpoint_silence_ms=5)
    for answer in recognise(network, config, data.draw(cuts(samples)), options):
        if not answer.final:
            assert answer.alternatives == ()
            continue
        texts = [[token.id for token in text.tokens] for text in answer.alternatives]
        assert texts[0] == [token.id for token in answer.tokens]
        assert len(texts) <= wanted
        scores = [text.score for text in answer.alternatives]
        assert scores == sorted(scores, reverse=True)


def test_alternatives_of_several_segments_in_one_answer() -> None:
    network, samples, config = RandomTransducer(1, (), 5.0), audio(1, 200 * FRAME_SAMPLES), parameters()
    options = replace(NEVER_CLOSES, stream_beam=4, alternatives=4, endpoint_silence_ms=6)
    apart = [answer for answer in recognise(network, config, in_chunks(samples, config), options) if answer.final]
    (together,) = recognise(network, config, [samples], options)
    assert len(apart) > 2
    assert together.alternatives[0].tokens == tuple(token for answer in apart for token in answer.alternatives[0].tokens)
    assert len(together.alternatives) == 4
    assert together.alternatives[0].score == pytest.approx(sum(answer.alternatives[0].score for answer in apart))


@given(seeds, lengths, configs, kinds, st.data())
def test_endpoint_token_of_a_beam_ends_a_segment(
    seed: int, length: int, config: Parameters, durations: tuple[int, ...], data: st.DataObject
) -> None:
    network, samples = RandomTransducer(seed, durations, 3.0), audio(seed, length)
    config = replace(config, endpoint_tokens=frozenset({2}))
    options = replace(config.options, stream_beam=3)
    at_once = recognise(network, config, [samples], options)
    answers = recognise(network, config, in_chunks(samples, config), options)
    assert final_tokens(answers) == final_tokens(at_once)
    assert final_tokens(recognise(network, config, data.draw(cuts(samples)), options)) == final_tokens(at_once)
    for answer in answers[:-1]:
        assert answer.final == (2 in [token.id for token in answer.tokens[: answer.stable]])


def test_full_segment_of_a_beam_keeps_what_was_stable() -> None:
    """A word that began in an earlier answer is not moved to the next segment."""
    splits = 0
    config = replace(with_geometry(0, 3, 0), continuations=frozenset(range(1, VOCABULARY)))
    for seed in range(12):
        network, stable = RandomTransducer(seed, (), 2.0), list[Token]()
        stream = Stream(config, replace(NEVER_CLOSES, stream_beam=3, max_total_tokens=6))
        for chunk in np.split(frames_of(audio(seed, 90 * FRAME_SAMPLES)), 30, axis=1):
            stream.push(np.zeros(3 * FRAME_SAMPLES, np.int16))
            row = stream.row(chunk)
            decode(network, network.joint, [row], 8)
            stream.commit(row)
            answer = stream.finish_request(end=False)
            assert answer.tokens[: len(stable)] == stable
            stable = [] if answer.final else answer.tokens[: answer.stable]
            splits += answer.final and len(answer.tokens) < 6 + MAX_WORD_TOKENS
    assert splits > 10, "few segments ended before a word"
