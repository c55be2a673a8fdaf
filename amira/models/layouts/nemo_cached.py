"""NeMo's cache-aware encoders, as sherpa-onnx and parakeet-rs publish them.

Their chunk is a constant of the graph: one graph per latency. Features are not normalised. Nine feature frames of zeros stand
before the first chunk (NeMo's ``pad_and_drop_preencoded``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from amira.models.configs import ModelError
from amira.models.front_ends import nemo_log_mel
from amira.models.graphs import Graph, Shape, count_logits, open_session
from amira.models.layouts.nemo import merge_decoder, metadata
from amira.models.layouts.parts import CachedEncoder, Floats, Parts
from amira.models.projections import project_cache
from amira.models.surgery import Assembly, EditedGraph, State, join_states, opset_of, pack_states, value
from amira.models.vocabularies import END_OF_UTTERANCE, find_vocabulary, read_pieces, to_convention

FEATURES = "audio_signal", "processed_signal"
LENGTHS = "length", "processed_signal_length"
FRAMES = "outputs", "encoded"
FRAME_LENGTHS = "encoded_lengths", "encoded_len"
STATES = "cache_last_channel", "cache_last_time", "cache_last_channel_len"
NEXT = "{name}_next", "new_{name}", "cache_last_channel_next_len"
"""Names of a state's output; the last is that of the third state in NeMo's own export."""

SUBSAMPLING = 8
PRE_ENCODE_FEATURES = 9
"""Feature frames before a chunk that NeMo's subsampling needs."""

PUBLISHED_CONTEXT, PUBLISHED_KERNEL = 70, 8
"""Sizes of the caches of all published models but Nemotron 3.5, for graphs that leave them open without metadata."""

PROBE_CHUNKS = 32
"""Length of the input by which a graph's chunk is found, in encoder frames: more than any published chunk, 14."""


def is_cached(encoder: Graph) -> bool:
    """Whether a graph is one of these encoders."""
    return STATES[0] in encoder.inputs


def convert(files: Mapping[str, Path], cache_type: int, *, gpu: bool, projected: bool) -> Parts:
    """Convert a cache-aware model.

    Args:
        files: ``encoder``, and ``decoder_joint`` or ``decoder`` and ``joiner``.
        cache_type: ONNX element type of the packed cache: FLOAT16 or FLOAT.
        gpu: whether the front end must run on CUDA.
        projected: whether the cache has keys and values instead of the frames that they are computed from, if it can.

    Raises:
        ModelError: a file does not fit.
    """
    encoder = convert_encoder(files["encoder"], cache_type, projected=projected)
    described = metadata(EditedGraph.load(files["encoder"]))
    bins = encoder.graph.proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    if "decoder_joint" in files:
        decoder_joint: Path | EditedGraph = files["decoder_joint"]
        logits = _count_logits(Graph(files["decoder_joint"]), encoder)
    else:
        decoder_joint = merge_decoder(files["decoder"], files["joiner"], described)
        logits = int(described["vocab_size"]) + 1
    vocabulary = find_vocabulary(files["encoder"].parent)
    pieces = read_pieces(vocabulary)
    endpoints = [index for index, piece in enumerate(pieces) if piece == END_OF_UTTERANCE]
    pieces = to_convention(pieces, logits, logits - 1, vocabulary)
    front_end = nemo_log_mel(bins, gpu=gpu)
    return Parts(front_end, encoder, decoder_joint, vocabulary, bins, pieces, endpoint_tokens=endpoints)


