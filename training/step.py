"""One step of a stream: encode a chunk and its look-ahead, with the context of earlier chunks in a cache.

A step computes what `chunks.encode` computes for one chunk. The context is packed into one tensor, so that the server carries
it without knowing its parts: keys and values of the attention before rotation, the last frames of the convolutions, and sums
for the stem's group norm. Positions are counted within the window, so streams may have any length.

The module is written for tracing: sizes and rotations are constants; only the batch and the length of the window are open.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.chunks import NORM_STEPS, PRIOR_STEPS, PRIOR_VARIANCE, STACK, STEPS, mirrored
from training.model import Block, Encoder
from training.moonshine import EXTRA_STEPS, FRAME_SAMPLES, HEADS, WIDTH, Layer, Layers

_MASKED = -1e9
"""Added to the score of a key that a query must not see."""


class _Rotation(NamedTuple):
    """Rotary position embedding of heads of size D.

    Attributes:
        turn: cosines and sines of the positions [2, N, 1, D].
        crossed: matrix that maps a head to the other halves of its pairs, with their signs [D, D].
    """

    turn: Tensor
    crossed: Tensor


def _of_moonshine(layers: Layers, count: int) -> _Rotation:
    """Return the rotation of `moonshine.rotate` at positions 0 to `count` - 1."""
    turn = layers.turn(torch.arange(count))
    size, rest = turn.shape[2], WIDTH // HEADS - turn.shape[2]
    turn = torch.stack((functional.pad(turn[0], (0, rest), value=1.0), functional.pad(turn[1], (0, rest))))
    crossed = torch.zeros(size + rest, size + rest)
    first = torch.arange(0, size, 2)
    crossed[first + 1, first], crossed[first, first + 1] = -1.0, 1.0
    return _Rotation(turn[:, :, None], crossed)


def _of_conformer(size: int, count: int) -> _Rotation:
    """Return the rotation of `model.rotate` for heads of `size` at positions 0 to `count` - 1."""
    first = torch.arange(size // 2)
    angles = torch.arange(count)[:, None] * 10000.0 ** (-first / len(first))
    angles = torch.cat((angles, angles), dim=1)
    crossed = torch.zeros(size, size)
    crossed[first + len(first), first], crossed[first, first + len(first)] = -1.0, 1.0
    return _Rotation(torch.stack((angles.cos(), angles.sin()))[:, :, None], crossed)


class _Keys(NamedTuple):
    """Rotations and mask of the attention for windows of T frames.

    Attributes:
        turn: cosines and sines for the keys [2, L + T, 1, D].
        turn_q: cosines and sines for the queries, times the scale of the scores [2, T, 1, D].
        mask: added to the scores [B, 1, 1 or T, L + T].
    """

    turn: Tensor
    turn_q: Tensor
    mask: Tensor


class _Rate(nn.Module):
    """Attention at one frame rate, with its constants.

    Args:
        stride: number of 24 ms frames per frame.
        left: number of keys before the chunk, L.
        right: number of frames of look-ahead.
        longest: number of frames of the longest window.
        rotation: rotation at L + `longest` positions.
        reach: maximum distance of a key from its query in frames; None: no maximum.
    """

    def __init__(self, stride: int, left: int, right: int, longest: int, rotation: _Rotation, reach: int | None) -> None:
        super().__init__()
        self.left, self.right, self._reach = left, right, reach
        keys = torch.arange(-left, longest)
        constants = {
            "at": (keys * stride).float(),
            "far": ((keys - keys[left:, None]).abs() > (reach or 0)) * _MASKED,
            "turn": rotation.turn,
            "turn_q": rotation.turn[:, left:] * rotation.turn.shape[3] ** -0.5,
            "crossed": rotation.crossed,
        }
        for name, constant in constants.items():
            self.register_buffer(name, constant, persistent=False)

    def real(self, frames: int, length: Tensor) -> Tensor:
        """Return a mask of the frames that are audio [B, `frames`, 1]; `length` [B] is in 24 ms frames."""
        return (self.at[self.left : self.left + frames] < length[:, None]).float()[..., None]

    def keys(self, frames: int, length: Tensor, seen: Tensor) -> _Keys:
        """Return rotations and mask for windows of `frames` frames.

        Args:
            frames: length of a window in frames.
            length: length of each window's audio in 24 ms frames [B].
            seen: audio before each window in 24 ms frames, or a lower number that covers L frames [B].
        """
        end = self.left + frames
        at = self.at[:end]
        mask = (((at < -seen[:, None]) | (at >= length[:, None])).float() * _MASKED)[:, None, None]
        if self._reach is not None:
            mask = mask + self.far[:frames, :end]
        return _Keys(self.turn[:, :end], self.turn_q[:, :frames], mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: _Keys, heads: int) -> Tensor:
        """Attend from q [B, T, H D] to k and v [B, L + T, H D], and return [B, T, H D]."""
        q, k, v = (x.reshape(x.shape[0], -1, heads, self.crossed.shape[0]) for x in (q, k, v))
        q, k = self._rotate(q, keys.turn_q), self._rotate(k, keys.turn)
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) + keys.mask
        return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)

    def _rotate(self, x: Tensor, turn: Tensor) -> Tensor:
        return x * turn[0] + (x @ self.crossed) * turn[1]

    def kept(self, x: Tensor, count: int) -> Tensor:
        """Return the last `count` frames before the look-ahead of x [B, N, D]: the context of the next chunk."""
        return x[:, -count - self.right : -self.right]


class Step(nn.Module):
    """The encoder for one chunk of a stream.

    Args:
        encoder: the encoder.
        left: left context of the attention in 24 ms frames.
        right: look-ahead in 24 ms frames, at least one frame of 96 ms; it is encoded again with the next chunk.
        windows: lengths of chunk and look-ahead that the step is used with, in 24 ms frames; all are multiples of four.

    Attributes:
        cache_size: number of values in the cache of one stream, S.
    """

    def __init__(self, encoder: Encoder, left: int, right: int, windows: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder, self._right = encoder, right
        self._layers = [*encoder.lower.layers, *encoder.upper.layers]
        longest = max(windows)
        self._past_steps = NORM_STEPS - STEPS * min(windows)
        self._max_seen = max(left, math.ceil(self._past_steps / STEPS))
        shapes: list[tuple[int, ...]] = [(2, self._past_steps), (1,), *[(left, WIDTH)] * 2 * len(self._layers)]
        rates = [_Rate(1, left, right, longest, _of_moonshine(encoder.lower, left + longest), None)]
        for stride, blocks in ((2, encoder.at_48_ms), (STACK, encoder.at_96_ms)):
            reach, width, taps = blocks[0].reach, blocks[0].depthwise.in_channels, blocks[0].depthwise.kernel_size[0]
            rotation = _of_conformer(width // blocks[0].heads, reach + longest // stride)
            rates.append(_Rate(stride, reach, right // stride, longest // stride, rotation, reach))
            shapes += [(reach, width), (reach, width), (taps // 2, width)] * len(blocks)
            self._max_seen = max(self._max_seen, reach * stride)
        self._rates, self._shapes = nn.ModuleList(rates), shapes
        self._sizes = [math.prod(shape) for shape in shapes]
        self.cache_size = sum(self._sizes)
        self.register_buffer("steps", torch.arange(NORM_STEPS).float(), persistent=False)
        self.register_buffer("average", torch.full((1, WIDTH, 1), 1 / WIDTH), persistent=False)

    def forward(self, audio_signal: Tensor, length: Tensor, cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode windows of one length.

        Args:
            audio_signal: samples of the windows [B, 384, T], zero behind their audio.
            length: number of frames of each window that are audio [B].
            cache: context behind the previous chunk [B, S], FP16; zeros at the start of a stream.

        Returns:
            Outputs [B, D, T / 4] of chunk and look-ahead, their lengths [B], and the context behind the chunk [B, S].
        """
        parts = cache.float().split(self._sizes, dim=1)
        sums, seen, *contexts = (part.reshape(-1, *shape) for part, shape in zip(parts, self._shapes, strict=True))
        real, seen, frames = length.float(), seen[:, 0], audio_signal.shape[2]
        x, sums = self._stem(audio_signal.transpose(1, 2).flatten(1), real, seen, sums)
        kept = [sums, (seen + (frames - self._right)).clamp(max=self._max_seen)[:, None]]
        rate, *lower_rates = self._rates
        keys = rate.keys(frames, real, seen)
        past = iter(contexts)
        for layer in self._layers:
            x, *after = self._layer(layer, x, rate, keys, (next(past), next(past)))
            kept += after
        encoder = self.encoder
        x = encoder.norm(encoder.upper.norm(x))
        for lower, stack, blocks in zip(
            lower_rates, (encoder.to_48_ms, encoder.to_96_ms), (encoder.at_48_ms, encoder.at_96_ms), strict=True
        ):
            x = stack((x * rate.real(frames, real)).reshape(x.shape[0], -1, stack.in_features))
            rate, frames = lower, frames // 2
            keys, mask = rate.keys(frames, real, seen), rate.real(frames, real)
            for block in blocks:
                x, *after = self._block(block, x, rate, keys, mask, (next(past), next(past), next(past)))
                kept += after
        packed = torch.cat([part.flatten(1) for part in kept], dim=1).to(cache.dtype)
        return x.transpose(1, 2), (length + (STACK - 1)) // STACK, packed

    def _stem(self, samples: Tensor, length: Tensor, seen: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, T, 288] of samples [B, 384 T], and the sums of the steps that the next chunk needs.

        Args:
            samples: of the windows.
            length: length of their audio in frames [B].
            seen: audio before the windows in frames [B].
            past: mean and mean square of each step before the windows [B, 2, P].
        """
        stem, steps = self.encoder.stem, samples.shape[1] // FRAME_SAMPLES * STEPS
        x = torch.tanh(stem.conv1(mirrored(samples[:, None])))
        own = x[:, :, :-EXTRA_STEPS]
        # Convolutions, since ONNX Runtime's ReduceMean adds in an order that depends on the number of streams in the call.
        means = [functional.conv1d(values, self.average) for values in (own, own * own)]
        sums = torch.cat((past, torch.cat(means, dim=1)), dim=2)
        count = (self.steps[:steps] < (length * STEPS + EXTRA_STEPS)[:, None]).float().sum(1)
        count = count + (self.steps[: NORM_STEPS - steps] < (seen * STEPS)[:, None]).float().sum(1) + PRIOR_STEPS
        mean, square = (sums[:, :, -NORM_STEPS:].sum(2) / count[:, None]).split(1, dim=1)
        variance = square + (PRIOR_STEPS * PRIOR_VARIANCE / count)[:, None] - mean * mean
        scale = torch.rsqrt(variance.clamp(min=1e-6) + 1e-5)[..., None] * stem.scale
        x = x * scale + (stem.shift - mean[..., None] * scale)
        features = functional.gelu(stem.conv3(functional.gelu(stem.conv2(x)))).transpose(1, 2)
        ahead = self._right * STEPS
        return features, sums[:, :, -self._past_steps - ahead : -ahead]

    def _layer(
        self, layer: Layer, x: Tensor, rate: _Rate, keys: _Keys, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply a layer to x [B, T, 288], and return it with the keys and values that the next chunk needs.

        Args:
            layer: the layer.
            x: frames.
            rate: attention at their rate.
            keys: rotations and mask.
            past: keys and values before the window, each [B, L, 288].
        """
        y = layer.input_layernorm(x)
        k, v = torch.cat((past[0], layer.k_proj(y)), dim=1), torch.cat((past[1], layer.v_proj(y)), dim=1)
        x = x + layer.o_proj(rate.attend(layer.q_proj(y), k, v, keys, HEADS))
        x = x + layer.fc2(functional.gelu(layer.fc1(layer.post_attention_layernorm(x))))
        return x, rate.kept(k, rate.left), rate.kept(v, rate.left)

    def _block(
        self, block: Block, x: Tensor, rate: _Rate, keys: _Keys, real: Tensor, past: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Apply a block to x [B, T, D], and return it with the context that the next chunk needs.

        Args:
            block: the block.
            x: frames.
            rate: attention at their rate.
            keys: rotations and mask.
            real: mask of the frames that are audio [B, T, 1].
            past: keys and values before the window, each [B, L, D], and inputs of the convolution before it [B, 4, D].
        """
        x = x + 0.5 * block.before(x)
        q, k, v = block.qkv(block.attention_norm(x)).chunk(3, -1)
        k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        x = x + block.attention_out(rate.attend(q, k, v, keys, block.heads))
        around = block.depthwise.kernel_size[0] // 2
        y = torch.cat((past[2], functional.glu(block.gate(block.convolution_norm(x)), dim=-1) * real), dim=1)
        z = functional.conv1d(
            functional.pad(y, (0, 0, 0, around)).transpose(1, 2),
            block.depthwise.weight,
            block.depthwise.bias,
            groups=block.depthwise.groups,
        ).transpose(1, 2)
        x = x + block.convolution_out(functional.silu(block.depthwise_norm(z)))
        x = block.out_norm(x + 0.5 * block.after(x))
        return x, rate.kept(k, rate.left), rate.kept(v, rate.left), rate.kept(y, around)
