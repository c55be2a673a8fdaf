"""What an ONNX transducer in NeMo's export convention says about itself, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

Shape = tuple[int | None, ...]

FLOAT, INT32, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64


class ModelError(ValueError):
    """A model can't be used; one line that names the file, the tensor, what was found and what is expected."""


@dataclass(frozen=True)
class Tensor:
    """An input or output: its ONNX element type, and its shape with None for what is dynamic."""

    type: int
    shape: Shape


class Graph:
    """An ONNX file, read without its weights.

    Args:
        path: the file.

    Raises:
        ModelError: it is missing or no ONNX model, or its external data is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ModelError(f"{path} is missing")
        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf's decoder has several errors and no common one
            raise ModelError(f"{path} is no ONNX model: {error}") from error
        weights = {tensor.name for tensor in model.graph.initializer}
        self.inputs = {value.name: _tensor(value) for value in model.graph.input if value.name not in weights}
        self.outputs = {value.name: _tensor(value) for value in model.graph.output}
        self.data_files = sorted(_external_data(model))
        for name in self.data_files:
            if not (path.parent / name).is_file():
                raise ModelError(f"{path} keeps weights in {name}, which is missing beside it")

    def check(self, kind: str, expected: Mapping[str, tuple[int, Shape]]) -> None:
        """Hold the inputs or outputs against what the convention asks for.

        Args:
            kind: ``input`` or ``output``.
            expected: element type and shape by name; None in a shape is anything.

        Raises:
            ModelError: one is missing or differs.
        """
        found = self.inputs if kind == "input" else self.outputs
        for name, (element_type, shape) in expected.items():
            if name not in found:
                raise ModelError(f"{self.path}: {kind} {name} is missing; the graph has {', '.join(found) or 'none'}")
            tensor = found[name]
            fits = len(tensor.shape) == len(shape) and all(
                want is None or have is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
            )
            if tensor.type != element_type or not fits:
                raise ModelError(
                    f"{self.path}: {kind} {name} is {_show(tensor.type, tensor.shape)}; expected {_show(element_type, shape)}"
                )


@dataclass(frozen=True)
class Transducer:
    """A model's graphs and what follows from them.

    Attributes:
        encoder, decoder_joint: the graphs.
        vocabulary: its file.
        features: feature bins that the encoder takes.
        encoder_size: size of an encoder frame.
        layers, hidden: the predictor's states are [layers, batch, hidden].
        pieces: size of the vocabulary with the blank, which is last.
        durations: jumps of a TDT in frames; empty for an RNN-T.
    """

    encoder: Graph
    decoder_joint: Graph
    vocabulary: Path
    features: int
    encoder_size: int
    layers: int
    hidden: int
    pieces: int
    durations: tuple[int, ...]

    @property
    def kind(self) -> str:
        """``rnnt`` or ``tdt``."""
        return "tdt" if self.durations else "rnnt"

    @classmethod
    def read(cls, encoder: Path, decoder_joint: Path, vocabulary: Path, features: int | None = None) -> Transducer:
        """Read a model.

        Args:
            encoder: the encoder's graph.
            decoder_joint: the predictor's and joint network's graph.
            vocabulary: the pieces.
            features: feature bins, where the encoder's graph leaves them open.

        Raises:
            ModelError: it does not follow the convention.
        """
        encoder_graph, joint_graph = Graph(encoder), Graph(decoder_joint)
        encoder_graph.check("input", {"audio_signal": (FLOAT, (None, features, None)), "length": (INT64, (None,))})
        encoder_graph.check("output", {"outputs": (FLOAT, (None, None, None)), "encoded_lengths": (INT64, (None,))})
        joint_graph.check(
            "input",
            {
                "encoder_outputs": (FLOAT, (None, encoder_graph.outputs["outputs"].shape[1], None)),
                "targets": (INT32, (None, None)),
                "target_length": (INT32, (None,)),
                "input_states_1": (FLOAT, (None, None, None)),
                "input_states_2": (FLOAT, (None, None, None)),
            },
        )
        states: dict[str, tuple[int, Shape]] = {f"output_states_{i}": (FLOAT, (None, None, None)) for i in (1, 2)}
        joint_graph.check("output", {"outputs": (FLOAT, (None, None, None, None)), **states})
        bins = encoder_graph.inputs["audio_signal"].shape[1] or features
        size = joint_graph.inputs["encoder_outputs"].shape[1] or encoder_graph.outputs["outputs"].shape[1]
        layers, _, hidden = joint_graph.inputs["input_states_1"].shape
        for name, value, graph in (
            ("audio_signal", bins, encoder_graph),
            ("encoder_outputs", size, joint_graph),
            ("input_states_1", layers and hidden, joint_graph),
        ):
            if not value:
                raise ModelError(f"{graph.path}: input {name} leaves its size open; export it with fixed sizes")
        assert bins and size and layers and hidden  # noqa: S101, PT018 (what the loop has just seen)
        pieces = count_pieces(vocabulary)
        logits = _count_logits(joint_graph, size, layers, hidden)
        surplus = logits - pieces
        if surplus < 0 or surplus == 1:
            raise ModelError(
                f"{decoder_joint}: output outputs has {logits} logits a frame; {vocabulary.name} has {pieces} pieces with the "
                f"blank, so an RNN-T has {pieces} and a TDT some more, one for each duration"
            )
        return cls(encoder_graph, joint_graph, vocabulary, bins, size, layers, hidden, pieces, tuple(range(surplus)))


def count_pieces(vocabulary: Path) -> int:
    """Number of pieces in a vocabulary, the blank included.

    Raises:
        ModelError: it is missing, malformed, or its last piece is no blank.
    """
    if not vocabulary.is_file():
        raise ModelError(f"{vocabulary} is missing")
    lines = vocabulary.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if line.rpartition(" ")[2] != str(number):
            raise ModelError(f"{vocabulary} line {number + 1} is {line!r}; expected 'piece {number}'")
    if not lines or not lines[-1].startswith("<blk>"):
        raise ModelError(
            f"{vocabulary}: the last piece is {lines[-1] if lines else 'missing'!r}; expected '<blk> {len(lines) - 1}'"
        )
    return len(lines)


def _count_logits(graph: Graph, size: int, layers: int, hidden: int) -> int:
    """Last dimension of the joint network's outputs; NeMo leaves it open, so one step is run."""
    known = graph.outputs["outputs"].shape[-1]
    if known:
        return known
    session = ort.InferenceSession(graph.path, providers=["CPUExecutionProvider"])
    state = np.zeros((layers, 1, hidden), np.float32)
    feeds = {
        "encoder_outputs": np.zeros((1, size, 1), np.float32),
        "targets": np.zeros((1, 1), np.int32),
        "target_length": np.ones(1, np.int32),
        "input_states_1": state,
        "input_states_2": state,
    }
    return int(session.run(["outputs"], feeds)[0].shape[-1])


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    tensor = value.type.tensor_type
    dims = (dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
    return Tensor(tensor.elem_type, tuple(dims))


def _external_data(model: onnx.ModelProto) -> set[str]:
    """Names of the files beside a model that hold its weights."""
    external = (tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL)
    return {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}


def _show(element_type: int, shape: Sequence[int | None]) -> str:
    dims = ", ".join("?" if dim is None else str(dim) for dim in shape)
    return f"{onnx.TensorProto.DataType.Name(element_type)} [{dims}]"
