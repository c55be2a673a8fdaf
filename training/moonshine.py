"""Moonshine tiny's encoder in PyTorch, for training and for an export that is independent of padding.

Moonshine (Jeffries et al., 2024, arXiv:2410.15608) is published in the wheel `moonshine-voice` as a quantised ONNX Runtime
file. The published graph normalises over the padding of a batch. This module masks by length, so the result for a recording
does not depend on the rest of its batch. The weights are dequantised from the file.
"""

from __future__ import annotations

import copy
import importlib.resources
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 288
FRAME_SAMPLES = 384
"""Number of 16 kHz samples per frame of Moonshine's encoder: 24 ms."""
LAYERS = 6
HEADS = 8
_FEED_FORWARD = 1152
_ROTARY = 32
STEM_STEP = 64
"""Stride of the stem's first convolution in samples: 4 ms, six steps per frame."""
STEM_WIDTH = 127
"""Kernel of the stem's first convolution in samples."""
STEM_REACH = 511
"""Receptive field of a frame beyond its first sample, in samples. Padding of this length gives one output for each frame that
has begun."""
EXTRA_STEPS = (STEM_REACH - STEM_WIDTH) // STEM_STEP + 1
"""Steps of the first convolution beyond those that begin within the frames."""


def assets() -> Path:
    """Return the directory of the model files in the wheel."""
    return Path(str(importlib.resources.files("moonshine_voice"))) / "assets" / "tiny-en"


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend from q [B, H, T, D] to k and v [B, H, S, D] where `mask` (broadcast to [B, H, T, S]) is set.

    On a CPU the operations are separate: the backward pass of torch's fused attention takes three times as long there.
    """
    if q.is_cuda:
        return _fused(q, k, v, mask)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend with torch's fused kernels. They need sizes that are multiples of eight."""
    size, extra = q.shape[-1], -q.shape[-1] % 8
    q, k, v = (functional.pad(x, (0, extra)) for x in (q.to(v.dtype), k.to(v.dtype), v))
    return functional.scaled_dot_product_attention(q, k, v, mask, scale=size**-0.5)[..., :size]


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """One layer: attention over the whole input, then a feed-forward net, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(WIDTH, bias=False)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.post_attention_layernorm = nn.LayerNorm(WIDTH, bias=False)
        self.fc1 = nn.Linear(WIDTH, _FEED_FORWARD)
        self.fc2 = nn.Linear(_FEED_FORWARD, WIDTH)

    def forward(self, x: Tensor, mask: Tensor, turn: Tensor) -> Tensor:
        """Map x [B, T, 288] to the same shape.

        Args:
            x: frames.
            mask: set for frames that are not padding [B, 1, 1, T].
            turn: cosines and sines of the positions [2, T, 32].
        """
        return self.around(x, lambda q, k, v: attend(rotate(q, turn), rotate(k, turn), v, mask))

    def around(self, x: Tensor, attention: Attention) -> Tensor:
        """Apply the layer with the given attention, which maps q, k and v [B, H, T, 36] to the same shape."""
        batch, frames, _ = x.shape
        y = self.input_layernorm(x)
        q, k, v = (
            p(y).view(batch, frames, HEADS, WIDTH // HEADS).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = x + self.o_proj(attention(q, k, v).transpose(1, 2).reshape(batch, frames, WIDTH))
        return x + self.fc2(functional.gelu(self.fc1(self.post_attention_layernorm(x))))


class Stem(nn.Module):
    """Maps samples to frames: three convolutions, with one group norm over everything but padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, WIDTH, STEM_WIDTH, stride=STEM_STEP, bias=False)
        self.scale = nn.Parameter(torch.ones(WIDTH, 1))
        self.shift = nn.Parameter(torch.zeros(WIDTH, 1))
        self.conv2 = nn.Conv1d(WIDTH, 2 * WIDTH, 7, stride=3)
        self.conv3 = nn.Conv1d(2 * WIDTH, WIDTH, 3, stride=2)

    def forward(self, samples: Tensor, frames: Tensor) -> Tensor:
        """Map samples [B, N] to [B, ceil(N / 384), 288]; each row is zero after its `frames` x 384 samples."""
        lengths = frames * FRAME_SAMPLES + STEM_REACH
        x = torch.tanh(self.conv1(functional.pad(samples, (0, STEM_REACH))[:, None]))
        steps = (lengths - STEM_WIDTH) // STEM_STEP + 1
        real = (torch.arange(x.shape[2], device=x.device) < steps[:, None])[:, None].to(x.dtype)
        count = (steps * WIDTH)[:, None, None].float()  # sums of this size need float32
        x = (x * real).float()
        mean = x.sum((1, 2), keepdim=True) / count
        variance = (((x - mean) * real) ** 2).sum((1, 2), keepdim=True) / count
        return self.above((x - mean) * torch.rsqrt(variance + 1e-5))

    def above(self, x: Tensor) -> Tensor:
        """Map normalised steps [B, 288, S] of 4 ms to frames [B, T, 288]."""
        x = x * self.scale + self.shift
        return functional.gelu(self.conv3(functional.gelu(self.conv2(x)))).transpose(1, 2)


