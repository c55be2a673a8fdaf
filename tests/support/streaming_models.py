"""Small cached and icefall transducers with random weights, in the layouts that they are published in.

They recognise nothing, but their tensors have the names, types, axes and roles of the real exports, so that sherpa-onnx loads
them: a convolutional subsampling, attention over a cache, causal convolutions with a cache, an LSTM or stateless predictor, a
joint network. Seeds and biases are chosen for many different tokens on speech.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from tests.support.synthetic import GraphBuilder

FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
Floats = npt.NDArray[np.float32]

BEHIND_EVERYTHING = 2**31
FEATURE_MEAN, FEATURE_SCALE = -8.0, 0.3
"""Of log-mel features of speech, roughly."""

LANGUAGES = {"auto": 5, "en-US": 0, "de-DE": 1}


def declare(name: str, element_type: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element_type, shape)


def save(
    path: Path,
    graph: GraphBuilder,
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    metadata: dict[str, Any] | None = None,
    external: bool = False,
) -> None:
    """Write a graph with metadata."""
    model = graph.model(inputs, outputs, full_check=False)
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    if external:
        onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=256)
    else:
        onnx.save_model(model, path)


@dataclass(frozen=True)
class NemoShape:
    """What distinguishes cache-aware NeMo models.

    Attributes:
        features: values of a feature frame.
        right: attention's look-ahead in encoder frames; the chunk has one more.
        context: attention's cache in encoder frames.
        kernel: cache of the convolutions in encoder frames.
        layers, size: of the encoder.
        pieces: size of the vocabulary without the blank.
        hidden: size of the predictor.
        prompted: whether the encoder takes a language.
        feed_forward: number of feed-forward networks per layer; a conformer has two.
        seed: of the weights.
        blank_bias: added to the blank's logit.
    """

    features: int = 80
    right: int = 1
    context: int = 14
    kernel: int = 4
    layers: int = 2
    size: int = 32
    pieces: int = 40
    hidden: int = 24
    prompted: bool = False
    feed_forward: int = 0
    seed: int = 0
    blank_bias: float = 4.0

    @property
    def chunk(self) -> int:
        """Encoder frames of a chunk."""
        return self.right + 1

    @property
    def chunk_features(self) -> int:
        return 8 * self.chunk

    @property
    def window_features(self) -> int:
        return 9 + self.chunk_features

    @property
    def metadata(self) -> dict[str, Any]:
        """As sherpa-onnx's export scripts write it."""
        shape = {
            "vocab_size": self.pieces,
            "window_size": self.window_features,
            "chunk_shift": self.chunk_features,
            "normalize_type": "",
            "cache_last_channel_dim1": self.layers,
            "cache_last_channel_dim2": self.context,
            "cache_last_channel_dim3": self.size,
            "cache_last_time_dim1": self.layers,
            "cache_last_time_dim2": self.size,
            "cache_last_time_dim3": self.kernel,
            "pred_rnn_layers": 1,
            "pred_hidden": self.hidden,
            "subsampling_factor": 8,
            "feat_dim": self.features,
            "model_type": "EncDecHybridRNNTCTCBPEModel",
            "version": 1,
            "model_author": "NeMo",
        }
        if self.prompted:
            shape |= {"prompt_dictionary": json.dumps(LANGUAGES), "auto_prompt_id": LANGUAGES["auto"]}
        return shape


