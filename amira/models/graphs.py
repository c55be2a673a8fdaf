"""Read and check ONNX transducers in NeMo's export convention."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from amira.models.configs import ModelError

Shape = tuple[int | None, ...]

OPEN = -1
"""Size in an expected shape that must be dynamic in the graph; the value is that of Triton's configurations."""

FLOAT, INT32, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64
FLOAT16 = onnx.TensorProto.FLOAT16
LFS_POINTER = b"version https://git-lfs"
MAX_DURATIONS = 16
"""Maximum number of durations of a TDT; with more surplus logits, the vocabulary is too short. Published TDTs have 5."""


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        type: ONNX element type.
        shape: sizes; None for a dynamic one.
    """

    type: int
    shape: Shape

    @property
    def dims(self) -> list[int]:
        """Shape with ``OPEN`` for dynamic sizes, as in Triton's configurations."""
        return [OPEN if size is None else size for size in self.shape]


class Graph:
    """An ONNX file, read without its weights.

    Args:
        path: path of the file.

    Attributes:
        path: path of the file.
        inputs, outputs: tensors by name.
        data_files: names of external weight files in the same directory.
        size: size of the file and its weight files in bytes.

    Raises:
        ModelError: the file is missing or not an ONNX model, or a weight file is missing or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        model = _load(path)
        weights = {tensor.name for tensor in model.graph.initializer}
        self.inputs = {value.name: _tensor(value) for value in model.graph.input if value.name not in weights}
        self.outputs = {value.name: _tensor(value) for value in model.graph.output}
        data = _external_data(path, model)
        for name, size in data.items():
            file_with_weights = path.parent / name
            if not file_with_weights.is_file():
                raise ModelError(f"{path} keeps weights in {name}, which is missing beside it")
            if (found := file_with_weights.stat().st_size) < size:
                raise ModelError(f"{path} keeps weights in {name}, which has {found} bytes; expected {size} at least")
        self.data_files = list(data)
        self.size = sum(file.stat().st_size for file in (path, *(path.parent / name for name in data)))

    def resolve(self) -> None:
        """Replace the outputs' shapes with those that ONNX Runtime infers.

        Raises:
            ModelError: ONNX Runtime cannot load the graph.
        """
        for node in open_session(self.path).get_outputs():
            shape = tuple(size if isinstance(size, int) else None for size in node.shape)
            self.outputs[node.name] = replace(self.outputs[node.name], shape=shape)

    def check_no_others(self, inputs: Collection[str]) -> None:
        """Check that the graph has no other inputs.

        Raises:
            ModelError: it has others.
        """
        if others := [name for name in self.inputs if name not in inputs]:
            raise ModelError(
                f"{self.path}: nothing feeds {', '.join(others)}; expected the inputs {', '.join(inputs)} alone "
                "(encoders with a cache must be imported)"
            )

    def check_import(self, floats: Collection[str], batched: Mapping[str, int]) -> None:
        """Check inputs of a published graph.

        Args:
            floats: inputs that must be FLOAT.
            batched: axis of the batch, which must be open, by input.

        Raises:
            ModelError: an input has another type, or fixes the batch.
        """
        for name in floats:
            if (found := self.inputs[name].type) != FLOAT:
                kind = onnx.TensorProto.DataType.Name(found)
                raise ModelError(
                    f"{self.path}: input {name} is {kind}; expected FLOAT: convert it with float inputs and outputs"
                )
        for name, axis in batched.items():
            if (size := self.inputs[name].shape[axis]) is not None:
                raise ModelError(
                    f"{self.path}: input {name} has a batch of {size}; expected any, export it with a dynamic axis"
                )

    def check(self, kind: str, expected: Mapping[str, tuple[int, Shape]], *, exact: bool = False) -> None:
        """Compare the inputs or outputs with the expected ones.

        Args:
            kind: ``input`` or ``output``.
            expected: element type and shape by name; None allows any size, ``OPEN`` requires a dynamic one.
            exact: whether expected sizes must be fixed in the graph; else they may be dynamic.

        Raises:
            ModelError: a tensor is missing or differs.
        """
        found = self.inputs if kind == "input" else self.outputs
        for name, (element_type, shape) in expected.items():
            if name not in found:
                raise ModelError(f"{self.path}: {kind} {name} is missing; the graph has {', '.join(found) or 'none'}")
            tensor = found[name]
            fits = len(tensor.dims) == len(shape) and all(
                want in (None, have) or (have == OPEN and not exact) for have, want in zip(tensor.dims, shape, strict=True)
            )
            if tensor.type != element_type or not fits:
                raise ModelError(
                    f"{self.path}: {kind} {name} is {_show(tensor.type, tensor.dims)}; expected {_show(element_type, shape)}"
                )


@dataclass(frozen=True)
class TransducerGraphs:
    """Graphs and vocabulary of a transducer, and the sizes that follow from them.

    Attributes:
        encoder, decoder_joint: the graphs.
        vocabulary: path of the vocabulary.
        features: number of values in a feature frame.
        encoder_size: number of values in an encoder frame.
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

    @property
    def parameters(self) -> dict[str, str]:
        """Parameters of the decoder that follow from the graphs."""
        durations = {"durations": ",".join(map(str, self.durations))} if self.durations else {}
        sizes = {"blank": self.pieces - 1, "predictor_layers": self.layers, "predictor_hidden": self.hidden}
        return {"kind": self.kind, **durations, **{name: str(size) for name, size in sizes.items()}}

    @classmethod
    def read(cls, encoder: Graph, decoder_joint: Graph, vocabulary: Path, features: int | None = None) -> TransducerGraphs:
        """Check a model's graphs and vocabulary against NeMo's convention and each other.

        Args:
            encoder: graph of the encoder.
            decoder_joint: graph of predictor and joint network.
            vocabulary: path of the vocabulary.
            features: number of values in a feature frame, if it is dynamic in the encoder's graph.

        Raises:
            ModelError: they do not fit.
        """
        _check_encoder(encoder, features)
        decoder_joint.check(
            "input",
            {
                "encoder_outputs": (FLOAT, (OPEN, encoder.outputs["outputs"].shape[1], OPEN)),
                "targets": (INT32, (OPEN, None)),
                "target_length": (INT32, (OPEN,)),
                "input_states_1": (FLOAT, (None, OPEN, None)),
            },
        )
        layers, _, hidden = decoder_joint.inputs["input_states_1"].shape
        state = FLOAT, (layers, OPEN, hidden)
        decoder_joint.check("input", {"input_states_2": state})
        decoder_joint.check_no_others(("encoder_outputs", "targets", "target_length", "input_states_1", "input_states_2"))
        decoder_joint.check("output", {"outputs": (FLOAT, (OPEN, OPEN, None, None)), "prednet_lengths": (INT32, (OPEN,))})
        decoder_joint.check("output", {"output_states_1": state, "output_states_2": state})
        bins = encoder.inputs["audio_signal"].shape[1] or features
        size = decoder_joint.inputs["encoder_outputs"].shape[1] or encoder.outputs["outputs"].shape[1]
        if not bins:
            raise _left_open(encoder, "audio_signal")
        if not size:
            raise _left_open(decoder_joint, "encoder_outputs")
        if not (layers and hidden):
            raise _left_open(decoder_joint, "input_states_1")
        pieces = count_pieces(vocabulary)
        logits = count_logits(decoder_joint, size, layers, hidden)
        surplus = logits - pieces
        if surplus not in (0, *range(2, MAX_DURATIONS + 1)):
            raise ModelError(
                f"{decoder_joint.path}: output outputs has {logits} logits a frame; {vocabulary.name} has {pieces} pieces with "
                f"the blank, so expected {pieces} for an RNN-T, or 2 to {MAX_DURATIONS} more for the durations of a TDT"
            )
        return cls(encoder, decoder_joint, vocabulary, bins, size, layers, hidden, pieces, tuple(range(surplus)))