def convert_encoder(path: Path, cache_type: int, *, projected: bool) -> CachedEncoder:
    """Convert an encoder: pack its states, and give its tensors the convention's names; see ``convert``.

    Raises:
        ModelError: it lacks a tensor, or leaves a size open that nothing else names.
    """
    graph = Graph(path)
    edited = EditedGraph.load(path)
    described = metadata(edited)
    features, lengths = (_one_of(graph, "input", names) for names in (FEATURES, LENGTHS))
    frames, frame_lengths = (_one_of(graph, "output", names) for names in (FRAMES, FRAME_LENGTHS))
    graph.check_import((features,), {})
    bins = graph.inputs[features].shape[1] or int(described.get("feat_dim", 0))
    if not bins:
        raise ModelError(f"{path}: input {features} leaves its size open; export it with fixed sizes")
    graph.check_no_others((features, lengths, *STATES, "prompt_index"))
    states = _states(graph, described)
    fixed_batch = graph.inputs[STATES[0]].shape[states[0].batch_axis] == 1
    batch: int | str = 1 if fixed_batch else "B"
    shift, window = _window(graph, described, states, (features, lengths, frame_lengths), bins)
    published = None
    if projected and (changed := project_cache(edited.proto.graph, states[0], cache_type)):
        published = partial(_encode_published, graph, states, (features, lengths, frames))
        states = [*changed, *states[1:]]

    assembly = Assembly(path, opset_of(edited, path))
    prompted = "prompt_index" in graph.inputs
    feeds = {features: "audio_signal", lengths: "length", **pack_states(assembly, "cache", states, cache_type)}
    if prompted:
        feeds["prompt_index"] = "prompt_index"
    next_states = {state.output: f"next_{state.input}" for state in states}
    assembly.insert(edited, "encoder/", feeds, {frames: "outputs", frame_lengths: "encoded_lengths", **next_states})
    join_states(assembly, states, next_states, cache_type, "cache_next")
    size = sum(state.size for state in states)
    packed = assembly.build(
        [
            value("audio_signal", TensorProto.FLOAT, batch, bins, window),
            value("length", TensorProto.INT64, batch),
            value("cache", cache_type, batch, size),
            *([value("prompt_index", TensorProto.INT64, batch)] if prompted else []),
        ],
        [
            value("outputs", TensorProto.FLOAT, batch, graph.outputs[frames].shape[1] or states[0].shape[-1], "T"),
            value("encoded_lengths", TensorProto.INT64, batch),
            value("cache_next", cache_type, batch, size),
        ],
        path.parent,
    )
    prompts, default = _prompts(path, described) if prompted else ({}, "")
    return CachedEncoder(packed, window, shift, size, fixed_batch, prompts, default, published)


def _one_of(graph: Graph, kind: str, names: tuple[str, ...]) -> str:
    """Return which of these tensors a graph has."""
    tensors = graph.inputs if kind == "input" else graph.outputs
    for name in names:
        if name in tensors:
            return name
    raise ModelError(f"{graph.path}: {kind} {' or '.join(names)} is missing; the graph has {', '.join(tensors)}")


def _states(graph: Graph, described: Mapping[str, str]) -> list[State]:
    """Return an encoder's states with all their sizes: from the graph, else from its metadata, else the published ones."""
    states = []
    for name, published in zip(
        STATES, ((None, None, PUBLISHED_CONTEXT, None), (None, None, None, PUBLISHED_KERNEL), ()), strict=True
    ):
        if name not in graph.inputs:
            raise ModelError(f"{graph.path}: input {name} is missing; the graph has {', '.join(graph.inputs)}")
        tensor = graph.inputs[name]
        output = _one_of(graph, "output", tuple(pattern.format(name=name) for pattern in NEXT))
        if len(tensor.shape) == 1:
            states.append(State(name, output, (1,), 0, tensor.type))
            continue
        if len(tensor.shape) != len(published):
            raise ModelError(f"{graph.path}: input {name} has {len(tensor.shape)} axes; expected {len(published)}")
        batch_axis, shape = _sizes(tensor.shape, [int(described.get(f"{name}_dim{i}", 0)) or None for i in (1, 2, 3)])
        sizes = [size or default for size, default in zip(shape, published, strict=True)]
        if open_axes := [axis for axis, size in enumerate(sizes) if not size and axis != batch_axis]:
            raise ModelError(
                f"{graph.path}: input {name} leaves axis {open_axes[0]} open, and no metadata {name}_dim1 … name it"
            )
        states.append(State(name, output, tuple(size or 1 for size in sizes), batch_axis, tensor.type))
    return states


def _sizes(shape: Shape, row: list[int | None]) -> tuple[int, list[int | None]]:
    """Return the batch axis of a cache and its sizes.

    Args:
        shape: as the graph declares it: batch first, or layers first.
        row: sizes without the batch that the metadata name: layers and two more.
    """
    layers = row[0]
    layers_first = shape[0] is not None and shape[0] != 1 and shape[1] in (None, 1)
    if layers and shape[0] not in (None, layers):
        layers_first = False
    batch_axis = 1 if layers_first else 0
    declared = [size for axis, size in enumerate(shape) if axis != batch_axis]
    sizes: list[int | None] = [have or named for have, named in zip(declared, row, strict=True)]
    sizes.insert(batch_axis, None)
    return batch_axis, sizes


