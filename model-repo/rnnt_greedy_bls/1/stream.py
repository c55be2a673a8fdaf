"""One stream of audio: which windows it is cut into, and what its frames have been decoded to so far.

An encoder that wants context sees windows of ``left + chunk + right`` frames, as the stream's latency has them. The chunk's
frames are decoded for good with the state carried from the chunk before; the right context's are decoded from a copy of it and
shown as the unstable tail. Windows lie on a grid that begins with the stream, so they depend on its samples alone, never on how
those were cut into requests. A recording that is decoded whole is one window without context.
"""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from greedy import Floats, Predictor, Row, Token
from parameters import SAMPLE_RATE, Options, ParameterError, Parameters

Samples = npt.NDArray[np.int16]

UNLIMITED_TOKENS = 2**31
STATE_VERSION = 2
COUNTS = "frames", "features", "segment", "segment_start_frame", "symbols", "surplus_frames"
"""What a saved state has of whole numbers from 0 on, the last token aside."""


class Window(NamedTuple):
    """Audio for one call of the encoder.

    Attributes:
        samples: 16 kHz audio [n].
        left_frames: frames of left context, to be dropped.
        chunk_frames: frames to be decoded for good; None: all that remain.
        live: somebody waits for it while it is spoken; False for a recording that is decoded whole.
    """

    samples: Samples
    left_frames: int
    chunk_frames: int | None
    live: bool


