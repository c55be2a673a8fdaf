"""`make export`: write the trained model as the graphs and the vocabulary of a model repository.

The encoder becomes two graphs: one for whole recordings, and one for a step of a stream, which carries the context in a cache.
Tensor names and layouts are those of NeMo's export; the cache is packed into one tensor, as `amira models import` does it.
Matrices are stored as int8 with one scale per output, other large weights as float16. Matrices of Moonshine that were not
trained are 8-bit numbers with one scale already; they are stored as they are, since another scale would round them again.
Operators that ONNX Runtime folds when it loads the graph convert all to float32. DequantizeLinear is not used: the runtime
fuses it into kernels that quantise activations over the whole batch, padding included.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import sentencepiece
import torch
import typer
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from training import config as configuration
from training import start
from training.chunks import STACK
from training.command import run
from training.data import TOKENS
from training.model import Transducer, build
from training.moonshine import FRAME_SAMPLES
from training.parts import DecoderJoint, Encoder, Preprocessor
from training.step import Step
from training.weights import averaged

_SMALL = 4096
"""Smallest number of weights in a tensor that is compressed."""
_WEIGHTED = {"Conv", "Gather", "Gemm", "LSTM", "MatMul"}
"""Operators whose weights are compressed."""
LEFT, RIGHT = 96, 20
"""Left context of the attention and look-ahead of a stream, in frames of 24 ms: 2.3 s and 0.48 s."""
WINDOWS = (44, 60, 100)
"""Chunk and look-ahead of the latencies `low`, `balanced` and `throughput`, in frames of 24 ms."""


def graphs(model: Transducer, predictor_width: int, width: int) -> dict[str, onnx.ModelProto]:
    """Return the graphs by name.

    Args:
        model: the trained model.
        predictor_width: size of the predictor's states.
        width: size of the encoder's frames.
    """
    states = torch.zeros(1, 2, predictor_width)
    step = Step(model.encoder, LEFT, RIGHT, WINDOWS)
    targets, target_length = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([3, 3], dtype=torch.int32)
    return {
        "preprocessor": _trace(
            Preprocessor(),
            {"waveforms": (torch.randn(2, 20_000), "BN"), "waveforms_lens": (torch.tensor([20_000, 15_000]), "B")},
            {"features": "B-T", "features_lens": "B"},
        ),
        "encoder": _trace(
            Encoder(model),
            {"audio_signal": (torch.randn(2, FRAME_SAMPLES, 61), "B-T"), "length": (torch.tensor([61, 40]), "B")},
            {"outputs": "B-S", "encoded_lengths": "B"},
        ),
        "encoder_stream": _trace(
            step,
            {
                "audio_signal": (torch.randn(2, FRAME_SAMPLES, WINDOWS[1]), "B-T"),
                "length": (torch.tensor([WINDOWS[1], 40]), "B"),
                "cache": (torch.zeros(2, step.cache_size, dtype=torch.float16), "B-"),
            },
            {"outputs": "B-S", "encoded_lengths": "B", "cache_next": "B-"},
        ),
        "decoder_joint": _trace(
            DecoderJoint(model),
            {
                "encoder_outputs": (torch.randn(2, width, 5), "B-T"),
                "targets": (targets, "BU"),
                "target_length": (target_length, "B"),
                "input_states_1": (states, "-B-"),
                "input_states_2": (states, "-B-"),
            },
            {"outputs": "BTU-", "prednet_lengths": "B", "output_states_1": "-B-", "output_states_2": "-B-"},
        ),
    }


def _trace(module: nn.Module, inputs: dict[str, tuple[Tensor, str]], outputs: dict[str, str]) -> onnx.ModelProto:
    """Trace a module to a graph. For each tensor, a letter names a dynamic axis, and `-` marks a fixed one."""
    axes = {name: letters for name, (_, letters) in inputs.items()} | outputs
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns about every Python number; here they are constants
        torch.onnx.export(
            module.eval(),
            tuple(tensor for tensor, _ in inputs.values()),
            buffer,  # type: ignore[arg-type,unused-ignore] # torch accepts files, but its annotation does not
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={n: {i: a for i, a in enumerate(letters) if a != "-"} for n, letters in axes.items()},
            opset_version=17,
            dynamo=False,
        )
        results = module(*(tensor for tensor, _ in inputs.values()))
    model = onnx.load_model_from_string(buffer.getvalue())
    for value, result in zip(model.graph.output, results, strict=True):
        dims = value.type.tensor_type.shape.dim
        for dim, size, axis in zip(dims, result.shape, outputs[value.name], strict=True):
            if axis == "-":  # the tracer leaves some open; config.pbtxt must match the graph
                dim.dim_value = size
    return model


def compress(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with large weights in 8 or 16 bits, and with its constants as they are."""
    stored, nodes = [], []
    for weight in model.graph.initializer:
        array, name = numpy_helper.to_array(weight), weight.name
        users = {node.op_type for node in model.graph.node if name in node.input}
        if array.dtype != np.float32 or array.size < _SMALL or not users & _WEIGHTED:
            stored.append(weight)
        elif array.ndim == 2:  # noqa: PLR2004 - a matrix
            if (scale := _exact_scale(array)) is not None:
                steps = np.round(array / scale)
                zero = -steps.min()
                stored.append(numpy_helper.from_array((steps + zero).astype(np.uint8), f"{name}.uint8"))
                stored.append(numpy_helper.from_array(np.asarray(zero), f"{name}.zero"))
                nodes.append(helper.make_node("Cast", [f"{name}.uint8"], [f"{name}.shifted"], to=TensorProto.FLOAT))
                nodes.append(helper.make_node("Sub", [f"{name}.shifted", f"{name}.zero"], [f"{name}.unscaled"]))
            else:
                scale = np.maximum(np.abs(array).max(axis=_inputs_axis(model.graph, name), keepdims=True), 1e-8) / 127
                stored.append(numpy_helper.from_array(np.round(array / scale).astype(np.int8), f"{name}.int8"))
                nodes.append(helper.make_node("Cast", [f"{name}.int8"], [f"{name}.unscaled"], to=TensorProto.FLOAT))
            stored.append(numpy_helper.from_array(np.asarray(scale, np.float32), f"{name}.scale"))
            nodes.append(helper.make_node("Mul", [f"{name}.unscaled", f"{name}.scale"], [name]))
        else:
            stored.append(numpy_helper.from_array(array.astype(np.float16), f"{name}.float16"))
            nodes.append(helper.make_node("Cast", [f"{name}.float16"], [name], to=TensorProto.FLOAT))
    compressed = onnx.ModelProto()
    compressed.CopyFrom(model)
    del compressed.graph.initializer[:]
    compressed.graph.initializer.extend(stored)
    del compressed.graph.node[:]
    compressed.graph.node.extend([*nodes, *model.graph.node])
    onnx.checker.check_model(compressed)
    return compressed


