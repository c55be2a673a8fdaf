"""Edit ONNX graphs so that they follow the repository's convention, without reading their weights.

A layout's graph becomes the inner part of a new one. The new graph has the convention's inputs and outputs, and a few nodes
that rename, transpose and reshape between the two. These nodes compute nothing, so the results stay the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.compose import add_prefix

from amira.models.configs import ModelError

FP16_INTEGER_LIMIT = 2048
"""Largest integer up to which FP16 is exact. Counters in a cache stop there: encoders compare them with context lengths."""

MIN_OPSET = 13
"""Oldest operator set of graphs that are edited. NeMo and icefall export 13 and later."""


@dataclass(frozen=True)
class EditedGraph:
    """A graph in memory, and where its external weights are.

    Attributes:
        proto: the graph, external weights not loaded.
        directory: of the files with its external weights.
    """

    proto: onnx.ModelProto
    directory: Path

    @classmethod
    def load(cls, path: Path) -> EditedGraph:
        """Read a graph without its external weights."""
        return cls(onnx.load(path, load_external_data=False), path.parent)


class State(NamedTuple):
    """A tensor that an encoder carries from call to call.

    Attributes:
        input, output: its names.
        shape: its sizes; the entry at ``batch_axis`` is not used.
        batch_axis: axis of the batch.
        element_type: ONNX element type: FLOAT, FLOAT16 or INT64.
    """

    input: str
    output: str
    shape: tuple[int, ...]
    batch_axis: int
    element_type: int

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Sizes for one row of the batch."""
        return (*self.shape[: self.batch_axis], *self.shape[self.batch_axis + 1 :])

    @property
    def size(self) -> int:
        """Number of values for one row of the batch."""
        return int(np.prod(self.row_shape, dtype=np.int64))


class Assembly:
    """A graph in the making around other graphs. Tensors are referred to by name.

    Args:
        path: of the source, for messages.
        opset: version of the standard operators.
    """

    def __init__(self, path: Path, opset: int) -> None:
        self._path = path
        self._opset = opset
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[TensorProto] = []
        self._imports: dict[str, int] = {"": opset}
        self._functions: list[onnx.FunctionProto] = []
        self._ir_version = 8
        self._count = 0

    def weight(self, values: npt.NDArray[Any]) -> str:
        """Add a constant; return its name."""
        name = f"constant_{len(self._weights)}_{self._count}"
        self._weights.append(numpy_helper.from_array(values, name))
        return name

    def integers(self, *values: int) -> str:
        """Add a vector of integers; return its name."""
        return self.weight(np.array(values, np.int64))

    def integer(self, value: int) -> str:
        """Add an integer; return its name."""
        return self.weight(np.array(value, np.int64))

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add a node with one output; return the output's name."""
        self._count += 1
        name = output or f"{operator.lower()}_{self._count}"
        self._nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def add_many(self, operator: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Add a node with several outputs; return their names."""
        self._count += 1
        names = [f"{operator.lower()}_{self._count}_{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names

    def insert(self, graph: EditedGraph, prefix: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        """Insert a whole graph.

        Args:
            graph: the graph.
            prefix: distinguishes its names from others.
            inputs: tensors to feed, by the graph's input.
            outputs: new names, by the graph's output; outputs that are not named are dropped.
        """
        inner = add_prefix(graph.proto, prefix)
        self._ir_version = max(self._ir_version, inner.ir_version)
        for imported in inner.opset_import:
            domain = "" if imported.domain == "ai.onnx" else imported.domain
            if self._imports.setdefault(domain, imported.version) != imported.version:
                raise ModelError(
                    f"{self._path}: operators {domain or 'ai.onnx'} have version {imported.version}; "
                    f"expected {self._imports[domain]}, as in the graph beside it"
                )
        for name, feed in inputs.items():
            self.add("Identity", feed, output=prefix + name)
        self._nodes.extend(inner.graph.node)
        self._weights.extend(inner.graph.initializer)
        self._functions.extend(inner.functions)
        for name, output in outputs.items():
            self.add("Identity", prefix + name, output=output)

    def build(
        self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto], directory: Path
    ) -> EditedGraph:
        """Return the finished graph."""
        graph = helper.make_graph(self._nodes, "main_graph", inputs, outputs, self._weights)
        imports = [helper.make_opsetid(domain, version) for domain, version in self._imports.items()]
        model = helper.make_model(graph, opset_imports=imports, ir_version=self._ir_version, functions=self._functions)
        return EditedGraph(model, directory)


def pack_states(assembly: Assembly, cache: str, states: Sequence[State], element_type: int) -> dict[str, str]:
    """Split a packed cache into an encoder's states.

    Args:
        assembly: the graph in the making.
        cache: name of the packed cache [B, S].
        states: of the encoder, in the order of their values in the cache.
        element_type: of the cache: FLOAT or FLOAT16.

    Returns:
        Names of the states' tensors by the encoder's input.
    """
    sizes = assembly.integers(*(state.size for state in states))
    parts = assembly.add_many("Split", cache, sizes, outputs=len(states), axis=1)
    unpacked = {}
    for state, part in zip(states, parts, strict=True):
        rows = assembly.add("Reshape", part, assembly.integers(-1, *state.row_shape))
        if state.batch_axis:
            rank, axis = len(state.shape), state.batch_axis
            rows = assembly.add("Transpose", rows, perm=[*range(1, axis + 1), 0, *range(axis + 1, rank)])
        if state.element_type != element_type:
            rows = assembly.add("Cast", rows, to=state.element_type)
        unpacked[state.input] = rows
    return unpacked


def join_states(assembly: Assembly, states: Sequence[State], names: Mapping[str, str], element_type: int, output: str) -> None:
    """Join an encoder's next states to a packed cache; the reverse of ``pack_states``.

    Args:
        assembly: the graph in the making.
        states: of the encoder.
        names: of the states' tensors, by the encoder's output.
        element_type: of the cache.
        output: name of the packed cache [B, S].
    """
    parts = []
    for state in states:
        rows = names[state.output]
        if state.element_type == TensorProto.INT64 and element_type == TensorProto.FLOAT16:
            rows = assembly.add("Min", rows, assembly.integer(FP16_INTEGER_LIMIT))
        if state.element_type != element_type:
            rows = assembly.add("Cast", rows, to=element_type)
        if state.batch_axis:
            rank, axis = len(state.shape), state.batch_axis
            rows = assembly.add("Transpose", rows, perm=[axis, *range(axis), *range(axis + 1, rank)])
        parts.append(assembly.add("Reshape", rows, assembly.integers(-1, state.size)))
    assembly.add("Concat", *parts, output=output, axis=1)


def value(name: str, element_type: int, *shape: int | str) -> onnx.ValueInfoProto:
    """Return the declaration of an input or output; a text in the shape names an open size."""
    return helper.make_tensor_value_info(name, element_type, shape)


def opset_of(graph: EditedGraph, path: Path) -> int:
    """Return a graph's version of the standard operators.

    Raises:
        ModelError: it is older than ``MIN_OPSET``.
    """
    version = next((o.version for o in graph.proto.opset_import if o.domain in ("", "ai.onnx")), 1)
    if version < MIN_OPSET:
        raise ModelError(f"{path} has operators of version {version}; expected {MIN_OPSET} or later, export it again")
    return int(version)
