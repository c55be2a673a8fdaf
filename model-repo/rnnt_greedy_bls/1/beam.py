"""Decode transducers with a beam: time-synchronous, equal texts merged, in plain numpy.

All hypotheses stand at the same frame and emit a limited number of tokens there (the time-synchronous search of Saon et al.,
ICASSP 2020). Hypotheses of equal tokens are one, whose probability is the sum over its alignments. A TDT's hypotheses jump, and
wait at their frame until the others arrive there.

A text is scored once for a block of frames, as in ``greedy.py``, so a call of the network is due only when new texts survive
the beam, or a block ends. Instead of the blank penalty of greedy decoding, each token has a bonus. The hypotheses
(``hypotheses.py``) outlive a row: the next chunk of a stream continues from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fusion import Floats, Fusion, log_softmax, token_scores
from greedy import JointOutputs, Query, Scored, Token
from hypotheses import Hypotheses, Hypothesis, Text


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
    score_range: float = 4.0


class BeamRow:
    """Frames of one stream that are decoded with a beam; a ``greedy.Search``.

    Args:
        frames: encoder frames [D, T]; T may be 0.
        hypotheses: those before the frames, changed in place: they are behind the frames when the row is finished.
        joint: layout of the network's logits.
        options: size of the beam.
        fusion: what the stream adds to the scores of tokens.

    Attributes:
        finished: whether all frames are decoded, or decoding failed.
        error: why decoding failed; empty if it did not.
    """

    def __init__(
        self, frames: Floats, hypotheses: Hypotheses, joint: JointOutputs, options: BeamOptions, fusion: Fusion
    ) -> None:
        self.frames = frames
        self.fusion = fusion
        self.hypotheses = hypotheses
        self.finished = False
        self.error = ""
        self._joint = joint
        self._options = options
        self._begin = self._frame = hypotheses.frame
        self._unscored: list[Text] = []
        self._scored: list[Text] = []
        self._search = self._decode()
        self._go_on()

    @property
    def done_frames(self) -> int:
        """Number of decoded frames."""
        return self.frames.shape[1] if self.finished else 0

    def queries(self, block_frames: int) -> list[Query]:
        """Return the texts that are not scored at this frame."""
        at = self._frame - self._begin
        frames = self.frames[:, at : at + block_frames]
        return [Query(frames, text.token, text.states) for text in self._unscored]

    def take(self, scored: Scored) -> None:
        """Go on until new texts must be scored."""
        self._store(scored)
        if not self.error:
            self._go_on()

    def _go_on(self) -> None:
        try:
            next(self._search)
        except StopIteration:
            self.finished = True

    def _store(self, scored: Scored) -> None:
        """Keep the network's results for the texts that were asked for."""
        blank = self._joint.blank
        length = min(scored.logits.shape[1], self._begin + self.frames.shape[1] - self._frame)
        log_probs = log_softmax(scored.logits[:, :length, : blank + 1])
        if np.isnan(log_probs).any():
            self.error = f"the logits are not finite from frame {self._frame} on"
            self.finished = True
            return
        log_durations = scored.logits[:, :length, blank + 1 :]
        if self._joint.durations:
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
                text.forget_scores()
        self._scored = [text for text in self._scored if text.log_probs.size] + self._unscored
        for i, text in enumerate(self._unscored):
            text.begin, text.log_probs, text.log_durations = self._frame, log_probs[i], log_durations[i]
        self._unscored = []

    def _decode(self) -> Iterator[None]:
        """Decode all frames; pause when ``_unscored`` has texts."""
        options, hypotheses = self._options, self.hypotheses
        end = self._begin + self.frames.shape[1]
        if end > self._begin:
            yield from self._feed_restored_texts()
        for frame in range(self._begin, end):
            self._frame = frame
            current, best = hypotheses.take(frame, options.width), -math.inf
            for symbols in range(options.max_symbols_per_step + 1):
                if not current:
                    break
                self._unscored = [hypothesis.text for hypothesis in current if not hypothesis.text.is_scored(frame)]
                if self._unscored:
                    yield
                best = max(best, *(self._pass_blank(hypothesis) for hypothesis in current))
                if symbols < options.max_symbols_per_step:
                    current = self._emit(current, best)
        hypotheses.finish_frames(end, options.width)

    def _feed_restored_texts(self) -> Iterator[None]:
        """Feed the predictor the texts of restored hypotheses, whose states are not saved, one token of all texts at a time."""
        texts = [self.hypotheses.root]
        while texts := [text for text in texts if text.children]:
            self._unscored = [text for text in texts if not all(child.states for child in text.children.values())]
            if self._unscored:
                yield
            texts = [text.child(token, self.fusion) for text in texts for token in text.children]

    def _pass_blank(self, hypothesis: Hypothesis) -> float:
        """Move a hypothesis over a blank; return its best score after it."""
        text, frame = hypothesis.text, self._frame
        blank = float(text.log_probs[frame - text.begin, self._joint.blank])
        if not self._joint.durations:
            return self.hypotheses.arrive(frame + 1, hypothesis.moved(blank)).score
        best = -math.inf
        for jump, log_prob in zip(self._joint.durations, text.log_durations[frame - text.begin].tolist(), strict=True):
            moved = hypothesis.moved(blank + log_prob)
            self.hypotheses.arrive(frame + max(jump, 1), moved)
            best = max(best, moved.score)
        return best

    def _emit(self, current: list[Hypothesis], best: float) -> list[Hypothesis]:
        """Extend hypotheses by the tokens that score best; return those that stay on the frame."""
        frame, joint, width = self._frame, self._joint, self._options.width
        texts = [hypothesis.text for hypothesis in current]
        # Relative to the best score, so that the length of a stream does not matter for their precision.
        scores = np.stack([text.log_probs[frame - text.begin, : joint.blank] + text.bonuses for text in texts])[:, :, None]
        scores = scores + np.array([hypothesis.score - best for hypothesis in current], np.float32)[:, None, None]
        jumps = joint.durations or (0,)
        if joint.durations:
            scores = scores + np.stack([text.log_durations[frame - text.begin] for text in texts])[:, None]
        flat = scores.reshape(-1)
        chosen = np.flatnonzero(flat > -self._options.score_range)
        if len(chosen) > width:
            chosen = chosen[np.argsort(-flat[chosen], kind="stable")[:width]]
        staying: dict[Text, Hypothesis] = {}
        for number, token, duration in zip(*(axis.tolist() for axis in np.unravel_index(chosen, scores.shape)), strict=True):
            jump = jumps[duration]
            longer = self._extended(current[number], token, duration if joint.durations else None)
            if jump:
                self.hypotheses.arrive(frame + jump, longer)
            else:
                staying[longer.text] = longer.merged(staying.get(longer.text))
        return list(staying.values())

    def _extended(self, hypothesis: Hypothesis, token: int, duration: int | None) -> Hypothesis:
        """Return a hypothesis with one more token on the frame.

        Args:
            hypothesis: the hypothesis.
            token: the token.
            duration: index of its duration; None for an RNN-T.
        """
        text, at = hypothesis.text, self._frame - hypothesis.text.begin
        log_prob = float(text.log_probs[at, token])
        gain, frames = log_prob + float(text.bonuses[token]), 1
        if duration is not None:
            gain += float(text.log_durations[at, duration])
            frames = max(self._joint.durations[duration], 1)
        emitted = Token(token, self._frame, frames, math.exp(log_prob))
        return Hypothesis(
            text.child(token, self.fusion), hypothesis.score + gain, hypothesis.best + gain, (*hypothesis.tokens, emitted)
        )
