"""One stream of audio: which windows it is cut into, and what its frames have been decoded to so far.

An encoder that wants context sees windows of ``left + chunk + right`` frames. The chunk's frames are decoded for good with the
state carried from the chunk before; the right context's are decoded from a copy of it and shown as the unstable tail. Windows
lie on a grid that begins with the stream, so they depend on its samples alone, never on how those were cut into requests. A
recording that is decoded whole is one window without context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from greedy import Floats, Predictor, Step, Token, Transducer, decode
from parameters import SAMPLE_RATE, Options, Parameters

Samples = npt.NDArray[np.int16]

UNLIMITED_TOKENS = 2**31


class Window(NamedTuple):
    """Audio for one call of the encoder.

    Attributes:
        samples: 16 kHz audio [n].
        left_frames: frames of left context, to be dropped.
        chunk_frames: frames to be decoded for good; None: all that remain.
    """

    samples: Samples
    left_frames: int
    chunk_frames: int | None


class Answer(NamedTuple):
    """What a stream has to say after a request.

    Attributes:
        tokens: tokens since the last final answer, frames counted from the start of the stream; the unstable tail included.
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
        options: what the stream chose.
        predictor: the predictor where the next frame is decoded.
        waiting: encoded frames [D, T] that are yet to be decoded for good: those behind a segment that max_total_tokens closed.
        tail: encoded frames [D, T] of the last window's right context.
    """

    def __init__(self, parameters: Parameters, transducer: Transducer, options: Options) -> None:
        self.options = options
        self._parameters = parameters
        self._transducer = transducer
        self._pcm: Samples = np.zeros(0, np.int16)
        self._pcm_start = 0  # frame index of the first sample of _pcm
        self._encoded = 0  # frames whose window was given out
        self._received_samples = 0
        self._features = 0
        self._frames = 0  # frames decoded for good
        self.waiting: Floats = np.zeros((0, 0), np.float32)
        self.tail: Floats = self.waiting
        self.predictor = self._fresh_predictor()
        self._tokens: list[Token] = []  # since the last final answer
        self._segment = 0
        self._segment_start_frame = 0
        self._segment_start_token = 0  # index in _tokens
        self._closed = False

    def push(self, samples: Samples) -> None:
        """Append audio.

        Raises:
            ValueError: the stream is decoded whole and this makes it longer than allowed.
        """
        limit = int(self._parameters.max_whole_secs * SAMPLE_RATE)
        self._received_samples += len(samples)
        if self.options.context == "whole" and self._received_samples > limit:
            raise ValueError(
                f"context=whole takes at most {self._parameters.max_whole_secs:g} s of audio; "
                f"this has {self._received_samples / SAMPLE_RATE:.2f} s"
            )
        self._pcm = np.concatenate((self._pcm, samples))

    def next_window(self, end: bool) -> Window | None:
        """The next window that is due, if any.

        Args:
            end: no audio follows; what is left is the last window.
        """
        p = self._parameters
        left_frames = self._encoded - self._pcm_start
        ahead = len(self._pcm) - left_frames * p.frame_samples
        if self.options.context == "window" and ahead >= (p.chunk_frames + p.right_frames) * p.frame_samples:
            frames = left_frames + p.chunk_frames + p.right_frames
            window = Window(self._pcm[: frames * p.frame_samples], left_frames, p.chunk_frames)
            self._encoded += p.chunk_frames
            drop = max(0, self._encoded - p.left_frames - self._pcm_start)
            self._pcm = self._pcm[drop * p.frame_samples :]
            self._pcm_start += drop
            return window
        if not end or ahead <= 0:
            return None
        samples = np.pad(self._pcm, (0, max(0, p.frame_samples - len(self._pcm))))
        self._encoded += -(-ahead // p.frame_samples)
        self._pcm = self._pcm[:0]
        self._pcm_start = self._encoded
        return Window(samples, left_frames, None)

    def answer(self, tail: Sequence[Token], end: bool) -> Answer:
        """What to reply to the request that was just decoded; a final answer begins the next segment."""
        final = self._closed or end
        samples = self._received_samples if end else self._frames * self._parameters.frame_samples
        tokens = self._tokens if final else [*self._tokens, *tail]
        answer = Answer(
            tokens, len(self._tokens), self._segment, final, samples, self._features, self._frames
        )
        if final:
            self._tokens = []
            self._segment_start_token = 0
            self._segment += 1
        self._closed = False
        return answer

    def _fresh_predictor(self, surplus_frames: int = 0) -> Predictor:
        p = self._parameters
        state = np.zeros((p.predictor_layers, p.predictor_hidden), np.float32)
        return Predictor(p.blank, (state, state), surplus_frames=surplus_frames)

    def receive(self, window: Window, frames: Floats, features: int) -> None:
        """Take the encoder's frames [D, T] of a window.

        Raises:
            ValueError: there are too few, so ``frame_samples`` or the contexts do not suit the encoder.
        """
        end = frames.shape[1] if window.chunk_frames is None else window.left_frames + window.chunk_frames
        if frames.shape[1] < max(end, window.left_frames + 1):
            raise ValueError(
                f"the encoder gave {frames.shape[1]} frames for a window of {len(window.samples)} samples, of which "
                f"{max(end, window.left_frames + 1)} are needed: frame_samples is {self._parameters.frame_samples}"
            )
        features_a_frame = round(features / frames.shape[1])
        if window.chunk_frames is None:
            self._features += features - window.left_frames * features_a_frame
        else:
            self._features += window.chunk_frames * features_a_frame
        chunk = frames[:, window.left_frames : end]
        self.waiting = np.concatenate((self.waiting, chunk), axis=1) if self.waiting.size else chunk
        self.tail = frames[:, end:]
        self._closed = False

    def token_budget(self) -> int:
        if self.options.context == "whole":
            return UNLIMITED_TOKENS
        return self.options.max_total_tokens - (len(self._tokens) - self._segment_start_token)

    def commit(self, tokens: Sequence[Token], done_frames: int) -> None:
        """Book decoded tokens and frames, and close the segment where its rules say so."""
        self._tokens.extend(self.from_start(tokens))
        self._frames += done_frames
        self.waiting = self.waiting[:, done_frames:]
        if self.options.context == "whole":
            return
        p, options = self._parameters, self.options
        segment_tokens = self._tokens[self._segment_start_token :]
        silent_frames = self._frames - (segment_tokens[-1].frame + segment_tokens[-1].frames) if segment_tokens else 0
        silent_ms = silent_frames * p.frame_samples * 1000 // SAMPLE_RATE
        segment_secs = (self._frames - self._segment_start_frame) * p.frame_samples / SAMPLE_RATE
        if (
            len(segment_tokens) >= options.max_total_tokens
            or segment_secs >= p.max_segment_secs
            or (options.endpoint_silence_ms and silent_ms >= options.endpoint_silence_ms)
        ):
            self._closed = True
            self._segment_start_frame = self._frames
            self._segment_start_token = len(self._tokens)
            self.predictor = self._fresh_predictor(self.predictor.surplus_frames)

    def from_start(self, tokens: Sequence[Token]) -> list[Token]:
        return [token._replace(frame=token.frame + self._frames) for token in tokens]


def decode_windows(step: Step, streams: Sequence[Stream], ends: Sequence[bool]) -> None:
    """Decode for good the frames that each stream has received; the streams share every call of the network.

    Args:
        step: the network.
        streams: streams, each once.
        ends: whether a stream ends here, so that nothing may wait for its next window.

    Raises:
        ValueError: the network's outputs are not those of the transducer.
    """
    rows = [(stream, end) for stream, end in zip(streams, ends, strict=True) if stream.waiting.size]
    while rows:
        batch = [stream for stream, _ in rows]
        tokens, done = _decode(step, batch, [s.waiting for s in batch], [s.predictor for s in batch])
        for stream, row_tokens, row_done in zip(batch, tokens, done, strict=True):
            stream.commit(row_tokens, row_done)
        rows = [(stream, end) for stream, end in rows if end and stream.waiting.size]


def decode_tails(step: Step, streams: Sequence[Stream]) -> list[list[Token]]:
    """The unstable tokens of each stream: those of its right context, decoded from a copy of its state."""
    tails: list[list[Token]] = [[] for _ in streams]
    index = [i for i, stream in enumerate(streams) if stream.tail.size or stream.waiting.size]
    if index:
        batch = [streams[i] for i in index]
        rows = [np.concatenate((s.waiting, s.tail), axis=1) if s.waiting.size else s.tail for s in batch]
        tokens, _ = _decode(step, batch, rows, [replace(s.predictor) for s in batch], limited=False)
        for i, row_tokens in zip(index, tokens, strict=True):
            tails[i] = streams[i].from_start(row_tokens)
    return tails


def _decode(
    step: Step, streams: Sequence[Stream], rows: Sequence[Floats], predictors: Sequence[Predictor], limited: bool = True
) -> tuple[list[list[Token]], list[int]]:
    return decode(
        step,
        streams[0]._transducer,
        rows,
        predictors,
        [stream.options.max_symbols_per_step for stream in streams],
        [stream.token_budget() if limited else UNLIMITED_TOKENS for stream in streams],
        streams[0]._parameters.block_frames,
    )
