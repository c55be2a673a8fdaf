"""One stream of audio: the windows that it is cut into, and the tokens that its frames were decoded to.

An encoder that needs context gets windows of ``left + chunk + right`` frames, by the stream's latency. The chunk's frames are
decoded for good, from the state behind the previous chunk. The right context's frames are decoded from a copy of that state and
shown as the unstable tail. Windows lie on a grid that begins with the stream, so they depend on its samples alone, not on how
these were cut into requests. A recording that is decoded whole is one window without context.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from greedy import Floats, Predictor, Row, Token
from parameters import SAMPLE_RATE, Options, ParameterError, Parameters

Samples = npt.NDArray[np.int16]
Span = tuple[float, float]

UNLIMITED_TOKENS = 2**31
STATE_VERSION = 2
COUNTS = "frames", "features", "segment", "segment_start_frame", "symbols", "surplus_frames"
"""The whole numbers of a saved state, from 0 on, except the last token."""

WORD_GAP_SECS = 0.5
"""A token after a longer gap does not continue the word before the gap, for the end of a segment."""

MAX_WORD_SECS = 2.0
"""Longest time by which a segment exceeds its limit to complete a word."""

MAX_WORD_TOKENS = 16
"""Maximum number of tokens by which a segment exceeds its limit to complete a word. A script without spaces needs the bound."""


class Window(NamedTuple):
    """Audio for one encoder call.

    Attributes:
        samples: 16 kHz audio [n].
        left_frames: frames of left context, which are dropped.
        chunk_frames: frames that are decoded for good; None: all that remain.
        live: whether a person waits for the words while speaking; False for a recording that is decoded whole.
    """

    samples: Samples
    left_frames: int
    chunk_frames: int | None
    live: bool


class Answer(NamedTuple):
    """A stream's answer to one request.

    Attributes:
        tokens: the segment's tokens, frames counted from the start of the stream; the unstable tail included. Segments that
            ended since the last answer, or with the stream, are answered as one.
        spans: start and end of each token in frames from the start of the stream; see ``token_spans``.
        stable: number of leading tokens that can no longer change.
        segment: index of the segment.
        final: whether the segment ends here; the next answer then begins a new one.
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
    """The whole state of one sequence.

    Attributes:
        parameters: the decoder's, the same for all streams.
        options: this stream's.
        geometry: of its windows.
    """

    def __init__(self, parameters: Parameters, options: Options) -> None:
        self.options = options
        self.parameters = parameters
        self.geometry = parameters.geometries[options.latency]
        self._pcm: Samples = np.zeros(0, np.int16)
        self._pcm_start = 0  # frame index of the first sample of _pcm
        self._encoded = 0  # frames whose window was given out
        self._received_samples = 0
        self._features = 0
        self._frames = 0  # frames decoded for good
        self._predictor = self._fresh_predictor()  # where the next frame is decoded for good
        self._tokens: list[Token] = []  # of the segment
        self._tail: list[Token] = []  # of the last window's right context
        self._closed: list[list[Token]] = []  # of segments that ended since the last answer
        self._segment = 0
        self._segment_start_frame = 0
        self._answered_to = 0.0  # end of the last final answer's last span, in frames

    def save(self) -> str:
        """Return the state behind an answer as text; with the audio from its left context on, it restores the stream.

        The audio is left out: the caller has it, and it is most of the bytes.
        """
        predictor = self._predictor
        return json.dumps(
            {
                "version": STATE_VERSION,
                "geometry": self.geometry,
                "frames": self._frames,
                "features": self._features,
                "segment": self._segment,
                "segment_start_frame": self._segment_start_frame,
                "answered_to": self._answered_to,
                "tokens": self._tokens,
                "last_token": predictor.last_token,
                "symbols": predictor.symbols,
                "surplus_frames": predictor.surplus_frames,
                "shape": predictor.states[0].shape,
                "states": [base64.b64encode(state.astype("<f4").tobytes()).decode() for state in predictor.states],
            },
            separators=(",", ":"),
        )

    @classmethod
    def restore(cls, parameters: Parameters, options: Options, saved: str) -> Stream:
        """Return the stream whose state is ``saved``; its next audio begins with the left context of the state's ``frames``.

        Raises:
            ParameterError: ``saved`` is not a state of this model and these windows, or the stream is to be decoded whole.
        """
        if options.context != "window":
            raise ParameterError("a state cannot be restored with context=whole")
        stream = cls(parameters, options)
        try:
            state = json.loads(saved)
            if state["version"] != STATE_VERSION:
                raise ValueError(f"version {state['version']} instead of {STATE_VERSION}")
            if state["geometry"] != list(stream.geometry):  # on another grid the audio would begin elsewhere
                raise ValueError(f"windows of {state['geometry']} frames instead of {list(stream.geometry)}")
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
            answered_to = float(state.get("answered_to", 0))  # earlier editions do not save it
            if not 0 <= answered_to <= counts["frames"] + counts["surplus_frames"]:
                raise ValueError(f"answered_to {answered_to} instead of 0 to {counts['frames'] + counts['surplus_frames']}")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ParameterError(f"the state to restore is not one of this model: {error!r}") from None
        stream._predictor = Predictor(last_token, states, counts["symbols"], counts["surplus_frames"])
        stream._features, stream._segment = counts["features"], counts["segment"]
        stream._frames = stream._encoded = counts["frames"]
        stream._segment_start_frame = counts["segment_start_frame"]
        stream._answered_to = answered_to
        stream._pcm_start = max(0, stream._frames - stream.geometry.left_frames)
        stream._received_samples = stream._pcm_start * parameters.frame_samples
        return stream

    def push(self, samples: Samples) -> None:
        """Append audio.

        Raises:
            ParameterError: the stream is decoded whole and exceeds ``max_whole_secs`` with these samples.
        """
        limit = int(self.parameters.max_whole_secs * SAMPLE_RATE)
        self._received_samples += len(samples)
        if self.options.context == "whole" and self._received_samples > limit:
            raise ParameterError(
                f"context=whole takes at most {self.parameters.max_whole_secs:g} s of audio; "
                f"this has {self._received_samples / SAMPLE_RATE:.2f} s; cut it, or send it with context=window"
            )
        self._pcm = np.concatenate((self._pcm, samples))

    def next_window(self, end: bool) -> Window | None:
        """Return the next window that is due, if any.

        Args:
            end: no audio follows; the rest of it is the last window.
        """
        frame_samples = self.parameters.frame_samples
        kept_frames, chunk_frames, right_frames = self.geometry
        left_frames = self._encoded - self._pcm_start
        ahead = len(self._pcm) - left_frames * frame_samples
        if self.options.context == "window" and ahead >= (chunk_frames + right_frames) * frame_samples:
            frames = left_frames + chunk_frames + right_frames
            window = Window(self._pcm[: frames * frame_samples], left_frames, chunk_frames, live=True)
            self._encoded += chunk_frames
            drop = max(0, self._encoded - kept_frames - self._pcm_start)
            self._pcm = self._pcm[drop * frame_samples :]
            self._pcm_start += drop
            return window
        if not end or ahead <= 0:
            return None
        samples = np.pad(self._pcm, (0, max(0, frame_samples - len(self._pcm))))
        self._encoded += -(-ahead // frame_samples)
        return Window(samples, left_frames, None, live=self.options.context == "window")

    def receive(self, window: Window, frames: Floats, features: int) -> tuple[Floats, Floats]:
        """Take the encoder's frames of a window.

        Args:
            window: the window.
            frames: its encoder frames [D, T].
            features: number of feature frames behind them.

        Returns:
            The frames to decode for good, and those of the right context.

        Raises:
            ValueError: there are too few or too many frames, so ``frame_samples`` or the contexts do not suit the encoder.
        """
        end = frames.shape[1] if window.chunk_frames is None else window.left_frames + window.chunk_frames
        frame_samples, samples = self.parameters.frame_samples, len(window.samples)
        # If the stream's end cuts a frame short, an encoder may make a frame of it or none.
        needed = window.left_frames + (window.chunk_frames or min(1, samples // frame_samples - window.left_frames))
        most = -(-samples // frame_samples) + 2  # padding and rounding up add one or two
        if not needed <= frames.shape[1] <= most:
            allowed = f"of which {needed} are needed" if frames.shape[1] < needed else f"which has {most} at most"
            raise ValueError(
                f"the encoder gave {frames.shape[1]} frames for a window of {samples} samples, {allowed}: "
                f"frame_samples is {frame_samples}"
            )
        features_to = [round(features * frame * frame_samples / samples) for frame in (window.left_frames, end)]
        self._features += (features if window.chunk_frames is None else features_to[1]) - features_to[0]
        return frames[:, window.left_frames : end], frames[:, end:]

    def row(self, frames: Floats) -> Row:
        """Return the next frames as a row to decode for good and then to give to ``commit``."""
        # Of a full segment, the first token of the next word ends it: one token a row.
        return self._row(frames, self._predictor, 1 if self._is_full else self._left_tokens)

    def commit(self, row: Row) -> Floats:
        """Take a decoded row, and close the segment where its rules say so.

        Returns:
            The frames that the end of the segment left undecoded.
        """
        tokens = self._from_start(row.tokens)
        if tokens and self._tokens and self._is_full and tokens[0].id not in self.parameters.continuations:
            self._close_segment_before(tokens[0])
        self._tokens.extend(tokens)
        self._frames += row.done_frames
        silence_ms = self.options.endpoint_silence_ms
        silent_samples = self._silent_frames * self.parameters.frame_samples
        if (silence_ms and silent_samples * 1000 // SAMPLE_RATE >= silence_ms) or (self._is_full and not self._is_amid_word):
            self._close_segment()
        return row.frames[:, row.done_frames :]

    def tail_row(self, frames: Floats) -> Row:
        """Return the right context's frames as a row to decode from a copy of the state and then to give to ``show``."""
        return self._row(frames, replace(self._predictor), self._left_tokens)

    def show(self, row: Row) -> None:
        """Take the decoded right context, which may still change."""
        self._tail = self._from_start(row.tokens)

    def answer(self, end: bool) -> Answer:
        """Return the answer to the request that was just decoded; a final answer begins the next segment."""
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
        answer = Answer(tokens, spans, len(stable), self._segment, final, samples, self._features, self._frames)
        self._closed = []
        self._segment += final
        return answer

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
        """Number of frames behind the segment's last token; 0 while there is none."""
        return self._frames - (self._tokens[-1].frame + self._tokens[-1].frames) if self._tokens else 0

    @property
    def _left_tokens(self) -> int:
        """Number of tokens until the segment's limit, at least 1."""
        return max(1, self.options.max_total_tokens - len(self._tokens))

    def _row(self, frames: Floats, predictor: Predictor, max_tokens: int) -> Row:
        whole = self.options.context == "whole"
        return Row(frames, predictor, self.options.max_symbols_per_step, UNLIMITED_TOKENS if whole else max_tokens)

    def _fresh_predictor(self, surplus_frames: int = 0) -> Predictor:
        p = self.parameters
        state = np.zeros((p.predictor_layers, p.predictor_hidden), np.float32)
        return Predictor(p.blank, (state, state), surplus_frames=surplus_frames)

    def _close_segment(self) -> None:
        """End the segment; the next one begins with a fresh predictor."""
        self._closed.append(self._tokens)
        self._tokens = []
        self._segment_start_frame = self._frames
        if not self._predictor.symbols:  # amid a frame, a fresh predictor would emit the frame's tokens once more
            self._predictor = self._fresh_predictor(self._predictor.surplus_frames)

    def _close_segment_before(self, token: Token) -> None:
        """End the segment before a token that the predictor has already taken, so the predictor goes on."""
        self._closed.append(self._tokens)
        self._tokens = []
        self._segment_start_frame = token.frame

    def _from_start(self, tokens: list[Token]) -> list[Token]:
        """Return tokens whose frames count from the stream's start, not from the first frame that is not decoded for good."""
        return [token._replace(frame=token.frame + self._frames) for token in tokens]


def token_spans(tokens: Sequence[Token], begin: float, end: float) -> list[Span]:
    """Return start and end of each token in frames: in order, none empty, no two overlapping.

    A token spans its frame, or its duration where the model gives one. Tokens of one frame share it evenly. A token on a frame
    behind the audio, which an encoder may add, belongs to the audio's last frame.

    Args:
        tokens: in order of their frames.
        begin: where the span before the first token ended.
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