class Answer(NamedTuple):
    """What a stream has to say after a request.

    Attributes:
        tokens: of the segment, frames counted from the start of the stream; the unstable tail included. Segments that ended
            since the last answer, or by the end of the stream, are answered as one.
        stable: how many of them can no longer change.
        segment: index of the segment.
        final: whether the segment ends here; the next answer then begins a new one.
        samples, features, frames: audio samples, feature frames and encoder frames decoded for good since the start.
    """

    tokens: list[Token]
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
        options: what the stream chose.
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

    def save(self) -> str:
        """The state behind an answer as text; with the audio from its left context on it makes the same stream.

        The audio is left out: whoever keeps the state has it, and it is most of the bytes.
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
        """The stream of which ``saved`` is the state; its next audio begins with the left context of the state's ``frames``.

        Raises:
            ParameterError: ``saved`` is no state of this model or of other windows, or the stream is to be decoded whole.
        """
        if options.context != "window":
            raise ParameterError("a state can't be restored with context=whole")
        stream = cls(parameters, options)
        try:
            state = json.loads(saved)
            if state["version"] != STATE_VERSION:
                raise ValueError(f"version {state['version']} instead of {STATE_VERSION}")
            if state["geometry"] != list(stream.geometry):  # another grid, and the audio would begin elsewhere
                raise ValueError(f"windows of {state['geometry']} frames instead of {list(stream.geometry)}")
            shape = parameters.predictor_layers, parameters.predictor_hidden
            states = tuple(np.frombuffer(base64.b64decode(text), "<f4").reshape(shape) for text in state["states"])
            if len(states) != len(stream._predictor.states) or not np.isfinite(states).all():
                raise ValueError(f"{len(states)} states instead of {len(stream._predictor.states)} that are finite")
            counts = {name: int(state[name]) for name in COUNTS}
            if min(counts.values()) < 0:
                raise ValueError(f"{counts} instead of 0 or more")
            stream._tokens = [Token(*token) for token in state["tokens"]]
            if wrong := [token.id for token in stream._tokens if not 0 <= token.id < parameters.blank]:
                raise ValueError(f"tokens {wrong} instead of 0 to {parameters.blank - 1}")
            last_token = int(state["last_token"])
            if not 0 <= last_token <= parameters.blank:
                raise ValueError(f"last token {last_token} instead of 0 to {parameters.blank}")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ParameterError(f"the state to restore is none of this model's: {error!r}") from None
        stream._predictor = Predictor(last_token, states, counts["symbols"], counts["surplus_frames"])
        stream._features, stream._segment = counts["features"], counts["segment"]
        stream._frames = stream._encoded = counts["frames"]
        stream._segment_start_frame = counts["segment_start_frame"]
        stream._pcm_start = max(0, stream._frames - stream.geometry.left_frames)
        stream._received_samples = stream._pcm_start * parameters.frame_samples
        return stream

    def push(self, samples: Samples) -> None:
        """Append audio.

        Raises:
            ValueError: the stream is decoded whole and this makes it longer than allowed.
        """
        limit = int(self.parameters.max_whole_secs * SAMPLE_RATE)
        self._received_samples += len(samples)
        if self.options.context == "whole" and self._received_samples > limit:
            raise ValueError(
                f"context=whole takes at most {self.parameters.max_whole_secs:g} s of audio; "
                f"this has {self._received_samples / SAMPLE_RATE:.2f} s"
            )
        self._pcm = np.concatenate((self._pcm, samples))

    def next_window(self, end: bool) -> Window | None:
        """The next window that is due, if any.

        Args:
            end: no audio follows; what is left is the last window.
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
        """Take the encoder's frames [D, T] of a window, made from so many feature frames.

        Returns:
            The frames to be decoded for good, and those of the right context.

        Raises:
            ValueError: there are too few or too many, so ``frame_samples`` or the contexts do not suit the encoder.
        """
        end = frames.shape[1] if window.chunk_frames is None else window.left_frames + window.chunk_frames
        frame_samples, samples = self.parameters.frame_samples, len(window.samples)
        # Of a frame that the stream's end cuts short an encoder may make a frame or none.
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
        """The frames that come next, to be decoded for good and then given to ``commit``."""
        return self._row(frames, self._predictor)

    def commit(self, row: Row) -> Floats:
        """Book a decoded row, and close the segment where its rules say so; gives the frames that the segment's end left."""
        self._tokens.extend(self._from_start(row.tokens))
        self._frames += row.done_frames
        p, options = self.parameters, self.options
        silent_frames = self._frames - (self._tokens[-1].frame + self._tokens[-1].frames) if self._tokens else 0
        silent_ms = silent_frames * p.frame_samples * 1000 // SAMPLE_RATE
        segment_secs = (self._frames - self._segment_start_frame) * p.frame_samples / SAMPLE_RATE
        if (
            len(self._tokens) >= options.max_total_tokens
            or segment_secs >= p.max_segment_secs
            or (options.endpoint_silence_ms and silent_ms >= options.endpoint_silence_ms)
        ):
            self._close_segment()
        return row.frames[:, row.done_frames :]

    def tail_row(self, frames: Floats) -> Row:
        """The right context's frames, to be decoded from a copy of the state and then given to ``show``."""
        return self._row(frames, replace(self._predictor))

    def show(self, row: Row) -> None:
        """Take the decoded right context: what may still change of the next answers."""
        self._tail = self._from_start(row.tokens)

    def answer(self, end: bool) -> Answer:
        """What to reply to the request that was just decoded; a final answer begins the next segment."""
        if end:
            self._close_segment()
        final = bool(self._closed)
        stable = [token for tokens in self._closed for token in tokens] if final else self._tokens
        tokens = stable if final else [*stable, *self._tail]
        samples = self._received_samples if end else self._frames * self.parameters.frame_samples
        answer = Answer(tokens, len(stable), self._segment, final, samples, self._features, self._frames)
        self._closed = []
        self._segment += final
        return answer

    def _row(self, frames: Floats, predictor: Predictor) -> Row:
        whole = self.options.context == "whole"
        left_tokens = UNLIMITED_TOKENS if whole else self.options.max_total_tokens - len(self._tokens)
        return Row(frames, predictor, self.options.max_symbols_per_step, left_tokens)

    def _fresh_predictor(self, surplus_frames: int = 0) -> Predictor:
        p = self.parameters
        state = np.zeros((p.predictor_layers, p.predictor_hidden), np.float32)
        return Predictor(p.blank, (state, state), surplus_frames=surplus_frames)

    def _close_segment(self) -> None:
        self._closed.append(self._tokens)
        self._tokens = []
        self._segment_start_frame = self._frames
        if not self._predictor.symbols:  # amid a frame a fresh predictor would find the frame's tokens once more
            self._predictor = self._fresh_predictor(self._predictor.surplus_frames)

    def _from_start(self, tokens: list[Token]) -> list[Token]:
        """Tokens whose frames are counted from the first that is not decoded for good, counted from the stream's start."""
        return [token._replace(frame=token.frame + self._frames) for token in tokens]
