"""Decide where segments of a stream end. The rules have no state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from greedy import Token
from parameters import SAMPLE_RATE, Options, Parameters

WORD_GAP_SECS = 0.5
"""Silence after a token from which a full segment ends without waiting for the rest of a word."""

MAX_WORD_SECS = 2.0
"""Maximum time by which a segment exceeds its limit to complete a word."""

MAX_WORD_TOKENS = 16
"""Maximum number of tokens by which a segment exceeds its limit to complete a word; scripts without spaces need the limit."""


@dataclass(frozen=True)
class Segment:
    """A segment as far as it is decoded for good.

    Attributes:
        parameters: parameters of the decoder.
        options: options of the stream.
        tokens: its tokens, by the best hypothesis; frames are counted from the start of the stream.
        start: its first frame.
        end: next frame to decode.
    """

    parameters: Parameters
    options: Options
    tokens: Sequence[Token]
    start: int
    end: int

    @property
    def is_full(self) -> bool:
        """Whether it has reached its limit of tokens or seconds."""
        return self.left_tokens <= 0 or self._secs(self.end - self.start) >= self.parameters.max_segment_secs

    @property
    def is_silent(self) -> bool:
        """Whether the silence after its last token ends it."""
        silence_ms = self.options.endpoint_silence_ms
        return silence_ms > 0 and self._silent_frames * self.parameters.frame_samples * 1000 // SAMPLE_RATE >= silence_ms

    @property
    def is_amid_word(self) -> bool:
        """Whether the next token may continue its last word, within the bounds of a word."""
        return (
            bool(self.parameters.continuations and self.tokens)
            and self._secs(self._silent_frames) < WORD_GAP_SECS
            and self._secs(self.end - self.start) < self.parameters.max_segment_secs + MAX_WORD_SECS
            and -self.left_tokens < MAX_WORD_TOKENS
        )

    @property
    def left_tokens(self) -> int:
        """Number of tokens until its limit; negative beyond it."""
        return self.options.max_total_tokens - len(self.tokens)

    def begins_word(self, token: Token) -> bool:
        """Return whether it can end before a token."""
        return token.id not in self.parameters.continuations

    @property
    def _silent_frames(self) -> int:
        """Number of frames after the last token; 0 without tokens."""
        return self.end - (self.tokens[-1].frame + self.tokens[-1].frames) if self.tokens else 0

    def _secs(self, frames: int) -> float:
        return frames * self.parameters.frame_samples / SAMPLE_RATE