def _check_encoder(encoder: Graph, features: int | None) -> None:
    """Compare an encoder's tensors with the convention; one with a cache may fix the batch, and fixes its window."""
    if (cache := encoder.inputs.get("cache")) is None:
        encoder.check("input", {"audio_signal": (FLOAT, (OPEN, features, OPEN)), "length": (INT64, (OPEN,))})
        encoder.check_no_others(("audio_signal", "length"))
        encoder.check("output", {"outputs": (FLOAT, (OPEN, None, OPEN)), "encoded_lengths": (INT64, (OPEN,))})
        return
    batch = cache.shape[0] or OPEN
    carried = FLOAT16 if cache.type == FLOAT16 else FLOAT, (batch, cache.shape[-1])
    one_a_row = {name: (INT64, (batch,)) for name in ("length", "prompt_index") if name in encoder.inputs or name == "length"}
    encoder.check("input", {"audio_signal": (FLOAT, (batch, features, None)), **one_a_row, "cache": carried})
    encoder.check_no_others(("audio_signal", "length", "cache", "prompt_index"))
    outputs = {"outputs": (FLOAT, (batch, None, None)), "encoded_lengths": (INT64, (batch,)), "cache_next": carried}
    encoder.check("output", outputs)


def data_files(path: Path) -> list[str]:
    """Return the names of a graph's weight files; the files may be missing.

    Raises:
        ModelError: the graph is missing or not an ONNX model, or a weight file is in another directory.
    """
    return list(_external_data(path, _load(path)))


