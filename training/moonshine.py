"""Moonshine tiny's encoder in PyTorch, so that it can be trained on and exported safe for batches.

Moonshine (Jeffries et al., 2024, arXiv:2410.15608) is published in the wheel `moonshine-voice` as a quantised ONNX Runtime
file. Its own graph normalises over the padding of a batch; this one masks by length, so that a recording gives the same in
any company. The weights are the file's, dequantised.
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
"""Samples at 16 kHz for each frame of the encoder: 24 ms."""
LAYERS = 6
_HEADS = 8
_FEED_FORWARD = 1152
_ROTARY = 32
STEM_STEP = 64
"""Samples at 16 kHz for each step of the stem's first convolution: 4 ms, six to a frame."""
STEM_WIDTH = 127
"""Samples that a step sees."""
STEM_REACH = 511
"""Samples that the stem sees behind a frame's first: with so many zeros added, every begun frame gives one output."""


def assets() -> Path:
    """Return the directory of the wheel that holds the model."""
    return Path(str(importlib.resources.files("moonshine_voice"))) / "assets" / "tiny-en"


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of q [B, H, T, D] to what `mask` (broadcast to [B, H, T, S]) allows of k and v [B, H, S, D].

    Written out on a CPU, where torch's fused one takes three times as long to differentiate.
    """
    if q.is_cuda:
        return _fused(q, k, v, mask)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same by torch's fused kernels, which want sizes that are multiples of eight."""
    size, extra = q.shape[-1], -q.shape[-1] % 8
    q, k, v = (functional.pad(x, (0, extra)) for x in (q.to(v.dtype), k.to(v.dtype), v))
    return functional.scaled_dot_product_attention(q, k, v, mask, scale=size**-0.5)[..., :size]


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """One layer: attention over the whole input, then a feed-forward net, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(WIDTH, bias=False)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.post_attention_layernorm = nn.LayerNorm(WIDTH, bias=False)
        self.fc1 = nn.Linear(WIDTH, _FEED_FORWARD)
        self.fc2 = nn.Linear(_FEED_FORWARD, WIDTH)

    def forward(self, x: Tensor, mask: Tensor, turn: Tensor) -> Tensor:
        """Map x [B, T, 288] to the same; mask [B, 1, 1, T] says which frames are real, turn [2, T, 32] rotates."""
        return self.around(x, lambda q, k, v: attend(rotate(q, turn), rotate(k, turn), v, mask))

    def around(self, x: Tensor, attention: Attention) -> Tensor:
        """Do what the layer does around its attention, which maps q, k and v [B, H, T, 36] to the same."""
        batch, frames, _ = x.shape
        y = self.input_layernorm(x)
        q, k, v = (
            p(y).view(batch, frames, _HEADS, WIDTH // _HEADS).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = x + self.o_proj(attention(q, k, v).transpose(1, 2).reshape(batch, frames, WIDTH))
        return x + self.fc2(functional.gelu(self.fc1(self.post_attention_layernorm(x))))


class Stem(nn.Module):
    """From samples to frames: three convolutions, with one group norm over all that is real."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, WIDTH, STEM_WIDTH, stride=STEM_STEP, bias=False)
        self.scale = nn.Parameter(torch.ones(WIDTH, 1))
        self.shift = nn.Parameter(torch.zeros(WIDTH, 1))
        self.conv2 = nn.Conv1d(WIDTH, 2 * WIDTH, 7, stride=3)
        self.conv3 = nn.Conv1d(2 * WIDTH, WIDTH, 3, stride=2)

    def forward(self, samples: Tensor, frames: Tensor) -> Tensor:
        """Map samples [B, N], zero behind each row's `frames` x 384, to [B, ceil(N / 384), 288]."""
        lengths = frames * FRAME_SAMPLES + STEM_REACH
        x = torch.tanh(self.conv1(functional.pad(samples, (0, STEM_REACH))[:, None]))
        steps = (lengths - STEM_WIDTH) // STEM_STEP + 1
        real = (torch.arange(x.shape[2], device=x.device) < steps[:, None])[:, None].to(x.dtype)
        count = (steps * WIDTH)[:, None, None].float()  # sums of so many need float32
        x = (x * real).float()
        mean = x.sum((1, 2), keepdim=True) / count
        variance = (((x - mean) * real) ** 2).sum((1, 2), keepdim=True) / count
        return self.above((x - mean) * torch.rsqrt(variance + 1e-5))

    def above(self, x: Tensor) -> Tensor:
        """Map normalised steps [B, 288, S] of 4 ms to frames [B, T, 288]."""
        x = x * self.scale + self.shift
        return functional.gelu(self.conv3(functional.gelu(self.conv2(x)))).transpose(1, 2)


class Layers(nn.Module):
    """Some of the encoder's layers; the last ones end in its norm."""

    def __init__(self, layers: list[Layer], norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.register_buffer("rates", 10000.0 ** (-torch.arange(0, _ROTARY, 2) / _ROTARY), persistent=False)

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        """Map x [B, T, 288] to the same; `frames` [B] says how many of each row are real."""
        at = torch.arange(x.shape[1], device=x.device)
        turn = self.turn(at)
        mask = (at < frames[:, None])[:, None, None]
        for layer in self.layers:
            x = layer(x, mask, turn)
        return self.norm(x)

    def turn(self, at: Tensor) -> Tensor:
        """Return cosines and sines [2, T, 32] that rotate what is at the positions `at` [T]."""
        angles = at[:, None] * self.get_buffer("rates")
        angles = torch.stack((angles, angles), dim=-1).reshape(-1, _ROTARY)  # the exporter gets repeat_interleave wrong
        return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021) of the first 32 of each head's dimensions, by neighbouring pairs."""
    part, rest = x[..., :_ROTARY], x[..., _ROTARY:]
    crossed = torch.stack((-part[..., 1::2], part[..., 0::2]), dim=-1).reshape(part.shape)
    return torch.cat((part * turn[0] + crossed * turn[1], rest), dim=-1).to(x.dtype)


def load(lower: int) -> tuple[Stem, Layers, Layers]:
    """Read the published weights: the stem, the first `lower` layers, and the layers above with the final norm."""
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
    """Return the published file as ONNX: the runtime can write what it reads."""
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