def build_nemo_cached(directory: Path, shape: NemoShape, *, layout: str = "sherpa-onnx", external: bool = False) -> None:
    """Write a cache-aware model.

    Args:
        directory: where to.
        shape: of the model.
        layout: ``sherpa-onnx`` (three files, batch first), ``nemotron`` (parakeet-rs: two files, batch fixed at 1) or ``eou``
            (parakeet-rs: two files, layers first).
        external: whether the encoder's weights are in a file of their own.
    """
    random = np.random.default_rng(shape.seed)
    _nemo_encoder(directory / "encoder.onnx", shape, random, layout, external)
    weights = _NemoDecoder.draw(shape, random)
    if layout == "sherpa-onnx":
        weights.save_decoder(directory / "decoder.onnx", shape)
        weights.save_joiner(directory / "joiner.onnx", shape)
        write_tokens(directory / "tokens.txt", [*(f"▁w{i}" for i in range(shape.pieces)), "<blk>"])
        return
    weights.save_decoder_joint(directory / "decoder_joint.onnx", shape)
    if layout == "nemotron":
        (directory / "tokenizer.model").write_bytes(sentencepiece_model([f"▁w{i}" for i in range(shape.pieces)]))
        if shape.prompted:
            languages = {"model_defaults": {"prompt_dictionary": LANGUAGES}}
            (directory / "config.json").write_text(json.dumps(languages), encoding="utf-8")
    else:
        ordinary = {f"▁w{i}": i for i in range(shape.pieces - 2)}
        added = [{"id": shape.pieces - 2, "content": "<EOU>"}, {"id": shape.pieces - 1, "content": "<EOB>"}]
        content: dict[str, Any] = {"model": {"type": "BPE", "vocab": ordinary}, "added_tokens": added}
        (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def write_tokens(path: Path, pieces: list[str]) -> None:
    path.write_text("".join(f"{piece} {index}\n" for index, piece in enumerate(pieces)), encoding="utf-8")


def sentencepiece_model(pieces: list[str]) -> bytes:
    """A SentencePiece model of these pieces, with a score and a trainer's field that a reader must skip."""

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    messages = [field(1, piece.encode()) + bytes([2 << 3 | 5, 0, 0, 128, 63]) for piece in pieces]
    return b"".join(field(1, message) for message in messages) + field(2, b"\x08\x01")


def _nemo_encoder(  # noqa: PLR0915 (one graph, in order)
    path: Path, shape: NemoShape, random: np.random.Generator, layout: str, external: bool
) -> None:
    graph = GraphBuilder()
    size, layers_first = shape.size, layout != "sherpa-onnx"
    names = {
        "sherpa-onnx": ("audio_signal", "length", "outputs", "encoded_lengths", "{}_next", "cache_last_channel_next_len"),
        "nemotron": ("processed_signal", "processed_signal_length", "encoded", "encoded_len", "{}_next", "{}_next"),
        "eou": ("audio_signal", "length", "outputs", "encoded_lengths", "new_{}", "new_{}"),
    }[layout]
    signal, signal_length, frames_name, lengths_name, next_name, next_length_name = names
    next_length = next_length_name.format("cache_last_channel_len")

    features = graph.add("Squeeze", graph.add("Shape", signal, start=2, end=3))
    index = graph.add("Range", graph.integer(0), features, graph.integer(1))
    inside = graph.add("Less", index, graph.add("Unsqueeze", signal_length, graph.integers(1, 2)))
    scaled = graph.add("Mul", graph.add("Sub", signal, _scalar(graph, FEATURE_MEAN)), _scalar(graph, FEATURE_SCALE))
    x = graph.add("Mul", scaled, graph.add("Cast", inside, to=FLOAT))
    length, channels = signal_length, shape.features
    for _ in range(3):
        kernel = _normal(random, 1.6 / np.sqrt(channels * 3), size, channels, 3)
        bias = _normal(random, 0.1, size)
        convolved = graph.add("Conv", x, graph.weight(kernel), graph.weight(bias), strides=[2], pads=[2, 1])
        x, channels = graph.add("Relu", convolved), size
        length = graph.add("Add", graph.add("Div", length, graph.integer(2)), graph.integer(1))
    chunk = graph.add("Sub", graph.add("Max", length, graph.integer(2)), graph.integer(2))
    graph.add("Min", chunk, graph.integer(shape.chunk), output=lengths_name)
    kept = graph.add("Slice", x, graph.integers(2), graph.integers(2 + shape.chunk), graph.integers(2))
    x = graph.add("Transpose", kept, perm=[0, 2, 1])

    def by_layer(cache: str) -> str:
        return graph.add("Transpose", cache, perm=[1, 0, 2, 3]) if layers_first else cache

    channel_cache, time_cache = by_layer("cache_last_channel"), by_layer("cache_last_time")
    channels_next, times_next = [], []
    for layer in range(shape.layers):
        number = graph.integer(layer)
        keys = graph.add("Concat", graph.add("Gather", channel_cache, number, axis=1), x, axis=1)
        query, key, value = (
            graph.add("MatMul", rows, graph.weight(_normal(random, 1 / np.sqrt(size), size, size))) for rows in (x, keys, keys)
        )
        scores = graph.add("MatMul", query, graph.add("Transpose", key, perm=[0, 2, 1]))
        positions = graph.add("Squeeze", graph.add("Shape", keys, start=1, end=2))
        place = graph.add("Range", graph.integer(0), positions, graph.integer(1))
        empty = graph.add("Sub", graph.integer(shape.context), "cache_last_channel_len")
        masked = graph.add("Less", place, graph.add("Unsqueeze", empty, graph.integers(1, 2)))
        attention = graph.add("Softmax", graph.add("Where", masked, _scalar(graph, -1e4), scores), axis=-1)
        y = graph.add("Add", x, graph.add("MatMul", attention, value))
        everything = graph.integers(BEHIND_EVERYTHING)
        channel = graph.add("Slice", keys, graph.integers(-shape.context), everything, graph.integers(1))
        channels_next.append(graph.add("Unsqueeze", channel, graph.integers(1)))
        for _ in range(shape.feed_forward):
            inner = graph.add("MatMul", y, graph.weight(_normal(random, 1 / np.sqrt(size), size, 4 * size)))
            outer = graph.weight(_normal(random, 0.5 / np.sqrt(4 * size), 4 * size, size))
            y = graph.add("Add", y, graph.add("MatMul", graph.add("Relu", inner), outer))
        turned = graph.add("Transpose", y, perm=[0, 2, 1])
        history = graph.add("Concat", graph.add("Gather", time_cache, number, axis=1), turned, axis=2)
        depthwise = _normal(random, 1 / np.sqrt(shape.kernel + 1), size, 1, shape.kernel + 1)
        convolved = graph.add("Conv", history, graph.weight(depthwise), group=size)
        recent = graph.add("Slice", history, graph.integers(-shape.kernel), everything, graph.integers(2))
        times_next.append(graph.add("Unsqueeze", recent, graph.integers(1)))
        added = graph.add("Transpose", graph.add("Add", turned, convolved), perm=[0, 2, 1])
        ones, zeros = np.ones(size, np.float32), np.zeros(size, np.float32)
        x = graph.add("LayerNormalization", added, graph.weight(ones), graph.weight(zeros), axis=-1)
    for parts, name in ((channels_next, "cache_last_channel"), (times_next, "cache_last_time")):
        joined = graph.add("Concat", *parts, axis=1)
        graph.add("Transpose" if layers_first else "Identity", joined, output=next_name.format(name),
                  **({"perm": [1, 0, 2, 3]} if layers_first else {}))  # fmt: skip
    if shape.prompted:
        table = graph.weight(_normal(random, 0.7, 8, size))
        x = graph.add("Add", x, graph.add("Unsqueeze", graph.add("Gather", table, "prompt_index"), graph.integers(1)))
    graph.add("Transpose", x, output=frames_name, perm=[0, 2, 1])
    longer = graph.add("Add", "cache_last_channel_len", graph.integer(shape.chunk))
    graph.add("Min", longer, graph.integer(shape.context), output=next_length)

    batch: int | str = 1 if layout == "nemotron" else "B"
    layers = shape.layers

    def cache(name: str, *row: int | str) -> onnx.ValueInfoProto:
        return declare(name, FLOAT, *((layers, batch, *row) if layers_first else (batch, layers, *row)))

    context, kernel_cache = (shape.context, shape.kernel) if layers_first else ("C", "K")  # NeMo leaves them open
    metadata: dict[str, Any] = {}
    if layout == "sherpa-onnx":
        metadata = shape.metadata
    elif layout == "nemotron":
        metadata = {"chunk_size_output_frames": shape.chunk, "pre_encode_cache": 9}
    save(
        path,
        graph,
        [
            declare(signal, FLOAT, batch, shape.features, "T"),
            declare(signal_length, INT64, batch),
            cache("cache_last_channel", context, size),
            cache("cache_last_time", size, kernel_cache),
            declare("cache_last_channel_len", INT64, batch),
            *([declare("prompt_index", INT64, batch)] if shape.prompted else []),
        ],
        [
            declare(frames_name, FLOAT, batch, size, "To"),
            declare(lengths_name, INT64, batch),
            cache(next_name.format("cache_last_channel"), context, size),
            cache(next_name.format("cache_last_time"), size, kernel_cache),
            declare(next_length, INT64, batch),
        ],
        metadata,
        external,
    )


@dataclass
class _NemoDecoder:
    """Weights of an LSTM predictor and a joint network."""

    embedding: Floats
    lstm: tuple[Floats, Floats, Floats]
    encoder: Floats
    predictor: Floats
    output: Floats
    bias: Floats

    @classmethod
    def draw(cls, shape: NemoShape, random: np.random.Generator, joint: int = 32) -> _NemoDecoder:
        hidden, outputs = shape.hidden, shape.pieces + 1
        embedding = _normal(random, 1, outputs, hidden)
        embedding[-1] = 0
        deviation = 1 / np.sqrt(hidden)
        lstm = (
            _normal(random, deviation, 1, 4 * hidden, hidden),
            _normal(random, deviation, 1, 4 * hidden, hidden),
            _normal(random, 0.1, 1, 8 * hidden),
        )
        bias = np.zeros(outputs, np.float32)
        bias[-1] = shape.blank_bias
        return cls(
            embedding,
            lstm,
            _normal(random, 2.5 / np.sqrt(shape.size), shape.size, joint),
            _normal(random, 5 / np.sqrt(hidden), hidden, joint),
            _normal(random, 3 / np.sqrt(joint), joint, outputs),
            bias,
        )

    def _predict(self, graph: GraphBuilder, states: tuple[str, str], outputs: tuple[str, str], hidden: int) -> str:
        """Add the predictor; return its outputs [B, H, 1]."""
        embedded = graph.add("Gather", graph.weight(self.embedding), graph.add("Transpose", "targets", perm=[1, 0]))
        weights = [graph.weight(values) for values in self.lstm]
        fed, *_ = graph.add_many("LSTM", embedded, *weights, "", *states, outputs=["fed", *outputs], hidden_size=hidden)
        graph.add("Identity", "target_length", output="prednet_lengths")
        return graph.add("Transpose", graph.add("Squeeze", fed, graph.integers(1)), perm=[1, 2, 0])

    def _join(self, graph: GraphBuilder, frames: str, fed: str) -> None:
        encoded = graph.add("MatMul", graph.add("Transpose", frames, perm=[0, 2, 1]), graph.weight(self.encoder))
        predicted = graph.add("MatMul", graph.add("Transpose", fed, perm=[0, 2, 1]), graph.weight(self.predictor))
        both = graph.add("Unsqueeze", encoded, graph.integers(2)), graph.add("Unsqueeze", predicted, graph.integers(1))
        logits = graph.add("MatMul", graph.add("Tanh", graph.add("Add", *both)), graph.weight(self.output))
        graph.add("Add", logits, graph.weight(self.bias), output="outputs")

    def save_decoder(self, path: Path, shape: NemoShape) -> None:
        """With the accidental names of the state tensors that PyTorch's exporter gives."""
        graph = GraphBuilder()
        fed = self._predict(graph, ("states.1", "onnx::LSTM_3"), ("states", "162"), shape.hidden)
        graph.add("Identity", fed, output="outputs")
        state = FLOAT, 1, "B", shape.hidden
        save(
            path,
            graph,
            [declare("targets", INT32, "B", "U"), declare("target_length", INT32, "B"), declare("states.1", *state),
             declare("onnx::LSTM_3", *state)],
            [declare("outputs", FLOAT, "B", shape.hidden, "U"), declare("prednet_lengths", INT32, "B"),
             declare("states", *state), declare("162", *state)],
        )  # fmt: skip

    def save_joiner(self, path: Path, shape: NemoShape) -> None:
        graph = GraphBuilder()
        self._join(graph, "encoder_outputs", "decoder_outputs")
        save(
            path,
            graph,
            [
                declare("encoder_outputs", FLOAT, "B", shape.size, "T"),
                declare("decoder_outputs", FLOAT, "B", shape.hidden, "U"),
            ],
            [declare("outputs", FLOAT, "B", "T", "U", shape.pieces + 1)],
        )

    def save_decoder_joint(self, path: Path, shape: NemoShape) -> None:
        graph = GraphBuilder()
        fed = self._predict(graph, ("input_states_1", "input_states_2"), ("output_states_1", "output_states_2"), shape.hidden)
        self._join(graph, "encoder_outputs", fed)
        state = FLOAT, 1, "B", shape.hidden
        save(
            path,
            graph,
            [declare("encoder_outputs", FLOAT, "B", shape.size, "T"), declare("targets", INT32, "B", "U"),
             declare("target_length", INT32, "B"), declare("input_states_1", *state), declare("input_states_2", *state)],
            [declare("outputs", FLOAT, "B", "T", "U", shape.pieces + 1), declare("prednet_lengths", INT32, "B"),
             declare("output_states_1", *state), declare("output_states_2", *state)],
        )  # fmt: skip


@dataclass(frozen=True)
class IcefallShape:
    """What distinguishes icefall's models.

    Attributes:
        chunk: encoder frames of 20 ms in a chunk; the output has half of them.
        left: attention's cache in such frames.
        layers, size: of the encoder.
        joint: size of the joint network.
        pieces: size of the vocabulary with the blank.
        context: number of tokens that the decoder sees.
        seed: of the weights.
        blank_bias: added to the blank's logit.
    """

    chunk: int = 16
    left: int = 8
    layers: int = 2
    size: int = 24
    joint: int = 32
    pieces: int = 50
    context: int = 2
    seed: int = 0
    blank_bias: float = 5.0


EMBEDDED = 128
"""Channels of zipformer2's subsampling, whose cache is [N, 128, 3, 19]."""


def build_icefall(directory: Path, shape: IcefallShape, *, streaming: bool = True, pieces: list[str] | None = None) -> None:
    """Write a streaming zipformer2 or an offline transducer."""
    random = np.random.default_rng(shape.seed)
    (_zipformer if streaming else _offline_encoder)(directory / "encoder.onnx", shape, random)
    _stateless_decoder(directory / "decoder.onnx", shape, random)
    graph = GraphBuilder()
    bias = np.zeros(shape.pieces, np.float32)
    bias[0] = shape.blank_bias
    both = graph.add("Tanh", graph.add("Add", "encoder_out", "decoder_out"))
    weights = graph.weight(_normal(random, 1, shape.joint, shape.pieces))
    graph.add("Gemm", both, weights, graph.weight(bias), output="logit")
    joint = FLOAT, "N", shape.joint
    save(
        directory / "joiner.onnx",
        graph,
        [declare("encoder_out", *joint), declare("decoder_out", *joint)],
        [declare("logit", FLOAT, "N", shape.pieces)],
        {"joiner_dim": shape.joint},
    )
    names = pieces or ["<blk>", "<sos/eos>", "<unk>", *(f"▁w{i}" for i in range(3, shape.pieces))]
    write_tokens(directory / "tokens.txt", names)


def _stateless_decoder(path: Path, shape: IcefallShape, random: np.random.Generator) -> None:
    graph = GraphBuilder()
    table = graph.weight(_normal(random, 1, shape.pieces, shape.joint))
    embedded = graph.add("Gather", table, graph.add("Max", "y", graph.integer(0)))
    known = graph.add("Cast", graph.add("GreaterOrEqual", "y", graph.integer(0)), to=FLOAT)
    masked = graph.add("Mul", embedded, graph.add("Unsqueeze", known, graph.integers(-1)))
    kernel = graph.weight(_normal(random, 1.5, shape.joint, 4, shape.context))
    convolved = graph.add("Conv", graph.add("Transpose", masked, perm=[0, 2, 1]), kernel, group=shape.joint // 4)
    fed = graph.add("Relu", graph.add("Squeeze", convolved, graph.integers(2)))
    graph.add("MatMul", fed, graph.weight(_normal(random, 0.25, shape.joint, shape.joint)), output="decoder_out")
    save(
        path,
        graph,
        [declare("y", INT64, "N", shape.context)],
        [declare("decoder_out", FLOAT, "N", shape.joint)],
        {"context_size": shape.context, "vocab_size": shape.pieces},
    )


def _zipformer(path: Path, shape: IcefallShape, random: np.random.Generator) -> None:  # noqa: PLR0915 (one graph, in order)
    graph = GraphBuilder()
    size, chunk, left = shape.size, shape.chunk, shape.left
    half_kernel, key_size, value_size, nonlinear = 3, 16, 8, 3 * size // 4
    scaled = graph.add("Mul", graph.add("Sub", "x", _scalar(graph, FEATURE_MEAN)), _scalar(graph, FEATURE_SCALE))
    kernel = graph.weight(_normal(random, 0.12, EMBEDDED, 80, 7))
    embedded = graph.add("Relu", graph.add("Conv", graph.add("Transpose", scaled, perm=[0, 2, 1]), kernel, strides=[2]))
    embedded = graph.add("Slice", embedded, graph.integers(0), graph.integers(chunk + 3), graph.integers(2))
    first = graph.add("Slice", "embed_states", graph.integers(0), graph.integers(1), graph.integers(3))
    history = graph.add("Concat", graph.add("Squeeze", first, graph.integers(3)), embedded, axis=2)
    kept = graph.add("Slice", history, graph.integers(chunk), graph.integers(chunk + 3), graph.integers(2))
    graph.add("Tile", graph.add("Unsqueeze", kept, graph.integers(3)), graph.integers(1, 1, 1, 19), output="new_embed_states")
    convolved = graph.add("Conv", history, graph.weight(_normal(random, 0.06, size, EMBEDDED, 7)))
    x = graph.add("Transpose", convolved, perm=[2, 0, 1])  # [T, N, D]
    inputs: list[onnx.ValueInfoProto] = []
    outputs: list[onnx.ValueInfoProto] = []
    everything = graph.integers(BEHIND_EVERYTHING)

    def carry(name: str, layer: int, *dims: int | str) -> str:
        inputs.append(declare(f"{name}_{layer}", FLOAT, *dims))
        outputs.append(declare(f"new_{name}_{layer}", FLOAT, *dims))
        return f"{name}_{layer}"

    for layer in range(shape.layers):
        contexts = []
        for name, width in (("cached_key", key_size), ("cached_val1", value_size), ("cached_val2", value_size)):
            state = carry(name, layer, left, "N", width)
            rows = graph.add("MatMul", x, graph.weight(_normal(random, 0.25, size, width)))
            joined = graph.add("Concat", state, rows, axis=0)
            graph.add("Slice", joined, graph.integers(-left), everything, graph.integers(0), output=f"new_{state}")
            mean = graph.add("ReduceMean", joined, axes=[0], keepdims=1)
            contexts.append(graph.add("MatMul", mean, graph.weight(_normal(random, 0.5, width, size))))
            if name == "cached_key":
                state = carry("cached_nonlin_attn", layer, 1, "N", left, nonlinear)
                rows = graph.add("MatMul", x, graph.weight(_normal(random, 0.25, size, nonlinear)))
                rows = graph.add("Unsqueeze", graph.add("Transpose", rows, perm=[1, 0, 2]), graph.integers(0))
                joined = graph.add("Concat", state, rows, axis=2)
                graph.add("Slice", joined, graph.integers(-left), everything, graph.integers(2), output=f"new_{state}")
        for context in contexts:
            x = graph.add("Add", x, context)
        turned = graph.add("Transpose", x, perm=[1, 2, 0])  # [N, D, T]
        for name in ("cached_conv1", "cached_conv2"):
            state = carry(name, layer, "N", size, half_kernel)
            joined = graph.add("Concat", state, turned, axis=2)
            graph.add("Slice", joined, graph.integers(-half_kernel), everything, graph.integers(2), output=f"new_{state}")
            depthwise = graph.weight(_normal(random, 0.5, size, 1, half_kernel + 1))
            turned = graph.add("Add", turned, graph.add("Tanh", graph.add("Conv", joined, depthwise, group=size)))
        x = graph.add("Transpose", turned, perm=[2, 0, 1])
    # The left context that is still empty counts: what stands there is faded in as the stream goes on.
    started = graph.add("Min", "processed_lens", graph.integer(left))
    weight = graph.add("Div", graph.add("Cast", started, to=FLOAT), _scalar(graph, float(left)))
    weight = graph.add("Unsqueeze", graph.add("Add", weight, _scalar(graph, 1.0)), graph.integers(1, 2))
    frames = graph.add("Mul", graph.add("Transpose", x, perm=[1, 0, 2]), weight)
    halved = graph.add("Slice", frames, graph.integers(0), everything, graph.integers(1), graph.integers(2))
    graph.add("MatMul", halved, graph.weight(_normal(random, 0.5, size, shape.joint)), output="encoder_out")
    graph.add("Add", "processed_lens", graph.integer(chunk), output="new_processed_lens")
    embed = FLOAT, "N", EMBEDDED, 3, 19

    def each(count: Any) -> str:
        return ",".join(map(str, count)) if isinstance(count, (list, tuple)) else str(count)

    metadata = {
        "model_type": "zipformer2", "version": 1, "model_author": "k2-fsa", "comment": "streaming zipformer2",
        "decode_chunk_len": 2 * chunk, "T": 2 * chunk + 13, "num_encoder_layers": each([shape.layers]),
        "encoder_dims": each([size]), "cnn_module_kernels": each([2 * half_kernel + 1]), "left_context_len": each([left]),
        "query_head_dims": each([key_size // 2]), "value_head_dims": each([value_size // 2]), "num_heads": each([2]),
    }  # fmt: skip
    save(
        path,
        graph,
        [declare("x", FLOAT, "N", 2 * chunk + 13, 80), *inputs, declare("embed_states", *embed),
         declare("processed_lens", INT64, "N")],
        [declare("encoder_out", FLOAT, "N", chunk // 2, shape.joint), *outputs, declare("new_embed_states", *embed),
         declare("new_processed_lens", INT64, "N")],
        metadata,
    )  # fmt: skip


def _offline_encoder(path: Path, shape: IcefallShape, random: np.random.Generator) -> None:
    graph = GraphBuilder()
    size = 48
    scaled = graph.add("Mul", graph.add("Sub", "x", _scalar(graph, FEATURE_MEAN)), _scalar(graph, FEATURE_SCALE))
    kernel = graph.weight(_normal(random, 0.1, size, 80, 7))
    x = graph.add("Tanh", graph.add("Conv", graph.add("Transpose", scaled, perm=[0, 2, 1]), kernel, strides=[2]))
    x = graph.add("Conv", x, graph.weight(_normal(random, 0.3, shape.joint, size, 3)), strides=[2], pads=[1, 1])
    graph.add("Transpose", x, output="encoder_out", perm=[0, 2, 1])
    halved = graph.add("Div", graph.add("Sub", "x_lens", graph.integer(5)), graph.integer(2))
    graph.add("Div", graph.add("Add", halved, graph.integer(1)), graph.integer(2), output="encoder_out_lens")
    save(
        path,
        graph,
        [declare("x", FLOAT, "N", "T", 80), declare("x_lens", INT64, "N")],
        [declare("encoder_out", FLOAT, "N", "U", shape.joint), declare("encoder_out_lens", INT64, "N")],
        {"model_type": "zipformer2", "version": 1, "model_author": "k2-fsa", "comment": "non-streaming zipformer2"},
    )


def _normal(random: np.random.Generator, deviation: float, *shape: int) -> Floats:
    return (random.standard_normal(shape) * deviation).astype(np.float32)


def _scalar(graph: GraphBuilder, value: float) -> str:
    return graph.weight(np.array(value, np.float32))
