"""icefall's transducers, as sherpa-onnx publishes them: streaming zipformer2 and offline encoders with a stateless decoder.

Their blank is token 0, a decoder sees the last tokens instead of a state, and at most one token is emitted per frame. Features
are Kaldi's filter bank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from onnx import TensorProto

from amira.models.configs import ModelError
from amira.models.front_ends import Fbank, fbank
from amira.models.graphs import Graph
from amira.models.layouts.nemo import metadata
from amira.models.layouts.parts import CachedEncoder, Parts
from amira.models.surgery import Assembly, EditedGraph, State, join_states, opset_of, pack_states, value
from amira.models.vocabularies import find_vocabulary, read_pieces, to_convention

UNKNOWN = "<unk>"
LENGTH = "x_lens"
"""Input of an offline encoder alone."""

BATCH_AXES = {"cached_key": 1, "cached_nonlin_attn": 1, "cached_val1": 1, "cached_val2": 1}
"""Axis of the batch in a zipformer2's states by the beginning of their names; in the others the batch is first."""

MIN_FEATURES = 9
"""Shortest input of an offline encoder in feature frames; its subsampling makes no frame of fewer."""

SILENCE = np.log(np.float32(np.finfo(np.float32).eps))
"""Log-mel value of silence in Kaldi's filter bank."""

FINAL_PADDING_MS = 300
"""Silence that icefall's streaming_decode.py appends to a recording."""

NEVER = np.float32(-1e30)
"""Logit of a token that is never emitted."""


def is_icefall(encoder: Graph) -> bool:
    """Whether a graph is one of icefall's encoders."""
    return "x" in encoder.inputs and "encoder_out" in encoder.outputs


def convert(files: Mapping[str, Path], cache_type: int) -> Parts:
    """Convert a model.

    Args:
        files: ``encoder``, ``decoder`` and ``joiner``.
        cache_type: ONNX element type of a streaming encoder's packed cache: FLOAT16 or FLOAT.

    Raises:
        ModelError: a file does not fit.
    """
    encoder = Graph(files["encoder"])
    encoder.check_import(("x",), {})
    bins = encoder.inputs["x"].shape[-1]
    if not bins:
        raise ModelError(f"{encoder.path}: input x leaves its size open; export it with fixed sizes")
    vocabulary = find_vocabulary(files["encoder"].parent)
    pieces = read_pieces(vocabulary)
    unknown = pieces.index(UNKNOWN) if UNKNOWN in pieces else None
    decoder_joint, logits = merge_decoder(files["decoder"], files["joiner"], unknown)
    streaming = LENGTH not in encoder.inputs
    return Parts(
        fbank(Fbank(bins)),
        _convert_streaming(encoder, bins, cache_type) if streaming else _convert_offline(encoder, bins),
        decoder_joint,
        vocabulary,
        bins,
        to_convention(pieces, logits, 0, vocabulary),
        max_symbols=1,
        fresh_features="none",
        final_padding_ms=FINAL_PADDING_MS if streaming else 0,
    )


def convert_encoder(path: Path, cache_type: int) -> CachedEncoder:
    """Convert a streaming encoder; see ``convert``."""
    encoder = Graph(path)
    return _convert_streaming(encoder, encoder.inputs["x"].shape[-1] or 0, cache_type)


