"""The transducer (Graves, 2012): Moonshine's layers and Conformer blocks as encoder, an LSTM predictor, and a joint network.

The blocks are Conformers (Gulati et al., 2020) with local attention. Their norms cover one frame each, so padding never changes
the result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from training import config as configuration
from training import moonshine
from training.moonshine import WIDTH, Attention, Layers, Stem, attend

LSTMState = tuple[Tensor, Tensor]


LOWER = 3
"""Number of lower Moonshine layers, which have a learning rate of their own (`lower_rate`)."""


class Block(nn.Module):
    """A Conformer block: half a feed-forward net, local attention, convolution, the other half.

    Args:
        sizes: sizes of the layers.
        reach: maximum distance that attention covers, in frames each way.

    Attributes:
        heads: number of attention heads.
    """

    def __init__(self, sizes: configuration.Model, reach: int) -> None:
        super().__init__()
        width, inner, self._dropout = sizes.width, sizes.feed_forward, sizes.dropout
        self.heads, self.reach = sizes.heads, reach
        self.before, self.after = (
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, inner),
                nn.SiLU(),
                nn.Linear(inner, width),
                nn.Dropout(self._dropout),
            )
            for _ in range(2)
        )
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.convolution_norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, sizes.kernel, padding=sizes.kernel // 2, groups=width)
        self.depthwise_norm = nn.LayerNorm(width)
        self.convolution_out = nn.Linear(width, width)
        self.out_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        """Map x [B, T, D] to the same shape; `frames` [B] is the number of frames of each row without padding."""
        at = torch.arange(x.shape[1], device=x.device)
        real = at < frames[:, None]
        near = (at - at[:, None]).abs() <= self.reach
        mask = ((real[:, None] & near) | (at == at[:, None]))[:, None]  # each frame attends to itself, so no row is empty
        return self.around(x, real, lambda q, k, v: attend(rotate(q, at), rotate(k, at), v, mask), self.convolve)

    def around(self, x: Tensor, real: Tensor, attention: Attention, convolve: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply the block with the given attention and convolution over time.

        Args:
            x: frames [B, T, D].
            real: mask of the frames that are not padding [B, T].
            attention: maps q, k and v [B, H, T, D / H] to the same shape.
            convolve: maps frames [B, T, D] to the same shape.
        """
        batch, count, width = x.shape
        x = x + 0.5 * self.before(x)
        q, k, v = (
            y.view(batch, count, self.heads, width // self.heads).transpose(1, 2)
            for y in self.qkv(self.attention_norm(x)).chunk(3, -1)
        )
        x = x + self._drop(self.attention_out(attention(q, k, v).transpose(1, 2).reshape(batch, count, width)))
        y = functional.glu(self.gate(self.convolution_norm(x)), dim=-1) * real[..., None].to(x.dtype)
        x = x + self._drop(self.convolution_out(functional.silu(self.depthwise_norm(convolve(y)))))
        return self.out_norm(x + 0.5 * self.after(x))

    def convolve(self, y: Tensor) -> Tensor:
        """Convolve y [B, T, D] over time, padded with zeros."""
        if y.is_cuda:
            around = self.depthwise.kernel_size[0] // 2
            return self.convolve_within(functional.pad(y, (0, 0, around, around)))
        return self.depthwise(y.transpose(1, 2)).transpose(1, 2)

    def convolve_within(self, y: Tensor) -> Tensor:
        """Convolve y [B, T, D] over time to [B, T - 8, D], without padding.

        On a GPU, the sum of shifted frames is faster than a depthwise convolution.
        """
        weight, taps = self.depthwise.weight.to(y.dtype), self.depthwise.kernel_size[0]
        count = y.shape[1] - taps + 1
        total = y[:, :count] * weight[:, 0, 0]
        for tap in range(1, taps):
            total = total + y[:, tap : tap + count] * weight[:, 0, tap]
        return total + self.depthwise.bias.to(y.dtype)

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self._dropout, self.training)


def rotate(x: Tensor, at: Tensor) -> Tensor:
    """Apply rotary position embedding (Su et al., 2021) to x [B, H, T, D] at positions `at` [T]; halves are paired."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = at[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Encoder(nn.Module):
    """Maps samples to encoder frames of 96 ms."""

    def __init__(self, stem: Stem, lower: Layers, upper: Layers, sizes: configuration.Model) -> None:
        super().__init__()
        width = sizes.width
        self.stem, self.lower, self.upper = stem, lower, upper
        self.norm = nn.LayerNorm(WIDTH)
        self.to_48_ms = nn.Linear(2 * WIDTH, width)
        self.at_48_ms = nn.ModuleList(Block(sizes, 2 * sizes.reach_frames) for _ in range(sizes.blocks_at_48_ms))
        self.to_96_ms = nn.Linear(2 * width, width)
        self.at_96_ms = nn.ModuleList(Block(sizes, sizes.reach_frames) for _ in range(sizes.blocks_at_96_ms))

    def forward(self, samples: Tensor, frames: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map samples [B, 384 T] to outputs [B, ceil(T / 4), D] and their lengths [B].

        Args:
            samples: 16 kHz audio, zero after the end of each row.
            frames: number of 24 ms frames of each row without padding [B].
            hidden: mask of frames [B, T] whose features are set to zero.
        """
        x = self.stem(samples, frames)
        if hidden is not None:
            x = x.masked_fill(hidden[..., None], 0)
        x = self.norm(self.upper(self.lower(x, frames), frames))
        x, frames = self.to_48_ms(_pairs(x, frames)), (frames + 1) // 2
        for block in self.at_48_ms:
            x = block(x, frames)
        x, frames = self.to_96_ms(_pairs(x, frames)), (frames + 1) // 2
        for block in self.at_96_ms:
            x = block(x, frames)
        return x * _real(x, frames), frames


