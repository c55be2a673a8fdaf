"""Cache the keys and values of an attention instead of the frames that they are computed from.

NeMo's encoders cache the frames that enter each layer's attention, and project all of them to keys and values in every call:
70 old frames beside 2 to 14 new ones. A projection acts on each frame by itself, so the projected frames can be cached. The
cache is twice as large then, and a chunk costs what its own frames cost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from amira.models.surgery import State, value

PROJECTIONS = {"MatMul", "MatMulInteger"}
BY_FRAME = PROJECTIONS | {"Add", "Mul", "Cast", "Identity", "DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear"}
"""Operators that act on each frame by itself if their other inputs are constants. Dynamic quantisation does so up to its scale,
which is then that of the new frames."""

FRAMES_AXIS = 1
"""Axis of the frames in a layer's cache [B, C, D]."""


@dataclass
class _Attention:
    """The part of a layer that is rewritten.

    Attributes:
        cached: tensor of the layer's cache [B, C, D].
        fresh: tensor of the new frames [B, T, D].
        joined: tensor of both [B, C + T, D].
        by_frame: nodes that project it, each by its first output.
        projected: their results that other nodes use [B, C + T, D]: keys and values.
    """

    cached: str
    fresh: str
    joined: str
    by_frame: dict[str, onnx.NodeProto]
    projected: list[str]


def project_cache(graph: onnx.GraphProto, state: State, element_type: int) -> list[State] | None:
    """Rewrite an encoder so that the keys and values of each layer are states instead of its frames.

    Args:
        graph: changed in place, unless its structure is another one.
        state: of the attention: layers, C and D beside the batch.
        element_type: ONNX element type of the new states: that of the packed cache, so that old frames are not converted.

    Returns:
        The new states, or None if the graph has another structure.
    """
    layers, context, _ = state.row_shape
    found = _find_attentions(graph, state.input)
    constants = _constants(graph)
    widths = {_width(attention, name, constants) for attention in found for name in attention.projected}
    if len(found) != layers or not all(attention.projected for attention in found) or 0 in widths:
        return None
    states = []
    for number, attention in enumerate(found):
        for i, tensor in enumerate(attention.projected):
            name = f"{state.input}_{number}_{i}"
            shape = 1, context, _width(attention, tensor, constants)
            states.append(State(name, f"{name}_next", shape, 0, element_type))
        _rewrite(graph, attention, states[-len(attention.projected) :])
    for tensors, old in ((graph.input, state.input), (graph.output, state.output)):
        tensors.remove(next(tensor for tensor in tensors if tensor.name == old))
    graph.input.extend(value(new.input, element_type, "B", *new.row_shape) for new in states)
    graph.output.extend(value(new.output, element_type, "B", *new.row_shape) for new in states)
    _drop_unused(graph)
    _sort(graph)
    return states


def _find_attentions(graph: onnx.GraphProto, cache: str) -> list[_Attention]:
    """Return the attentions of a graph in their order, as far as their structure is known."""
    constants = _constants(graph)
    of_cache = _closure(graph, {cache}, constants)
    consumers = _consumers(graph.node)
    found = []
    for node in graph.node:
        if node.op_type == "Concat" and _axis(node) == FRAMES_AXIS and len(node.input) == 2:  # noqa: PLR2004 (cached, new)
            cached, fresh = node.input
            if cached in of_cache and fresh not in of_cache and fresh not in constants:
                attention = _attention(graph, consumers, constants, cached, fresh, node.output[0])
                if attention:
                    found.append(attention)
    return found


def _attention(
    graph: onnx.GraphProto,
    consumers: dict[str, list[onnx.NodeProto]],
    constants: dict[str, tuple[int, ...]],
    cached: str,
    fresh: str,
    joined: str,
) -> _Attention | None:
    """Return the attention around a join of old and new frames; None if it projects nothing, or has no next cache."""
    inside = {joined}
    by_frame: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        acts = node.op_type in BY_FRAME and inside.intersection(node.input)
        if acts and all(name in inside or _is_same_for_frames(node, name, constants) for name in node.input):
            by_frame[node.output[0]] = node
            inside.update(node.output)
    outside = [tensor for tensor in inside if any(node.output[0] not in by_frame for node in consumers[tensor])]
    projected = [name for node in by_frame.values() for name in node.output if name in outside]
    if not any(node.op_type in PROJECTIONS for node in by_frame.values()):
        return None
    return _Attention(cached, fresh, joined, by_frame, projected)


