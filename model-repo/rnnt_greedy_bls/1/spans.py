"""Times of tokens, in frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from greedy import Token

Span = tuple[float, float]
"""Start and end."""


def token_spans(tokens: Sequence[Token], begin: float, end: float) -> list[Span]:
    """Return start and end of each token in frames. Spans are in order, are not empty, and do not overlap.

    A token spans its frame, or its duration if the model outputs durations. Tokens of one frame share it evenly. An encoder may
    add a frame after the end of the audio; a token on this frame counts as one of the last frame.

    Args:
        tokens: tokens in order of their frames.
        begin: end of the span before the first token.
        end: length of the audio; greater than ``begin``.
    """
    last_frame = math.ceil(end) - 1
    groups = [(frame, list(group)) for frame, group in groupby(tokens, lambda token: min(token.frame, last_frame))]
    spans: list[Span] = []
    for i, (frame, group) in enumerate(groups):
        low, high = max(float(frame), begin), min(frame + 1.0, end)
        borders = [low + (high - low) * j / len(group) for j in range(len(group))]
        following = groups[i + 1][0] if i + 1 < len(groups) else math.inf
        until = max(high, min(float(group[-1].frame + group[-1].frames), following, end))
        spans.extend(zip(borders, [*borders[1:], until], strict=True))
    return spans
