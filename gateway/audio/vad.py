"""Voice activity: the probability that a frame of audio holds speech.

The network is Silero VAD 6.2 (https://github.com/snakers4/silero-vad): a spectrogram, four convolutions over time, an LSTM. In
numpy a frame of one stream costs a quarter of the time of the ggml build on PyPI, and a twentieth among the frames of twenty
streams, since most of the time of a small product is its call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

FRAME_SAMPLES = 512
"""Samples per frame at 16 kHz, 32 ms."""

CONTEXT_SAMPLES = 64
"""Samples before a frame that the network also gets."""

WINDOW, HOP = 256, 128
"""Samples per spectrum, and from one spectrum to the next."""

SPECTRA = 4
"""Spectra per frame."""

CELLS = 128
"""Cells of the LSTM."""

FULL_SCALE = np.float32(0x8000)


@dataclass(frozen=True)
class _Network:
    """Weights, arranged for products from the left.

    Attributes:
        window: Hann window [256].
        convolutions: weights [3, in, out] and bias [out] of each layer.
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
    output_bias: np.float32


class Voice:
    """The network's state for one stream."""

    def __init__(self) -> None:
        self._context = np.zeros(CONTEXT_SAMPLES, np.float32)
        self.hidden = np.zeros(CELLS, np.float32)
        self.cell = np.zeros(CELLS, np.float32)

    def skip(self, samples: NDArray[np.int16], *, forget: bool) -> None:
        """Take the next whole frames [n * 512], which the network does not get; forget what was before if asked to."""
        self._context = samples[-CONTEXT_SAMPLES:] / FULL_SCALE
        if forget:
            self.hidden, self.cell = np.zeros((2, CELLS), np.float32)

    def windows(self, samples: NDArray[np.int16]) -> Floats:
        """Take the next whole frames [n * 512]; return each with the samples before it [n, 576], full scale 1."""
        audio = np.concatenate((self._context, samples / FULL_SCALE))
        self._context = audio[-CONTEXT_SAMPLES:]
        return np.lib.stride_tricks.sliding_window_view(audio, FRAME_SAMPLES + CONTEXT_SAMPLES)[::FRAME_SAMPLES]


class Request(NamedTuple):
    """Audio of one stream to look at.

    Attributes:
        voice: the stream's.
        samples: its next frames [n * 512], n above 0.
        loud: the frames that may be speech [n]. The network does not get the others, which cost next to nothing.
        forget: after which of the others it starts anew [n].
    """

    voice: Voice
    samples: NDArray[np.int16]
    loud: NDArray[np.bool_]
    forget: NDArray[np.bool_]


def probabilities(requests: Sequence[Request]) -> list[list[float]]:
    """Return the probability of speech, 0 to 1, of each frame of each request; the requests are of different streams."""
    sizes = np.array([len(request.loud) for request in requests])
    loud, forget = np.zeros((2, int(sizes.max()), len(requests)), bool)  # frame by frame
    for column, request in enumerate(requests):
        loud[: len(request.loud), column] = request.loud
        forget[: len(request.loud), column] = request.forget & ~request.loud
    windows = np.concatenate([request.voice.windows(request.samples) for request in requests])
    places = np.arange(len(loud))[:, None] + (np.cumsum(sizes) - sizes)
    gates = _encode(windows[places[loud]])
    hidden = np.stack([request.voice.hidden for request in requests])
    cell = np.stack([request.voice.cell for request in requests])
    found = np.zeros(loud.shape, np.float32)
    start = 0
    for frame, count in enumerate(loud.sum(axis=1).tolist()):
        now = gates[start : start + count]
        start += count
        if count == len(requests):
            hidden, cell, found[frame] = _step(now, hidden, cell)
            continue
        hidden[forget[frame]] = cell[forget[frame]] = 0
        if count:
            taken = loud[frame]
            hidden[taken], cell[taken], found[frame, taken] = _step(now, hidden[taken], cell[taken])
    for column, request in enumerate(requests):
        request.voice.hidden, request.voice.cell = hidden[column], cell[column]
    return [found[:size, column].tolist() for column, size in enumerate(sizes.tolist())]


