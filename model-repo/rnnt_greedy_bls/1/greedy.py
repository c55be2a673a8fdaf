"""Decode transducers greedily in blocks of frames, in plain numpy; rows of ``beam.py`` share the calls.

A transducer's predictor changes only when a token is emitted. So one call of the network scores a whole block of frames with a
constant predictor state. This module finds the first token in the scores; then the network is called again. A row of frames
costs its tokens + 1 calls, and one more for each further block. Rows belong to independent streams and share calls.

The same loop decodes RNN-T (Graves 2012, arXiv:1211.3711) and TDT (Xu et al. 2023, arXiv:2304.06795). A TDT's network also
outputs the number of frames to jump. An RNN-T is a TDT whose blanks always jump one frame and whose tokens jump none.

The network alone decides between the blank and a token. Which token it is, a language model and phrases decide with it
(``fusion.py``), so they cost a look-up per token and leave the walk over blanks as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from fusion import EMPTY_CONTEXT, NO_FUSION, Context, Fusion, token_scores

Floats = npt.NDArray[np.float32]
States = tuple[Floats, ...]


class Step(Protocol):
    """Predictor and joint network: scores one block of frames per row after the row's last token."""

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
class JointOutputs:
    """Layout of the joint network's logits, and their use.

    Attributes:
        blank: index of the blank; the tokens are 0 … blank - 1, and the logits of the durations follow the blank's.
        durations: jumps in frames that a TDT chooses from; empty for an RNN-T.
        blank_penalty: subtracted from the blank's logit; trades deletions for insertions.
    """

    blank: int
    durations: tuple[int, ...] = ()
    blank_penalty: float = 0.0

    @property
    def size(self) -> int:
        """Number of logits per frame."""
        return self.blank + 1 + len(self.durations)


@dataclass
class PredictorState:
    """Decoding state of a stream, carried from call to call and from row to row.

    Attributes:
        last_token: last token emitted; the blank at the start.
        states: predictor states before ``last_token`` was fed, each [L, H].
        symbols: number of tokens emitted on the next frame; between rows it is 0 unless ``max_tokens`` ended a row.
        surplus_frames: number of frames of the next row that a TDT jump has already passed.
        context: state of language model and phrases after ``last_token``.
    """

    last_token: int
    states: States
    symbols: int = 0
    surplus_frames: int = 0
    context: Context = EMPTY_CONTEXT


class Query(NamedTuple):
    """What one row of a call scores.

    Attributes:
        frames: encoder frames [D, T].
        last_token: token that is fed before.
        states: predictor states before it, each [L, H].
    """

    frames: Floats
    last_token: int
    states: States


class Scored(NamedTuple):
    """Result of a call for the queries of one search.

    Attributes:
        logits: of the frames [B, T, V + 1 + durations]; those behind a query's frames are to be ignored.
        internal: logits of a frame of zeros without the blank [B, V]; arbitrary unless the search's fusion needs them.
        states: predictor states after the token was fed, each [L, B, H].
    """

    logits: Floats
    internal: Floats
    states: States


class Search(Protocol):
    """Decoding of one stream's frames that shares calls with others."""

    fusion: Fusion
    error: str

    @property
    def finished(self) -> bool:
        """Whether decoding has ended, or failed."""
        ...

    def queries(self, block_frames: int) -> list[Query]:
        """Return what the next call has to score, at most this many frames each."""
        ...

    def take(self, scored: Scored) -> None:
        """Go on with the result of the call."""
        ...


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
    """Frames of one stream that are being decoded.

    Attributes:
        frames: encoder frames [D, T]; T may be 0.
        predictor: state of the stream, changed in place; the next row continues from it.
        max_symbols_per_step: number of tokens on one frame after which decoding moves on; at least 1.
        max_tokens: number of tokens after which decoding stops; the next row has the rest of the frames.
        fusion: what the stream adds to the scores of tokens.
        tokens: tokens emitted so far; frames are counted from the start of the row.
        position: index of the next frame; beyond the end of the row if a TDT jumped there.
        error: why decoding failed; empty if it did not.
    """

    frames: Floats
    predictor: PredictorState
    max_symbols_per_step: int
    max_tokens: int
    fusion: Fusion = NO_FUSION
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

    def query(self, block_frames: int) -> Query:
        """Return the next block of frames as a query."""
        frames = self.frames[:, self.position : self.position + block_frames]
        return Query(frames, self.predictor.last_token, self.predictor.states)

    def pass_blanks(self, frames: int) -> None:
        """Skip this many frames of blanks."""
        self.predictor.symbols = 0
        self._move(frames)

    def emit(self, token: int, jump: int, probability: float, states: States) -> None:
        """Append a token on the next frame, jump by ``jump`` frames, and keep the predictor states [L, H].

        A frame whose logits are NaN always emits a token, since no comparison with NaN chooses the blank. Its probability is
        not finite, so only this row fails.
        """
        if not math.isfinite(probability):
            self.error = f"token {token} has probability {probability} at frame {self.position}: the logits are not finite"
            return
        predictor = self.predictor
        self.tokens.append(Token(token, self.position, max(jump, 1), probability))
        predictor.last_token, predictor.states = token, states
        if self.fusion.is_active:
            predictor.context = self.fusion.advance(predictor.context, token)
        predictor.symbols += 1
        if jump == 0 and predictor.symbols >= self.max_symbols_per_step:
            jump = 1
        if jump > 0:
            predictor.symbols = 0
        self._move(jump)

    def _move(self, frames: int) -> None:
        self.position += frames
        self.predictor.surplus_frames = max(0, self.position - self.frames.shape[1])


