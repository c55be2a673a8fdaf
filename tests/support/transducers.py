"""A small random joint, and the plain frame-by-frame decoding that decoding in blocks must agree with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from greedy import Floats, JointOutputs, PredictorState, States, Token

VOCABULARY = 7
LAYERS, HIDDEN, DIMENSION = 2, 5, 4


def quantised(values: npt.NDArray[np.float64], steps: int = 64) -> Floats:
    """Round to multiples of 1/steps: sums of their products are exact, so in whatever order a batch is summed."""
    rounded: Floats = (np.round(values * steps) / steps).astype(np.float32)
    return rounded


def random_frames(seed: int, frames: int) -> Floats:
    return quantised(np.random.default_rng(seed).normal(size=(DIMENSION, frames)))


class RandomTransducer:
    """A ``greedy.Step`` with random weights, which counts its calls.

    Args:
        seed: of the weights.
        durations: of a TDT; empty for an RNN-T.
        blank_bias: added to the blank's logit; the more, the fewer tokens.
        memory: weight of the predictor in the logits; with 0 a frame alone decides.
    """

    def __init__(self, seed: int, durations: tuple[int, ...] = (), blank_bias: float = 2.0, memory: float = 1.0) -> None:
        random = np.random.default_rng(seed)
        self.joint = JointOutputs(VOCABULARY, durations)
        self.calls = 0
        self._embedding = quantised(random.normal(size=(VOCABULARY + 1, HIDDEN)))
        self._recurrence = quantised(random.normal(size=(HIDDEN, HIDDEN)))
        self._encoder = quantised(random.normal(size=(DIMENSION, self.joint.size)))
        self._predictor = quantised(random.normal(size=(HIDDEN, self.joint.size)) * memory)
        self._bias = np.zeros(self.joint.size, np.float32)
        self._bias[VOCABULARY] = blank_bias

    def __call__(self, frames: Floats, last_tokens: npt.NDArray[np.int32], states: States) -> tuple[Floats, States]:
        self.calls += 1
        hidden, before = states
        fed = quantised(np.tanh(self._embedding[last_tokens] + hidden @ self._recurrence - before[::-1]))
        logits = frames.swapaxes(1, 2) @ self._encoder + (fed[-1] @ self._predictor)[:, None] + self._bias
        return logits, (fed, hidden)

    def fresh(self) -> PredictorState:
        state = np.zeros((LAYERS, HIDDEN), np.float32)
        return PredictorState(VOCABULARY, (state, state))


def decode_frame_by_frame(network: RandomTransducer, frames: Floats, max_symbols_per_step: int) -> list[Token]:
    """One call a frame and symbol, in the manner of onnx-asr's transducer loop."""
    blank, durations = network.joint.blank, network.joint.durations
    tokens: list[Token] = []
    last_token, states = blank, tuple(state[:, None] for state in network.fresh().states)
    t = symbols = 0
    while t < frames.shape[1]:
        logits, states_after = network(frames[None, :, t : t + 1], np.array([last_token], np.int32), states)
        scores = logits[0, 0, : blank + 1].astype(np.float64)
        token = int(scores.argmax())
        duration = durations[logits[0, 0, blank + 1 :].argmax()] if durations else 0
        if token != blank:
            probability = float((np.exp(scores) / np.exp(scores).sum())[token])
            tokens.append(Token(token, t, max(duration, 1), probability))
            last_token, states = token, states_after
            symbols += 1
        if duration > 0 or token == blank or symbols == max_symbols_per_step:
            t += max(duration, 1)
            symbols = 0
    return tokens


def assert_same(tokens: list[Token], expected: list[Token]) -> None:
    assert [token[:3] for token in tokens] == [token[:3] for token in expected]
    assert [token.probability for token in tokens] == pytest.approx([token.probability for token in expected])
