"""Small transducers with random weights, as files that look like NeMo's ONNX exports in the layout they are published in.

They recognise nothing, but they behave like models that do: tensor names, types and shapes are those of the exports, the
encoder's frames depend on about half a second of speech to either side, and the biases are calibrated on the bundled
recordings so that tokens come as often as in speech. Whoever decodes such a model differently decodes it visibly differently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx_asr.preprocessors.preprocessor import OnnxPreprocessor

from gateway.audio.files import decode_audio

Floats = npt.NDArray[np.float32]
Kind = Literal["rnnt", "tdt"]

SPEECH = Path(__file__).parents[1] / "speech"

OPSET = 17
IR_VERSION = 8

HIDDEN = 640
ENCODED = 256
JOINT = 256
MATCHES = 16  # the blank's share of the joint network, see _DecoderWeights
EMBEDDING = 160
CHANNELS = 128
STRIDES = 3  # convolutions of stride 2
CONTEXTS = 3  # residual convolutions over 5 frames
SUBSAMPLING = 2**STRIDES
FRAMES_PER_SECOND = 100 / SUBSAMPLING

UNKNOWN = 0
UNKNOWN_BIAS = -30.0  # as good as never, as in a trained model
LOGIT_SCALE = 4.0  # standard deviation of a logit; the more, the rarer near-ties that rounding could decide
RECURRENCE = 1.5  # the more, the more history matters; from about 4 on, rounding errors would grow from token to token

TOKENS_PER_SECOND = 3.0, 6.0  # least and most in each recording
DURATION_SHARES = 0.12, 0.28, 0.24, 0.18, 0.18  # of the jumps 0 … 4
MAX_TOKENS_PER_FRAME = 10
CLEAR_GAP = 4e-3  # at least between the best two logits of any decision; rounding makes about 1e-5
DRAWS = 8  # of weights, before giving up


@dataclass(frozen=True)
class _Size:
    """What distinguishes the two kinds."""

    features: int
    pieces: int
    durations: int
    layers: int
    token_shares: tuple[float, float]  # of the decoder's decisions, those for a token: among these the blank bias is sought

    @property
    def blank(self) -> int:
        return self.pieces

    @property
    def outputs(self) -> int:
        return self.pieces + 1 + self.durations


SIZES: Mapping[Kind, _Size] = {
    "rnnt": _Size(features=80, pieces=512, durations=0, layers=1, token_shares=(0.18, 0.4)),
    "tdt": _Size(features=128, pieces=1024, durations=len(DURATION_SHARES), layers=2, token_shares=(0.45, 0.75)),
}


def build(directory: Path, kind: Kind, seed: int = 0) -> None:
    """Write a model.

    Args:
        directory: where to; made if missing.
        kind: ``rnnt`` has 80 mel features, 512 pieces and one LSTM layer, ``tdt`` has 128, 1024 and two, and 5 durations.
        seed: of the weights.

    Raises:
        RuntimeError: with none of the weights tried can tokens be had at the wanted rate.
    """
    size = SIZES[kind]
    random = np.random.default_rng(seed)
    encoder, encoded = _normalised_encoder(_EncoderWeights.draw(size, random), _features(size.features))
    decoder_joint = _calibrated_decoder_joint(size, encoded, random)
    directory.mkdir(parents=True, exist_ok=True)
    onnx.save_model(encoder, directory / "encoder-model.onnx")
    onnx.save_model(decoder_joint, directory / "decoder_joint-model.onnx")
    lines = "".join(f"{piece} {index}\n" for index, piece in enumerate(vocabulary(kind)))
    (directory / "vocab.txt").write_text(lines, encoding="utf-8")
    config = {
        "model_type": f"nemo-conformer-{kind}",
        "features_size": size.features,
        "subsampling_factor": SUBSAMPLING,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def move_weights(directory: Path) -> None:
    """Move the encoder's weights into a file of their own, ``encoder-model.onnx.data``."""
    path = directory / "encoder-model.onnx"
    location = f"{path.name}.data"
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location=location, size_threshold=1024)


