"""Beam search against a search without a beam, and language models in greedy decoding against decoding frame by frame."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam import BeamOptions, BeamRow
from fusion import NO_FUSION, Context, Fusion
from greedy import Floats, Row, Token, decode
from hypotheses import MAX_SAVED, MAX_UNSETTLED_TOKENS, Alternative, Hypotheses
from tests.support.languages import random_fusion
from tests.support.transducers import DIMENSION, VOCABULARY, RandomTransducer, assert_same, decode_frame_by_frame, random_frames

UNLIMITED = 10**9
KINDS: list[tuple[int, ...]] = [(), (0, 1, 2)]
EXHAUSTIVE = BeamOptions(10**6, 2, 0.3, math.inf)

seeds = st.integers(0, 10**6)


fusions = st.one_of(st.just(NO_FUSION), seeds.map(random_fusion))


def log_softmax(values: Floats) -> list[float]:
    exact = values.astype(np.float64)
    result: list[float] = (exact - np.log(np.exp(exact - exact.max()).sum()) - exact.max()).tolist()
    return result


class Naive:
    """All that a text's tokens add, from the text alone; and the network's logits after a text, fed token by token."""

    def __init__(self, network: RandomTransducer, fusion: Fusion, frames: Floats, bonus: float) -> None:
        self.network, self.fusion, self.frames, self.bonus = network, fusion, frames, bonus
        self._fed = functools.cache(self._feed)
        self.added = functools.cache(self._added)
        self.context = functools.cache(self._context)

    def _feed(self, text: tuple[int, ...]) -> tuple[Floats, tuple[Floats, ...]]:
        states = tuple(state[:, None] for state in self.network.fresh().states) if not text else self._fed(text[:-1])[1]
        last = np.array([text[-1] if text else VOCABULARY], np.int32)
        frames = np.concatenate((self.frames, np.zeros((DIMENSION, 1), np.float32)), axis=1)
        logits, after = self.network(frames[None], last, states)
        return logits[0], after

    def logits(self, text: tuple[int, ...], frame: int) -> Floats:
        logits: Floats = self._fed(text)[0][frame]
        return logits

    def _context(self, text: tuple[int, ...]) -> Context:
        return self.fusion.advance(self.context(text[:-1]), text[-1]) if text else self.fusion.fresh()

    def next_token(self, text: tuple[int, ...]) -> list[float]:
        """What each next token adds."""
        context = self.context(text)
        scores = np.zeros(VOCABULARY)
        if model := self.fusion.language_model:
            internal = log_softmax(self.logits(text, -1)[:VOCABULARY])
            scores += self.fusion.weight * model.scores([context.language])[0]
            scores -= self.fusion.internal_weight * np.array(internal)
        if self.fusion.phrases:
            scores += self.fusion.phrases.scores(context.phrase)
        result: list[float] = scores.tolist()
        return result

    def _added(self, text: tuple[int, ...]) -> float:
        return self.added(text[:-1]) + self.next_token(text[:-1])[text[-1]] + self.bonus if text else 0.0


def search_all(naive: Naive, durations: tuple[int, ...], max_symbols: int) -> dict[tuple[int, ...], float]:
    """Return the log probability of every text, summed over all its alignments."""
    length = naive.frames.shape[1]
    ended: dict[tuple[int, ...], float] = {}

    def visit(text: tuple[int, ...], frame: int, symbols: int, log_prob: float) -> None:
        if frame >= length:
            ended[text] = float(np.logaddexp(ended.get(text, -math.inf), log_prob))
            return
        logits = naive.logits(text, frame)
        tokens = log_softmax(logits[: VOCABULARY + 1])
        jumps = dict(zip(durations, log_softmax(logits[VOCABULARY + 1 :]), strict=True)) if durations else {0: 0.0}
        for jump, log_duration in jumps.items():
            visit(text, frame + max(jump, 1), 0, log_prob + tokens[VOCABULARY] + log_duration)
            if symbols < max_symbols:
                for token in range(VOCABULARY):
                    after = log_prob + tokens[token] + log_duration
                    visit((*text, token), frame + jump, 0 if jump else symbols + 1, after)

    visit((), 0, 0, 0.0)
    return ended


def fresh(network: RandomTransducer, added: Fusion) -> Hypotheses:
    predictor = network.fresh()
    predictor.context = added.fresh()
    return Hypotheses(predictor)


def run(
    network: RandomTransducer, rows: Sequence[Floats], options: BeamOptions, chosen: Sequence[Fusion], block_frames: int = 4
) -> list[list[Alternative]]:
    """Return the texts of each row."""
    beams = [
        BeamRow(frames, fresh(network, added), network.joint, options, added)
        for frames, added in zip(rows, chosen, strict=True)
    ]
    decode(network, network.joint, beams, block_frames)
    assert all(beam.finished and beam.done_frames == beam.frames.shape[1] for beam in beams)
    return [beam.hypotheses.alternatives(options.width) for beam in beams]


def ids(text: Alternative) -> tuple[int, ...]:
    return tuple(token.id for token in text.tokens)


@settings(max_examples=12)
@given(seeds, st.sampled_from([((), 1, 3), ((), 2, 2), ((0, 1, 2), 1, 2)]), fusions, st.integers(1, 3))
def test_wide_beam_finds_the_best_of_all_texts(
    seed: int, case: tuple[tuple[int, ...], int, int], added: Fusion, block_frames: int
) -> None:
    durations, max_symbols, length = case
    network, frames = RandomTransducer(seed, durations, 3.0), random_frames(seed, length)
    options = BeamOptions(10**6, max_symbols, 0.3, math.inf)
    (texts,) = run(network, [frames], options, [added], block_frames)
    naive = Naive(network, added, frames, 0.3)
    expected = {text: log_prob + naive.added(text) for text, log_prob in search_all(naive, durations, max_symbols).items()}
    found = {ids(text): text.score for text in texts}
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx([expected[text] for text in found], abs=1e-3)
    assert texts[0].score == max(found.values())


def run_in_chunks(
    network: RandomTransducer,
    frames: Floats,
    places: Sequence[int],
    options: BeamOptions,
    added: Fusion,
    *,
    restore: bool,
) -> tuple[list[Token], Hypotheses]:
    """Decode frames that are cut at these places; return the settled tokens and the hypotheses behind them.

    Args:
        network, frames, options, added: as for ``run``.
        places: the places.
        restore: whether the hypotheses are saved and restored behind each chunk.
    """
    hypotheses, settled = fresh(network, added), list[Token]()
    for chunk in np.split(frames, sorted(places), axis=1):
        decode(network, network.joint, [BeamRow(chunk, hypotheses, network.joint, options, added)], 4)
        settled += hypotheses.settle(0)
        if restore and len(hypotheses.save()) <= MAX_SAVED:
            saved = json.loads(json.dumps(hypotheses.save()))
            hypotheses = Hypotheses(hypotheses.settled, hypotheses.frame)
            hypotheses.restore(saved, added, VOCABULARY, 2)
            assert json.loads(json.dumps(hypotheses.save())) == saved
    return settled, hypotheses


@settings(max_examples=8)
@given(
    seeds,
    st.sampled_from([((), 1, 3), ((), 2, 2), ((0, 1, 2), 1, 2)]),
    fusions,
    st.lists(st.integers(0, 3), max_size=3),
    st.booleans(),
)
def test_wide_beam_in_chunks_finds_all_texts(
    seed: int, case: tuple[tuple[int, ...], int, int], added: Fusion, places: list[int], restore: bool
) -> None:
    durations, max_symbols, length = case
    network, frames = RandomTransducer(seed, durations, 3.0), random_frames(seed, length)
    options = BeamOptions(10**6, max_symbols, 0.3, math.inf)
    settled, hypotheses = run_in_chunks(network, frames, places, options, added, restore=restore)
    naive = Naive(network, added, frames, 0.3)
    expected = {text: log_prob + naive.added(text) for text, log_prob in search_all(naive, durations, max_symbols).items()}
    assert not settled or len(expected) == 1
    found = {ids(text): text.score for text in hypotheses.alternatives(10**6)}
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx([expected[text] for text in found], abs=1e-3)


@given(seeds, st.integers(0, 30), fusions, st.integers(2, 5), st.lists(st.integers(0, 30), max_size=6), st.booleans())
def test_chunks_change_no_token_of_an_rnnt(
    seed: int, length: int, added: Fusion, width: int, places: list[int], restore: bool
) -> None:
    """A TDT's hypotheses that wait behind a chunk are compared there, so its beam is pruned at other frames."""
    network, frames = RandomTransducer(seed, (), 3.0), random_frames(seed, length)
    options = BeamOptions(width, 2, 0.3)
    ((best, *_),) = run(network, [frames], options, [added])
    settled, hypotheses = run_in_chunks(network, frames, places, options, added, restore=restore)
    tokens = [*settled, *hypotheses.tokens]
    assert [token.id for token in tokens] == [token.id for token in best.tokens]
    assert [token.frame for token in tokens] == sorted(token.frame for token in tokens)


