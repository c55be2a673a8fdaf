"""Front ends as graphs: samples to feature frames, each frame independent of the window that it is computed in.

Cached encoders get their features window by window, so nothing may be normalised over a window. NeMo's front end is that of
onnx-asr without its normalisation. Kaldi's subtracts the mean, pre-emphasises, applies a window and transforms; all four are
linear in a frame's samples, so they are one convolution.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from amira.models.configs import ModelError
from amira.models.surgery import Assembly, EditedGraph, value

SAMPLE_RATE = 16_000
HOP_SAMPLES = 160
"""Samples between two feature frames, of NeMo's and Kaldi's front ends alike."""

NEMO_BINS = (80, 128)
"""Feature sizes of NeMo's mel front ends that onnx-asr has as graphs."""

OPSET = 17
FRAME_SAMPLES, FFT_SAMPLES = 400, 512
"""Window of 25 ms, and the length of its transform."""

FORGET = 0.97
"""Pre-emphasis of NeMo and Kaldi."""

SLANEY_HZ_PER_MEL, SLANEY_BREAK_HZ, SLANEY_BREAK_MEL, SLANEY_LOG_STEP = 200 / 3, 1000.0, 15.0, np.log(6.4) / 27
"""Slaney's mel scale: linear up to the break, logarithmic above (Auditory Toolbox, 1998)."""

Matrix = npt.NDArray[np.float64]


def nemo_front_end(bins: int, *, gpu: bool) -> Path:
    """Return onnx-asr's graph of NeMo's log-mel front end, normalised over the utterance.

    Args:
        bins: values of a feature frame.
        gpu: whether CUDA must have a kernel for each operator; it has none for STFT.

    Raises:
        ModelError: there is no front end with that many bins.
    """
    if bins not in NEMO_BINS:
        raise ModelError(f"{bins} features; front ends exist for {' and '.join(map(str, NEMO_BINS))}")
    name = f"nemo{bins}{'_conv' if gpu else ''}.onnx"
    return Path(str(importlib.resources.files("onnx_asr") / "preprocessors" / "data" / name))


def nemo_log_mel(bins: int, *, gpu: bool) -> EditedGraph:
    """Return NeMo's log-mel front end without normalisation.

    A frame depends on its own 512 samples and the one before them.
    """
    path = nemo_front_end(bins, gpu=gpu)
    graph = EditedGraph.load(path)
    (log,) = (node.output[0] for node in graph.proto.graph.node if node.op_type == "Log")
    (transposed,) = (node.output[0] for node in graph.proto.graph.node if log in node.input)
    nodes = [node for node in graph.proto.graph.node if node.output[0] != "features"]
    needed, kept = {transposed, "features_lens"}, []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.proto.graph.node[:], graph.proto.graph.output[:]
    graph.proto.graph.node.extend(reversed(kept))
    graph.proto.graph.node.append(onnx.helper.make_node("Identity", [transposed], ["features"]))
    graph.proto.graph.output.extend(
        [value("features", TensorProto.FLOAT, "B", bins, "T"), value("features_lens", TensorProto.INT64, "B")]
    )
    weights = [weight for weight in graph.proto.graph.initializer if weight.name in needed]
    del graph.proto.graph.initializer[:]
    graph.proto.graph.initializer.extend(weights)
    return graph


@dataclass(frozen=True)
class Fbank:
    """Options of Kaldi's filter bank; the defaults are those of icefall's recipes.

    Attributes:
        bins: number of mel filters.
        low_hz, high_hz: range of the filters.
        remove_mean: whether each frame's mean is subtracted first.
        window: of the frame; ``hann`` is the periodic one.
        slaney: whether the mel scale and the filters' areas are Slaney's, as in librosa and NeMo, instead of Kaldi's.
    """

    bins: int = 80
    low_hz: float = 20.0
    high_hz: float = 7600.0
    remove_mean: bool = True
    window: Literal["povey", "hann"] = "povey"
    slaney: bool = False


