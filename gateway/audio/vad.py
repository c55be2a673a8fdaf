"""Voice activity: the probability that a frame of audio holds speech.

The network is Silero VAD 6.2 (https://github.com/snakers4/silero-vad): a spectrogram, four convolutions over time, an LSTM. In
numpy a frame costs a quarter of the time of the ggml build on PyPI, and frames that come together share the calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

FRAME_SAMPLES = 512
"""Samples of one frame at 16 kHz, 32 ms."""

CONTEXT_SAMPLES = 64
"""Samples before a frame that the network sees again."""

WINDOW, HOP = 256, 128
"""Samples of a spectrum, and from one to the next."""

SPECTRA = 4
"""Spectra of one frame."""

DECAY = np.float32(0.8)
"""What remains of the network's state after a frame that is not looked at."""

FULL_SCALE = np.float32(0x8000)


@dataclass(frozen=True)
class _Network:
    """Weights, arranged for products from the left.

    Attributes:
        window: Hann window [256].
        convolutions: of each layer the weights [3, in, out] and the bias [out].
        input_weight, state_weight: of the LSTM [128, 512], gates in the order input, forget, cell, output.
        bias: of the LSTM [512].
        output_weight, output_bias: of the last layer [128] and [].
    """

    window: Floats
    convolutions: tuple[tuple[Floats, Floats], ...]
    input_weight: Floats
    state_weight: Floats
    bias: Floats
    output_weight: Floats
    output_bias: float


@cache
def _network() -> _Network:
    """Read the weights, once in a process."""
    with files("gateway.audio").joinpath("silero/weights.npz").open("rb") as file, np.load(file) as stored:
        weights = {name: stored[name].astype(np.float32) for name in stored.files}
    convolutions = tuple(
        (np.ascontiguousarray(weights[f"encoder_{layer}_weight"].transpose(2, 1, 0)), weights[f"encoder_{layer}_bias"])
        for layer in range(4)
    )
    # The gates become sigmoids by one tanh: sigmoid(x) = (1 + tanh(x / 2)) / 2. So their weights are halved, but the cell's.
    half = np.repeat(np.array([0.5, 0.5, 1.0, 0.5], np.float32), 128)
    return _Network(
        np.hanning(WINDOW + 1)[:-1].astype(np.float32),
        convolutions,
        np.ascontiguousarray(weights["input_weight"].T * half),
        np.ascontiguousarray(weights["state_weight"].T * half),
        weights["bias"] * half,
        weights["output_weight"],
        float(weights["output_bias"]),
    )


def powers_of(samples: NDArray[np.int16]) -> Floats:
    """Return the mean power of each frame [n] of whole frames [n * 512]."""
    frames = samples.reshape(-1, FRAME_SAMPLES).astype(np.float32)
    powers: Floats = np.einsum("ij,ij->i", frames, frames) / FRAME_SAMPLES
    return powers


class VoiceActivity:
    """The network's state for one stream."""

    def __init__(self) -> None:
        self._network = _network()
        self._context = np.zeros(CONTEXT_SAMPLES, np.float32)
        self._hidden = np.zeros(128, np.float32)
        self._cell = np.zeros(128, np.float32)

    def probabilities(self, samples: NDArray[np.int16], loud: NDArray[np.bool_]) -> list[float]:
        """Return the probability of speech of each frame, 0 to 1.

        Args:
            samples: whole frames [n * 512].
            loud: which of them may be speech [n]; the others cost nothing, have no speech and end what the network remembers.
        """
        audio = np.concatenate((self._context, samples / FULL_SCALE))
        self._context = audio[-CONTEXT_SAMPLES:]
        if not loud.any():
            self._forget()
            return [0.0] * len(loud)
        gates = self._encode(audio)
        return [self._step(gates[i]) if loud[i] else self._forget() for i in range(len(loud))]

    def _encode(self, audio: Floats) -> Floats:
        """Return the LSTM's input of each frame [frames, 512]."""
        network = self._network
        frames = len(audio) // FRAME_SAMPLES
        strided = np.lib.stride_tricks.sliding_window_view(audio, FRAME_SAMPLES + CONTEXT_SAMPLES)[::FRAME_SAMPLES]
        padded = np.concatenate((strided, strided[:, -2 : -2 - CONTEXT_SAMPLES : -1]), axis=1)  # reflected at the end
        windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW, axis=1)[:, ::HOP]
        spectra = np.abs(np.fft.rfft(windows * network.window)).astype(np.float32)
        values = np.zeros((frames, SPECTRA + 2, spectra.shape[2]), np.float32)
        values[:, 1:-1] = spectra
        # Layer by layer, zeros at both ends: 4 spectra become 4, 2, 1 and 1.
        (first, bias_1), (second, bias_2), (third, bias_3), (fourth, bias_4) = network.convolutions
        taps = np.stack([values[:, i : i + 3] for i in range(SPECTRA)], axis=1).reshape(frames * SPECTRA, -1)
        values = np.zeros((frames, SPECTRA + 2, 128), np.float32)
        values[:, 1:-1] = _relu(taps @ first.reshape(-1, 128) + bias_1).reshape(frames, SPECTRA, 128)
        taps = np.stack([values[:, i : i + 3] for i in (0, 2)], axis=1).reshape(frames * 2, -1)
        pair = _relu(taps @ second.reshape(-1, 64) + bias_2).reshape(frames, 128)
        single = _relu(pair @ third[1:].reshape(-1, 64) + bias_3)  # before the first is a zero
        result: Floats = _relu(single @ fourth[1] + bias_4) @ network.input_weight + network.bias
        return result

    def _step(self, gates: Floats) -> float:
        """Advance the LSTM by one frame, and return the probability."""
        network = self._network
        activations = np.tanh(gates + self._hidden @ network.state_weight)
        keep = activations[128:256] + 1
        update = (activations[:128] + 1) * activations[256:384]
        self._cell = (keep * self._cell + update) * np.float32(0.5)
        self._hidden = (activations[384:] + 1) * np.tanh(self._cell) * np.float32(0.5)
        logit = float(np.maximum(self._hidden, 0) @ network.output_weight) + network.output_bias
        return float(1 / (1 + np.exp(-logit)))

    def _forget(self) -> float:
        """Advance by a frame without speech; return its probability."""
        self._hidden = self._hidden * DECAY
        self._cell = self._cell * DECAY
        return 0.0


def _relu(values: Floats) -> Floats:
    return np.maximum(values, 0, out=values)