@given(seeds, st.integers(1, 30), st.sampled_from(KINDS), fusions, st.lists(st.integers(0, 30), max_size=6))
def test_restored_hypotheses_continue_unchanged(
    seed: int, length: int, durations: tuple[int, ...], added: Fusion, places: list[int]
) -> None:
    network, frames = RandomTransducer(seed, durations, 3.0), random_frames(seed, length)
    undisturbed, restored = (
        run_in_chunks(network, frames, places, BeamOptions(), added, restore=restore) for restore in (False, True)
    )
    assert restored[0] == undisturbed[0]
    assert restored[1].alternatives(4) == undisturbed[1].alternatives(4)


@given(seeds, st.integers(1, 60), st.sampled_from(KINDS), st.integers(1, 20))
def test_no_token_is_unsettled_for_long(seed: int, length: int, durations: tuple[int, ...], frames_kept: int) -> None:
    network, frames = RandomTransducer(seed, durations, 1.0), random_frames(seed, length)
    hypotheses = fresh(network, NO_FUSION)
    for chunk in np.split(frames, range(7, length, 7), axis=1):
        decode(network, network.joint, [BeamRow(chunk, hypotheses, network.joint, BeamOptions(8), NO_FUSION)], 4)
        due = hypotheses.frame - frames_kept
        before = hypotheses.tokens
        settled = hypotheses.settle_due(due)
        assert [*settled, *hypotheses.tokens] == list(before), "the best hypothesis is kept"
        assert all(token.frame >= due for token in hypotheses.tokens)
        assert max(len(tokens) for *_, tokens in hypotheses.save()) <= MAX_UNSETTLED_TOKENS


