"""State of one stream of audio: the tokens that its windows' frames were decoded to, in segments.

A chunk's frames are decoded for good, from the state after the previous chunk: greedily, or with a beam, whose hypotheses are
carried from chunk to chunk and whose tokens are settled where they all agree. The right context's frames are decoded greedily
from a copy of the best state, and their tokens are the unstable tail. ``windows.py`` cuts the audio.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from beam import BeamOptions, BeamRow
from fusion import EMPTY_CONTEXT, NO_FUSION, Context, Fusion
from greedy import Floats, JointOutputs, PredictorState, Row, Token
from hypotheses import NO_ALTERNATIVES, Alternative, Hypotheses, combined
from parameters import SAMPLE_RATE, Options, ParameterError, Parameters
from segments import Segment
from spans import Span, token_spans
from windows import Cache, Samples, Window, check_length, windows_of

UNLIMITED_TOKENS = 2**31
STATE_VERSION, BEAM_STATE_VERSION = 2, 3
"""Versions of the formats of saved states. Releases without a beam for streams refuse states with hypotheses."""

COUNTS = "frames", "features", "segment", "segment_start_frame", "symbols", "surplus_frames"
"""Fields of a saved state that are whole numbers of 0 or more."""

MAX_UNSETTLED_SECS = 1.0
"""Time after which a token is settled: hypotheses without it are dropped. More time lowers the word error rate by nothing."""

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
        alternatives: the best texts of a final segment, the best first, if the stream wants several.
    """

    tokens: list[Token]
    spans: list[Span]
    stable: int
    segment: int
    final: bool
    samples: int
    features: int
    frames: int
    alternatives: Sequence[Alternative] = ()


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
        # Greedy decoding gains nothing by a language model, and a tail is shown for a moment only.
        self._tail_fusion = replace(fusion, language_model=None) if options.width > 1 else fusion
        self._windows = windows_of(parameters, options)
        self._received_samples = 0
        self._frames = 0  # frames decoded for good
        self._predictor: PredictorState  # before the next frame to decode for good; with a beam, before the segment
        self._hypotheses: Hypotheses | None  # of a beam
        self._begin_segment()
        self._tokens: list[Token] = []  # of the segment; those that can no longer change
        self._tail: list[Token] = []  # of the last window's right context
        self._closed: list[list[Token]] = []  # of segments that ended since the last result
        self._alternatives: Sequence[Alternative] = NO_ALTERNATIVES  # texts of these segments
        self._segment = 0
        self._segment_start_frame = 0
        self._answered_to = 0.0  # end of the last span of the last final result, in frames
        self._at_rest = False  # whether an endpoint ended the last segment, and no token followed

    def save(self) -> str:
        """Return the state after a result as JSON. With the audio that the windows need, it restores the stream.

        The state does not include audio: the caller has it, and it is most of the data.
        """
        beam = self._hypotheses
        predictor = beam.settled if beam else self._predictor
        return json.dumps(
            {
                "version": BEAM_STATE_VERSION if beam else STATE_VERSION,
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
                **({"hypotheses": beam.save()} if beam else {}),
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
            if state["version"] not in (STATE_VERSION, BEAM_STATE_VERSION):
                raise ValueError(f"version {state['version']} instead of {STATE_VERSION} or {BEAM_STATE_VERSION}")
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
            predictor = PredictorState(last_token, states, counts["symbols"], counts["surplus_frames"], context)
            hypotheses = _restored_hypotheses(stream, predictor, counts["frames"], state)
            received = stream._windows.restore(counts["frames"], counts["features"], state, samples)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ParameterError(f"the state to restore is not one of this model: {error!r}") from None
        stream._predictor = predictor
        stream._hypotheses = hypotheses
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
        """Count the encoder frames of a window, and split them; see ``Windows.receive``."""
        return self._windows.receive(window, frames, features, cache)

    def row(self, frames: Floats) -> Row | BeamRow:
        """Return the next frames as a row to decode for good; pass the decoded row to ``commit``."""
        if self._hypotheses:
            joint = JointOutputs(self.parameters.blank, self.parameters.durations)
            return BeamRow(frames, self._hypotheses, joint, self._beam_options, self.fusion)
        # The first token of the next word ends a full segment, and an endpoint token ends any: their rows end after one token.
        single = self._current.is_full or self.parameters.endpoint_tokens
        return self._row(frames, self._predictor, 1 if single else self._current.left_tokens, self.fusion)

    def commit(self, row: Row | BeamRow) -> Floats:
        """Append the tokens of a decoded row, and end the segment if a rule says so.

        Returns:
            The frames that are not yet decoded because the segment ended.
        """
        return self._commit_beam(row) if isinstance(row, BeamRow) else self._commit_greedy(row)

    def tail_row(self, frames: Floats) -> Row:
        """Return the right context's frames as a row to decode from a copy of the state; pass the decoded row to ``show``."""
        return self._row(frames, self._next_predictor, max(1, self._current.left_tokens), self._tail_fusion)

    def show(self, row: Row) -> None:
        """Replace the unstable tail with the tokens of the decoded right context."""
        self._tail = self._from_start(row.tokens)

    def finish_request(self, end: bool) -> Decoded:
        """Return the result of the request that was just decoded; after a final result, begin the next segment."""
        if end:
            self._close_segment()
        final = bool(self._closed)
        stable = [token for tokens in self._closed for token in tokens] if final else self._tokens
        tokens = stable if final else [*self._best_tokens, *self._tail]
        received_frames = self._received_samples / self.parameters.frame_samples
        following = self._tokens if final else []
        spans = token_spans([*tokens, *following], self._answered_to, received_frames)
        if final and spans:
            self._answered_to = spans[len(tokens)][0] if following else spans[-1][1]
        samples = self._received_samples if end else self._frames * self.parameters.frame_samples
        spans = spans[: len(tokens)]
        self._rest()
        counts = samples, self._windows.features, self._frames
        alternatives = self._alternatives if final and self.options.alternatives > 1 else ()
        decoded = Decoded(tokens, spans, len(stable), self._segment, final, *counts, alternatives)
        self._closed, self._alternatives = [], NO_ALTERNATIVES
        self._segment += final
        return decoded

    def _commit_greedy(self, row: Row) -> Floats:
        tokens, before = self._from_start(row.tokens), self._current
        self._tokens.extend(tokens)
        if tokens and before.tokens and before.is_full and before.begins_word(tokens[0]):
            self._split_segment(len(before.tokens))
        self._at_rest &= not tokens
        self._frames += row.done_frames
        left = row.frames[:, row.done_frames :]
        if tokens and tokens[-1].id in self.parameters.endpoint_tokens:
            passed = min(1, left.shape[1])
            self._close_segment_after_endpoint(self._frames + passed)
            return left[:, passed:]
        self._close_segment_if_due()
        return left

    def _commit_beam(self, row: BeamRow) -> Floats:
        """Judge the ends of segments at the end of each chunk, by the best hypothesis."""
        beam, begin, answered = row.hypotheses, self._frames, len(self._tokens)
        tokens = beam.tokens
        self._at_rest &= not tokens
        self._frames += row.done_frames
        left = row.frames[:, row.done_frames :]
        if self.options.context == "whole":
            return left
        if endpoint := next((token for token in tokens if token.id in self.parameters.endpoint_tokens), None):
            self._tokens.extend(tokens[: tokens.index(endpoint) + 1])
            self._close_segment_after_endpoint(max(begin, endpoint.frame + 1))
            return row.frames[:, self._frames - begin :]
        self._tokens += beam.settle_due(self._frames - MAX_UNSETTLED_SECS * SAMPLE_RATE / self.parameters.frame_samples)
        if not self._close_segment_if_due() and (segment := self._current).is_full:
            # Not before a token of an earlier chunk: it may be part of an answer.
            words = [i for i, token in enumerate(segment.tokens) if i >= max(1, answered) and segment.begins_word(token)]
            if words:
                self._split_segment(words[-1])
        return left

    def _rest(self) -> None:
        """Inform the windows if the last one ended in silence after an endpoint."""
        if self._at_rest:
            self._at_rest = False
            self._windows.rest()

    @property
    def _beam_options(self) -> BeamOptions:
        bonus = self.parameters.insertion_bonus
        if self.fusion.language_model:
            bonus += self.parameters.language_model_bonus
        return BeamOptions(self.options.width, min(self.options.max_symbols_per_step, MAX_BEAM_SYMBOLS), bonus)

    @property
    def _best_tokens(self) -> list[Token]:
        """Tokens of the segment as far as it is decoded for good, by the best hypothesis."""
        return [*self._tokens, *(self._hypotheses.tokens if self._hypotheses else ())]

    @property
    def _current(self) -> Segment:
        """The segment so far."""
        return Segment(self.parameters, self.options, self._best_tokens, self._segment_start_frame, self._frames)

    @property
    def _next_predictor(self) -> PredictorState:
        """Copy of the state behind these tokens."""
        return self._hypotheses.predictor if self._hypotheses else replace(self._predictor)

    def _row(self, frames: Floats, predictor: PredictorState, max_tokens: int, fusion: Fusion) -> Row:
        whole = self.options.context == "whole"
        limit = UNLIMITED_TOKENS if whole else max_tokens
        return Row(frames, predictor, self.options.max_symbols_per_step, limit, fusion)

    def _begin_segment(self, surplus_frames: int = 0) -> None:
        """Begin with a fresh predictor."""
        p = self.parameters
        state = np.zeros((p.predictor_layers, p.predictor_hidden), np.float32)
        self._predictor = PredictorState(p.blank, (state, state), surplus_frames=surplus_frames, context=self.fusion.fresh())
        self._hypotheses = Hypotheses(self._predictor, self._frames) if self.options.width > 1 else None

    def _close_segment_if_due(self) -> bool:
        """End the segment if it is silent, or full and not amid a word; return whether it ended."""
        segment = self._current
        due = segment.is_silent or (segment.is_full and not segment.is_amid_word)
        if due:
            self._close_segment()
            self._at_rest = segment.is_silent
        return due

    def _close_segment(self) -> None:
        """End the segment with the best hypothesis. The next one begins with a fresh predictor."""
        ends = self._hypotheses.alternatives(self.options.alternatives) if self._hypotheses else NO_ALTERNATIVES
        self._close([Alternative((*self._tokens, *end.tokens), end.score) for end in ends], [])
        self._segment_start_frame = self._frames
        predictor = self._next_predictor
        if not predictor.symbols:  # within a frame, a fresh predictor would repeat the frame's tokens
            self._begin_segment(predictor.surplus_frames)

    def _close_segment_after_endpoint(self, frame: int) -> None:
        """End the segment with an endpoint token; the next segment begins on a frame with a fresh predictor."""
        self._frames = frame
        self._begin_segment()
        self._close_segment()
        self._at_rest = True

    def _split_segment(self, at: int) -> None:
        """End the segment before a token. The predictor, or the beam, already includes the token, so it is kept."""
        if self._hypotheses:
            self._tokens += self._hypotheses.settle(max(0, at + 1 - len(self._tokens)))
        self._close([Alternative(tuple(self._tokens[:at]), 0.0)], self._tokens[at:])
        self._segment_start_frame = self._tokens[0].frame

    def _close(self, texts: Sequence[Alternative], following: list[Token]) -> None:
        """End the segment.

        Args:
            texts: its texts, the best first.
            following: settled tokens of the next segment.
        """
        self._closed.append(list(texts[0].tokens))
        self._alternatives = combined(self._alternatives, texts, self.options.alternatives)
        self._tokens = following

    def _from_start(self, tokens: list[Token]) -> list[Token]:
        """Return a row's tokens with frames counted from the start of the stream instead of the start of the row."""
        return [token._replace(frame=token.frame + self._frames) for token in tokens]


def _restored_hypotheses(stream: Stream, predictor: PredictorState, frame: int, state: Mapping[str, Any]) -> Hypotheses | None:
    """Return the hypotheses of a saved state, or one that goes on from a greedy state; None for a stream that is greedy, too.

    A greedy stream takes over the hypotheses of a saved state until its segment ends, since their predictor's states are not
    known yet.

    Raises:
        TypeError, ValueError: they are malformed.
    """
    saved = state.get("hypotheses")
    if not saved and stream.options.width == 1:
        return None
    hypotheses = Hypotheses(predictor, frame)
    if saved:
        p = stream.parameters
        hypotheses.restore(saved, stream.fusion, p.blank, max((1, *p.durations)))
    return hypotheses


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