def vocabulary(kind: Kind) -> list[str]:
    """Pieces by token id, the blank last; two in five begin a word."""
    consonants, vowels = "bcdfghjklmnprstvwz", "aeiou"
    syllables = ["".join(letters) for letters in product(consonants, vowels, ("", *"nrst"))]
    pieces = [piece for i, syllable in enumerate(syllables) for piece in ([f"▁{syllable}"] if i % 5 < 2 else []) + [syllable]]
    pieces += [f"▁{syllable}e" for syllable in syllables] + [f"{syllable}s" for syllable in syllables]
    return ["<unk>", *list(dict.fromkeys(pieces))[: SIZES[kind].pieces - 1], "<blk>"]


@cache
def recordings() -> dict[str, Floats]:
    """The bundled recordings by name, 16 kHz, full scale 1."""
    return {
        path.stem: decode_audio(path.read_bytes(), "audio/flac", max_secs=60).astype(np.float32) / np.float32(0x8000)
        for path in sorted(SPEECH.glob("*.flac"))
    }


@cache
def _features(size: int) -> list[Floats]:
    """The recordings' mel features [1, F, T]."""
    preprocessor = OnnxPreprocessor(f"nemo{size}", {"providers": ["CPUExecutionProvider"]})
    features = []
    for samples in recordings().values():
        mel, lengths = preprocessor(samples[None], np.array([len(samples)], np.int64))
        features.append(mel[:, :, : lengths[0]])
    return features


class GraphBuilder:
    """A graph in the making; tensors are referred to by name."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[TensorProto] = []

    def weight(self, values: npt.NDArray[Any]) -> str:
        name = f"weight_{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(values, name))
        return name

    def half_weight(self, values: Floats) -> str:
        """A weight that takes half the space in the file."""
        return self.add("Cast", self.weight(values.astype(np.float16)), to=TensorProto.FLOAT)

    def integers(self, *values: int) -> str:
        return self.weight(np.array(values, np.int64))

    def integer(self, value: int) -> str:
        return self.weight(np.array(value, np.int64))

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        return self.add_many(operator, *inputs, outputs=[output or f"{operator}_{len(self._nodes)}"], **attributes)[0]

    def add_many(self, operator: str, *inputs: str, outputs: Sequence[str], **attributes: Any) -> Sequence[str]:
        self._nodes.append(helper.make_node(operator, inputs, outputs, f"node_{len(self._nodes)}", **attributes))
        return outputs

    def model(
        self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto], *, full_check: bool = True
    ) -> onnx.ModelProto:
        graph = helper.make_graph(self._nodes, "main_graph", inputs, outputs, self._weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(model, full_check=full_check)
        return model


def tensor(name: str, element: int, *shape: int | None) -> onnx.ValueInfoProto:
    """A graph's input or output; dynamic axes, given as None, are named as NeMo's export names them."""
    names = iter(f"{name}_dynamic_axes_{i}" for i in range(1, 9))
    return helper.make_tensor_value_info(name, element, [next(names) if axis is None else axis for axis in shape])


def _session(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _normal(random: np.random.Generator, deviation: float, *shape: int) -> Floats:
    return (random.standard_normal(shape) * deviation).astype(np.float32)


@dataclass
class _EncoderWeights:
    """Kernels [out, in, width] of the convolutions in order, the biases of all but the last, and its own."""

    strided: list[Floats]
    context: list[Floats]
    output: Floats
    output_bias: Floats

    @classmethod
    def draw(cls, size: _Size, random: np.random.Generator) -> _EncoderWeights:
        def kernel(outputs: int, inputs: int, width: int) -> Floats:
            return _normal(random, (2 / (inputs * width)) ** 0.5, outputs, inputs, width)

        return cls(
            [kernel(CHANNELS, size.features if i == 0 else CHANNELS, 3) for i in range(STRIDES)],
            [kernel(CHANNELS, CHANNELS, 5) for _ in range(CONTEXTS)],
            kernel(ENCODED, CHANNELS, 1),
            np.zeros(ENCODED, np.float32),
        )


def _encoder(weights: _EncoderWeights) -> onnx.ModelProto:
    """Features to frames. Every layer sees zeros behind a row's end, so padding changes nothing."""
    graph = GraphBuilder()
    x, length = "audio_signal", "length"

    def masked(values: str) -> str:
        frames = graph.add("Squeeze", graph.add("Shape", values, start=2, end=3))
        index = graph.add("Range", graph.integer(0), frames, graph.integer(1))
        inside = graph.add("Less", index, graph.add("Unsqueeze", length, graph.integers(1)))
        mask = graph.add("Unsqueeze", graph.add("Cast", inside, to=TensorProto.FLOAT), graph.integers(1))
        return graph.add("Mul", values, mask)

    x = masked(x)
    for i, kernel in enumerate(weights.strided):
        x = graph.add("Relu", graph.add("Conv", x, graph.weight(kernel), strides=[2], pads=[1, 1]))
        halved = graph.add("Add", length, graph.integer(1))
        name = "encoded_lengths" if i == STRIDES - 1 else None
        length = graph.add("Div", halved, graph.integer(2), output=name)
        x = masked(x)
    for kernel in weights.context:
        convolved = graph.add("Relu", graph.add("Conv", x, graph.weight(kernel), pads=[2, 2]))
        x = masked(graph.add("Add", x, convolved))
    graph.add("Conv", x, graph.weight(weights.output), graph.weight(weights.output_bias), output="outputs")
    return graph.model(
        [
            tensor("audio_signal", TensorProto.FLOAT, None, weights.strided[0].shape[1], None),
            tensor("length", TensorProto.INT64, None),
        ],
        [
            tensor("outputs", TensorProto.FLOAT, None, ENCODED, None),
            tensor("encoded_lengths", TensorProto.INT64, None),
        ],
    )