@given(
    seeds, st.lists(st.tuples(st.integers(0, 20), fusions), min_size=1, max_size=4), st.sampled_from(KINDS), st.integers(1, 9)
)
def test_rows_blocks_and_other_streams_change_nothing(
    seed: int, rows: list[tuple[int, Fusion]], durations: tuple[int, ...], block_frames: int
) -> None:
    network, options = RandomTransducer(seed, durations, 3.0), BeamOptions()
    frames = [random_frames(seed + i, length) for i, (length, _) in enumerate(rows)]
    chosen = [added for _, added in rows]
    together = run(network, frames, options, chosen, block_frames)
    for row_frames, added, texts in zip(frames, chosen, together, strict=True):
        (alone,) = run(network, [row_frames], options, [added], block_frames=100)
        assert texts == alone


@given(seeds, st.integers(0, 20), st.sampled_from(KINDS), fusions)
def test_tokens_of_a_beam_are_in_order_and_probable(seed: int, length: int, durations: tuple[int, ...], added: Fusion) -> None:
    network, frames = RandomTransducer(seed, durations, 3.0), random_frames(seed, length)
    (texts,) = run(network, [frames], BeamOptions(), [added])
    scores = [text.score for text in texts]
    assert scores == sorted(scores, reverse=True)
    assert len({ids(text) for text in texts}) == len(texts)
    tokens = texts[0].tokens
    for token, following in pairwise(tokens):
        assert token.frame <= following.frame < length
    assert all(0 < token.probability <= 1 for token in tokens)


