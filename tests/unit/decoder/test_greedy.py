from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from greedy import Floats, JointOutputs, PredictorState, Row, States, Step, Token, decode
from tests.support.transducers import DIMENSION, VOCABULARY, RandomTransducer, assert_same, decode_frame_by_frame, random_frames

UNLIMITED = 10**9
RNNT: tuple[int, ...] = ()
KINDS = [RNNT, (0, 1, 2, 3, 4), (0,), (1, 2)]

networks = st.builds(
    RandomTransducer,
    seed=st.integers(0, 10**6),
    durations=st.sampled_from(KINDS),
    blank_bias=st.sampled_from([2.0, 4.0, 6.0]),
)
frames = st.builds(random_frames, seed=st.integers(0, 10**6), frames=st.integers(0, 25))
batches = st.lists(frames, min_size=1, max_size=4)
block_sizes = st.integers(1, 30)
symbol_limits = st.integers(1, 6)


def run(
    network: RandomTransducer,
    rows: Sequence[Floats],
    block_frames: int,
    max_symbols_per_step: int = 10,
    max_tokens: int = UNLIMITED,
    predictors: Sequence[PredictorState] | None = None,
) -> tuple[list[list[Token]], list[int]]:
    predictors = predictors or [network.fresh() for _ in rows]
    decoded = [
        Row(frames, predictor, max_symbols_per_step, max_tokens) for frames, predictor in zip(rows, predictors, strict=True)
    ]
    decode(network, network.joint, decoded, block_frames)
    return [row.tokens for row in decoded], [row.done_frames for row in decoded]


def test_random_transducers_mix_blanks_and_tokens() -> None:
    for durations in KINDS:
        runs = [decode_frame_by_frame(RandomTransducer(i, durations, 4.0), random_frames(i, 30), 10) for i in range(30)]
        assert sum(map(len, runs)) > 30
        assert sum(30 - len({token.frame for token in tokens}) for tokens in runs) > 30
        if 0 in durations or not durations:
            assert any(count > 1 for tokens in runs for count in Counter(token.frame for token in tokens).values())
    forgetful = decode_frame_by_frame(RandomTransducer(2, RNNT, 4.0, memory=0.0), random_frames(2, 30), 10)
    assert forgetful != decode_frame_by_frame(RandomTransducer(2, RNNT, 4.0), random_frames(2, 30), 10)


@given(networks, batches, block_sizes, symbol_limits)
def test_blocks_and_batches_change_nothing(
    network: RandomTransducer, rows: list[Floats], block_frames: int, max_symbols: int
) -> None:
    tokens, done = run(network, rows, block_frames, max_symbols)
    assert done == [row.shape[1] for row in rows]
    for row, row_tokens in zip(rows, tokens, strict=True):
        assert_same(row_tokens, decode_frame_by_frame(network, row, max_symbols))


@given(networks, batches, block_sizes, symbol_limits, st.data())
def test_windows_change_nothing(
    network: RandomTransducer, rows: list[Floats], block_frames: int, max_symbols: int, data: st.DataObject
) -> None:
    borders = [
        [0, *sorted(data.draw(st.lists(st.integers(0, row.shape[1]), min_size=4, max_size=4))), row.shape[1]] for row in rows
    ]
    predictors = [network.fresh() for _ in rows]
    joined: list[list[Token]] = [[] for _ in rows]
    for window in range(5):
        spans = [(row_borders[window], row_borders[window + 1]) for row_borders in borders]
        windows = [row[:, start:end] for row, (start, end) in zip(rows, spans, strict=True)]
        tokens, done = run(network, windows, block_frames, max_symbols, predictors=predictors)
        assert done == [end - start for start, end in spans]
        for i, (start, _) in enumerate(spans):
            joined[i] += [token._replace(frame=token.frame + start) for token in tokens[i]]
    for row, row_tokens in zip(rows, joined, strict=True):
        assert_same(row_tokens, decode_frame_by_frame(network, row, max_symbols))