def fbank(options: Fbank) -> EditedGraph:
    """Return Kaldi's log-mel filter bank, with frames at the edges mirrored (``snip_edges=false``) and without dither.

    A frame t depends on the samples 160 t - 120 … 160 t + 280.
    """
    graph = Assembly(Path("fbank"), OPSET)
    backwards, axis = graph.integers(-1), graph.integers(1)
    before, after = 120, FRAME_SAMPLES - HOP_SAMPLES - 40
    left = graph.add("Slice", "waveforms", graph.integers(before - 1), graph.integers(-(2**31)), axis, backwards)
    right = graph.add("Slice", "waveforms", graph.integers(-1), graph.integers(-after - 1), axis, backwards)
    padded = graph.add("Unsqueeze", graph.add("Concat", left, "waveforms", right, axis=1), axis)
    matrix = graph.weight(_frame_matrix(options)[:, None].astype(np.float32))
    image = graph.add("Conv", padded, matrix, strides=[HOP_SAMPLES], kernel_shape=[FRAME_SAMPLES])
    squares = graph.add("Reshape", graph.add("Mul", image, image), graph.integers(0, 2, FFT_SAMPLES // 2 + 1, -1))
    power = graph.add("Transpose", graph.add("ReduceSum", squares, axis, keepdims=0), perm=[0, 2, 1])
    mel = graph.add("MatMul", power, graph.weight(mel_filters(options).astype(np.float32)))
    floor = graph.weight(np.array(np.finfo(np.float32).eps, np.float32))
    graph.add("Transpose", graph.add("Log", graph.add("Max", mel, floor)), output="features", perm=[0, 2, 1])
    rounded = graph.add("Add", "waveforms_lens", graph.integer(HOP_SAMPLES // 2))
    graph.add("Div", rounded, graph.integer(HOP_SAMPLES), output="features_lens")
    return graph.build(
        [value("waveforms", TensorProto.FLOAT, "B", "N"), value("waveforms_lens", TensorProto.INT64, "B")],
        [value("features", TensorProto.FLOAT, "B", options.bins, "T"), value("features_lens", TensorProto.INT64, "B")],
        Path(),
    )


def _frame_matrix(options: Fbank) -> Matrix:
    """Return what a frame's samples are multiplied by: real parts of the transform, then imaginary parts [514, 400]."""
    n = FRAME_SAMPLES
    mean = np.eye(n) - (1 / n if options.remove_mean else 0)
    emphasis = np.eye(n) - FORGET * np.eye(n, k=-1)
    emphasis[0, 0] = 1 - FORGET
    angles = 2 * np.pi * np.outer(np.arange(FFT_SAMPLES // 2 + 1), np.arange(n)) / FFT_SAMPLES
    transform = np.concatenate([np.cos(angles), -np.sin(angles)])
    matrix: Matrix = transform @ np.diag(_window(options)) @ emphasis @ mean
    return matrix


def _window(options: Fbank) -> Matrix:
    """Return a frame's window; Kaldi's own is a Hann window to the power of 0.85."""
    if options.window == "hann":
        periodic: Matrix = np.hanning(FRAME_SAMPLES + 1)[:-1]
        return periodic
    povey: Matrix = np.hanning(FRAME_SAMPLES) ** 0.85
    return povey


def mel_filters(options: Fbank) -> Matrix:
    """Return the weights of each power in each filter [257, bins]; triangles in mel for Kaldi, in Hz for Slaney."""
    limits = np.array([options.low_hz, options.high_hz])
    frequencies = SAMPLE_RATE / FFT_SAMPLES * np.arange(FFT_SAMPLES // 2 + 1)
    if options.slaney:
        edges = _from_slaney(_spread(_to_slaney(limits), options.bins + 2))
        points = frequencies
    else:
        edges = _spread(_to_mel(limits), options.bins + 2)
        points = _to_mel(frequencies)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (points[:, None] - left) / (centre - left)
    falling = (right - points[:, None]) / (right - centre)
    filters: Matrix = np.maximum(0, np.minimum(rising, falling))
    if options.slaney:
        filters *= 2 / (right - left)
    else:
        filters[-1] = 0  # Kaldi leaves out the highest frequency
    return filters


def _spread(limits: Matrix, points: int) -> Matrix:
    low, high = limits.tolist()
    return np.linspace(low, high, points, dtype=np.float64)


def _to_mel(frequency: Matrix) -> Matrix:
    mel: Matrix = 1127 * np.log1p(frequency / 700)
    return mel


def _to_slaney(frequency: Matrix) -> Matrix:
    """Return Slaney's mel."""
    linear = frequency / SLANEY_HZ_PER_MEL
    logarithmic = SLANEY_BREAK_MEL + np.log(np.maximum(frequency, 1) / SLANEY_BREAK_HZ) / SLANEY_LOG_STEP
    mel: Matrix = np.where(frequency < SLANEY_BREAK_HZ, linear, logarithmic)
    return mel


def _from_slaney(mel: Matrix) -> Matrix:
    exponential = SLANEY_BREAK_HZ * np.exp((mel - SLANEY_BREAK_MEL) * SLANEY_LOG_STEP)
    frequency: Matrix = np.where(mel < SLANEY_BREAK_MEL, mel * SLANEY_HZ_PER_MEL, exponential)
    return frequency