def _convert_streaming(encoder: Graph, bins: int, cache_type: int) -> CachedEncoder:
    edited = EditedGraph.load(encoder.path)
    described = metadata(edited)
    if (kind := described.get("model_type", "")) != "zipformer2":
        raise ModelError(f"{encoder.path}: its metadata name the model type {kind!r}; expected 'zipformer2'")
    try:
        window, shift = int(described["T"]), int(described["decode_chunk_len"])
    except (KeyError, ValueError) as error:
        raise ModelError(f"{encoder.path}: its metadata lack {error}; expected T and decode_chunk_len") from error
    states = [_state(encoder, name) for name in encoder.inputs if name != "x"]
    frames = encoder.outputs["encoder_out"].shape[1]
    if not frames or shift % frames:
        raise ModelError(
            f"{encoder.path}: output encoder_out has {frames} frames of {shift} feature frames; expected a divisor"
        )
    fixed_batch = encoder.inputs["x"].shape[0] == 1
    batch: int | str = 1 if fixed_batch else "B"
    assembly = Assembly(encoder.path, opset_of(edited, encoder.path))
    feeds = {"x": assembly.add("Transpose", "audio_signal", perm=[0, 2, 1])}
    feeds |= pack_states(assembly, "cache", states, cache_type)
    next_states = {state.output: f"next_{state.input}" for state in states}
    assembly.insert(edited, "encoder/", feeds, {"encoder_out": "frames", **next_states})
    assembly.add("Transpose", "frames", output="outputs", perm=[0, 2, 1])
    factor = shift // frames
    rounded = assembly.add("Add", "length", assembly.integer(factor - 1))
    started = assembly.add("Div", rounded, assembly.integer(factor))
    assembly.add("Min", started, assembly.integer(frames), output="encoded_lengths")
    join_states(assembly, states, next_states, cache_type, "cache_next")
    size = sum(state.size for state in states)
    packed = assembly.build(
        [
            value("audio_signal", TensorProto.FLOAT, batch, bins, window),
            value("length", TensorProto.INT64, batch),
            value("cache", cache_type, batch, size),
        ],
        [
            value("outputs", TensorProto.FLOAT, batch, encoder.outputs["encoder_out"].shape[2] or "D", frames),
            value("encoded_lengths", TensorProto.INT64, batch),
            value("cache_next", cache_type, batch, size),
        ],
        encoder.path.parent,
    )
    return CachedEncoder(packed, window, shift, size, fixed_batch)


def _convert_offline(encoder: Graph, bins: int) -> EditedGraph:
    encoder.check_no_others(("x", LENGTH))
    edited = EditedGraph.load(encoder.path)
    assembly = Assembly(encoder.path, opset_of(edited, encoder.path))
    count = assembly.add("Gather", assembly.add("Shape", "audio_signal"), assembly.integers(2))
    missing = assembly.add("Max", assembly.add("Sub", assembly.integers(MIN_FEATURES), count), assembly.integers(0))
    pads = assembly.add("Concat", assembly.integers(0, 0, 0, 0, 0), missing, axis=0)
    padded = assembly.add("Pad", "audio_signal", pads, assembly.weight(SILENCE))
    feeds = {
        "x": assembly.add("Transpose", padded, perm=[0, 2, 1]),
        LENGTH: assembly.add("Max", "length", assembly.integer(MIN_FEATURES)),
    }
    assembly.insert(edited, "encoder/", feeds, {"encoder_out": "frames", "encoder_out_lens": "encoded_lengths"})
    assembly.add("Transpose", "frames", output="outputs", perm=[0, 2, 1])
    return assembly.build(
        [value("audio_signal", TensorProto.FLOAT, "B", bins, "T"), value("length", TensorProto.INT64, "B")],
        [
            value("outputs", TensorProto.FLOAT, "B", encoder.outputs["encoder_out"].shape[2] or "D", "T2"),
            value("encoded_lengths", TensorProto.INT64, "B"),
        ],
        encoder.path.parent,
    )


def _state(encoder: Graph, name: str) -> State:
    """Return a state of a streaming encoder; its output is called as its input, with ``new_`` before it."""
    output = f"new_{name}"
    if output not in encoder.outputs:
        raise ModelError(f"{encoder.path}: output {output} is missing; the graph has {', '.join(encoder.outputs)}")
    tensor = encoder.inputs[name]
    stem = name.rpartition("_")[0]
    batch_axis = BATCH_AXES.get(stem, 0)
    if open_axes := [axis for axis, size in enumerate(tensor.shape) if size is None and axis != batch_axis]:
        raise ModelError(f"{encoder.path}: input {name} leaves axis {open_axes[0]} open; expected only the batch, {batch_axis}")
    return State(name, output, tuple(size or 1 for size in tensor.shape), batch_axis, tensor.type)