def _window(
    graph: Graph, described: Mapping[str, str], states: list[State], names: tuple[str, str, str], bins: int
) -> tuple[int, int]:
    """Return an encoder's chunk and window in feature frames: from its metadata, else by running it on a long input."""
    if "chunk_shift" in described:
        return int(described["chunk_shift"]), int(described["window_size"])
    before = int(described.get("pre_encode_cache", PRE_ENCODE_FEATURES))
    frames = int(described.get("chunk_size_output_frames", 0)) or _probe_chunk(graph, states, names, bins, before)
    return frames * SUBSAMPLING, frames * SUBSAMPLING + before


def _probe_chunk(graph: Graph, states: list[State], names: tuple[str, str, str], bins: int, before: int) -> int:
    """Return how many encoder frames a graph gives at most."""
    features, lengths, frame_lengths = names
    size = graph.inputs[features].shape[2] or before + PROBE_CHUNKS * SUBSAMPLING
    feeds = {**_fresh(graph, states), features: np.zeros((1, bins, size), np.float32), lengths: np.array([size], np.int64)}
    try:
        found = int(open_session(graph.path).run([frame_lengths], feeds)[0][0])
    except Exception as error:  # ONNX Runtime has a class of its own for every status code
        raise ModelError(f"{graph.path} can't be run on zeros: {' '.join(str(error).split())}") from error
    if not 0 < found < PROBE_CHUNKS and graph.inputs[features].shape[2] is None:
        raise ModelError(f"{graph.path} gives {found} frames of {size} feature frames; expected a chunk of a fixed size")
    return found


def _fresh(graph: Graph, states: Sequence[State]) -> dict[str, Any]:
    """Return the inputs of a graph as it was published, for the first window of one stream, but without its features."""
    feeds = {state.input: np.zeros(state.shape, np.float32 if len(state.shape) > 1 else np.int64) for state in states}
    return feeds | ({"prompt_index": np.zeros(1, np.int64)} if "prompt_index" in graph.inputs else {})


def _encode_published(
    graph: Graph, states: Sequence[State], names: tuple[str, str, str], windows: Sequence[Floats]
) -> list[Floats]:
    """Return the frames that a graph as it was published makes of consecutive windows [1, F, W] of one stream."""
    features, lengths, frames = names
    session, feeds, encoded = open_session(graph.path), _fresh(graph, states), []
    for window in windows:
        feeds |= {features: window, lengths: np.array([window.shape[2]], np.int64)}
        made, *after = session.run([frames, *(state.output for state in states)], feeds)
        feeds |= {state.input: value for state, value in zip(states, after, strict=True)}
        encoded.append(made)
    return encoded


def _prompts(path: Path, described: Mapping[str, str]) -> tuple[dict[str, int], str]:
    """Return the number of each language, and the language of streams that name none."""
    text, config = described.get("prompt_dictionary", ""), path.parent / "config.json"
    try:
        given = json.loads(text) if text else _find(json.loads(config.read_text(encoding="utf-8")), "prompt_dictionary")
        prompts = {str(name): int(number) for name, number in given.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} takes a language by prompt_index; expected a prompt_dictionary in its metadata or in {config}"
        ) from error
    automatic = described.get("auto_prompt_id", "")
    default = next((name for name, number in prompts.items() if str(number) == automatic), "")
    default = default or ("auto" if "auto" in prompts else next(iter(prompts), ""))
    return prompts, default


def _find(content: Any, key: str) -> Any:
    """Return the value of a key at any depth of a JSON document, or None."""
    if not isinstance(content, dict):
        return None
    if key in content:
        return content[key]
    return next((found for inner in content.values() if (found := _find(inner, key)) is not None), None)


def _count_logits(decoder_joint: Graph, encoder: CachedEncoder) -> int:
    """Return the number of outputs of a joint network."""
    frames = encoder.graph.proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    state = decoder_joint.inputs.get("input_states_1")
    layers, hidden = (state.shape[0], state.shape[-1]) if state and state.shape else (0, 0)
    if not (layers and hidden):
        raise ModelError(f"{decoder_joint.path}: input input_states_1 leaves its size open; export it with fixed sizes")
    return count_logits(decoder_joint, frames, layers, hidden)
