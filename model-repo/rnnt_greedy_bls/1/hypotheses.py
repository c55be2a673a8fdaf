"""Hypotheses of a beam, carried from frame to frame of a search and from chunk to chunk of a stream.

Texts form a tree. Its root is the settled text, which all hypotheses continue. Tokens on which all of them agree are settled,
so a settled token never changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fusion import Context, Floats, Fusion
from greedy import PredictorState, States, Token

MAX_UNSETTLED_TOKENS = 24
"""Maximum number of tokens of a stream's hypothesis that are not settled."""

MAX_SAVED = 256
"""Maximum number of hypotheses of a saved state: a TDT's wait at several frames."""

NOTHING = np.zeros((0, 0), np.float32)


@dataclass(eq=False)
class Text:
    """A node in the tree of texts, with what the network says after it.

    Attributes:
        token: last token.
        states: predictor states before the token was fed, each [L, H]; empty if they are not known yet.
        context: state of language model and phrases after it.
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
    children: dict[int, Text] = field(default_factory=dict)
    states_after: States = ()
    bonuses: Floats = field(default_factory=lambda: NOTHING)
    begin: int = 0
    log_probs: Floats = field(default_factory=lambda: NOTHING)
    log_durations: Floats = field(default_factory=lambda: NOTHING)

    def is_scored(self, frame: int) -> bool:
        """Return whether the network has scored a frame after this text."""
        return self.begin <= frame < self.begin + len(self.log_probs)

    def child(self, token: int, fusion: Fusion) -> Text:
        """Return the text with one more token; this text is scored."""
        child = self.children.get(token)
        if child is None:
            child = self.children[token] = Text(token, self.states_after, fusion.advance(self.context, token))
        elif not child.states:
            child.states = self.states_after
        return child

    def forget_scores(self) -> None:
        """Free the memory of the scores."""
        self.log_probs = self.log_durations = NOTHING


class Hypothesis(NamedTuple):
    """A text with its score.

    Attributes:
        text: the text.
        score: log of the sum of the probabilities of its alignments, with all that is added to its tokens.
        best: the same of its best alignment alone.
        tokens: tokens of the best alignment behind the root.
    """

    text: Text
    score: float
    best: float
    tokens: tuple[Token, ...]

    def moved(self, log_prob: float) -> Hypothesis:
        """Return the hypothesis after a blank of this log probability."""
        return self._replace(score=self.score + log_prob, best=self.best + log_prob)

    def merged(self, other: Hypothesis | None) -> Hypothesis:
        """Return the sum of two hypotheses of the same text."""
        if other is None:
            return self
        better = self if self.best >= other.best else other
        return better._replace(score=float(np.logaddexp(self.score, other.score)))


class Alternative(NamedTuple):
    """A text of a segment or recording.

    Attributes:
        tokens: its tokens.
        score: its log probability with all that is added, less a part that all texts of the segment have.
    """

    tokens: tuple[Token, ...]
    score: float


NO_ALTERNATIVES = (Alternative((), 0.0),)
"""The only text of nothing."""


def combined(first: Sequence[Alternative], second: Sequence[Alternative], count: int) -> list[Alternative]:
    """Return the best texts of two segments that become one, the best first."""
    texts = [Alternative((*a.tokens, *b.tokens), a.score + b.score) for a in first for b in second]
    return sorted(texts, key=lambda text: -text.score)[:count]


class Hypotheses:
    """All hypotheses of a stream or recording. A TDT's wait at the frames that they jumped to.

    Args:
        predictor: state after the text that is settled; it is not changed.
        frame: next frame to decode, counted from the start of the stream.

    Attributes:
        root: the settled text.
        frame: next frame to decode.
    """

    def __init__(self, predictor: PredictorState, frame: int = 0) -> None:
        self.root = Text(predictor.last_token, predictor.states, predictor.context)
        self.frame = frame
        first = Hypothesis(self.root, 0.0, 0.0, ())
        self._waiting: dict[int, dict[Text, Hypothesis]] = {frame + predictor.surplus_frames: {self.root: first}}

    def arrive(self, frame: int, hypothesis: Hypothesis) -> Hypothesis:
        """Add a hypothesis to those that wait at a frame; return it with those of the same text."""
        there = self._waiting.setdefault(frame, {})
        merged = there[hypothesis.text] = hypothesis.merged(there.get(hypothesis.text))
        return merged

    def take(self, frame: int, width: int) -> list[Hypothesis]:
        """Remove the hypotheses that wait at a frame, and return those with the best scores, the best first."""
        return _best(self._waiting.pop(frame, {}).values(), width)

    def alternatives(self, count: int) -> list[Alternative]:
        """Return the best texts behind the root, the best first; at least one."""
        return [Alternative(hypothesis.tokens, hypothesis.score) for hypothesis, _ in self._ranked(count)]

    @property
    def settled(self) -> PredictorState:
        """State of the settled text."""
        return PredictorState(self.root.token, self.root.states, context=self.root.context)

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Tokens of the best hypothesis that are not settled."""
        return self._ranked(1)[0][0].tokens

    @property
    def predictor(self) -> PredictorState:
        """State of the best hypothesis."""
        hypothesis, frame = self._ranked(1)[0]
        text = hypothesis.text
        return PredictorState(text.token, text.states, surplus_frames=frame - self.frame, context=text.context)

    def finish_frames(self, frame: int, width: int) -> None:
        """Go on at a frame: drop all but the best hypotheses, and what is known of the frames before."""
        self.frame = frame
        self._waiting = {
            at: {hypothesis.text: hypothesis for hypothesis in _best(there.values(), width)}
            for at, there in self._waiting.items()
        }
        self._drop_dead_texts()

    def settle(self, least: int) -> list[Token]:
        """Settle the tokens on which all hypotheses agree, and return them.

        Args:
            least: number of tokens of the best hypothesis that are settled at least; those that differ there are dropped.
        """
        best = self.tokens
        least_ids = _ids(best[:least])
        kept = {
            at: {text: hypothesis for text, hypothesis in there.items() if _ids(hypothesis.tokens[:least]) == least_ids}
            for at, there in self._waiting.items()
        }
        self._waiting = {at: there for at, there in kept.items() if there}
        count = _common_length([_ids(hypothesis.tokens) for hypothesis in self._all()])
        settled = list(best[:count])
        for token in settled:
            self.root = self.root.children[token.id]
        for there in self._waiting.values():
            for text, hypothesis in there.items():
                there[text] = hypothesis._replace(tokens=_behind(settled, hypothesis.tokens[count:]))
        self._drop_dead_texts()
        return settled

    def settle_due(self, frame: float) -> list[Token]:
        """Settle the tokens on which all hypotheses agree, and the best one's that would be unsettled for too long.

        Args:
            frame: the best hypothesis's tokens before it are settled.
        """
        longest = max(len(hypothesis.tokens) for hypothesis in self._all())
        old = sum(token.frame < frame for token in self.tokens)
        return self.settle(max(old, longest - MAX_UNSETTLED_TOKENS))

    def save(self) -> list[list[Any]]:
        """Return all hypotheses for JSON, without the states of their texts, which the root's and their tokens determine."""
        return [
            [frame, hypothesis.score, hypothesis.best, hypothesis.tokens]
            for frame, there in self._waiting.items()
            for hypothesis in there.values()
        ]

    def restore(self, saved: Sequence[Sequence[Any]], fusion: Fusion, blank: int, max_jump: int) -> None:
        """Replace the hypotheses by saved ones. Their texts get states when they are decoded.

        Args:
            saved: what ``save`` returned.
            fusion: what the stream adds to the scores of tokens.
            blank: number of tokens.
            max_jump: maximum number of frames by which a hypothesis is ahead of the next frame.

        Raises:
            TypeError, ValueError: they are malformed, or not of this model.
        """
        if not 1 <= len(saved) <= MAX_SAVED:
            raise ValueError(f"{len(saved)} hypotheses instead of 1 to {MAX_SAVED}")
        self._waiting = {}
        for at, score, best, listed in saved:
            frame, tokens = int(at), tuple(Token(*token) for token in listed)
            if len(tokens) > MAX_UNSETTLED_TOKENS or not all(0 <= token.id < blank for token in tokens):
                raise ValueError(f"tokens {_ids(tokens)} instead of at most {MAX_UNSETTLED_TOKENS} from 0 to {blank - 1}")
            if not 0 <= frame - self.frame <= max_jump or not math.isfinite(score) or not math.isfinite(best):
                raise ValueError(f"hypothesis at frame {frame} of score {score} and {best}")
            text = self.root
            for token in tokens:
                context = fusion.advance(text.context, token.id)
                text = text.children.setdefault(token.id, Text(token.id, (), context))
            self.arrive(frame, Hypothesis(text, float(score), float(best), tokens))

    def _ranked(self, width: int) -> list[tuple[Hypothesis, int]]:
        """Return the best texts, each with the frame at which its best alignment waits."""
        merged: dict[Text, Hypothesis] = {}
        frames: dict[Text, tuple[float, int]] = {}
        for at, there in self._waiting.items():
            for text, hypothesis in there.items():
                merged[text] = hypothesis.merged(merged.get(text))
                frames[text] = max((hypothesis.best, at), frames.get(text, (-math.inf, 0)))
        return [(hypothesis, frames[hypothesis.text][1]) for hypothesis in _best(merged.values(), width)]

    def _all(self) -> Iterator[Hypothesis]:
        for there in self._waiting.values():
            yield from there.values()

    def _drop_dead_texts(self) -> None:
        """Drop the texts that no hypothesis continues, and all scores: they are of frames before the next one."""
        alive = {self.root}
        for hypothesis in self._all():
            text = self.root
            for token in hypothesis.tokens:
                text = text.children[token.id]
                alive.add(text)
        for text in alive:
            text.forget_scores()
            text.children = {token: child for token, child in text.children.items() if child in alive}


def _best(hypotheses: Iterable[Hypothesis], width: int) -> list[Hypothesis]:
    """Return the hypotheses with the best scores, the best first."""
    return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)[:width]


def _ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


def _common_length(texts: Sequence[Sequence[int]]) -> int:
    """Return the length of the common prefix of texts."""
    columns = zip(*texts, strict=False)
    return next((i for i, ids in enumerate(columns) if len(set(ids)) > 1), min(map(len, texts)))


def _behind(settled: Sequence[Token], tokens: Sequence[Token]) -> tuple[Token, ...]:
    """Return tokens on frames that are not before the settled ones: these are of the best hypothesis's alignment."""
    first = settled[-1].frame if settled else 0
    return tuple(token._replace(frame=max(token.frame, first)) for token in tokens)