def _exact_scale(matrix: NDArray[np.float32]) -> np.float32 | None:
    """Return the scale with which 8 bits hold a matrix without an error, or None if there is no such scale."""
    smallest: np.float32 = np.abs(matrix[matrix != 0]).min(initial=1.0)
    steps = np.round(matrix / smallest)
    exact = np.ptp(steps) <= np.iinfo(np.uint8).max and (steps * smallest == matrix).all()
    return smallest if exact else None


def _inputs_axis(graph: onnx.GraphProto, name: str) -> int:
    """Return the axis that a matrix product sums over. The scales are per output, or per row of an embedding."""
    user = next(node for node in graph.node if name in node.input)
    rows = user.op_type == "Gather" or any(a.name == "transB" and a.i for a in user.attribute)
    return 1 if rows else 0


def write(config: configuration.Config, work: Path, repository: Path) -> int:
    """Write graphs and vocabulary of the trained model into a model repository, and return the graphs' size in bytes."""
    model = build(config)
    model.load_state_dict(averaged(work))
    size = write_graphs(model, config, repository)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(work / TOKENS))
    lines = [f"{pieces.id_to_piece(i)} {i}\n" for i in range(pieces.get_piece_size())] + [f"<blk> {model.blank}\n"]
    (repository / "vocab.txt").write_text("".join(lines), encoding="utf-8")
    return size


def write_again(config: configuration.Config, source: Path, repository: Path) -> int:
    """Write the graphs of a model repository's weights into another one or the same; return their size in bytes."""
    model = build(config)
    start.load(model, source)
    vocabulary = (source / "vocab.txt").read_bytes()
    size = write_graphs(model, config, repository)
    (repository / "vocab.txt").write_bytes(vocabulary)
    return size


def write_graphs(model: Transducer, config: configuration.Config, repository: Path) -> int:
    """Write the graphs of a model into a model repository, and return their size in bytes."""
    size = 0
    for name, graph in graphs(model, config.model.predictor, config.model.width).items():
        path = repository / name / "1" / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it may be a link into another repository
        onnx.save(compress(graph), path)
        size += path.stat().st_size
    return size


def main(
    work: Annotated[Path, typer.Option(help="Directory of the checkpoint or of its copies")],
    into: Annotated[Path, typer.Option(help="Model repository to write to")],
    config: Annotated[Path, typer.Option(help="The configuration")] = configuration.DEFAULT,
    begin: Annotated[Path | None, typer.Option(help="Model repository whose weights to write instead")] = None,
) -> None:
    """Write the graphs of the trained model."""
    settings = configuration.load(config)
    size = write_again(settings, begin, into) if begin else write(settings, work, into)
    typer.echo(f"{into}: {size / 1e6:.1f} MB of graphs, {STACK * FRAME_SAMPLES} samples per frame")


if __name__ == "__main__":
    run(main)
