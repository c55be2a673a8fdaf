"""Windows that a stream is cut into, for encoders of two kinds.

``Windowed`` encoders need context and get windows of ``left + chunk + right`` frames. ``Cached`` encoders carry it from call to
call in a cache, an input and an output; their windows hold new audio and the few feature frames beside it that
the encoder's subsampling needs. Windows lie on a grid that begins with the stream, so they depend on its samples alone, not on
how these were cut into requests.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from greedy import Floats
from parameters import SAMPLE_RATE, CachedEncoders, Geometry, Options, ParameterError, Parameters

Samples = npt.NDArray[np.int16]
Cache = npt.NDArray[Any]
"""Context of a cached encoder [S], FP16 or FP32."""

WHOLE = Geometry(0, 1, 0)
"""Geometry of a recording that is decoded whole; it has one window."""


class Carried(NamedTuple):
    """What a cached encoder needs beside the audio.

    Attributes:
        model: name of the encoder.
        cache: context behind the previous window; None: zeros.
        size: feature frames of the encoder's input.
        zeros: number of feature frames of zeros that the input begins with, instead of the audio's.
        skip: number of the audio's feature frames that are not part of the input.
        length: number of the input's feature frames that count; zeros follow them.
        prompt: number of the stream's language, or None if the encoder takes none.
        decode: whether the window's encoder frames are decoded; False while a fresh cache is filled with earlier audio.
    """

    model: str
    cache: Cache | None
    size: int
    zeros: int
    skip: int
    length: int
    prompt: int | None
    decode: bool


class Window(NamedTuple):
    """Audio for one encoder call.

    Attributes:
        samples: 16 kHz audio [n].
        left_frames: frames of left context, which are dropped.
        chunk_frames: frames that are decoded for good; None: all that remain.
        live: whether a person waits for the words while speaking; False for a recording that is decoded whole.
        carried: what a cached encoder needs; None for an encoder without a cache.
    """

    samples: Samples
    left_frames: int
    chunk_frames: int | None
    live: bool
    carried: Carried | None = None

    @property
    def kind(self) -> tuple[bool, int, str]:
        """What windows that share a call have in common: padding unequal ones costs more than sharing saves."""
        return self.live, len(self.samples), self.carried.model if self.carried else ""


class Windows(Protocol):
    """Cuts one stream's audio into windows, and counts what they give.

    Attributes:
        grid: sizes that the windows' places follow from; a state can be restored on the same grid only.
        features: number of feature frames decoded for good.
    """

    grid: tuple[int, ...]
    features: int

    def push(self, samples: Samples) -> None:
        """Append audio."""
        ...

    def next_window(self, end: bool) -> Window | None:
        """Return the next window that is due, if any.

        Args:
            end: no audio follows; the rest of it is the last window.
        """
        ...

    def receive(self, window: Window, frames: Floats, features: int, cache: Cache | None) -> tuple[Floats, Floats]:
        """Take the encoder's frames of a window.

        Args:
            window: the window.
            frames: its encoder frames [D, T].
            features: number of feature frames behind them.
            cache: context behind the window, of a cached encoder.

        Returns:
            The frames to decode for good, and those of the right context.

        Raises:
            ValueError: there are too few or too many frames, so the parameters do not suit the encoder.
        """
        ...

    def rest(self) -> None:
        """Take notice that the last window ended in silence behind the end of a segment."""
        ...

    def save(self) -> dict[str, int]:
        """Return what restores the windows beside the counts and the audio."""
        ...

    def restore(self, frames: int, features: int, saved: dict[str, Any], samples: int | None) -> int:
        """Go on behind a number of frames that were decoded for good.

        Args:
            frames: number of encoder frames decoded for good.
            features: number of feature frames decoded for good.
            saved: what ``save`` returned.
            samples: position of the next audio in the stream; None: the first that is needed.

        Returns:
            The position of the next audio.

        Raises:
            ValueError: the state is malformed, or the audio begins too late.
        """
        ...


def windows_of(parameters: Parameters, options: Options) -> Windows:
    """Return the windows of a new stream.

    Raises:
        ParameterError: the stream asks for a language that the encoder does not know.
    """
    whole = options.context == "whole"
    if parameters.cached and not (whole and parameters.whole_encoder_model):
        return Cached(parameters.cached, parameters.frame_samples, options)
    geometry = WHOLE if whole else parameters.geometries[options.latency]
    return Windowed(geometry, parameters.frame_samples, options)


class Windowed:
    """Windows of an encoder that needs context; see ``Windows``."""

    def __init__(self, geometry: Geometry, frame_samples: int, options: Options) -> None:
        self._frame_samples = frame_samples
        self._whole = options.context == "whole"
        self.grid: tuple[int, ...] = geometry
        self.features = 0
        self._pcm: Samples = np.zeros(0, np.int16)
        self._pcm_start = 0  # frame index of the first sample of _pcm
        self._encoded = 0  # frames whose window was given out

    def push(self, samples: Samples) -> None:
        """Append audio."""
        self._pcm = np.concatenate((self._pcm, samples))

    def next_window(self, end: bool) -> Window | None:
        """Return the next window that is due, if any."""
        frame_samples = self._frame_samples
        kept_frames, chunk_frames, right_frames = self.grid
        left_frames = self._encoded - self._pcm_start
        ahead = len(self._pcm) - left_frames * frame_samples
        if not self._whole and ahead >= (chunk_frames + right_frames) * frame_samples:
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
        return Window(samples, left_frames, None, live=not self._whole)

    def receive(self, window: Window, frames: Floats, features: int, cache: Cache | None) -> tuple[Floats, Floats]:  # noqa: ARG002
        """Take the encoder's frames of a window."""
        end = frames.shape[1] if window.chunk_frames is None else window.left_frames + window.chunk_frames
        frame_samples, samples = self._frame_samples, len(window.samples)
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
        self.features += (features if window.chunk_frames is None else features_to[1]) - features_to[0]
        return frames[:, window.left_frames : end], frames[:, end:]

    def rest(self) -> None:
        """Do nothing: each window has its context."""

    def save(self) -> dict[str, int]:
        """Return nothing: frames and features are enough."""
        return {}

    def restore(self, frames: int, features: int, saved: dict[str, Any], samples: int | None) -> int:  # noqa: ARG002
        """Go on behind a number of frames; the next audio begins with their left context."""
        needed = max(0, frames - self.grid[0]) * self._frame_samples
        if samples not in (None, needed):
            raise ValueError(f"audio from sample {samples} on instead of {needed}")
        self.features, self._encoded = features, frames
        self._pcm_start = needed // self._frame_samples
        return needed


