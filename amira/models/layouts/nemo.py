"""NeMo's transducers without a cache: ``encoder``, and ``decoder_joint`` or sherpa-onnx's ``decoder`` and ``joiner``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onnx import TensorProto

from amira.models.configs import ModelError
from amira.models.front_ends import nemo_front_end
from amira.models.graphs import Graph
from amira.models.layouts.parts import Parts
from amira.models.surgery import Assembly, EditedGraph, opset_of, value
from amira.models.vocabularies import BLANK_NAMES, find_vocabulary, read_pieces, to_convention

STATES = 2
"""Number of state tensors of NeMo's LSTM predictor."""


def metadata(graph: EditedGraph) -> dict[str, str]:
    """Return a graph's metadata."""
    return {entry.key: entry.value for entry in graph.proto.metadata_props}


def merge_decoder(decoder: Path, joiner: Path, encoder_metadata: Mapping[str, str]) -> EditedGraph:
    """Merge sherpa-onnx's ``decoder`` and ``joiner`` of a NeMo model into one ``decoder_joint``.

    The decoder's tensors are known by their order: targets, their lengths, two states; outputs in the same order.

    Args:
        decoder: ``targets``, ``target_length`` and two states [L, B, H] → [B, H, 1], lengths and two states.
        joiner: encoder frames [B, D, T] and decoder outputs [B, H, U] → logits [B, T, U, V + 1].
        encoder_metadata: names sizes that the decoder leaves open.

    Raises:
        ModelError: a graph has other tensors.
    """
    graphs = Graph(decoder), Graph(joiner)
    for graph, inputs, outputs in zip(graphs, (2 + STATES, 2), (2 + STATES, 1), strict=True):
        if (len(graph.inputs), len(graph.outputs)) != (inputs, outputs):
            raise ModelError(
                f"{graph.path} has the inputs {', '.join(graph.inputs)} and the outputs {', '.join(graph.outputs)}; "
                f"expected {inputs} inputs and {outputs} outputs"
            )
    frames, fed = graphs[1].inputs
    targets, lengths, *before = graphs[0].inputs
    predicted, predicted_lengths, *after = graphs[0].outputs
    graphs[0].check_import(before, {targets: 0, before[0]: 1})
    graphs[1].check_import((frames, fed), {frames: 0, fed: 0})
    size = graphs[1].inputs[frames].shape[1] or 0
    layers, _, hidden = graphs[0].inputs[before[0]].shape
    layers = layers or int(encoder_metadata.get("pred_rnn_layers", 0))
    hidden = hidden or int(encoder_metadata.get("pred_hidden", 0))
    if not (layers and hidden):
        raise ModelError(f"{decoder}: input {before[0]} leaves its sizes open, and the encoder's metadata do not name them")
    edited = EditedGraph.load(decoder)
    assembly = Assembly(decoder, opset_of(edited, decoder))
    feeds = dict(zip(graphs[0].inputs, ("targets", "target_length", "input_states_1", "input_states_2"), strict=True))
    results = {predicted: "predicted", predicted_lengths: "prednet_lengths", after[0]: "output_states_1"}
    assembly.insert(edited, "decoder/", feeds, {**results, after[1]: "output_states_2"})
    edited_joiner = EditedGraph.load(joiner)
    (logits,) = graphs[1].outputs
    assembly.insert(edited_joiner, "joiner/", {frames: "encoder_outputs", fed: "predicted"}, {logits: "outputs"})
    state = TensorProto.FLOAT, layers, "B", hidden
    return assembly.build(
        [
            value("encoder_outputs", TensorProto.FLOAT, "B", size or "D", "T"),
            value("targets", TensorProto.INT32, "B", graphs[0].inputs[targets].shape[1] or "U"),
            value("target_length", graphs[0].inputs[lengths].type, "B"),
            value("input_states_1", *state),
            value("input_states_2", *state),
        ],
        [
            value("outputs", TensorProto.FLOAT, "B", "T", "U", graphs[1].outputs[logits].shape[-1] or "V"),
            value("prednet_lengths", TensorProto.INT32, "B"),
            value("output_states_1", *state),
            value("output_states_2", *state),
        ],
        decoder.parent,
    )


def convert(files: Mapping[str, Path], *, gpu: bool) -> Parts:
    """Convert sherpa-onnx's three files of a NeMo model without a cache.

    Raises:
        ModelError: a file does not fit.
    """
    encoder = Graph(files["encoder"])
    described = metadata(EditedGraph.load(files["encoder"]))
    bins = encoder.inputs["audio_signal"].shape[1] or int(described.get("feat_dim", 0))
    if described.get("normalize_type", "per_feature") != "per_feature":
        raise ModelError(
            f"{encoder.path}: its metadata name the normalisation {described['normalize_type']!r}; expected 'per_feature'"
        )
    vocabulary = find_vocabulary(files["encoder"].parent)
    decoder_joint = merge_decoder(files["decoder"], files["joiner"], described)
    pieces = read_pieces(vocabulary)
    count = len(pieces) + (pieces[-1] not in BLANK_NAMES)
    pieces = to_convention(pieces, count, count - 1, vocabulary)
    return Parts(nemo_front_end(bins, gpu=gpu), files["encoder"], decoder_joint, vocabulary, bins, pieces)
