"""Greedy decoding of transducers in blocks of frames, in plain numpy.

A transducer's predictor changes only when a token is emitted. So one call of the network scores a whole block of frames
against a predictor that stands still; the walk to the first token happens here, and only then is the network asked again.
A row of frames costs its tokens + 1 calls, and one more for each further block that it crosses; rows are independent streams
and share every call.

Two kinds are decoded by the same walk: RNN-T (Graves 2012, arXiv:1211.3711) and TDT (Xu et al. 2023, arXiv:2304.06795), whose
network also says how many frames to jump. An RNN-T is a TDT whose blanks always jump one frame and whose tokens jump none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
States = tuple[Floats, ...]


class Step(Protocol):
    """The predictor and joint network, for one block of frames after one token a row."""

    def __call__(self, frames: Floats, last_tokens: npt.NDArray[np.int32], states: States) -> tuple[Floats, States]:
        """Score the frames.

        Args:
            frames: encoder frames [B, D, T].
            last_tokens: the last token of each row [B], blank at the start.
            states: predictor states before that token was fed, each [L, B, H].

        Returns:
            Logits [B, T, V + 1 + durations] and the predictor states after the token was fed, each [L, B, H].
        """
        ...


@dataclass(frozen=True)
class Transducer:
    """What the network's outputs mean.

    Attributes:
        blank: index of the blank; the tokens are 0 … blank - 1, the durations' logits follow the blank's.
        durations: jumps in frames that a TDT chooses from; empty for an RNN-T.
        blank_penalty: subtracted from the blank's logit; trades deletions for insertions.
    """

    blank: int
    durations: tuple[int, ...] = ()
    blank_penalty: float = 0.0

    @property
    def outputs(self) -> int:
        """Number of logits a frame."""
        return self.blank + 1 + len(self.durations)


@dataclass
class Predictor:
    """What one row carries from one call to the next.

    Attributes:
        last_token: last token emitted, blank at the start.
        states: the predictor's states before ``last_token`` was fed, each [L, H].
        symbols: tokens already emitted on the frame that comes next; not 0 only where ``max_tokens`` stopped the walk.
        surplus_frames: frames of the next row that a TDT jump has already passed.
    """

    last_token: int
    states: States
    symbols: int = 0
    surplus_frames: int = 0


class Token(NamedTuple):
    """One emitted token.

    Attributes:
        id: index in the vocabulary.
        frame: frame of emission, counted from the start of the row.
        frames: how many frames the token spans: a TDT's duration, 1 where there is none.
        probability: of the token among all tokens and the blank, 0 … 1.
    """

    id: int
    frame: int
    frames: int
    probability: float


def decode(
    step: Step,
    transducer: Transducer,
    rows: Sequence[Floats],
    predictors: Sequence[Predictor],
    max_symbols_per_step: Sequence[int],
    max_tokens: Sequence[int],
    block_frames: int,
) -> tuple[list[list[Token]], list[int]]:
    """Decode each row of frames and leave its predictor where the next row of that stream begins.

    Args:
        step: the network.
        transducer: the meaning of its outputs.
        rows: encoder frames of each stream [D, T_i]; lengths may differ, and may be 0.
        predictors: carried state of each stream, changed in place.
        max_symbols_per_step: for each stream, after how many tokens on one frame the walk moves on by one frame.
        max_tokens: for each stream, the number of tokens at which its walk stops before the end of its row.
        block_frames: frames scored by one call.

    Returns:
        The tokens of each row in order, and how many of its frames are done: all, unless ``max_tokens`` was reached.
    """
    tokens: list[list[Token]] = [[] for _ in rows]
    position = [predictor.surplus_frames for predictor in predictors]

    def unfinished(i: int) -> bool:
        return position[i] < rows[i].shape[1] and len(tokens[i]) < max_tokens[i]

    active = [i for i in range(len(rows)) if unfinished(i)]
    while active:
        logits, states = _score(step, rows, predictors, position, active, block_frames)
        best, jumps = _choose(transducer, logits)
        for b, i in enumerate(active):
            length = min(block_frames, rows[i].shape[1] - position[i])
            t = 0
            while t < length and best[b][t] == transducer.blank:
                t += max(jumps[b][t], 1)
                predictors[i].symbols = 0
            if t >= length:
                position[i] += t
                continue
            token, jump = best[b][t], jumps[b][t]
            probability = _probability(transducer, logits[b, t], token)
            tokens[i].append(Token(token, position[i] + t, max(jump, 1), probability))
            predictors[i].last_token = token
            predictors[i].states = tuple(state[:, b] for state in states)
            predictors[i].symbols += 1
            if jump == 0 and predictors[i].symbols >= max_symbols_per_step[i]:
                jump = 1
            if jump > 0:
                predictors[i].symbols = 0
            position[i] += t + jump
        active = [i for i in active if unfinished(i)]
    done = [min(position[i], row.shape[1]) for i, row in enumerate(rows)]
    for i in range(len(rows)):
        predictors[i].surplus_frames = position[i] - done[i]
    return tokens, done


def _score(
    step: Step,
    rows: Sequence[Floats],
    predictors: Sequence[Predictor],
    position: Sequence[int],
    active: Sequence[int],
    block_frames: int,
) -> tuple[Floats, States]:
    """Call the network on the next block of every active row; shorter rows are padded with zeros."""
    width = max(min(block_frames, rows[i].shape[1] - position[i]) for i in active)
    frames = np.zeros((len(active), rows[active[0]].shape[0], width), np.float32)
    for b, i in enumerate(active):
        block = rows[i][:, position[i] : position[i] + width]
        frames[b, :, : block.shape[1]] = block
    last_tokens = np.array([predictors[i].last_token for i in active], np.int32)
    states = tuple(np.stack(layers, axis=1) for layers in zip(*(predictors[i].states for i in active), strict=True))
    return step(frames, last_tokens, states)


def _choose(transducer: Transducer, logits: Floats) -> tuple[list[list[int]], list[list[int]]]:
    """Best token and jump of every row and frame. A TDT's two parts are separate distributions (its paper, section 3)."""
    if logits.shape[-1] != transducer.outputs:
        raise ValueError(
            f"the joint network gives {logits.shape[-1]} logits a frame, but blank {transducer.blank} and "
            f"{len(transducer.durations)} durations need {transducer.outputs}"
        )
    scores = logits[..., : transducer.blank + 1]
    if transducer.blank_penalty:
        scores = scores.copy()
        scores[..., transducer.blank] -= transducer.blank_penalty
    best = scores.argmax(axis=-1)
    if transducer.durations:
        jumps = np.asarray(transducer.durations)[logits[..., transducer.blank + 1 :].argmax(axis=-1)]
    else:
        jumps = np.zeros_like(best)
    return best.tolist(), jumps.tolist()


def _probability(transducer: Transducer, logits: Floats, token: int) -> float:
    """Softmax over tokens and blank of one frame, at one token."""
    scores = logits[: transducer.blank + 1].astype(np.float64)
    return float(1.0 / np.exp(scores - scores[token]).sum())