def _normalised_encoder(weights: _EncoderWeights, features: Sequence[Floats]) -> tuple[onnx.ModelProto, list[Floats]]:
    """The encoder with each channel's mean 0 and deviation 1 on the recordings, and what it makes of them, each [D, T]."""

    def encode(model: onnx.ModelProto) -> list[Floats]:
        session = _session(model)
        lengths = [np.array([row.shape[2]], np.int64) for row in features]
        return [
            session.run(["outputs"], {"audio_signal": row, "length": length})[0][0]
            for row, length in zip(features, lengths, strict=True)
        ]

    frames = np.concatenate(encode(_encoder(weights)), axis=1)
    scale = 1 / frames.std(axis=1)
    weights.output *= scale[:, None, None]
    weights.output_bias -= frames.mean(axis=1) * scale
    model = _encoder(weights)
    return model, encode(model)


@dataclass
class _DecoderWeights:
    """Weights of predictor and joint: embedding [V + 1, E], LSTM layers [4 H, in], [4 H, H] and [8 H], projections [in, out].

    The tokens' logits are drawn at random. Were the blank's too, a frame that favours tokens would get ten, and a history that
    favours the blank would silence all frames. So the blank's logit is a product of the two: for projections e of the frame and
    p of the history, tanh(c + e + p) - tanh(c + e - p) - tanh(c - e + p) + tanh(c - e - p) is about 4 tanh''(c) e p.
    """

    embedding: Floats
    lstm: list[tuple[Floats, Floats, Floats]]
    encoder: Floats
    predictor: Floats
    joint_bias: Floats
    output: Floats
    output_bias: Floats

    @classmethod
    def draw(cls, size: _Size, random: np.random.Generator) -> _DecoderWeights:
        embedding = _normal(random, 1, size.pieces + 1, EMBEDDING)
        embedding[size.blank] = 0  # NeMo's padding index
        lstm = []
        for inputs, deviation in ((EMBEDDING, 2 / EMBEDDING**0.5), (HIDDEN, 5 / HIDDEN**0.5))[: size.layers]:
            recurrent = _normal(random, RECURRENCE / HIDDEN**0.5, 4 * HIDDEN, HIDDEN)
            lstm.append((_normal(random, deviation, 4 * HIDDEN, inputs), recurrent, _normal(random, 0.5, 8 * HIDDEN)))
        encoder = _normal(random, 1 / ENCODED**0.5, ENCODED, JOINT + MATCHES)
        predictor = _normal(random, 9 / HIDDEN**0.5, HIDDEN, JOINT + MATCHES)
        output = _normal(random, LOGIT_SCALE / (0.5 * JOINT) ** 0.5, JOINT + 4 * MATCHES, size.outputs)
        output[JOINT:] = 0
        output[:, size.blank] = 0
        output[JOINT:, size.blank] = np.repeat([1, -1, -1, 1], MATCHES) * LOGIT_SCALE / MATCHES**0.5
        output_bias = np.zeros(size.outputs, np.float32)
        output_bias[UNKNOWN] = UNKNOWN_BIAS

        def matched(projection: Floats, signs: Sequence[int]) -> Floats:
            matches = projection[:, JOINT:]
            return np.concatenate([projection[:, :JOINT], *(sign * matches for sign in signs)], axis=1)

        joint_bias = np.repeat(np.array([0, 0.66], np.float32), [JOINT, 4 * MATCHES])  # where tanh bends most
        encoder, predictor = matched(encoder, (1, 1, -1, -1)), matched(predictor, (1, -1, 1, -1))
        return cls(embedding, lstm, encoder, predictor, joint_bias, output, output_bias)


