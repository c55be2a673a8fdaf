"""Decode transducers with a beam: time-synchronous, equal texts merged, in plain numpy.

All hypotheses stand at the same frame and emit a limited number of tokens there (the time-synchronous search of Saon et al.,
ICASSP 2020). Hypotheses of equal tokens are one, whose probability is the sum over its alignments. A TDT's hypotheses jump, and
wait at their frame until the others arrive there.

A text is scored once for a block of frames, as in ``greedy.py``, so a call of the network is due only when new texts survive
the beam, or a block ends. Instead of the blank penalty of greedy decoding, each token has a bonus.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fusion import Context, Floats, Fusion, log_softmax, token_scores
from greedy import JointOutputs, PredictorState, Query, Scored, States, Token


@dataclass(frozen=True)
class BeamOptions:
    """Size of a beam.

    Attributes:
        width: number of hypotheses that are kept at each frame, at least 1.
        max_symbols_per_step: maximum number of tokens on one frame.
        insertion_bonus: added to the score of each token.
        score_range: a token is tried unless its hypothesis scores worse than the best one by more than this.
    """

    width: int = 4
    max_symbols_per_step: int = 2
    insertion_bonus: float = 0.5
    score_range: float = 6.0


class Alternative(NamedTuple):
    """One of the best texts of a row.

    Attributes:
        tokens: its tokens; frames are counted from the start of the row.
        score: its log probability with all that is added.
    """

    tokens: list[Token]
    score: float


class _Path(NamedTuple):
    """The last token of an alignment, and the alignment before."""

    before: _Path | None
    token: Token


NOTHING = np.zeros((0, 0), np.float32)


@dataclass(eq=False)
class _Text:
    """A text: a node in the tree of all texts of a row, with what the network says after it.

    Attributes:
        token: last token; the row's last one for the empty text.
        states: predictor states before the token was fed, each [L, H].
        context: state of language model and phrases after it.
        added: sum of all that is added to the scores of its tokens.
        children: longer texts by their last token.
        states_after: predictor states after the token was fed.
        bonuses: what is added to the score of each next token [V]; empty before the text is scored.
        begin: frame of ``log_probs``' first row.
        log_probs: log probabilities of tokens and blank at the frames of a block [T, V + 1].
        log_durations: log probabilities of the durations [T, K]; K is 0 for an RNN-T.
    """

    token: int
    states: States
    context: Context
    added: float
    children: dict[int, _Text] = field(default_factory=dict)
    states_after: States = ()
    bonuses: Floats = field(default_factory=lambda: NOTHING)
    begin: int = 0
    log_probs: Floats = field(default_factory=lambda: NOTHING)
    log_durations: Floats = field(default_factory=lambda: NOTHING)

    def is_scored(self, frame: int) -> bool:
        """Return whether the network has scored a frame after this text."""
        return self.begin <= frame < self.begin + len(self.log_probs)


class _Hypothesis(NamedTuple):
    """A text at a frame.

    Attributes:
        text: the text.
        log_prob: log of the sum of the probabilities of its alignments.
        best: log probability of its best alignment.
        path: the best alignment.
    """

    text: _Text
    log_prob: float
    best: float
    path: _Path | None

    @property
    def score(self) -> float:
        """Its log probability with all that is added."""
        return self.log_prob + self.text.added

    def moved(self, log_prob: float) -> _Hypothesis:
        """Return the hypothesis after a blank of this log probability."""
        return self._replace(log_prob=self.log_prob + log_prob, best=self.best + log_prob)

    def merged(self, other: _Hypothesis | None) -> _Hypothesis:
        """Return the sum of two hypotheses of the same text."""
        if other is None:
            return self
        better = self if self.best >= other.best else other
        return better._replace(log_prob=float(np.logaddexp(self.log_prob, other.log_prob)))


class BeamRow:
    """Frames of one stream that are decoded with a beam; a ``greedy.Search``.

    Args:
        frames: encoder frames [D, T]; T may be 0.
        predictor: state of the stream before them; it is not changed.
        options: size of the beam.
        fusion: what the stream adds to the scores of tokens.

    Attributes:
        alternatives: the best texts in order, when decoding has finished; at least one.
        error: why decoding failed; empty if it did not.
    """

    def __init__(self, frames: Floats, predictor: PredictorState, options: BeamOptions, fusion: Fusion) -> None:
        self.frames = frames
        self.fusion = fusion
        self.alternatives: list[Alternative] = []
        self.error = ""
        self._options = options
        self._root = _Text(predictor.last_token, predictor.states, predictor.context, 0.0)
        self._frame = predictor.surplus_frames
        self._unscored: list[_Text] = []
        self._scored: list[_Text] = []
        self._search: Iterator[None] | None = None
        if self._frame < frames.shape[1]:
            self._unscored = [self._root]
        else:
            self.alternatives = [Alternative([], 0.0)]

    @property
    def finished(self) -> bool:
        """Whether all frames are decoded, or decoding failed."""
        return bool(self.alternatives or self.error)

    @property
    def tokens(self) -> list[Token]:
        """Tokens of the best text; empty before the end."""
        return self.alternatives[0].tokens if self.alternatives else []

    @property
    def done_frames(self) -> int:
        """Number of decoded frames."""
        return self.frames.shape[1] if self.finished else 0

    def queries(self, block_frames: int) -> list[Query]:
        """Return the texts that are not scored at this frame."""
        frames = self.frames[:, self._frame : self._frame + block_frames]
        return [Query(frames, text.token, text.states) for text in self._unscored]

    def take(self, joint: JointOutputs, scored: Scored) -> None:
        """Go on until new texts must be scored."""
        self._store(joint, scored)
        if self.error:
            return
        if self._search is None:
            self._search = self._decode(joint)
        next(self._search, None)

    def _store(self, joint: JointOutputs, scored: Scored) -> None:
        """Keep the network's results for the texts that were asked for."""
        length = min(scored.logits.shape[1], self.frames.shape[1] - self._frame)
        log_probs = log_softmax(scored.logits[:, :length, : joint.blank + 1])
        if np.isnan(log_probs).any():
            self.error = f"the logits are not finite from frame {self._frame} on"
            return
        log_durations = scored.logits[:, :length, joint.blank + 1 :]
        if joint.durations:
            log_durations = log_softmax(log_durations)
        new = [i for i, text in enumerate(self._unscored) if not text.bonuses.size]
        if new:
            contexts = [self._unscored[i].context for i in new]
            added = token_scores([self.fusion] * len(new), contexts, scored.internal[new])
            for i, bonuses in zip(new, added + np.float32(self._options.insertion_bonus), strict=True):
                self._unscored[i].bonuses = bonuses
                self._unscored[i].states_after = tuple(state[:, i].copy() for state in scored.states)
        for text in self._scored:
            if not text.is_scored(self._frame):
                text.log_probs = text.log_durations = NOTHING  # frees memory
        self._scored = [text for text in self._scored if text.log_probs.size] + self._unscored
        for i, text in enumerate(self._unscored):
            text.begin, text.log_probs, text.log_durations = self._frame, log_probs[i], log_durations[i]
        self._unscored = []

    def _decode(self, joint: JointOutputs) -> Iterator[None]:
        """Decode all frames; pause when ``_unscored`` has texts."""
        length = self.frames.shape[1]
        arriving: dict[int, dict[_Text, _Hypothesis]] = {self._frame: {self._root: _Hypothesis(self._root, 0.0, 0.0, None)}}
        for frame in range(self._frame, length):
            self._frame = frame
            current, best = _best(arriving.pop(frame, {}), self._options.width), -math.inf
            for symbols in range(self._options.max_symbols_per_step + 1):
                if not current:
                    break
                self._unscored = [hypothesis.text for hypothesis in current if not hypothesis.text.is_scored(frame)]
                if self._unscored:
                    yield
                best = max(best, *(self._pass_blank(joint, hypothesis, arriving) for hypothesis in current))
                if symbols < self._options.max_symbols_per_step:
                    current = self._emit(joint, current, best, arriving)
        ended: dict[_Text, _Hypothesis] = {}
        for hypotheses in arriving.values():
            for text, hypothesis in hypotheses.items():
                ended[text] = hypothesis.merged(ended.get(text))
        for text in ended:
            text.added += self.fusion.ending(text.context)
        self.alternatives = [
            Alternative(_tokens(hypothesis.path), hypothesis.score) for hypothesis in _best(ended, self._options.width)
        ]

    def _pass_blank(self, joint: JointOutputs, hypothesis: _Hypothesis, arriving: dict[int, dict[_Text, _Hypothesis]]) -> float:
        """Move a hypothesis over a blank; return its best score after it."""
        text, frame = hypothesis.text, self._frame
        blank = float(text.log_probs[frame - text.begin, joint.blank])
        if not joint.durations:
            moved = _arrive(arriving, frame + 1, hypothesis.moved(blank))
            return moved.score
        best = -math.inf
        for jump, log_prob in zip(joint.durations, text.log_durations[frame - text.begin].tolist(), strict=True):
            moved = hypothesis.moved(blank + log_prob)
            _arrive(arriving, frame + max(jump, 1), moved)
            best = max(best, moved.score)
        return best

    def _emit(
        self,
        joint: JointOutputs,
        current: list[_Hypothesis],
        best: float,
        arriving: dict[int, dict[_Text, _Hypothesis]],
    ) -> list[_Hypothesis]:
        """Extend hypotheses by the tokens that score best; return those that stay on the frame."""
        frame, width = self._frame, self._options.width
        texts = [hypothesis.text for hypothesis in current]
        tokens = np.stack([text.log_probs[frame - text.begin, : joint.blank] for text in texts])
        scores = (tokens + np.stack([text.bonuses for text in texts]))[:, :, None]
        scores = scores + np.array([hypothesis.score for hypothesis in current], np.float32)[:, None, None]
        jumps = joint.durations or (0,)
        durations = np.zeros((len(texts), 1), np.float32)
        if joint.durations:
            durations = np.stack([text.log_durations[frame - text.begin] for text in texts])
            scores = scores + durations[:, None]
        flat = scores.reshape(-1)
        chosen = np.flatnonzero(flat > best - self._options.score_range)
        if len(chosen) > width:
            chosen = chosen[np.argsort(-flat[chosen], kind="stable")[:width]]
        staying: dict[_Text, _Hypothesis] = {}
        for number, token, duration in zip(*(axis.tolist() for axis in np.unravel_index(chosen, scores.shape)), strict=True):
            hypothesis, jump = current[number], jumps[duration]
            log_prob = float(tokens[number, token]) + float(durations[number, duration])
            probability = math.exp(float(tokens[number, token]))
            longer = _Hypothesis(
                self._child(hypothesis.text, token),
                hypothesis.log_prob + log_prob,
                hypothesis.best + log_prob,
                _Path(hypothesis.path, Token(token, frame, max(jump, 1), probability)),
            )
            if jump:
                _arrive(arriving, frame + jump, longer)
            else:
                staying[longer.text] = longer.merged(staying.get(longer.text))
        return list(staying.values())

    def _child(self, text: _Text, token: int) -> _Text:
        """Return a text with one more token."""
        child = text.children.get(token)
        if child is None:
            context = self.fusion.advance(text.context, token)
            child = _Text(token, text.states_after, context, text.added + float(text.bonuses[token]))
            text.children[token] = child
        return child


def _arrive(arriving: dict[int, dict[_Text, _Hypothesis]], frame: int, hypothesis: _Hypothesis) -> _Hypothesis:
    """Add a hypothesis to those that arrive at a frame; return it with those of the same text."""
    there = arriving.setdefault(frame, {})
    merged = there[hypothesis.text] = hypothesis.merged(there.get(hypothesis.text))
    return merged


def _best(hypotheses: Mapping[_Text, _Hypothesis], width: int) -> list[_Hypothesis]:
    """Return the hypotheses with the best scores, the best first."""
    return sorted(hypotheses.values(), key=lambda hypothesis: -hypothesis.score)[:width]


def _tokens(path: _Path | None) -> list[Token]:
    tokens = []
    while path:
        tokens.append(path.token)
        path = path.before
    return tokens[::-1]