@given(networks, batches, block_sizes)
def test_row_costs_a_call_per_token_and_block(network: RandomTransducer, rows: list[Floats], block_frames: int) -> None:
    """A call either emits a token or crosses a block without one, and rows share their calls."""
    alone: list[int] = []
    for row in rows:
        network.calls = 0
        (tokens,), _ = run(network, [row], block_frames)
        blocks = -(-row.shape[1] // block_frames)
        # The walk begins a block anew behind every token: tokens + 1 calls, one for each further block.
        assert len(tokens) <= network.calls <= len(tokens) + blocks
        if not tokens and network.joint.durations == RNNT:
            assert network.calls == blocks
        alone.append(network.calls)
    network.calls = 0
    run(network, rows, block_frames)
    assert network.calls == max(alone)


@pytest.mark.parametrize(("block_frames", "calls"), [(1, 20), (7, 3), (10, 2), (20, 1), (32, 1)])
def test_row_without_tokens_costs_its_blocks(block_frames: int, calls: int) -> None:
    network = RandomTransducer(1, blank_bias=100.0)
    assert run(network, [random_frames(1, 20)], block_frames) == ([[]], [20])
    assert network.calls == calls


@pytest.mark.parametrize("block_frames", [1, 3, 20])
def test_max_symbols_per_step_holds_for_every_frame(block_frames: int) -> None:
    network = RandomTransducer(1, blank_bias=-100.0)
    (tokens,), _ = run(network, [random_frames(1, 8)], block_frames, max_symbols_per_step=3)
    assert [token.frame for token in tokens] == [frame for frame in range(8) for _ in range(3)]


@pytest.mark.parametrize("durations", KINDS)
def test_rows_have_their_own_limits(durations: tuple[int, ...]) -> None:
    network = RandomTransducer(3, durations, blank_bias=-100.0)
    frames, limits = random_frames(3, 12), [(1, UNLIMITED), (2, 5), (4, UNLIMITED)]
    rows = [Row(frames, network.fresh(), max_symbols, max_tokens) for max_symbols, max_tokens in limits]
    decode(network, network.joint, rows, 4)
    for row, (max_symbols, max_tokens) in zip(rows, limits, strict=True):
        assert_same(row.tokens, decode_frame_by_frame(network, frames, max_symbols)[:max_tokens])


@given(networks, frames, block_sizes, symbol_limits, st.integers(1, 5))
def test_max_tokens_stops_exactly_and_resuming_loses_nothing(
    network: RandomTransducer, row: Floats, block_frames: int, max_symbols: int, max_tokens: int
) -> None:
    predictor = network.fresh()
    joined: list[Token] = []
    start, resumes = 0, True
    while resumes:
        (tokens,), (done,) = run(network, [row[:, start:]], block_frames, max_symbols, max_tokens, [predictor])
        joined += [token._replace(frame=token.frame + start) for token in tokens]
        start += done
        resumes = len(tokens) == max_tokens
        assert len(tokens) <= max_tokens
        assert len(joined) <= row.shape[1] * max_symbols
    assert start == row.shape[1]
    assert_same(joined, decode_frame_by_frame(network, row, max_symbols))


def test_jump_passes_whole_rows() -> None:
    network = RandomTransducer(1, durations=(4,), blank_bias=100.0)
    predictor = network.fresh()
    calls = []
    for _ in range(5):
        assert run(network, [random_frames(1, 1)], 8, predictors=[predictor]) == ([[]], [1])
        calls.append(network.calls)
    assert calls == [1, 1, 1, 1, 2]


@given(networks, frames)
def test_empty_rows_cost_and_change_nothing(network: RandomTransducer, row: Floats) -> None:
    empty = np.zeros((DIMENSION, 0), np.float32)
    predictors = [network.fresh() for _ in range(3)]
    before = [predictors[0].last_token, predictors[0].symbols, predictors[0].surplus_frames]
    tokens, done = run(network, [empty, row, empty], 5, predictors=predictors)
    assert (tokens[0], tokens[2], done) == ([], [], [0, row.shape[1], 0])
    for predictor in (predictors[0], predictors[2]):
        assert [predictor.last_token, predictor.symbols, predictor.surplus_frames] == before
        assert not any(state.any() for state in predictor.states)
    assert_same(tokens[1], decode_frame_by_frame(network, row, 10))
    network.calls = 0
    assert run(network, [empty], 5) == ([[]], [0])
    assert run(network, [], 5) == ([], [])
    assert network.calls == 0


def fixed(*logits: float) -> Step:
    """Return a network that scores every frame alike."""

    def step(frames: Floats, last_tokens: npt.NDArray[np.int32], states: States) -> tuple[Floats, States]:
        return np.broadcast_to(np.array(logits, np.float32), (len(last_tokens), frames.shape[2], len(logits))), states

    return step


def decode_one_frame(step: Step, joint: JointOutputs) -> list[Token]:
    frame = np.zeros((DIMENSION, 1), np.float32)
    row = Row(frame, PredictorState(joint.blank, ()), 1, UNLIMITED)
    decode(step, joint, [row], 1)
    return row.tokens


@pytest.mark.parametrize("durations", [RNNT, (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("surplus", [-1, 1])
def test_wrong_number_of_logits_is_refused(durations: tuple[int, ...], surplus: int) -> None:
    joint = JointOutputs(VOCABULARY, durations)
    needed = VOCABULARY + 1 + len(durations)
    with pytest.raises(ValueError, match=rf"gives {needed + surplus} logits per frame.* need {needed}$"):
        decode_one_frame(fixed(*[0.0] * (needed + surplus)), joint)


@pytest.mark.parametrize("logits", [(np.nan, np.nan), (1.0, np.nan), (np.nan, 1.0), (np.inf, 1.0)])
def test_non_finite_logits_are_refused(logits: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="token 0 has probability nan at frame 0: the logits are not finite"):
        decode_one_frame(fixed(*logits), JointOutputs(1))


def test_probability_is_over_tokens_and_blank() -> None:
    expected = np.exp(3.0) / np.exp([1.0, 3.0, 2.0]).sum()
    for step, joint in (
        (fixed(1.0, 3.0, 2.0), JointOutputs(2)),
        (fixed(1.0, 3.0, 2.0, 50.0, 60.0), JointOutputs(2, (1, 2))),
        (fixed(1001.0, 1003.0, 1002.0), JointOutputs(2)),
        (fixed(1.0, 3.0, 2.0), JointOutputs(2, blank_penalty=7.0)),
    ):
        (token,) = decode_one_frame(step, joint)
        assert token.id == 1
        assert token.probability == pytest.approx(expected)


def test_token_spans_its_duration() -> None:
    (token,) = decode_one_frame(fixed(1.0, 0.0, 0.0, 0.0, 1.0), JointOutputs(1, (0, 1, 4)))
    assert token.frames == 4
    (token,) = decode_one_frame(fixed(1.0, 0.0), JointOutputs(1))
    assert token.frames == 1


@pytest.mark.parametrize(("blank_penalty", "emitted"), [(0.0, 0), (0.4, 0), (0.6, 1), (-5.0, 0)])
def test_blank_penalty_turns_blanks_into_tokens(blank_penalty: float, emitted: int) -> None:
    assert len(decode_one_frame(fixed(1.0, 1.5), JointOutputs(1, blank_penalty=blank_penalty))) == emitted


def test_negative_blank_penalty_turns_tokens_into_blanks() -> None:
    assert len(decode_one_frame(fixed(1.5, 1.0), JointOutputs(1))) == 1
    assert not decode_one_frame(fixed(1.5, 1.0), JointOutputs(1, blank_penalty=-1.0))