def _decoder_joint(size: _Size, weights: _DecoderWeights) -> onnx.ModelProto:
    """Predictor and joint network."""
    graph = GraphBuilder()
    graph.add("Identity", "target_length", output="prednet_lengths")
    layers = range(size.layers)
    before = [
        graph.add_many("Split", f"input_states_{i}", outputs=[f"state_{i}_{layer}" for layer in layers], axis=0) for i in (1, 2)
    ]
    x = graph.add("Gather", graph.half_weight(weights.embedding), graph.add("Transpose", "targets", perm=[1, 0]))
    for layer, kernels in enumerate(weights.lstm):
        kernel, recurrent, bias = (graph.half_weight(values[None]) for values in kernels)
        states = before[0][layer], before[1][layer]
        after = [f"{name}_{layer}" for name in ("fed", "hidden", "cell")]
        graph.add_many("LSTM", x, kernel, recurrent, bias, "", *states, outputs=after, hidden_size=HIDDEN)
        x = graph.add("Squeeze", after[0], graph.integers(1))
    for i, name in ((1, "hidden"), (2, "cell")):
        graph.add("Concat", *(f"{name}_{layer}" for layer in layers), output=f"output_states_{i}", axis=0)
    fed = graph.add("MatMul", graph.add("Transpose", x, perm=[1, 0, 2]), graph.half_weight(weights.predictor))
    fed = graph.add("Add", fed, graph.weight(weights.joint_bias))
    frames = graph.add("Transpose", "encoder_outputs", perm=[0, 2, 1])
    frames = graph.add("MatMul", frames, graph.half_weight(weights.encoder))
    both = graph.add("Add", graph.add("Unsqueeze", frames, graph.integers(2)), graph.add("Unsqueeze", fed, graph.integers(1)))
    logits = graph.add("MatMul", graph.add("Tanh", both), graph.half_weight(weights.output))
    graph.add("Add", logits, graph.weight(weights.output_bias), output="outputs")
    state_shape = size.layers, None, HIDDEN
    return graph.model(
        [
            tensor("encoder_outputs", TensorProto.FLOAT, None, ENCODED, None),
            tensor("targets", TensorProto.INT32, None, None),
            tensor("target_length", TensorProto.INT32, None),
            tensor("input_states_1", TensorProto.FLOAT, *state_shape),
            tensor("input_states_2", TensorProto.FLOAT, *state_shape),
        ],
        [
            tensor("outputs", TensorProto.FLOAT, None, None, None, size.outputs),
            tensor("prednet_lengths", TensorProto.INT32, None),
            tensor("output_states_1", TensorProto.FLOAT, *state_shape),
            tensor("output_states_2", TensorProto.FLOAT, *state_shape),
        ],
    )