def decode(step: Step, joint: JointOutputs, rows: Sequence[Row | Search], block_frames: int) -> None:
    """Decode rows and other searches to their end.

    Args:
        step: predictor and joint network.
        joint: layout of the network's logits.
        rows: one per stream; lengths may differ.
        block_frames: frames scored by one call.

    Raises:
        ValueError: the network's outputs have another layout, or are not finite.
    """
    while unfinished := [row for row in rows if not row.finished]:
        advance(step, joint, unfinished, block_frames)
    for error in filter(None, (row.error for row in rows)):
        raise ValueError(error)


def advance(step: Step, joint: JointOutputs, rows: Sequence[Row | Search], block_frames: int) -> None:
    """Advance rows and other searches by one call of the network: each row to its next token or over a block without tokens.

    See ``decode``.
    """
    greedy = [row for row in rows if isinstance(row, Row)]
    searches = [row for row in rows if not isinstance(row, Row)]
    asked = [search.queries(block_frames) for search in searches]
    queries = [*(row.query(block_frames) for row in greedy), *chain.from_iterable(asked)]
    scored = _score(step, joint, queries, internal=any(row.fusion.needs_internal for row in rows))
    if greedy:
        _advance_greedily(joint, greedy, _part(scored, 0, len(greedy)), block_frames)
    begin = len(greedy)
    for search, own in zip(searches, asked, strict=True):
        search.take(_part(scored, begin, begin + len(own)))
        begin += len(own)


def _advance_greedily(joint: JointOutputs, rows: Sequence[Row], scored: Scored, block_frames: int) -> None:
    best, jumps = _choose(joint, scored.logits)
    emitting: list[tuple[int, int]] = []  # row, frame of the block
    for b, row in enumerate(rows):
        length = min(block_frames, row.frames.shape[1] - row.position)
        t = 0
        while t < length and best[b][t] == joint.blank:
            t += max(jumps[b][t], 1)
        if t:
            row.pass_blanks(t)
        if t < length:
            emitting.append((b, t))
    _fuse(joint, rows, scored, emitting, best)
    for b, t in emitting:
        token = best[b][t]
        probability = _probability(joint, scored.logits[b, t], token)
        rows[b].emit(token, jumps[b][t], probability, tuple(state[:, b].copy() for state in scored.states))


def _fuse(
    joint: JointOutputs, rows: Sequence[Row], scored: Scored, emitting: Sequence[tuple[int, int]], best: list[list[int]]
) -> None:
    """Replace the best tokens of emitting frames by those that are best together with what their streams add."""
    fused = [(b, t) for b, t in emitting if rows[b].fusion.is_active]
    if not fused:
        return
    numbers = [b for b, _ in fused]
    fusions, contexts = [rows[b].fusion for b in numbers], [rows[b].predictor.context for b in numbers]
    added = token_scores(fusions, contexts, scored.internal[numbers])
    logits = scored.logits[numbers, [t for _, t in fused], : joint.blank]
    for (b, t), token in zip(fused, (logits + added).argmax(axis=-1).tolist(), strict=True):
        best[b][t] = token


def _score(step: Step, joint: JointOutputs, queries: Sequence[Query], *, internal: bool) -> Scored:
    """Call the network on all queries; pad shorter ones with zeros, and if ``internal`` is set all by a frame of zeros."""
    length = max(query.frames.shape[1] for query in queries)
    frames = np.zeros((len(queries), queries[0].frames.shape[0], length + internal), np.float32)
    for padded, query in zip(frames, queries, strict=True):
        padded[:, : query.frames.shape[1]] = query.frames
    last_tokens = np.array([query.last_token for query in queries], np.int32)
    states = tuple(np.stack(layers, axis=1) for layers in zip(*(query.states for query in queries), strict=True))
    logits, after = step(frames, last_tokens, states)
    if logits.shape[-1] != joint.size:
        raise ValueError(
            f"the joint network gives {logits.shape[-1]} logits per frame, but blank {joint.blank} and "
            f"{len(joint.durations)} durations need {joint.size}"
        )
    return Scored(logits[:, :length], logits[:, -1, : joint.blank], after)


def _part(scored: Scored, begin: int, end: int) -> Scored:
    """Return the results of the queries ``begin`` to ``end`` - 1."""
    states = tuple(state[:, begin:end] for state in scored.states)
    return Scored(scored.logits[begin:end], scored.internal[begin:end], states)


def _choose(joint: JointOutputs, logits: Floats) -> tuple[list[list[int]], list[list[int]]]:
    """Return the best token and jump for every row and frame; TDT has a distribution for each (section 3 of its paper)."""
    tokens = logits[..., : joint.blank]
    best = tokens.argmax(axis=-1)
    best[tokens.max(axis=-1) < logits[..., joint.blank] - np.float32(joint.blank_penalty)] = joint.blank
    if joint.durations:
        jumps = np.asarray(joint.durations)[logits[..., joint.blank + 1 :].argmax(axis=-1)]
    else:
        jumps = np.zeros_like(best)
    return best.tolist(), jumps.tolist()


def _probability(joint: JointOutputs, logits: Floats, token: int) -> float:
    """Return one token's softmax over the tokens and blank of a frame; NaN if the logits are not finite."""
    scores = logits[: joint.blank + 1].astype(np.float64)
    if math.isinf(scores[token]):
        return math.nan  # numpy returns the same with a warning
    return float(1.0 / np.exp(scores - scores[token]).sum())
