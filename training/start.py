"""Load the weights of a model repository's graphs into a model of the same architecture.

An export keeps the order of the operators, but not the names of their weights. Operators with weights are therefore paired with
the modules in the order of execution. Afterwards both must compute the same output.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from training.command import TrainingError
from training.model import Transducer
from training.moonshine import FRAME_SAMPLES
from training.parts import DecoderJoint, Encoder

_GATES = [0, 2, 3, 1]
"""Indices of ONNX's gates (input, output, forget, cell) in torch's order (input, forget, cell, output)."""
_TOLERANCE = 1e-3

Arrays = list[NDArray[np.float32]]


def load(model: Transducer, repository: Path) -> None:
    """Copy a model repository's weights into a model.

    Raises:
        TrainingError: the graphs have another architecture.
    """
    frames = torch.tensor([60])
    audio = torch.randn(1, FRAME_SAMPLES, 60, generator=torch.Generator().manual_seed(0)) * 0.1
    encoder = _Pair(Encoder(model), repository / "encoder" / "1" / "model.onnx")
    encoded = encoder.copy((audio, frames), ["audio_signal", "length"])
    states = torch.zeros(1, 1, model.predictor.lstm.hidden_size)
    one = torch.ones(1, dtype=torch.int32)
    decoder = _Pair(DecoderJoint(model), repository / "decoder_joint" / "1" / "model.onnx")
    decoder.copy(
        (encoded, one[None], one, states, states),
        ["encoder_outputs", "targets", "target_length", "input_states_1", "input_states_2"],
    )


class _Pair:
    """A module and its exported graph."""

    def __init__(self, module: nn.Module, path: Path) -> None:
        self._module, self._path = module.eval(), path

    def copy(self, inputs: tuple[Tensor, ...], names: list[str]) -> Tensor:
        """Copy the graph's weights into the module, compare the outputs of both, and return the first output."""
        stored = list(_stored(self._path))
        used = self._used(inputs)
        if len(stored) != len(used):
            raise TrainingError(f"{self._path}: {len(stored)} operators have weights; the configured model has {len(used)}")
        for arrays, module in zip(stored, used, strict=True):
            self._put(arrays, module)
        with torch.inference_mode():
            ours = self._module(*inputs)[0]
        session = onnxruntime.InferenceSession(self._path, providers=["CPUExecutionProvider"])
        theirs = session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})[0]
        if (difference := float(np.abs(ours.numpy() - theirs).max())) > _TOLERANCE:
            raise TrainingError(
                f"{self._path}: the configured model's outputs differ by {difference:.3g} with the same weights"
            )
        return ours.clone()

    def _used(self, inputs: tuple[Tensor, ...]) -> list[nn.Module]:
        """Return the modules with weights in the order of execution."""
        used: list[nn.Module] = []
        leaves = [
            m for m in self._module.modules() if isinstance(m, nn.Linear | nn.LayerNorm | nn.Conv1d | nn.Embedding | nn.LSTM)
        ]
        hooks = [leaf.register_forward_hook(lambda module, *_: used.append(module)) for leaf in leaves]
        with torch.inference_mode():
            self._module(*inputs)
        for hook in hooks:
            hook.remove()
        return used

    @torch.no_grad()
    def _put(self, arrays: Arrays, module: nn.Module) -> None:
        if isinstance(module, nn.LSTM):
            w, r, b, c = (_reordered(a) for a in (arrays[0][0], arrays[1][0], *np.split(arrays[2][0], 2)))
            values = {"weight_ih_l0": w, "weight_hh_l0": r, "bias_ih_l0": b, "bias_hh_l0": c}
        else:
            weight = arrays[0].T if isinstance(module, nn.Linear) else arrays[0]
            values = {"weight": weight} | ({"bias": arrays[1]} if getattr(module, "bias", None) is not None else {})
        for name, value in values.items():
            parameter = getattr(module, name)
            if parameter.shape != value.shape:
                raise TrainingError(
                    f"{self._path}: found {value.shape} where {type(module).__name__} has {tuple(parameter.shape)}"
                )
            parameter.copy_(torch.from_numpy(np.array(value)))
        if isinstance(module, nn.Embedding):
            module.weight[module.padding_idx] = 0


def _reordered(gates: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([np.split(gates, 4)[gate] for gate in _GATES])


def _weights(path: Path) -> dict[str, NDArray[np.float32]]:
    """Return a graph's weights in float32, after constant folding by the runtime."""
    with tempfile.TemporaryDirectory() as scratch:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = f"{scratch}/folded.onnx"
        options.log_severity_level = 3
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return {i.name: numpy_helper.to_array(i) for i in onnx.load(options.optimized_model_filepath).graph.initializer}


def _stored(path: Path) -> Iterator[Arrays]:
    """Yield the weights of each operator that has any. The bias of a matrix product is in the addition that follows it.

    The operators are in the order of the file, which is the order of the trace. The runtime would reorder them.
    """
    graph, tensors = onnx.load(path).graph, _weights(path)
    biases = {i: tensors[j] for n in graph.node if n.op_type == "Add" for i, j in (n.input, reversed(n.input)) if j in tensors}
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in tensors and tensors[node.input[0]].ndim > 1:
            yield [tensors[node.input[0]]]
        elif node.op_type == "MatMul" and node.input[1] in tensors:
            yield [tensors[node.input[1]], *([biases[node.output[0]]] if node.output[0] in biases else [])]
        elif node.op_type in {"LayerNormalization", "Conv", "LSTM"}:
            yield [tensors[name] for name in node.input[1:] if name in tensors]
