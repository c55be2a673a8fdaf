"""Greedy decoding of transducers in blocks of frames, in plain numpy.

A transducer's predictor changes only when a token is emitted. So one call of the network scores a whole block of frames against
a constant predictor state; the walk to the first token happens here, and then the network is called again. A row of frames
costs its tokens + 1 calls, and one more for each further block that it crosses. Rows are independent streams and share calls.

One walk decodes two kinds: RNN-T (Graves 2012, arXiv:1211.3711) and TDT (Xu et al. 2023, arXiv:2304.06795), whose network also
gives the number of frames to jump. An RNN-T is a TDT whose blanks always jump one frame and whose tokens jump none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
States = tuple[Floats, ...]


class Step(Protocol):
    """The predictor and joint network, for one block of frames after one token per row."""

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
    """The meaning of the network's outputs.

    Attributes:
        blank: index of the blank; the tokens are 0 … blank - 1, and the logits of the durations follow the blank's.
        durations: jumps in frames that a TDT chooses from; empty for an RNN-T.
        blank_penalty: subtracted from the blank's logit; trades deletions for insertions.
    """

    blank: int
    durations: tuple[int, ...] = ()
    blank_penalty: float = 0.0

    @property
    def outputs(self) -> int:
        """Number of logits per frame."""
        return self.blank + 1 + len(self.durations)


@dataclass
class Predictor:
    """The state that one row carries from call to call.

    Attributes:
        last_token: last token emitted, blank at the start.
        states: the predictor's states before ``last_token`` was fed, each [L, H].
        symbols: number of tokens already emitted on the next frame; between rows it is 0 unless ``max_tokens`` stopped one.
        surplus_frames: number of frames of the next row that a TDT jump has already passed.
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
        frames: number of frames that the token spans: a TDT's duration, else 1.
        probability: of the token among all tokens and the blank, 0 … 1.
    """

    id: int
    frame: int
    frames: int
    probability: float


@dataclass(eq=False)
class Row:
    """Frames of one stream on their way through the decoder.

    Attributes:
        frames: encoder frames [D, T]; T may be 0.
        predictor: carried state of the stream, changed in place; after the last frame, the next row begins with it.
        max_symbols_per_step: number of tokens on one frame after which the walk moves on; at least 1.
        max_tokens: number of tokens after which decoding stops; the next row has the rest of the frames.
        tokens: tokens emitted so far, frames counted from the row's start.
        position: the next frame; behind the row's end if a TDT jumped there.
        error: why the row cannot be decoded to its end; empty if it can.
    """

    frames: Floats
    predictor: Predictor
    max_symbols_per_step: int
    max_tokens: int
    tokens: list[Token] = field(default_factory=list)
    position: int = field(init=False)
    error: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self.position = 0
        self._move(self.predictor.surplus_frames)

    @property
    def finished(self) -> bool:
        """Whether all frames are decoded, ``max_tokens`` reached, or decoding failed."""
        return self.position >= self.frames.shape[1] or len(self.tokens) >= self.max_tokens or bool(self.error)

    @property
    def done_frames(self) -> int:
        """Number of decoded frames."""
        return min(self.position, self.frames.shape[1])

    def pass_blanks(self, frames: int) -> None:
        """Move over this many frames of blanks."""
        self.predictor.symbols = 0
        self._move(frames)

    def emit(self, token: int, jump: int, probability: float, states: States) -> None:
        """Take a token on the next frame, jump by ``jump`` frames, and commit the predictor's states [L, H].

        A frame whose logits are NaN always ends here, since no comparison with NaN chooses the blank; it fails this row alone.
        """
        if not math.isfinite(probability):
            self.error = f"token {token} has probability {probability} at frame {self.position}: the logits are not finite"
            return
        predictor = self.predictor
        self.tokens.append(Token(token, self.position, max(jump, 1), probability))
        predictor.last_token, predictor.states = token, states
        predictor.symbols += 1
        if jump == 0 and predictor.symbols >= self.max_symbols_per_step:
            jump = 1
        if jump > 0:
            predictor.symbols = 0
        self._move(jump)

    def _move(self, frames: int) -> None:
        self.position += frames
        self.predictor.surplus_frames = max(0, self.position - self.frames.shape[1])


def decode(step: Step, transducer: Transducer, rows: Sequence[Row], block_frames: int) -> None:
    """Decode rows to their end.

    Args:
        step: the network.
        transducer: the meaning of its outputs.
        rows: one per stream; lengths may differ.
        block_frames: frames scored by one call.

    Raises:
        ValueError: the network's outputs are not those of the transducer, or not finite.
    """
    while unfinished := [row for row in rows if not row.finished]:
        advance(step, transducer, unfinished, block_frames)
    for error in filter(None, (row.error for row in rows)):
        raise ValueError(error)


def advance(step: Step, transducer: Transducer, rows: Sequence[Row], block_frames: int) -> None:
    """Move each row to its next token, or over a block without one, with one call of the network; see ``decode``."""
    logits, states = _score(step, rows, block_frames)
    best, jumps = _choose(transducer, logits)
    for b, row in enumerate(rows):
        length = min(block_frames, row.frames.shape[1] - row.position)
        t = 0
        while t < length and best[b][t] == transducer.blank:
            t += max(jumps[b][t], 1)
        if t:
            row.pass_blanks(t)
        if t < length:
            token = best[b][t]
            probability = _probability(transducer, logits[b, t], token)
            row.emit(token, jumps[b][t], probability, tuple(state[:, b].copy() for state in states))


def _score(step: Step, rows: Sequence[Row], block_frames: int) -> tuple[Floats, States]:
    """Call the network on the next block of every row; pad shorter rows with zeros."""
    blocks = [row.frames[:, row.position : row.position + block_frames] for row in rows]
    frames = np.zeros((len(rows), blocks[0].shape[0], max(block.shape[1] for block in blocks)), np.float32)
    for padded, block in zip(frames, blocks, strict=True):
        padded[:, : block.shape[1]] = block
    last_tokens = np.array([row.predictor.last_token for row in rows], np.int32)
    states = tuple(np.stack(layers, axis=1) for layers in zip(*(row.predictor.states for row in rows), strict=True))
    return step(frames, last_tokens, states)


def _choose(transducer: Transducer, logits: Floats) -> tuple[list[list[int]], list[list[int]]]:
    """Return the best token and jump of every row and frame; a TDT's two are separate distributions (its paper, section 3)."""
    if logits.shape[-1] != transducer.outputs:
        raise ValueError(
            f"the joint network gives {logits.shape[-1]} logits per frame, but blank {transducer.blank} and "
            f"{len(transducer.durations)} durations need {transducer.outputs}"
        )
    tokens = logits[..., : transducer.blank]
    best = tokens.argmax(axis=-1)
    best[tokens.max(axis=-1) < logits[..., transducer.blank] - np.float32(transducer.blank_penalty)] = transducer.blank
    if transducer.durations:
        jumps = np.asarray(transducer.durations)[logits[..., transducer.blank + 1 :].argmax(axis=-1)]
    else:
        jumps = np.zeros_like(best)
    return best.tolist(), jumps.tolist()


def _probability(transducer: Transducer, logits: Floats, token: int) -> float:
    """Return one token's softmax over the tokens and blank of a frame; NaN if the logits are not finite."""
    scores = logits[: transducer.blank + 1].astype(np.float64)
    if math.isinf(scores[token]):
        return math.nan  # numpy gives the same, with a warning
    return float(1.0 / np.exp(scores - scores[token]).sum())
