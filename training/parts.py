"""The parts of the model with the inputs and outputs of their graphs; `step.Step` is the encoder of streams."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.model import Transducer
from training.moonshine import FRAME_SAMPLES


class Preprocessor(nn.Module):
    """Cuts samples into the encoder's frames."""

    def forward(self, waveforms: Tensor, waveforms_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Map waveforms [B, N] to features [B, 384, T], zero after the end of each row, and their lengths [B]."""
        real = torch.arange(waveforms.shape[1]) < waveforms_lens[:, None]
        samples = functional.pad(waveforms * real.to(waveforms.dtype), (0, FRAME_SAMPLES - 1))
        frames = (waveforms.shape[1] + FRAME_SAMPLES - 1) // FRAME_SAMPLES
        features = samples[:, : frames * FRAME_SAMPLES].reshape(samples.shape[0], -1, FRAME_SAMPLES)
        return features.transpose(1, 2), (waveforms_lens + FRAME_SAMPLES - 1) // FRAME_SAMPLES


class Encoder(nn.Module):
    """The encoder as a graph; its input is the preprocessor's output."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.encoder = model.encoder

    def forward(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Map features [B, 384, T] to outputs [B, D, ceil(T / 4)] and their lengths [B]."""
        samples = audio_signal.transpose(1, 2).flatten(1)
        samples = samples * (torch.arange(samples.shape[1]) < length[:, None] * FRAME_SAMPLES).to(samples.dtype)
        encoded, lengths = self.encoder(samples, length)
        return encoded.transpose(1, 2), lengths


class DecoderJoint(nn.Module):
    """Predictor and joint network as one graph."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.predictor, self.joint = model.predictor, model.joint

    def forward(
        self, encoder_outputs: Tensor, targets: Tensor, target_length: Tensor, input_states_1: Tensor, input_states_2: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map frames [B, D, T], targets [B, U] and states [1, B, H] to logits [B, T, U, V + 1], lengths and states."""
        predicted, (hidden, cell) = self.predictor(targets.long(), (input_states_1, input_states_2))
        frames = self.joint.frame(encoder_outputs.transpose(1, 2))
        return self.joint(frames[:, :, None], self.joint.token(predicted)[:, None]), target_length + 0, hidden, cell