def _rewrite(graph: onnx.GraphProto, attention: _Attention, states: Sequence[State]) -> None:
    """Project the new frames alone, and join keys and values with the cached ones."""
    for node in attention.by_frame.values():
        _replace(node, attention.joined, attention.fresh)
    sizes, count, axis = (f"{states[0].input}_{part}" for part in ("sizes", "count", "axis"))
    graph.initializer.append(numpy_helper.from_array(np.array([FRAMES_AXIS]), axis))
    added = [
        helper.make_node("Shape", [attention.fresh], [sizes]),
        helper.make_node("Gather", [sizes, axis], [count]),
    ]
    for state, tensor in zip(states, attention.projected, strict=True):
        cached, whole, fresh, kept = (f"{state.input}_{part}" for part in ("cached", "whole", "fresh", "kept"))
        for node in graph.node:
            if node.output[0] not in attention.by_frame:
                _replace(node, tensor, whole)
            if node.op_type == "Shape":
                _replace(node, attention.joined, whole)
        end = f"{state.input}_end"
        graph.initializer.append(numpy_helper.from_array(np.array([np.iinfo(np.int64).max]), end))
        added += [
            helper.make_node("Cast", [state.input], [cached], to=TensorProto.FLOAT),
            helper.make_node("Concat", [cached, tensor], [whole], axis=FRAMES_AXIS),
            helper.make_node("Cast", [tensor], [fresh], to=state.element_type),
            helper.make_node("Slice", [state.input, count, end, axis], [kept]),
            helper.make_node("Concat", [kept, fresh], [state.output], axis=FRAMES_AXIS),
        ]
    graph.node.extend(added)


def _constants(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Return the sizes of a graph's constants by name."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            sizes[node.output[0]] = next((tuple(a.t.dims) for a in node.attribute if a.name == "value"), ())
        elif node.op_type == "Identity" and node.input[0] in sizes:
            sizes[node.output[0]] = sizes[node.input[0]]
    return sizes


def _closure(graph: onnx.GraphProto, names: set[str], constants: Collection[str]) -> set[str]:
    """Return the tensors that are computed from these and constants alone."""
    closure = set(names)
    for node in graph.node:
        if closure.intersection(node.input) and all(not name or name in closure or name in constants for name in node.input):
            closure.update(node.output)
    return closure


def _consumers(nodes: Iterable[onnx.NodeProto]) -> dict[str, list[onnx.NodeProto]]:
    consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            consumers[name].append(node)
    return consumers


def _is_same_for_frames(node: onnx.NodeProto, name: str, constants: dict[str, tuple[int, ...]]) -> bool:
    """Whether an input is a constant that treats all frames alike: a matrix, a number, or a row of values."""
    sizes = constants.get(name)
    if sizes is None:
        return not name
    if node.op_type in PROJECTIONS and name == node.input[1]:
        return len(sizes) == 2  # noqa: PLR2004 (rows, columns)
    return int(np.prod(sizes)) == (sizes[-1] if sizes else 1)


def _width(attention: _Attention, tensor: str, constants: dict[str, tuple[int, ...]]) -> int:
    """Return how many values a projection gives for a frame: the columns of its matrix."""
    made_by = {name: node for node in attention.by_frame.values() for name in node.output}
    node = made_by[tensor]
    while node.op_type not in PROJECTIONS:
        names = [name for name in node.input if name in made_by]
        # Of the scales' product and the projection, the latter is the one whose chain has a matrix.
        following = next((made_by[name] for name in names if _has_matrix(made_by, name)), None)
        if following is None:
            return 0
        node = following
    return constants[node.input[1]][-1]


def _has_matrix(made_by: dict[str, onnx.NodeProto], name: str) -> bool:
    node = made_by.get(name)
    return node is not None and (node.op_type in PROJECTIONS or any(_has_matrix(made_by, other) for other in node.input))


def _axis(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)


def _replace(node: onnx.NodeProto, old: str, new: str) -> None:
    for i, name in enumerate(node.input):
        if name == old:
            node.input[i] = new


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove the nodes and weights that no output depends on."""
    nodes = list(graph.node)
    made_by = {name: index for index, node in enumerate(nodes) for name in node.output}
    waiting, seen = [output.name for output in graph.output], set()
    while waiting:
        index = made_by.get(waiting.pop())
        if index is not None and index not in seen:
            seen.add(index)
            waiting.extend(_uses(nodes[index]))
    _keep(graph, sorted(seen))
    used = {name for node in graph.node for name in _uses(node)}
    weights = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(weights)


def _sort(graph: onnx.GraphProto) -> None:
    """Order the nodes so that each follows those that it depends on."""
    made_by = {name: i for i, node in enumerate(graph.node) for name in node.output}
    nodes, order, done = list(graph.node), [], set()
    for first in range(len(nodes)):
        waiting = [first]
        while waiting:
            index = waiting[-1]
            missing = [made_by[name] for name in _uses(nodes[index]) if name in made_by and made_by[name] not in done]
            if index in done or not missing:
                waiting.pop()
                if index not in done:
                    done.add(index)
                    order.append(index)
            else:
                waiting.extend(missing)
    _keep(graph, order)


def _keep(graph: onnx.GraphProto, indices: Sequence[int]) -> None:
    """Keep these nodes, in this order."""
    kept = [onnx.NodeProto.FromString(graph.node[index].SerializeToString()) for index in indices]
    del graph.node[:]
    graph.node.extend(kept)


def _uses(node: onnx.NodeProto) -> list[str]:
    """Return the tensors that a node depends on, those of its branches included."""
    inner = [name for attribute in node.attribute for other in attribute.g.node for name in _uses(other)]
    return [*node.input, *inner]