class _Network:
    """The built decoder_joint, its biases still changeable.

    Args:
        size: of the model.
        session: of its graph.
    """

    def __init__(self, size: _Size, session: Any) -> None:
        self.size = size
        self.bias = np.zeros(size.outputs, np.float32)
        self._session = session

    def step(self, frames: Floats, targets: npt.NDArray[np.int32], states: list[Floats] | None) -> tuple[Floats, list[Floats]]:
        """Logits [B, T, U, …] of frames [B, D, T] after targets [B, U], and the states after all of these."""
        rows, tokens = targets.shape
        before = states or [np.zeros((self.size.layers, rows, HIDDEN), np.float32)] * 2
        inputs = {
            "encoder_outputs": frames,
            "targets": targets,
            "target_length": np.full(rows, tokens, np.int32),
            "input_states_1": before[0],
            "input_states_2": before[1],
        }
        logits, *after = self._session.run(["outputs", "output_states_1", "output_states_2"], inputs)
        return logits + self.bias, after

    def count_tokens(self, frames: Floats) -> int | None:
        """Greedily decode frames [D, T]; return the number of tokens, None if a decision is not clear."""
        blank = self.size.blank
        tokens = 0
        token, states, t, symbols = blank, None, 0, 0
        while t < frames.shape[1]:
            logits, after = self.step(frames[None, :, t : t + 1], np.array([[token]], np.int32), states)
            scores, durations = np.split(logits[0, 0, 0], [blank + 1])
            if any(np.diff(np.partition(part, -2)[-2:])[0] < CLEAR_GAP for part in (scores, durations) if part.size):
                return None
            best, jump = int(scores.argmax()), int(durations.argmax()) if durations.size else 0
            if best != blank:
                token, states = best, after
                tokens += 1
                symbols += 1
            if jump or best == blank or symbols == MAX_TOKENS_PER_FRAME:
                t += max(jump, 1)
                symbols = 0
        return tokens


def _calibrated_decoder_joint(size: _Size, rows: Sequence[Floats], random: np.random.Generator) -> onnx.ModelProto:
    """Predictor and joint network which, of the recordings' frames [D, T], make tokens at the wanted rate."""
    for _ in range(DRAWS):
        weights = _DecoderWeights.draw(size, random)
        network = _Network(size, _session(_decoder_joint(size, weights)))
        if _calibrate(network, rows, random):
            weights.output_bias += network.bias
            return _decoder_joint(size, weights)
    raise RuntimeError("none of the weights tried give the wanted rate of tokens")


def _calibrate(network: _Network, rows: Sequence[Floats], random: np.random.Generator) -> bool:
    """Set the biases of durations and blank; False: no blank bias gives clear decisions and the wanted rate of tokens."""
    blank = network.size.blank
    histories = random.integers(1, blank, (4, 8), np.int32)
    logits = np.concatenate(
        [network.step(np.repeat(row[None], 4, 0), histories, None)[0].reshape(-1, network.size.outputs) for row in rows]
    )
    durations, duration_bias = logits[:, blank + 1 :], network.bias[blank + 1 :]
    for _ in range(100 if duration_bias.size else 0):
        best = (durations + duration_bias).argmax(axis=1)
        shares = np.bincount(best, minlength=duration_bias.size) / len(best)
        duration_bias += np.log(DURATION_SHARES / np.maximum(shares, 1e-3))

    margins = logits[:, :blank].max(axis=1) - logits[:, blank]
    for share in np.linspace(*network.size.token_shares, 30):
        network.bias[blank] = np.quantile(margins, 1 - share)
        if all(_is_decoded_as_speech(network, row) for row in rows):
            return True
    return False


def _is_decoded_as_speech(network: _Network, row: Floats) -> bool:
    """Return whether all decisions on a recording's frames [D, T] are clear and tokens come at the wanted rate."""
    least, most = TOKENS_PER_SECOND
    tokens = network.count_tokens(row)
    return tokens is not None and least <= tokens * FRAMES_PER_SECOND / row.shape[1] <= most