def _real(x: Tensor, frames: Tensor) -> Tensor:
    return (torch.arange(x.shape[1], device=x.device) < frames[:, None])[..., None].to(x.dtype)


def _pairs(x: Tensor, frames: Tensor) -> Tensor:
    """Join neighbouring frames: [B, T, D] to [B, ceil(T / 2), 2 D]. Padding becomes zero."""
    x = functional.pad(x * _real(x, frames), (0, 0, 0, x.shape[1] % 2))
    return x.reshape(x.shape[0], x.shape[1] // 2, 2 * x.shape[2])


class Predictor(nn.Module):
    """An embedding and one LSTM over the tokens so far. A hypothesis starts with the blank, whose embedding is zero."""

    def __init__(self, blank: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(blank + 1, width, padding_idx=blank)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, tokens: Tensor, state: LSTMState | None = None) -> tuple[Tensor, LSTMState]:
        """Map tokens [B, U] and the state (2 x [1, B, D]) to [B, U, D] and the next state."""
        y, state = self.lstm(self.dropout(self.embedding(tokens)), state)
        return self.dropout(y), state


class Joint(nn.Module):
    """Computes the logits of all tokens and the blank (last) from an encoder frame and a predictor output."""

    def __init__(self, width: int, predictor: int, blank: int) -> None:
        super().__init__()
        self.frame = nn.Linear(width, width)
        self.token = nn.Linear(predictor, width)
        self.out = nn.Linear(width, blank + 1)

    def forward(self, frame: Tensor, token: Tensor) -> Tensor:
        """Combine outputs of `self.frame` and `self.token`, broadcast to one shape [..., D]."""
        return self.out(torch.tanh(frame + token))


class Transducer(nn.Module):
    """The whole model, with a CTC layer for the auxiliary loss of the encoder."""

    def __init__(self, moonshine_parts: tuple[Stem, Layers, Layers], blank: int, sizes: configuration.Model) -> None:
        super().__init__()
        self.blank = blank
        self.encoder = Encoder(*moonshine_parts, sizes)
        self.predictor = Predictor(blank, sizes.predictor, sizes.dropout)
        self.joint = Joint(sizes.width, sizes.predictor, blank)
        self.ctc = nn.Linear(sizes.width, blank + 1)


def build(config: configuration.Config) -> Transducer:
    """Return a transducer with Moonshine's published weights in its lower layers and random weights above."""
    return Transducer(moonshine.load(LOWER), config.data.pieces, config.model)


@torch.inference_mode()
def greedy(model: Transducer, encoded: Tensor, frames: Tensor, max_symbols: int = 4, penalty: float = 0.0) -> list[list[int]]:
    """Decode frame by frame, and return the tokens of each row.

    Args:
        model: the transducer.
        encoded: encoder frames [B, T, D].
        frames: number of frames of each row without padding [B].
        max_symbols: maximum number of tokens on one frame.
        penalty: subtracted from the blank's logit.
    """
    batch = encoded.shape[0]
    projected = model.joint.frame(encoded)
    y, state = model.predictor(torch.full((batch, 1), model.blank, device=encoded.device))
    token = model.joint.token(y[:, 0])
    emitted: list[Tensor] = []  # [B] each, blank where a row emitted nothing
    for frame in range(int(frames.max())):
        active = frames > frame
        for _ in range(max_symbols):
            logits = model.joint(projected[:, frame], token).float()
            logits[:, model.blank] -= penalty
            best = torch.where(active, logits.argmax(-1), model.blank)
            active = best != model.blank
            if not active.any():
                break
            emitted.append(best)
            y, after = model.predictor(best[:, None], state)
            token = torch.where(active[:, None], model.joint.token(y[:, 0]).to(token.dtype), token)
            keep = ~active[None, :, None]
            state = torch.where(keep, state[0], after[0]), torch.where(keep, state[1], after[1])
    if not emitted:
        return [[] for _ in range(batch)]
    return [[t for t in row if t != model.blank] for row in torch.stack(emitted, 1).tolist()]


def collapse(model: Transducer, encoded: Tensor, frames: Tensor) -> list[list[int]]:
    """Decode with the CTC layer: the best token of each frame, without repeats and blanks."""
    rows = zip(model.ctc(encoded).argmax(-1), frames.tolist(), strict=True)
    return [[t for t in torch.unique_consecutive(best[:count]).tolist() if t != model.blank] for best, count in rows]
