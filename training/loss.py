"""The transducer's loss: minus the log probability of a text, over all ways to place it in the frames."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from training.model import Joint

_IMPOSSIBLE = -1e30


def transducer_loss(joint: Joint, encoded: list[Tensor], predicted: list[Tensor], targets: list[Tensor], blank: int) -> Tensor:
    """Return the loss [B] of each target.

    Args:
        joint: Makes logits of a frame and a token.
        encoded: For each row, the encoder's frames [T, D].
        predicted: For each row, the predictor's outputs [U + 1, P], the first of them before any token.
        targets: For each row, the tokens [U].
        blank: Blank's index.
    """
    blanks, labels = [], []
    for row_frames, row_tokens, target in zip(encoded, predicted, targets, strict=True):
        logits = joint(joint.frame(row_frames)[:, None], joint.token(row_tokens)[None]).float()  # [T, U + 1, V + 1]
        total = logits.logsumexp(-1)
        blanks.append(logits[..., blank] - total)
        chosen = logits[:, :-1].gather(-1, target[None, :, None].expand(logits.shape[0], -1, 1))[..., 0]
        labels.append(chosen - total[:, :-1])
    lengths = torch.tensor([len(b) for b in blanks])
    return -_forward(_padded(blanks), _padded(labels), lengths, torch.tensor([len(t) for t in targets]))


def _padded(rows: list[Tensor]) -> Tensor:
    """Stack tables [T, U] of any sizes to [T, B, U]; what is added can't happen."""
    wide = max(row.shape[1] for row in rows)
    filled = [functional.pad(row, (0, wide - row.shape[1]), value=_IMPOSSIBLE) for row in rows]
    return pad_sequence(filled, padding_value=_IMPOSSIBLE)


def _forward(blanks: Tensor, labels: Tensor, frames: Tensor, tokens: Tensor) -> Tensor:
    """Graves's forward variable, a frame at a time, all tokens at once.

    Within a frame, a(u) = logaddexp(entered(u), a(u - 1) + label(u - 1)), a linear recurrence in the probabilities: with
    the running sum L of the labels' log probabilities, a - L is the cumulative logsumexp of entered - L.
    """
    labels = labels.clamp(min=-1e4).double()
    run = functional.pad(labels.cumsum(-1), (1, 0))  # [T, B, U + 1]
    entered = torch.full_like(run[0], _IMPOSSIBLE)
    entered[:, 0] = 0
    ended = []
    for frame in range(len(blanks)):
        reached = (entered - run[frame]).logcumsumexp(-1) + run[frame]
        entered = reached + blanks[frame]
        ended.append(entered)
    return torch.stack(ended)[frames - 1, torch.arange(len(frames)), tokens].float()
