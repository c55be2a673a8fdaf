"""State of one stream of audio: the tokens that its windows' frames were decoded to, in segments.

A chunk's frames are decoded for good, from the state after the previous chunk. The right context's frames are decoded from a
copy of the state, and their tokens are the unstable tail. ``windows.py`` cuts the audio.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from beam import BeamOptions, BeamRow
from fusion import EMPTY_CONTEXT, NO_FUSION, Context, Fusion
from greedy import Floats, PredictorState, Row, Token
from parameters import SAMPLE_RATE, Options, ParameterError, Parameters
from windows import Cache, Samples, Window, check_length, windows_of

Span = tuple[float, float]

UNLIMITED_TOKENS = 2**31
STATE_VERSION = 2
"""Version of the format of saved states."""

COUNTS = "frames", "features", "segment", "segment_start_frame", "symbols", "surplus_frames"
"""Fields of a saved state that are whole numbers of 0 or more."""

WORD_GAP_SECS = 0.5
"""Silence after a token from which a full segment ends without waiting for the rest of a word."""

MAX_WORD_SECS = 2.0
"""Maximum time by which a segment exceeds its limit to complete a word."""

MAX_WORD_TOKENS = 16
"""Maximum number of tokens by which a segment exceeds its limit to complete a word; scripts without spaces need the limit."""

MAX_BEAM_SYMBOLS = 2
"""Maximum number of tokens that a beam's hypotheses emit on one frame; more cost calls and change next to nothing."""


class Decoded(NamedTuple):
    """The decoder's result for one request.

    Attributes:
        tokens: tokens of the segment, with the unstable tail; frames are counted from the start of the stream. Segments that
            ended since the last result, or with the stream, are one segment.
        spans: start and end of each token in frames from the start of the stream; see ``token_spans``.
        stable: number of leading tokens that can no longer change.
        segment: index of the segment.
        final: whether the segment ends; the next result then has the next segment.
        samples, features, frames: audio samples, feature frames and encoder frames decoded for good since the start.
    """

    tokens: list[Token]
    spans: list[Span]
    stable: int
    segment: int
    final: bool
    samples: int
    features: int
    frames: int