class Layers(nn.Module):
    """Consecutive layers of the encoder, followed by a norm; the identity unless they are the last ones."""

    def __init__(self, layers: list[Layer], norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.register_buffer("rates", 10000.0 ** (-torch.arange(0, _ROTARY, 2) / _ROTARY), persistent=False)

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        """Map x [B, T, 288] to the same shape; `frames` [B] is the number of frames of each row without padding."""
        at = torch.arange(x.shape[1], device=x.device)
        turn = self.turn(at)
        mask = (at < frames[:, None])[:, None, None]
        for layer in self.layers:
            x = layer(x, mask, turn)
        return self.norm(x)

    def turn(self, at: Tensor) -> Tensor:
        """Return cosines and sines [2, T, 32] of the rotations at positions `at` [T]."""
        angles = at[:, None] * self.get_buffer("rates")
        angles = torch.stack((angles, angles), dim=-1).reshape(-1, _ROTARY)  # the exporter mistranslates repeat_interleave
        return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Apply rotary position embedding (Su et al., 2021) to the first 32 dimensions of each head, in neighbouring pairs."""
    part, rest = x[..., :_ROTARY], x[..., _ROTARY:]
    crossed = torch.stack((-part[..., 1::2], part[..., 0::2]), dim=-1).reshape(part.shape)
    return torch.cat((part * turn[0] + crossed * turn[1], rest), dim=-1).to(x.dtype)


def load(lower: int) -> tuple[Stem, Layers, Layers]:
    """Return the published encoder: the stem, the first `lower` layers, and the other layers with the final norm."""
    graph = _graph()
    tensors = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    stem = Stem()
    stem.load_state_dict(
        {
            "conv1.weight": _tensor(tensors["conv1.weight_add_tensor"]),
            "scale": _tensor(tensors["onnx::Mul_2080"]),
            "shift": _tensor(tensors["onnx::Add_2081"]),
            **{f"{c}.weight": _tensor(tensors[f"{c}.weight_add_tensor"]) for c in ("conv2", "conv3")},
            **{f"{c}.bias": _tensor(tensors[f"{c}.bias"]) for c in ("conv2", "conv3")},
        }
    )
    weights: dict[str, Tensor] = {}
    for node in graph.node:
        if node.op_type in {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"}:
            _, layer, _, projection, _ = node.name.split("/")
            stored = next(i for i in node.input if i in tensors and i.endswith("_quantized"))
            name = stored.removesuffix("_quantized")
            matrix = (tensors[stored].astype(np.float32) - float(tensors[f"{name}_zero_point"])) * tensors[f"{name}_scale"]
            weights[f"{layer.removeprefix('layers.')}.{projection}.weight"] = _tensor(matrix.T)
    layers = []
    for index in range(LAYERS):
        prefix = f"{index}."
        state = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{norm}.weight"] = _tensor(tensors[f"layers.{index}.{norm}.weight"])
        for linear in ("fc1", "fc2"):
            state[f"{linear}.bias"] = _tensor(tensors[f"layers.{index}.mlp.{linear}.bias"])
        layers.append(Layer())
        layers[-1].load_state_dict(state)
    last = nn.LayerNorm(WIDTH, bias=False)
    last.load_state_dict({"weight": _tensor(tensors["layer_norm.weight"])})
    return stem, Layers(layers[:lower], nn.Identity()), Layers(layers[lower:], last)


def _graph() -> onnx.GraphProto:
    """Return the published graph as ONNX: the runtime saves the file that it loads in this format."""
    with tempfile.TemporaryDirectory() as scratch:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.optimized_model_filepath = f"{scratch}/encoder.onnx"
        options.log_severity_level = 3
        options.add_session_config_entry("session.save_model_format", "ONNX")
        onnxruntime.InferenceSession(str(assets() / "encoder_model.ort"), options, providers=["CPUExecutionProvider"])
        return copy.deepcopy(onnx.load(options.optimized_model_filepath).graph)


def _tensor(array: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.array(array))
