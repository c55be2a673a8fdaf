"""Run the encoder chunk by chunk, as live streams do, on whole recordings at once.

A frame attends to its chunk, to a limited history of earlier chunks, and to a look-ahead. The look-ahead is encoded again with
every chunk, as in Emformer (Shi et al., 2021), so no layer sees further ahead. The stem's group norm covers the last seconds
instead of the whole recording.

All chunks of a recording are computed in parallel: x [B, N, C + R, D] holds the C own frames and the R look-ahead frames of
each of N chunks. The history of a chunk is gathered from the own frames of the earlier chunks; a streaming encoder would cache
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from training.model import Block, Encoder, rotate
from training.moonshine import EXTRA_STEPS, FRAME_SAMPLES, STEM_REACH, STEM_STEP, WIDTH, Attention, Layers, Stem, attend
from training.moonshine import rotate as rotate_moonshine

STACK = 4
"""Number of 24 ms frames in one output frame of the encoder, which is 96 ms long."""
NORM_SECS = 4.0
"""Length of the audio that the stem's group norm covers, in seconds."""
PRIOR_SECS, PRIOR_VARIANCE = 0.5, 0.009
"""Prior of the group norm: its weight in seconds of audio, and its variance around a mean of zero. The variance is that of
speech at a typical level."""
STEPS = FRAME_SAMPLES // STEM_STEP
"""Steps of the stem's first convolution in one frame."""
NORM_STEPS, PRIOR_STEPS = round(NORM_SECS * 16_000 / STEM_STEP), PRIOR_SECS * 16_000 / STEM_STEP
"""The same lengths in steps of the stem's first convolution."""
_Turn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cut:
    """Lengths of chunk, left context and right context, in frames of one layer's frame rate."""

    chunk: int
    left: int
    right: int

    def halved(self) -> Cut:
        """Return the same lengths at half the frame rate."""
        return Cut(self.chunk // 2, self.left // 2, self.right // 2)


def cut(chunk: int, left: int, right: int) -> Cut:
    """Return the cut for `encode` from lengths in frames of 96 ms."""
    return Cut(chunk * STACK, left * STACK, right * STACK)


@dataclass(frozen=True)
class _Layout:
    """Positions in the chunked form, for one frame rate.

    Attributes:
        cut: lengths in frames of this rate.
        frames: number of frames of each recording without padding [B].
        chunks: number of chunks, N.
    """

    cut: Cut
    frames: Tensor
    chunks: int

    def halved(self) -> _Layout:
        return _Layout(self.cut.halved(), (self.frames + 1) // 2, self.chunks)

    @property
    def at(self) -> Tensor:
        """Positions of the queries [N, C + R]."""
        first = torch.arange(self.chunks, device=self.frames.device)[:, None] * self.cut.chunk
        return first + torch.arange(self.cut.chunk + self.cut.right, device=self.frames.device)

    @property
    def real(self) -> Tensor:
        """Mask of the queries that lie within their recording [B, N, C + R]."""
        return self.at < self.frames[:, None, None]

    def keys(self, left: int) -> Tensor:
        """Return the positions of the keys [N, left + C + R]."""
        first = torch.arange(self.chunks, device=self.frames.device)[:, None] * self.cut.chunk - left
        return first + torch.arange(left + self.cut.chunk + self.cut.right, device=self.frames.device)

    def with_history(self, x: Tensor, left: int) -> Tensor:
        """Prepend `left` frames of earlier chunks to each chunk: [B, N, C + R, D] to [B, N, left + C + R, D]."""
        own = x[:, :, : self.cut.chunk].flatten(1, 2)
        own = functional.pad(own, (0, 0, left, 0))
        own = own.unfold(1, left + self.cut.chunk, self.cut.chunk).transpose(2, 3)
        return torch.cat((own, x[:, :, self.cut.chunk :]), dim=2)

    def attention(self, left: int, reach: int | None, turn_q: _Turn, turn_k: _Turn) -> Attention:
        """Return a function that attends over q, k and v [B N, H, C + R, D].

        Args:
            left: frames of history.
            reach: maximum distance of a key from its query in frames; None: no maximum.
            turn_q: rotates queries to their positions.
            turn_k: rotates keys to their positions.
        """
        keys, at = self.keys(left), self.at
        mask = ((keys >= 0) & (keys < self.frames[:, None, None]))[:, :, None]
        distance = keys[:, None] - at[:, :, None]
        if reach is not None:
            mask = mask & (distance.abs() <= reach)
        mask = (mask | (distance == 0)).flatten(0, 1)[:, None]  # each frame attends to itself, so no row is empty

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (self._gathered(x, left) for x in (k, v))
            return attend(turn_q(q), turn_k(k), v, mask)

        return attention

    def _gathered(self, x: Tensor, left: int) -> Tensor:
        rows, heads, count, size = x.shape
        x = x.transpose(1, 2).reshape(rows // self.chunks, self.chunks, count, heads * size)
        return self.with_history(x, left).reshape(rows, -1, heads, size).transpose(1, 2)


def encode(encoder: Encoder, samples: Tensor, frames: Tensor, by: Cut, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Encode samples [B, 384 T] chunk by chunk, and return outputs [B, ceil(T / 4), D] and their lengths [B].

    Args:
        encoder: the encoder.
        samples: 16 kHz audio, zero after the end of each row.
        frames: number of 24 ms frames of each row without padding [B].
        by: lengths of chunks and contexts.
        hidden: mask of frames [B, T] whose features are set to zero.
    """
    longest = samples.shape[1] // FRAME_SAMPLES
    layout = _Layout(by, frames, -(-longest // by.chunk))
    x = _stem(encoder.stem, samples, layout)
    if hidden is not None:
        index = layout.at.clamp(max=longest - 1)
        x = x.masked_fill(hidden[:, index][..., None], 0)
    x = _layers(encoder.lower, x, layout)
    x = encoder.norm(_layers(encoder.upper, x, layout))
    x, layout = encoder.to_48_ms(_pairs(x, layout)), layout.halved()
    for block in encoder.at_48_ms:
        x = _block(block, x, layout)
    x, layout = encoder.to_96_ms(_pairs(x, layout)), layout.halved()
    for block in encoder.at_96_ms:
        x = _block(block, x, layout)
    x = (x * layout.real[..., None].to(x.dtype))[:, :, : layout.cut.chunk].flatten(1, 2)
    return x[:, : -(-longest // STACK)], layout.frames


def _stem(stem: Stem, samples: Tensor, layout: _Layout) -> Tensor:
    """Return features [B, N, C + R, 288].

    The stem reads `STEM_REACH` samples behind the look-ahead, which a stream does not have yet: it sees the last ones mirrored.
    """
    chunks, own, size = layout.chunks, layout.cut.chunk, layout.cut.chunk + layout.cut.right
    needed = ((chunks - 1) * own + size) * FRAME_SAMPLES
    windows = functional.pad(samples, (0, needed - samples.shape[1])).unfold(1, size * FRAME_SAMPLES, own * FRAME_SAMPLES)
    x = torch.tanh(stem.conv1(mirrored(windows.flatten(0, 1)[:, None])))  # [B N, 288, steps]
    first = torch.arange(chunks, device=x.device)[:, None] * own * STEPS
    at = first + torch.arange(size * STEPS, device=x.device)
    real = at < (layout.frames * STEPS + EXTRA_STEPS)[:, None, None]
    begins = (first + size * STEPS - NORM_STEPS).clamp(min=0).minimum(first)

    def over(steps: Tensor) -> Tensor:
        """Sum values of the steps [B, N, S] over those that the norm of each chunk covers."""
        run = functional.pad(steps[:, :, : own * STEPS].flatten(1).double().cumsum(1), (1, 0))
        return (run[:, first[:, 0]] - run[:, begins[:, 0]]).float() + steps[:, :, -NORM_STEPS:].sum(2)

    inside = x[:, :, : size * STEPS].unflatten(0, (-1, chunks))
    count = (over(real.float()) + PRIOR_STEPS) * WIDTH
    mean = over(inside.sum(2, dtype=torch.float32)) / count
    squares = over((inside * inside).sum(2, dtype=torch.float32)) + PRIOR_STEPS * WIDTH * PRIOR_VARIANCE
    scale = torch.rsqrt((squares / count - mean**2).clamp(min=1e-6) + 1e-5)
    x = (x - mean.flatten()[:, None, None].to(x.dtype)) * scale.flatten()[:, None, None].to(x.dtype)
    return stem.above(x).unflatten(0, (-1, chunks))


def mirrored(samples: Tensor) -> Tensor:
    """Return samples [B, 1, N] with the last `STEM_REACH` of them mirrored behind the end [B, 1, N + STEM_REACH]."""
    return functional.pad(samples, (0, STEM_REACH), mode="reflect")


def _layers(layers: Layers, x: Tensor, layout: _Layout) -> Tensor:
    left = layout.cut.left
    own, seen = layers.turn(layout.at[0] + left), layers.turn(layout.keys(left)[0] + left)
    attention = layout.attention(left, None, lambda q: rotate_moonshine(q, own), lambda k: rotate_moonshine(k, seen))
    y = x.flatten(0, 1)
    for layer in layers.layers:
        y = layer.around(y, attention)
    return layers.norm(y).view(x.shape)


def _block(block: Block, x: Tensor, layout: _Layout) -> Tensor:
    left, before = min(block.reach, layout.chunks * layout.cut.chunk), block.depthwise.kernel_size[0] // 2
    own, seen = layout.at[0] + left, layout.keys(left)[0] + left
    attention = layout.attention(left, block.reach, lambda q: rotate(q, own), lambda k: rotate(k, seen))

    def convolve(y: Tensor) -> Tensor:
        y = layout.with_history(y.unflatten(0, (-1, layout.chunks)), before).flatten(0, 1)
        return block.convolve_within(functional.pad(y, (0, 0, 0, before)))

    y = x.flatten(0, 1)
    return block.around(y, layout.real.flatten(0, 1), attention, convolve).view(x.shape)


def _pairs(x: Tensor, layout: _Layout) -> Tensor:
    """Join neighbouring frames: [B, N, T, D] to [B, N, T / 2, 2 D]. Padding becomes zero."""
    x = x * layout.real[..., None].to(x.dtype)
    return x.reshape(*x.shape[:2], x.shape[2] // 2, 2 * x.shape[3])
