"""The transducer: Moonshine's layers and conformer blocks as the encoder, an LSTM predictor, a joint net.

Graves, "Sequence Transduction with Recurrent Neural Networks" (2012); the blocks are Conformers (Gulati et al., 2020) whose
attention is local and whose norms look at one frame only, so that padding never matters.
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
"""Moonshine's layers that are trained least; those above follow the text faster."""


class Block(nn.Module):
    """A Conformer block: half a feed-forward net, local attention, convolution, the other half."""

    def __init__(self, sizes: configuration.Model, reach: int) -> None:
        super().__init__()
        width, inner, self._dropout = sizes.width, sizes.feed_forward, sizes.dropout
        self._heads, self.reach = sizes.heads, reach
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
        """Map x [B, T, D] to the same; `frames` [B] says how many of each row are real."""
        at = torch.arange(x.shape[1], device=x.device)
        real = at < frames[:, None]
        near = (at - at[:, None]).abs() <= self.reach
        mask = ((real[:, None] & near) | (at == at[:, None]))[:, None]  # a frame sees itself: no row is empty
        return self.around(x, real, lambda q, k, v: attend(rotate(q, at), rotate(k, at), v, mask), self.convolve)

    def around(self, x: Tensor, real: Tensor, attention: Attention, convolve: Callable[[Tensor], Tensor]) -> Tensor:
        """Do what the block does around its attention and its convolution over time; `real` [B, T] says which frames are."""
        batch, count, width = x.shape
        x = x + 0.5 * self.before(x)
        q, k, v = (
            y.view(batch, count, self._heads, width // self._heads).transpose(1, 2)
            for y in self.qkv(self.attention_norm(x)).chunk(3, -1)
        )
        x = x + self._drop(self.attention_out(attention(q, k, v).transpose(1, 2).reshape(batch, count, width)))
        y = functional.glu(self.gate(self.convolution_norm(x)), dim=-1) * real[..., None].to(x.dtype)
        x = x + self._drop(self.convolution_out(functional.silu(self.depthwise_norm(convolve(y)))))
        return self.out_norm(x + 0.5 * self.after(x))

    def convolve(self, y: Tensor) -> Tensor:
        """Convolve y [B, T, D] over time, zeros around it."""
        if y.is_cuda:
            around = self.depthwise.kernel_size[0] // 2
            return self.convolve_within(functional.pad(y, (0, 0, around, around)))
        return self.depthwise(y.transpose(1, 2)).transpose(1, 2)

    def convolve_within(self, y: Tensor) -> Tensor:
        """Convolve y [B, T, D] over time to [B, T - 8, D], where its kernel fits.

        A GPU adds up shifted frames faster than it convolves channel by channel.
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
    """Rotary position embedding (Su et al., 2021) of x [B, H, T, D] at the positions `at` [T], halves paired."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = at[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Encoder(nn.Module):
    """From samples to the encoder's frames of 96 ms."""

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
        """Map samples [B, 384 T] to outputs [B, ceil(T / 4), D], and say how many of these are real.

        Args:
            samples: At 16 kHz; what lies behind a row's frames is zero.
            frames: How many frames of 24 ms of each row are real [B].
            hidden: Frames [B, T] whose features are put to zero.
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
    """Join neighbouring frames: [B, T, D] to [B, ceil(T / 2), 2 D]; what is not real is zero."""
    x = functional.pad(x * _real(x, frames), (0, 0, 0, x.shape[1] % 2))
    return x.reshape(x.shape[0], x.shape[1] // 2, 2 * x.shape[2])


class Predictor(nn.Module):
    """The tokens so far, summed up by an embedding and one LSTM; blank, which starts a hypothesis, embeds as zero."""

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
    """Logits of every token and blank (last), for an encoder's frame and a predictor's output."""

    def __init__(self, width: int, predictor: int, blank: int) -> None:
        super().__init__()
        self.frame = nn.Linear(width, width)
        self.token = nn.Linear(predictor, width)
        self.out = nn.Linear(width, blank + 1)

    def forward(self, frame: Tensor, token: Tensor) -> Tensor:
        """Combine what `self.frame` and `self.token` made, broadcast to one shape [..., D]."""
        return self.out(torch.tanh(frame + token))


class Transducer(nn.Module):
    """All that is learnt, the CTC layer that helps the encoder along included."""

    def __init__(self, moonshine_parts: tuple[Stem, Layers, Layers], blank: int, sizes: configuration.Model) -> None:
        super().__init__()
        self.blank = blank
        self.encoder = Encoder(*moonshine_parts, sizes)
        self.predictor = Predictor(blank, sizes.predictor, sizes.dropout)
        self.joint = Joint(sizes.width, sizes.predictor, blank)
        self.ctc = nn.Linear(sizes.width, blank + 1)


def build(config: configuration.Config) -> Transducer:
    """Return an untrained transducer on top of Moonshine's encoder."""
    return Transducer(moonshine.load(LOWER), config.data.pieces, config.model)


@torch.inference_mode()
def greedy(model: Transducer, encoded: Tensor, frames: Tensor, max_symbols: int = 4, penalty: float = 0.0) -> list[list[int]]:
    """Decode encoder frames [B, T, D], `frames` [B] of them real, frame by frame; return each row's tokens.

    `penalty` is taken off blank's logit.
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
    """Decode by the CTC layer: the best token of each frame, repeats and blanks taken out."""
    rows = zip(model.ctc(encoded).argmax(-1), frames.tolist(), strict=True)
    return [[t for t in torch.unique_consecutive(best[:count]).tolist() if t != model.blank] for best, count in rows]