class Cached:
    """Windows of an encoder with a cache; see ``Windows``.

    Window n holds the feature frames of chunk n and those before and after it that the encoder's input covers. The audio has
    ``edge_features`` more on both sides, so that the front end computes the same features as from the whole stream. Zeros stand
    before a fresh cache, unless the encoder begins with the chunk. An encoder may look ahead: its windows then end with
    ``right_features`` that the next window encodes again, and its caches hold the chunk alone. Without look-ahead, there is no
    right context.

    A cache begins afresh at endpoints, and when it covers ``max_cache_features``. In the second case, the chunks of the last
    ``warm_up_features`` are encoded again to fill it. Both places follow from the stream's audio. So a cache is equal bit for
    bit whether it was carried or is computed again for a restored stream, and it depends on a limited part of the past.
    """

    def __init__(self, cached: CachedEncoders, frame_samples: int, options: Options) -> None:
        self._cached = cached
        self._encoder = cached.encoders["throughput" if options.context == "whole" else options.latency]
        self._prompt = cached.prompt(options.language)
        self._live = options.context == "window"
        window, chunk = self._encoder.window_features, self._encoder.chunk_features
        self.grid: tuple[int, ...] = (window, chunk, self._encoder.cache_size)
        right = cached.right_features
        self._before = window - chunk - right if cached.zeros_before else 0  # feature frames of a window before its chunk
        self._chunk_frames = chunk * cached.hop_samples // frame_samples
        self._right_frames = right * cached.hop_samples // frame_samples
        self._warm_up = -(-cached.warm_up_features // chunk)  # chunks that fill a fresh cache
        self._max_chunks = cached.max_cache_features // chunk  # of a cache; 0: no limit
        self.features = 0
        self._pcm: Samples = np.zeros(0, np.int16)
        self._pcm_start = 0  # position of the first sample of _pcm
        self._received = 0  # samples
        self._chunk = 0  # next chunk whose window is given out
        self._decode_from = 0  # first chunk that is decoded
        self._anchor = 0  # chunk that began with a fresh cache
        self._cache: Cache | None = None

    def push(self, samples: Samples) -> None:
        """Append audio."""
        self._pcm = np.concatenate((self._pcm, samples))
        self._received += len(samples)

    def next_window(self, end: bool) -> Window | None:
        """Return the next window that is due, if any; a fresh cache may need windows before it, which are not decoded."""
        if not self._is_due(end):
            return None
        if self._next_anchor > self._anchor:
            self._decode_from = self._chunk
            self._chunk = self._anchor = self._next_anchor
        hop, edge, encoder = self._cached.hop_samples, self._cached.edge_features, self._encoder
        begin = self._chunk * encoder.chunk_features
        first = begin - self._before  # feature frame that the encoder's input begins with
        fresh = self._chunk == self._anchor
        zeros = self._before if fresh else max(0, -first)
        audio_from = max(0, first - edge, -(-self._pcm_start // hop))
        audio_to = self._audio_to(self._chunk)
        length, chunks, last = encoder.window_features, 1, False
        if self._received < audio_to:
            length = min(length, self._total - first)
            # The right context of the last window is decoded for good, too.
            last = self._total - begin <= encoder.chunk_features + self._cached.right_features
            chunks = -(-(self._total - begin) // encoder.chunk_features) if last else 1
        samples = self._pcm[audio_from * hop - self._pcm_start : audio_to - self._pcm_start]
        samples = np.pad(samples, (0, audio_to - audio_from * hop - len(samples)))
        carried = Carried(
            encoder.model,
            None if fresh else self._cache,
            encoder.window_features,
            zeros,
            first + zeros - audio_from,
            length,
            self._prompt,
            self._chunk >= self._decode_from,
        )
        self._chunk += chunks
        keep = max(self._pcm_start, self._audio_needed(max(self._anchor, self._chunk - self._warm_up), self._before))
        self._pcm = self._pcm[keep - self._pcm_start :]
        self._pcm_start = keep
        return Window(samples, 0, None if last else self._chunk_frames, self._live, carried)

    @property
    def _total(self) -> int:
        """Number of feature frames if no more audio follows; a single sample, as canaries send it, has one."""
        frames = (self._received + self._cached.final_padding_samples) // self._cached.hop_samples
        return max(frames, min(1, self._received))

    def _audio_to(self, chunk: int) -> int:
        """Return the number of samples at which the window of a chunk is complete."""
        features = chunk * self._encoder.chunk_features - self._before + self._encoder.window_features
        return (features + self._cached.edge_features) * self._cached.hop_samples

    def _is_due(self, end: bool) -> bool:
        """Return whether the window of the next chunk is complete, or is the last one's rest."""
        if self._received >= self._audio_to(self._chunk):
            return True
        return end and self._received > 0 and self._chunk * self._encoder.chunk_features < self._total

    @property
    def _next_anchor(self) -> int:
        """Chunk that the cache of the next window begins with."""
        is_full = self._max_chunks and self._chunk - self._anchor >= self._max_chunks
        return self._chunk - self._warm_up if is_full else self._anchor

    def receive(self, window: Window, frames: Floats, features: int, cache: Cache | None) -> tuple[Floats, Floats]:  # noqa: ARG002
        """Take the encoder's frames and cache of a window."""
        carried = window.carried
        found, expected = frames.shape[1], self._chunk_frames + self._right_frames
        if carried is None:
            raise ValueError("the window has nothing to carry")
        if found > expected or (found < expected and carried.length == carried.size):
            chunk = self._encoder.chunk_features + self._cached.right_features
            raise ValueError(
                f"{carried.model} gave {found} frames for a chunk of {chunk} feature frames, "
                f"which has {expected}: frame_samples is {chunk * self._cached.hop_samples // expected}"
            )
        self._cache = cache
        if not carried.decode:
            return frames[:, :0], frames[:, :0]
        self.features = min(self._chunk * self._encoder.chunk_features, self._received // self._cached.hop_samples)
        end = found if window.chunk_frames is None else window.chunk_frames
        return frames[:, :end], frames[:, end:]

    def rest(self) -> None:
        """Begin the next window with a fresh cache; nothing before it is needed any more."""
        if self._cached.reset_at_endpoint:
            self._anchor = self._chunk
            self._cache = None

    def save(self) -> dict[str, int]:
        """Return the chunk that the next window's cache begins with, and the sample from which on its audio is needed.

        The cache itself is too large to save; it is computed again from there.
        """
        return {"anchor": self._next_anchor, "needed_from": self._audio_needed(self._next_anchor, 0)}

    def restore(self, frames: int, features: int, saved: dict[str, Any], samples: int | None) -> int:
        """Go on behind a number of frames: fill the cache from the audio behind the last fresh cache, as far as it is there."""
        chunk, anchor = frames // self._chunk_frames, int(saved["anchor"])
        if not 0 <= anchor <= chunk or frames % self._chunk_frames:
            raise ValueError(f"anchor {anchor} of {frames} frames in chunks of {self._chunk_frames}")
        start = self._audio_needed(anchor, 0) if samples is None else samples
        while anchor < chunk and self._audio_needed(anchor, 0) < start:
            anchor += 1
        if start < 0 or self._audio_needed(anchor, 0) < start:
            raise ValueError(f"audio from sample {start} on instead of {self._audio_needed(chunk, 0)} or earlier")
        self.features = features
        self._chunk = self._anchor = anchor
        self._decode_from = chunk
        self._pcm_start = self._received = start
        return start

    def _audio_needed(self, chunk: int, before: int) -> int:
        """Return the first sample that a chunk's features need, and those of the feature frames before it."""
        first = chunk * self._encoder.chunk_features - before - self._cached.edge_features
        return max(0, first) * self._cached.hop_samples


def check_length(parameters: Parameters, options: Options, samples: int) -> None:
    """Check the length of a recording that is decoded whole.

    Raises:
        ParameterError: it exceeds ``max_whole_secs``.
    """
    if options.context == "whole" and samples > int(parameters.max_whole_secs * SAMPLE_RATE):
        raise ParameterError(
            f"context=whole takes at most {parameters.max_whole_secs:g} s of audio; "
            f"this has {samples / SAMPLE_RATE:.2f} s; cut it, or send it with context=window"
        )