def merge_decoder(decoder: Path, joiner: Path, unknown: int | None) -> tuple[EditedGraph, int]:
    """Merge a stateless decoder and a joiner to ``decoder_joint``.

    Ids move by one, so that the blank becomes the last. The state holds the tokens before the last one, plus one; zeros are the
    beginning. The unknown token counts as blank, as in sherpa-onnx.

    Args:
        decoder: ``y`` INT64 [N, context] → [N, J].
        joiner: two times [N, J] → logits [N, V].
        unknown: id of the unknown token, if the vocabulary has one.

    Returns:
        The graph, and the number of logits, V.

    Raises:
        ModelError: a graph has other tensors, or leaves sizes open.
    """
    graphs, edited = (Graph(decoder), Graph(joiner)), EditedGraph.load(decoder)
    shapes = [(len(graph.inputs), len(graph.outputs)) for graph in graphs]
    if shapes != [(1, 1), (2, 1)]:
        raise ModelError(
            f"{decoder} and {joiner} have {shapes[0][0]} and {shapes[1][0]} inputs; expected 1 and 2, as icefall exports them"
        )
    (context_input,), (fed,) = graphs[0].inputs, graphs[0].outputs
    (frames_input, fed_input), (logit,) = graphs[1].inputs, graphs[1].outputs
    for part in graphs:
        part.check_import([name for name in part.inputs if name != context_input], dict.fromkeys(part.inputs, 0))
    described = metadata(edited)
    context = graphs[0].inputs[context_input].shape[1] or int(described.get("context_size", 0))
    logits = graphs[1].outputs[logit].shape[1] or int(described.get("vocab_size", 0))
    size = graphs[1].inputs[frames_input].shape[1]
    if not (context and logits and size):
        raise ModelError(f"{decoder} and {joiner} leave their sizes open; expected context_size and vocab_size in the metadata")
    assembly = Assembly(decoder, opset_of(edited, decoder))
    one, first = assembly.integer(1), assembly.integers(0)
    shifted = assembly.add("Add", assembly.add("Cast", "targets", to=TensorProto.INT64), one)
    tokens = last = assembly.add("Mod", shifted, assembly.integer(logits))
    if context > 1:
        earlier = assembly.add("Cast", assembly.add("Squeeze", "input_states_1", first), to=TensorProto.INT64)
        tokens = assembly.add("Concat", assembly.add("Sub", earlier, one), last, axis=1)
        later = assembly.add("Slice", tokens, assembly.integers(1), assembly.integers(context), assembly.integers(1))
        kept = assembly.add("Cast", assembly.add("Add", later, one), to=TensorProto.FLOAT)
        assembly.add("Unsqueeze", kept, first, output="output_states_1")
    else:
        assembly.add("Identity", "input_states_1", output="output_states_1")
    assembly.insert(edited, "decoder/", {context_input: tokens}, {fed: "fed"})
    frames = assembly.add("Transpose", "encoder_outputs", perm=[0, 2, 1])
    shape = assembly.add("Shape", frames)
    rows = assembly.add("Reshape", frames, assembly.integers(-1, size))
    spread = assembly.add("Expand", assembly.add("Unsqueeze", "fed", assembly.integers(1)), shape)
    spread = assembly.add("Reshape", spread, assembly.integers(-1, size))
    joint = EditedGraph.load(joiner)
    assembly.insert(joint, "joiner/", {frames_input: rows, fed_input: spread}, {logit: "logits"})

    def columns(begin: int, end: int) -> str:
        return assembly.add("Slice", "logits", assembly.integers(begin), assembly.integers(end), assembly.integers(1))

    blank, parts = columns(0, 1), [columns(1, logits)]
    if unknown:
        score = columns(unknown, unknown + 1)
        blank = assembly.add("Max", blank, score)
        never = assembly.add("Expand", assembly.weight(NEVER.reshape(1, 1)), assembly.add("Shape", score))
        parts = [columns(1, unknown), never, columns(unknown + 1, logits)]
    ordered = assembly.add("Concat", *parts, blank, axis=1)
    batch_and_time = assembly.add("Slice", shape, first, assembly.integers(2), first)
    whole = assembly.add("Concat", batch_and_time, assembly.integers(1, logits), axis=0)
    assembly.add("Reshape", ordered, whole, output="outputs")
    assembly.add("Identity", "input_states_2", output="output_states_2")
    assembly.add("Identity", "target_length", output="prednet_lengths")
    state = TensorProto.FLOAT, 1, "B", max(1, context - 1)
    graph = assembly.build(
        [
            value("encoder_outputs", TensorProto.FLOAT, "B", size, "T"),
            value("targets", TensorProto.INT32, "B", 1),
            value("target_length", TensorProto.INT32, "B"),
            value("input_states_1", *state),
            value("input_states_2", *state),
        ],
        [
            value("outputs", TensorProto.FLOAT, "B", "T", 1, logits),
            value("prednet_lengths", TensorProto.INT32, "B"),
            value("output_states_1", *state),
            value("output_states_2", *state),
        ],
        decoder.parent,
    )
    return graph, logits