def test_beams_and_greedy_rows_share_calls() -> None:
    network, frames = RandomTransducer(5, blank_bias=3.0), [random_frames(i, 12) for i in range(4)]
    beams = [BeamRow(f, fresh(network, NO_FUSION), network.joint, BeamOptions(), NO_FUSION) for f in frames[:2]]
    rows = [Row(f, network.fresh(), 10, UNLIMITED) for f in frames[2:]]
    alone = 0
    for f in frames:
        before = network.calls
        run(network, [f], BeamOptions(), [NO_FUSION])
        alone = max(alone, network.calls - before)
    before = network.calls
    decode(network, network.joint, [*beams, *rows], 4)
    assert network.calls - before <= max(alone, max(len(row.tokens) for row in rows) + 3)
    for row, f in zip(rows, frames[2:], strict=True):
        assert_same(row.tokens, decode_frame_by_frame(network, f, 10))


def test_non_finite_logits_fail_only_their_beam() -> None:
    network, frames = RandomTransducer(5, blank_bias=3.0), random_frames(1, 12)
    broken = frames.copy()
    broken[:, 6] = np.nan
    rows = [BeamRow(f, fresh(network, NO_FUSION), network.joint, BeamOptions(), NO_FUSION) for f in (frames, broken, frames)]
    with pytest.raises(ValueError, match="the logits are not finite from frame"):
        decode(network, network.joint, rows, 4)
    assert [bool(row.error) for row in rows] == [False, True, False]
    assert rows[0].hypotheses.alternatives(4) == rows[2].hypotheses.alternatives(4)


def greedy_frame_by_frame(network: RandomTransducer, frames: Floats, added: Fusion, max_symbols: int) -> list[Token]:
    """Decode with the language model one frame and token at a time."""
    naive = Naive(network, added, frames, 0.0)
    tokens: list[Token] = []
    text: tuple[int, ...] = ()
    t = symbols = 0
    while t < frames.shape[1]:
        logits = naive.logits(text, t)
        jump = network.joint.durations[logits[VOCABULARY + 1 :].argmax()] if network.joint.durations else 0
        emits = logits[: VOCABULARY + 1].argmax() != VOCABULARY
        if emits:
            token = int((logits[:VOCABULARY] + np.array(naive.next_token(text), np.float32)).argmax())
            tokens.append(Token(token, t, max(jump, 1), math.exp(log_softmax(logits[: VOCABULARY + 1])[token])))
            text, symbols = (*text, token), symbols + 1
        if jump > 0 or not emits or symbols == max_symbols:
            t, symbols = t + max(jump, 1), 0
    return tokens


@given(
    seeds, st.lists(st.tuples(st.integers(0, 20), fusions), min_size=1, max_size=4), st.sampled_from(KINDS), st.integers(1, 9)
)
def test_greedy_with_a_language_model_equals_frame_by_frame(
    seed: int, cases: list[tuple[int, Fusion]], durations: tuple[int, ...], block_frames: int
) -> None:
    network = RandomTransducer(seed, durations, 3.0)
    rows = []
    for i, (length, added) in enumerate(cases):
        predictor = network.fresh()
        predictor.context = added.fresh()
        rows.append(Row(random_frames(seed + i, length), predictor, 3, UNLIMITED, added))
    decode(network, network.joint, rows, block_frames)
    for row in rows:
        assert_same(row.tokens, greedy_frame_by_frame(network, row.frames, row.fusion, 3))


def test_language_model_costs_no_calls() -> None:
    network, added = RandomTransducer(7, blank_bias=3.0), random_fusion(3)
    for chosen in (NO_FUSION, added):
        predictor = network.fresh()
        predictor.context = chosen.fresh()
        row = Row(random_frames(7, 40), predictor, 10, UNLIMITED, chosen)
        before = network.calls
        decode(network, network.joint, [row], 8)
        assert network.calls - before <= len(row.tokens) + 5
        assert row.tokens


def test_language_model_and_phrases_change_tokens() -> None:
    """The tests above would hold without any effect too."""
    network = RandomTransducer(7, blank_bias=3.0)
    frames = [random_frames(i, 20) for i in range(10)]
    plain = [texts[0].tokens for texts in run(network, frames, BeamOptions(), [NO_FUSION] * 10)]
    for added in (random_fusion(3, with_phrases=False), Fusion(phrases=random_fusion(3).phrases)):
        assert [texts[0].tokens for texts in run(network, frames, BeamOptions(), [added] * 10)] != plain