def count_pieces(vocabulary: Path) -> int:
    """Return the number of pieces in a vocabulary, the blank included.

    Raises:
        ModelError: the file is missing or malformed, or its last piece is not the blank.
    """
    if not vocabulary.is_file():
        raise ModelError(f"{vocabulary} is missing")
    try:
        with vocabulary.open(encoding="utf-8") as file:  # str.splitlines would split at some pieces
            lines = [line.rstrip("\n") for line in file]
    except UnicodeDecodeError as error:
        raise ModelError(f"{vocabulary} is no UTF-8 text: {error}") from error
    if not lines:
        raise ModelError(f"{vocabulary} is empty")
    for number, line in enumerate(lines):
        if line.rpartition(" ")[2] != str(number):
            raise ModelError(f"{vocabulary} line {number + 1} is {line!r}; expected 'piece {number}'")
    if not lines[-1].startswith("<blk>"):
        raise ModelError(f"{vocabulary} ends with {lines[-1]!r}; expected the blank, '<blk> {len(lines)}', behind it")
    return len(lines)


def count_logits(graph: Graph, size: int, layers: int, hidden: int) -> int:
    """Return the number of logits of the joint network. NeMo exports a dynamic size, so one step is run.

    Args:
        graph: graph of ``decoder_joint``.
        size: number of values of an encoder frame.
        layers: number of layers of the predictor's states.
        hidden: number of values of a layer's state.
    """
    known = graph.outputs["outputs"].shape[-1]
    if known:
        return known
    state = np.zeros((layers, 1, hidden), np.float32)
    feeds = {
        "encoder_outputs": np.zeros((1, size, 1), np.float32),
        "targets": np.zeros((1, 1), np.int32),
        "target_length": np.ones(1, np.int32),
        "input_states_1": state,
        "input_states_2": state,
    }
    return int(open_session(graph.path).run(["outputs"], feeds)[0].shape[-1])


def open_session(path: Path) -> Any:
    """Open a graph in ONNX Runtime without optimisation, since it is run only a few times.

    Raises:
        ModelError: ONNX Runtime cannot load the graph.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has one class per status code
        raise ModelError(f"{path} can't be loaded by ONNX Runtime: {error}") from error


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    tensor = value.type.tensor_type
    dims = (dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
    return Tensor(tensor.elem_type, tuple(dims))


def _load(path: Path) -> onnx.ModelProto:
    """Return a graph without its external weights."""
    if not path.is_file():
        raise ModelError(f"{path} is missing")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ModelError(f"{path} is a Git LFS pointer instead of the file; run git lfs pull where it was cloned")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors have no common class
        raise ModelError(f"{path} is no ONNX model: {error}") from error
    if not model.graph.output:
        raise ModelError(f"{path} is no ONNX model: it has no outputs")
    return model


def _external_data(path: Path, model: onnx.ModelProto) -> dict[str, int]:
    """Return the names of a model's weight files, with the minimum size of each in bytes."""
    sizes: dict[str, int] = {}
    for tensor in filter(uses_external_data, weights_of(model.graph)):
        info = ExternalDataInfo(tensor)
        if Path(info.location).name != info.location:  # an import must not read other directories
            raise ModelError(f"{path} keeps weights in {info.location!r}; expected a file beside it")
        sizes[info.location] = max(sizes.get(info.location, 0), (info.offset or 0) + (info.length or 0))
    return sizes


def weights_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield the initializers and constants of a graph, with those of its branches and loops."""
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from weights_of(inner)


def _left_open(graph: Graph, name: str) -> ModelError:
    return ModelError(f"{graph.path}: input {name} leaves its size open; export it with fixed sizes")


def _show(element_type: int, shape: Sequence[int | None]) -> str:
    dims = ", ".join("any" if size is None else "?" if size == OPEN else str(size) for size in shape)
    return f"{onnx.TensorProto.DataType.Name(element_type)} [{dims}]"
