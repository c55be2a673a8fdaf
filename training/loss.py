"""Transducer loss: the negative log probability of a text, summed over all its alignments to the frames (Graves, 2012).

Forward and backward variables of a batch are computed together, one anti-diagonal of the lattice at a time. The gradient is
computed in the same pass, so autograd stores no intermediate step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.model import Joint

_IMPOSSIBLE = -1e30


def transducer_loss(
    joint: Joint, encoded: Tensor, predicted: Tensor, targets: Tensor, frames: Tensor, counts: Tensor, blank: int
) -> Tensor:
    """Return the loss of each row [B].

    Args:
        joint: the joint network.
        encoded: encoder frames [B, T, D].
        predicted: predictor outputs [B, U + 1, P]; the first one precedes all tokens.
        targets: tokens [B, U]; padding may be any index below `blank`.
        frames: number of frames of each row without padding [B], at least 1.
        counts: number of tokens of each row without padding [B].
        blank: index of the blank.
    """
    logits = joint(joint.frame(encoded)[:, :, None], joint.token(predicted)[:, None])  # [B, T, U + 1, V + 1]
    blanks, labels = _Chosen.apply(logits, targets, blank)
    loss: Tensor = _Lattice.apply(blanks, labels, frames, counts)
    return loss


class _Chosen(torch.autograd.Function):
    """Log probabilities of the blank [B, T, U + 1] and of the next label [B, T, U]; the others are never stored."""

    @staticmethod
    def forward(context: Any, logits: Tensor, targets: Tensor, blank: int) -> tuple[Tensor, Tensor]:
        total = torch.cat([row.float().logsumexp(-1) for row in logits.split(16)])
        index = targets[:, None, :, None].expand(-1, logits.shape[1], -1, -1)
        labels = logits[:, :, :-1].gather(-1, index)[..., 0].float() - total[:, :, :-1]
        context.save_for_backward(logits, total, index)
        context.blank = blank
        return logits[..., blank].float() - total, labels

    @staticmethod
    def backward(context: Any, blanks: Tensor, labels: Tensor) -> tuple[Tensor, None, None]:
        logits, total, index = context.saved_tensors
        both = blanks.clone()
        both[:, :, :-1] += labels
        gradient = torch.empty_like(logits)
        for first in range(0, len(logits), 16):
            rows = slice(first, first + 16)
            gradient[rows] = (logits[rows].float() - total[rows, ..., None]).exp_().mul_(-both[rows, ..., None])
        gradient[..., context.blank] += blanks.to(gradient.dtype)
        gradient[:, :, :-1].scatter_add_(-1, index, labels[..., None].to(gradient.dtype))
        return gradient, None, None


class _Lattice(torch.autograd.Function):
    """Graves's forward and backward variables over log probabilities of blanks [B, T, U + 1] and labels [B, T, U]."""

    @staticmethod
    def forward(context: Any, blanks: Tensor, labels: Tensor, frames: Tensor, counts: Tensor) -> Tensor:
        batch, most, wide = blanks.shape
        blanks, labels = blanks.double(), labels.double().clamp(min=-1e4)
        # The reversed lattice of a row starts at its last frame and token; its arcs have the opposite direction.
        at, token = torch.arange(most, device=blanks.device), torch.arange(wide, device=blanks.device)
        back = (frames[:, None] - 1 - at).clamp(min=0)
        behind = (counts[:, None] - token).clamp(min=0)
        turned_blanks = _pick(blanks, (back - 1).clamp(min=0), behind)  # arc from (t - 1, u) to (t, u), indexed by its end
        turned_labels = _pick(functional.pad(labels, (0, 1)), back, (behind - 1).clamp(min=0))
        real_labels = functional.pad(labels, (0, 1)).masked_fill((token >= counts[:, None])[:, None], _IMPOSSIBLE)
        turned_labels = turned_labels.masked_fill((token >= counts[:, None])[:, None], _IMPOSSIBLE)
        reached = _walk(torch.cat((blanks, turned_blanks)), torch.cat((real_labels, turned_labels)))
        forwards, backwards = reached.split(batch)
        backwards = _pick(backwards, back, behind)  # log probability of the rest, without the final blank
        row = torch.arange(batch, device=blanks.device)
        last = blanks[row, frames - 1, counts]
        total = forwards[row, frames - 1, counts] + last
        real = (at < frames[:, None])[:, :, None] & (token <= counts[:, None])[:, None]
        weight = last - total
        onwards = functional.pad(backwards[:, 1:], (0, 0, 0, 1), value=_IMPOSSIBLE)
        onwards[row, frames - 1] = _IMPOSSIBLE
        by_blank = torch.where(real, (forwards + blanks + onwards + weight[:, None, None]).exp(), 0)
        by_blank[row, frames - 1, counts] = 1  # every alignment ends with the final blank
        by_label = (forwards + real_labels + functional.pad(backwards[:, :, 1:], (0, 1), value=_IMPOSSIBLE)).add_(
            weight[:, None, None]
        )
        by_label = torch.where(real, by_label.exp(), 0)[:, :, :-1]
        context.save_for_backward(by_blank.float(), by_label.float())
        return -total.float()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_blank, by_label = context.saved_tensors
        scale = -gradient[:, None, None]
        return by_blank * scale, by_label * scale, None, None


def _pick(values: Tensor, frames: Tensor, tokens: Tensor) -> Tensor:
    """Gather values [B, T, U] at each row's frames [B, T'] and tokens [B, U']."""
    by_frame = values.gather(1, frames[:, :, None].expand(-1, -1, values.shape[2]))
    return by_frame.gather(2, tokens[:, None].expand(-1, frames.shape[1], -1))


def _walk(blanks: Tensor, labels: Tensor) -> Tensor:
    """Return the forward variable [B, T, U + 1]: the log probability of reaching a frame and a token from the first of both.

    Each anti-diagonal t + u = n depends only on the one before, so arcs are indexed by n and u.
    """
    batch, most, wide = blanks.shape
    token = torch.arange(wide, device=blanks.device)
    diagonal = torch.arange(most + wide - 1, device=blanks.device)
    frame = diagonal[:, None] - token  # [N, U + 1]; two corners lie outside the lattice
    inside = (frame >= 0) & (frame < most)
    index = frame.clamp(0, most - 1)
    from_left = blanks[:, (index - 1).clamp(min=0), token].masked_fill(~(inside & (frame > 0)), _IMPOSSIBLE)
    from_below = labels[:, index, (token - 1).clamp(min=0)].masked_fill(~(inside & (token > 0)), _IMPOSSIBLE)
    # The diagonal is the first axis. An extra column before the tokens is never reached.
    from_left, from_below = from_left.transpose(0, 1).contiguous(), from_below.transpose(0, 1).contiguous()
    reached = torch.full((len(diagonal), batch, wide + 1), _IMPOSSIBLE, dtype=blanks.dtype, device=blanks.device)
    reached[0, :, 1] = 0
    for n in range(1, len(diagonal)):
        before = reached[n - 1]
        torch.logaddexp(before[:, 1:] + from_left[n], before[:, :-1] + from_below[n], out=reached[n, :, 1:])
    where = (torch.arange(most, device=blanks.device)[:, None] + token).expand(batch, -1, -1)  # n of each (t, u)
    return reached[:, :, 1:].permute(1, 0, 2).gather(1, where.reshape(batch, -1, wide).clamp(max=len(diagonal) - 1))