def powers_of(samples: NDArray[np.int16]) -> Floats:
    """Return the mean power of each frame [n] of whole frames [n * 512]."""
    frames = samples.reshape(-1, FRAME_SAMPLES).astype(np.float32)
    powers: Floats = np.einsum("ij,ij->i", frames, frames) / FRAME_SAMPLES
    return powers


@cache
def _network() -> _Network:
    """Read the weights, once per process."""
    with files("gateway.audio").joinpath("silero/weights.npz").open("rb") as file, np.load(file) as stored:
        weights = {name: stored[name].astype(np.float32) for name in stored.files}
    convolutions = tuple(
        (np.ascontiguousarray(weights[f"encoder_{layer}_weight"].transpose(2, 1, 0)), weights[f"encoder_{layer}_bias"])
        for layer in range(4)
    )
    # One tanh computes all gates: sigmoid(x) = (1 + tanh(x / 2)) / 2. So the weights of all gates but the cell's are halved.
    half = np.repeat(np.array([0.5, 0.5, 1.0, 0.5], np.float32), CELLS)
    return _Network(
        np.hanning(WINDOW + 1)[:-1].astype(np.float32),
        convolutions,
        np.ascontiguousarray(weights["input_weight"].T * half),
        np.ascontiguousarray(weights["state_weight"].T * half),
        weights["bias"] * half,
        weights["output_weight"],
        np.float32(weights["output_bias"]),
    )


def _encode(windows: Floats) -> Floats:
    """Return the LSTM's input [n, 512] of each window [n, 576]."""
    network = _network()
    frames = len(windows)
    padded = np.concatenate((windows, windows[:, -2 : -2 - CONTEXT_SAMPLES : -1]), axis=1)  # reflected at the end
    hops = np.lib.stride_tricks.sliding_window_view(padded, WINDOW, axis=1)[:, ::HOP]
    spectra = np.abs(np.fft.rfft(hops * network.window))
    # Layer by layer, zeros at both ends: 4 spectra become 4, 2, 1 and 1.
    (first, bias_1), (second, bias_2), (third, bias_3), (fourth, bias_4) = network.convolutions
    four = _relu(_taps(spectra, 1) @ first.reshape(-1, 128) + bias_1).reshape(frames, SPECTRA, 128)
    pair = _relu(_taps(four, 2) @ second.reshape(-1, 64) + bias_2).reshape(frames, 128)
    single = _relu(pair @ third[1:].reshape(-1, 64) + bias_3)  # before the first is a zero
    result: Floats = _relu(single @ fourth[1] + bias_4) @ network.input_weight + network.bias
    return result


def _taps(values: Floats | NDArray[np.float64], stride: int) -> Floats:
    """Return the inputs of a convolution of 3 values over time: [n * (4 / stride), 3 * size] of values [n, 4, size]."""
    frames, times, size = values.shape
    padded = np.zeros((frames, times + 2, size), np.float32)
    padded[:, 1:-1] = values
    taps = np.lib.stride_tricks.sliding_window_view(padded.reshape(frames, padded.shape[1] * size), 3 * size, axis=1)[
        :, :: stride * size
    ]
    return np.ascontiguousarray(taps.reshape(-1, 3 * size))  # of overlapping rows, products would be slow


def _step(gates: Floats, hidden: Floats, cell: Floats) -> tuple[Floats, Floats, Floats]:
    """Advance the LSTM of several streams by one frame; return its state [n, 128] twice, and the probabilities [n]."""
    network = _network()
    activations = gates + hidden @ network.state_weight
    np.tanh(activations, out=activations)
    update = (activations[:, :CELLS] + 1) * activations[:, 2 * CELLS : 3 * CELLS]
    cell = ((activations[:, CELLS : 2 * CELLS] + 1) * cell + update) * np.float32(0.5)
    hidden = (activations[:, 3 * CELLS :] + 1) * np.tanh(cell) * np.float32(0.5)
    logits = np.maximum(hidden, 0) @ network.output_weight + network.output_bias
    return hidden, cell, 1 / (1 + np.exp(-logits))


def _relu(values: Floats) -> Floats:
    return np.maximum(values, 0, out=values)