class Stream:
    """State of one stream.

    Attributes:
        parameters: parameters of the decoder.
        options: options of this stream.
        fusion: what the stream adds to the scores of tokens.
    """

    def __init__(self, parameters: Parameters, options: Options, fusion: Fusion = NO_FUSION) -> None:
        self.options = options
        self.parameters = parameters
        self.fusion = fusion
        self._windows = windows_of(parameters, options)
        self._received_samples = 0
        self._frames = 0  # frames decoded for good
        self._predictor = self._fresh_predictor()  # before the next frame to decode for good
        self._tokens: list[Token] = []  # of the segment
        self._tail: list[Token] = []  # of the last window's right context
        self._closed: list[list[Token]] = []  # of segments that ended since the last result
        self._segment = 0
        self._segment_start_frame = 0
        self._answered_to = 0.0  # end of the last span of the last final result, in frames
        self._at_rest = False  # whether an endpoint ended the last segment, and no token followed
        self._held: list[Floats] = []  # frames that a beam decodes when all are there

    def save(self) -> str:
        """Return the state after a result as JSON. With the audio that the windows need, it restores the stream.

        The state does not include audio: the caller has it, and it is most of the data.
        """
        predictor = self._predictor
        return json.dumps(
            {
                "version": STATE_VERSION,
                "geometry": self._windows.grid,
                **self._windows.save(),
                "frames": self._frames,
                "features": self._windows.features,
                "segment": self._segment,
                "segment_start_frame": self._segment_start_frame,
                "answered_to": self._answered_to,
                "tokens": self._tokens,
                "last_token": predictor.last_token,
                "symbols": predictor.symbols,
                "surplus_frames": predictor.surplus_frames,
                "fusion": self.fusion.digest,
                "context": predictor.context,
                "shape": predictor.states[0].shape,
                "states": [base64.b64encode(state.astype("<f4").tobytes()).decode() for state in predictor.states],
            },
            separators=(",", ":"),
        )

    @classmethod
    def restore(
        cls,
        parameters: Parameters,
        options: Options,
        saved: str,
        samples: int | None = None,
        fusion: Fusion = NO_FUSION,
    ) -> Stream:
        """Return a stream with the state ``saved``.

        Args:
            parameters: parameters of the decoder.
            options: options of the stream.
            saved: the state.
            samples: position of the next audio in the stream; None: the first that the windows need.
            fusion: what the stream adds to the scores of tokens. If it is not the one of the state, as after another language
                model was built, it begins anew.

        Raises:
            ParameterError: ``saved`` is not a state of this model and this geometry, or the options have ``context=whole``.
        """
        if options.context != "window":
            raise ParameterError("a state cannot be restored with context=whole")
        stream = cls(parameters, options, fusion)
        try:
            state = json.loads(saved)
            if state["version"] != STATE_VERSION:
                raise ValueError(f"version {state['version']} instead of {STATE_VERSION}")
            if state["geometry"] != list(stream._windows.grid):  # on another grid, the left context would differ
                raise ValueError(f"windows of {state['geometry']} frames instead of {list(stream._windows.grid)}")
            shape = parameters.predictor_layers, parameters.predictor_hidden
            states = tuple(np.frombuffer(base64.b64decode(text), "<f4").reshape(shape) for text in state["states"])
            if len(states) != len(stream._predictor.states) or not np.isfinite(states).all():
                raise ValueError(f"{len(states)} states instead of {len(stream._predictor.states)} finite ones")
            counts = {name: int(state[name]) for name in COUNTS}
            if min(counts.values()) < 0:
                raise ValueError(f"{counts} instead of 0 or more")
            stream._tokens = [Token(*token) for token in state["tokens"]]
            if wrong := [token.id for token in stream._tokens if not 0 <= token.id < parameters.blank]:
                raise ValueError(f"tokens {wrong} instead of 0 to {parameters.blank - 1}")
            last_token = int(state["last_token"])
            if not 0 <= last_token <= parameters.blank:
                raise ValueError(f"last token {last_token} instead of 0 to {parameters.blank}")
            answered_to = float(state.get("answered_to", 0))  # earlier releases do not save it
            if not 0 <= answered_to <= counts["frames"] + counts["surplus_frames"]:
                raise ValueError(f"answered_to {answered_to} instead of 0 to {counts['frames'] + counts['surplus_frames']}")
            context = _restored_context(fusion, state)
            received = stream._windows.restore(counts["frames"], counts["features"], state, samples)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ParameterError(f"the state to restore is not one of this model: {error!r}") from None
        stream._predictor = PredictorState(last_token, states, counts["symbols"], counts["surplus_frames"], context)
        stream._segment, stream._frames = counts["segment"], counts["frames"]
        stream._segment_start_frame = counts["segment_start_frame"]
        stream._answered_to = answered_to
        stream._received_samples = received
        return stream

    def push(self, samples: Samples) -> None:
        """Append audio.

        Raises:
            ParameterError: the stream is decoded whole and exceeds ``max_whole_secs`` with these samples.
        """
        self._received_samples += len(samples)
        check_length(self.parameters, self.options, self._received_samples)
        self._windows.push(samples)

    def next_window(self, end: bool) -> Window | None:
        """Return the next window that is due, if any.

        Args:
            end: whether no more audio follows; the rest of the audio is then the last window.
        """
        self._rest()
        return self._windows.next_window(end)

    def receive(self, window: Window, frames: Floats, features: int, cache: Cache | None = None) -> tuple[Floats, Floats]:
        """Count the encoder frames of a window, and split them; see ``Windows.receive``.

        A beam needs all frames of a recording at once: none are returned before ``take_held`` returns all of them.
        """
        decoded, tail = self._windows.receive(window, frames, features, cache)
        if not self._has_beam:
            return decoded, tail
        self._held.append(decoded)
        return decoded[:, :0], tail

    def take_held(self) -> Floats | None:
        """Return the frames that were held for a beam, when all are there; None if there are none."""
        held, self._held = self._held, []
        return np.concatenate(held, axis=1) if held else None

    def beam_row(self, frames: Floats) -> BeamRow:
        """Return all frames of a recording as a row to decode with a beam; pass the decoded row to ``commit``."""
        return BeamRow(frames, self._predictor, self._beam_options, self.fusion)

    def row(self, frames: Floats) -> Row:
        """Return the next frames as a row to decode for good; pass the decoded row to ``commit``."""
        # The first token of the next word ends a full segment, and an endpoint token ends any: their rows end after one token.
        single = self._is_full or self.parameters.endpoint_tokens
        return self._row(frames, self._predictor, 1 if single else self._left_tokens)

    def commit(self, row: Row | BeamRow) -> Floats:
        """Append the tokens of a decoded row, and end the segment if a rule says so.

        Returns:
            The frames that are not yet decoded because the segment ended.
        """
        tokens = self._from_start(row.tokens)
        if tokens and self._tokens and self._is_full and tokens[0].id not in self.parameters.continuations:
            self._close_segment_before(tokens[0])
        self._tokens.extend(tokens)
        self._at_rest &= not tokens
        self._frames += row.done_frames
        if tokens and tokens[-1].id in self.parameters.endpoint_tokens:
            return self._close_segment_after_endpoint(row)
        silence_ms = self.options.endpoint_silence_ms
        silent_samples = self._silent_frames * self.parameters.frame_samples
        silent = silence_ms > 0 and silent_samples * 1000 // SAMPLE_RATE >= silence_ms
        if silent or (self._is_full and not self._is_amid_word):
            self._close_segment()
            self._at_rest = silent
        return row.frames[:, row.done_frames :]

    def tail_row(self, frames: Floats) -> Row:
        """Return the right context's frames as a row to decode from a copy of the state; pass the decoded row to ``show``."""
        return self._row(frames, replace(self._predictor), self._left_tokens)

    def show(self, row: Row) -> None:
        """Replace the unstable tail with the tokens of the decoded right context."""
        self._tail = self._from_start(row.tokens)

    def finish_request(self, end: bool) -> Decoded:
        """Return the result of the request that was just decoded; after a final result, begin the next segment."""
        if end:
            self._close_segment()
        final = bool(self._closed)
        stable = [token for tokens in self._closed for token in tokens] if final else self._tokens
        tokens = stable if final else [*stable, *self._tail]
        received_frames = self._received_samples / self.parameters.frame_samples
        following = self._tokens if final else []
        spans = token_spans([*tokens, *following], self._answered_to, received_frames)
        if final and spans:
            self._answered_to = spans[len(tokens)][0] if following else spans[-1][1]
        samples = self._received_samples if end else self._frames * self.parameters.frame_samples
        spans = spans[: len(tokens)]
        self._rest()
        decoded = Decoded(tokens, spans, len(stable), self._segment, final, samples, self._windows.features, self._frames)
        self._closed = []
        self._segment += final
        return decoded

    def _rest(self) -> None:
        """Inform the windows if the last one ended in silence after an endpoint."""
        if self._at_rest:
            self._at_rest = False
            self._windows.rest()

    @property
    def _has_beam(self) -> bool:
        """Whether a beam decodes the stream: only recordings that are decoded whole."""
        return self.options.context == "whole" and self.options.beam > 1

    @property
    def _beam_options(self) -> BeamOptions:
        bonus = self.parameters.insertion_bonus
        if self.fusion.language_model:
            bonus += self.parameters.language_model_bonus
        return BeamOptions(self.options.beam, min(self.options.max_symbols_per_step, MAX_BEAM_SYMBOLS), bonus)

    @property
    def _is_full(self) -> bool:
        """Whether the segment has reached its limit of tokens or seconds."""
        return len(self._tokens) >= self.options.max_total_tokens or self._segment_secs >= self.parameters.max_segment_secs

    @property
    def _is_amid_word(self) -> bool:
        """Whether the next token may continue the segment's last word, within the bounds of a word."""
        return (
            bool(self.parameters.continuations and self._tokens)
            and self._silent_frames * self.parameters.frame_samples < WORD_GAP_SECS * SAMPLE_RATE
            and self._segment_secs < self.parameters.max_segment_secs + MAX_WORD_SECS
            and len(self._tokens) < self.options.max_total_tokens + MAX_WORD_TOKENS
        )

    @property
    def _segment_secs(self) -> float:
        return (self._frames - self._segment_start_frame) * self.parameters.frame_samples / SAMPLE_RATE

    @property
    def _silent_frames(self) -> int:
        """Number of frames after the segment's last token; 0 without tokens."""
        return self._frames - (self._tokens[-1].frame + self._tokens[-1].frames) if self._tokens else 0

    @property
    def _left_tokens(self) -> int:
        """Number of tokens until the segment's limit, at least 1."""
        return max(1, self.options.max_total_tokens - len(self._tokens))

    def _row(self, frames: Floats, predictor: PredictorState, max_tokens: int) -> Row:
        whole = self.options.context == "whole"
        limit = UNLIMITED_TOKENS if whole else max_tokens
        return Row(frames, predictor, self.options.max_symbols_per_step, limit, self.fusion)

    def _fresh_predictor(self, surplus_frames: int = 0) -> PredictorState:
        p = self.parameters
        state = np.zeros((p.predictor_layers, p.predictor_hidden), np.float32)
        return PredictorState(p.blank, (state, state), surplus_frames=surplus_frames, context=self.fusion.fresh())

    def _close_segment(self) -> None:
        """End the segment. The next one begins with a fresh predictor."""
        self._closed.append(self._tokens)
        self._tokens = []
        self._segment_start_frame = self._frames
        if not self._predictor.symbols:  # within a frame, a fresh predictor would repeat the frame's tokens
            self._predictor = self._fresh_predictor(self._predictor.surplus_frames)

    def _close_segment_after_endpoint(self, row: Row | BeamRow) -> Floats:
        """End the segment with an endpoint token; the next segment begins on the next frame with a fresh predictor.

        Returns:
            The frames that are not yet decoded.
        """
        left = row.frames[:, row.done_frames :]
        passed = min(1, left.shape[1])
        self._frames += passed
        self._predictor = self._fresh_predictor()
        self._close_segment()
        self._at_rest = True
        return left[:, passed:]

    def _close_segment_before(self, token: Token) -> None:
        """End the segment before a token. The predictor already includes the token, so it is kept."""
        self._closed.append(self._tokens)
        self._tokens = []
        self._segment_start_frame = token.frame

    def _from_start(self, tokens: list[Token]) -> list[Token]:
        """Return a row's tokens with frames counted from the start of the stream instead of the start of the row."""
        return [token._replace(frame=token.frame + self._frames) for token in tokens]


def _restored_context(fusion: Fusion, state: Mapping[str, Any]) -> Context:
    """Return the context of a saved state, or an empty one if it is of another fusion.

    Raises:
        ValueError: it is malformed.
    """
    if state.get("fusion") != fusion.digest:
        return EMPTY_CONTEXT
    language, phrase = map(int, state["context"])
    context = Context(language, phrase)
    if not fusion.allows(context):
        raise ValueError(f"context {list(context)} is not one of its language model and phrases")
    return context


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
