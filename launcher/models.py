"""``amira models``: bring a transducer as the ecosystem publishes it, and check a model repository.

A source is a directory with ``encoder-model.onnx``, ``decoder_joint-model.onnx`` and ``vocab.txt``, which is what NeMo's ONNX
export and the onnx-asr layout have in common, or a Hugging Face repository with those. The bundled model's configurations are
the templates for an imported one's, so there is one set of them.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from launcher.graphs import Graph, ModelError, Transducer
from launcher.run import MODEL_REPOSITORY

SAMPLE_RATE = 16_000
MEL_HOP_SAMPLES = 160
SUBSAMPLING = 8
MEL_BINS = (80, 128)
"""Sizes of NeMo's mel front end that onnx-asr carries as graphs."""

WINDOW_SECS = {"left": 10.0, "chunk": 2.0, "right": 2.0}
"""For encoders that were trained on whole utterances: NeMo's buffered streaming loses 0.3 points with these (its PR 9106)."""

LATENCY_WINDOW_SECS = {"low_latency_frames": (10.0, 1.0, 1.0), "high_throughput_frames": (10.0, 4.0, 2.0)}
"""Left, chunk and right of the other latencies: for ``low`` a guess, and for ``throughput`` the same context as above."""

MAX_SYMBOLS_PER_STEP = 10
"""NeMo's own default."""

NEMO_RECIPE = (
    "a .nemo file must be exported first, where NeMo is installed: "
    "model = nemo.collections.asr.models.ASRModel.restore_from('{path}'); model.export('model.onnx') - and write vocab.txt: "
    "open('vocab.txt', 'w').writelines(f'{{t}} {{i}}\\n' for i, t in enumerate([*model.tokenizer.vocab, '<blk>']))"
)
ROLES = ("preprocessor", "encoder", "decoder_joint")
NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Recogniser:
    """An ensemble of a model repository with all that it needs.

    Attributes:
        name: the ensemble's name.
        decoder: name of its decoder.
        parameters: the decoder's parameters.
    """

    name: str
    decoder: str
    parameters: Mapping[str, str]

    def describe(self) -> str:
        """One line for a person."""
        p = self.parameters
        frame_ms = int(p["frame_samples"]) / 16
        left, chunk, right = (int(p[f"{part}_frames"]) * frame_ms / 1000 for part in ("left", "chunk", "right"))
        return (
            f"{self.name}: {p['kind']}, {p['blank']} pieces, {frame_ms:g} ms a frame, windows of "
            f"{left:.2f} + {chunk:.2f} + {right:.2f} s"
        )


def import_model(source: str, name: str, repository: Path, quantization: str | None, *, gpu: bool) -> Transducer:
    """Write a model's parts into a repository.

    Args:
        source: a directory, or the id of a Hugging Face repository.
        name: name of the new ensemble; its parts are called ``name_…``.
        repository: where to; made if it does not exist.
        quantization: which variant to take, such as ``int8`` for ``encoder-model.int8.onnx``.
        gpu: whether its graphs are to run on a GPU.

    Raises:
        ModelError: the source can't be used, or the name is taken.
    """
    if not NAME.fullmatch(name):
        raise ModelError(f"name {name!r} has other characters than letters, digits, '.', '_' and '-', or more than 40")
    if (repository / name).exists():
        raise ModelError(f"{repository / name} exists; choose another --name, or remove it")
    suffix = f".{quantization}" if quantization else ""
    directory = _locate(source, suffix)
    config = _read_config(directory / "config.json")
    transducer = Transducer.read(
        directory / f"encoder-model{suffix}.onnx",
        directory / f"decoder_joint-model{suffix}.onnx",
        directory / "vocab.txt",
        config.get("features_size"),
    )
    declared = config.get("model_type", "").removeprefix("nemo-conformer-")
    if declared and declared != transducer.kind:
        raise ModelError(
            f"{directory / 'config.json'}: model_type is {config['model_type']!r}, but {transducer.decoder_joint.path.name} "
            f"and vocab.txt are those of {transducer.kind!r}"
        )
    front_end = _front_end(transducer)
    frame_samples = config.get("subsampling_factor", SUBSAMPLING) * MEL_HOP_SAMPLES
    max_symbols = config.get("max_tokens_per_step", MAX_SYMBOLS_PER_STEP)
    _Writer(transducer, name, repository, frame_samples, max_symbols, gpu=gpu).write(front_end)
    return transducer


def recognisers(repository: Path) -> list[Recogniser]:
    """The ensembles of a repository, each checked: its parts are there, and its graphs fit their configurations.

    Raises:
        ModelError: something is missing or does not fit.
    """
    if not repository.is_dir():
        raise ModelError(f"{repository} is no directory")
    configs = {path.parent.name: read_config(path) for path in sorted(repository.glob("*/config.pbtxt"))}
    found = [_check(repository, configs, name) for name, config in configs.items() if config.HasField("ensemble_scheduling")]
    if not found:
        raise ModelError(f"{repository} has no ensemble")
    return found


def read_config(path: Path) -> pb.ModelConfig:
    """A ``config.pbtxt``.

    Raises:
        ModelError: it is missing or malformed.
    """
    config = pb.ModelConfig()
    try:
        text_format.Parse(path.read_text(encoding="utf-8"), config)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except text_format.ParseError as error:
        raise ModelError(f"{path}: {error}") from error
    return config


def _locate(source: str, suffix: str) -> Path:
    """The directory of a source; downloads one that is a Hugging Face repository."""
    path = Path(source)
    if path.suffix == ".nemo":
        raise ModelError(NEMO_RECIPE.format(path=source))
    if path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(source):
        raise ModelError(f"{source} is neither a directory nor the id of a Hugging Face repository (owner/name)")
    from huggingface_hub import snapshot_download  # noqa: PLC0415 (half a second that other commands need not wait)

    patterns = [f"encoder-model{suffix}.onnx*", f"decoder_joint-model{suffix}.onnx*", "vocab.txt", "config.json"]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # every layer below has errors of its own, and to the user they are one
        raise ModelError(f"{source} can't be had from Hugging Face: {str(error).splitlines()[0]}") from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is no JSON object")
    return config


def _front_end(transducer: Transducer) -> Path:
    if transducer.features not in MEL_BINS:
        raise ModelError(
            f"{transducer.encoder.path}: input audio_signal takes {transducer.features} features; "
            f"front ends exist for {' and '.join(map(str, MEL_BINS))}"
        )
    graph = importlib.resources.files("onnx_asr") / "preprocessors" / "data" / f"nemo{transducer.features}.onnx"
    return Path(str(graph))


class _Writer:
    """Writes the models of one recogniser into a repository."""

    def __init__(
        self, transducer: Transducer, name: str, repository: Path, frame_samples: int, max_symbols: int, *, gpu: bool
    ) -> None:
        self._transducer, self._name, self._repository = transducer, name, repository
        self._frame_samples, self._max_symbols, self._gpu = frame_samples, max_symbols, gpu
        self._window_frames = {part: self._frames(secs) for part, secs in WINDOW_SECS.items()}
        self._written: list[Path] = []

    def write(self, front_end: Path) -> None:
        """Write all; whatever was written is removed again if something fails."""
        graphs = {
            "preprocessor": front_end,
            "encoder": self._transducer.encoder.path,
            "decoder_joint": self._transducer.decoder_joint.path,
        }
        try:
            for role, graph in graphs.items():
                self._write_graph(role, graph)
            self._write_decoder()
            self._write_detokenizer()
            self._write_ensemble()
        except BaseException:
            for path in self._written:
                shutil.rmtree(path, ignore_errors=True)
            raise

    def _frames(self, secs: float) -> int:
        return round(secs * SAMPLE_RATE / self._frame_samples)

    def _write_graph(self, role: str, graph: Path) -> None:
        config = _template(role, f"{self._name}_{role}")
        _set_graph_dims(config, self._transducer)
        if self._gpu:
            config.instance_group[0].kind = pb.ModelInstanceGroup.KIND_GPU
            config.instance_group[0].count = 1
        lengths = self._set_warmup(config)
        directory = self._write_model(config)
        for name, data in lengths.items():
            (directory / "warmup").mkdir(exist_ok=True)
            (directory / "warmup" / name).write_bytes(data)
        _link(graph, directory / "1" / "model.onnx")
        for name in Graph(graph).data_files:  # these keep their names, by which the graph asks for them
            _link(graph.parent / name, directory / "1" / name)

    def _set_warmup(self, config: pb.ModelConfig) -> dict[str, bytes]:
        """Fit the template's warm-up to one window of this model; return the files that it takes its lengths from."""
        t, window = self._transducer, sum(self._window_frames.values())
        samples = window * self._frame_samples
        features = samples // MEL_HOP_SAMPLES
        dims = {
            "waveforms": (1, samples),
            "audio_signal": (1, t.features, features),
            "encoder_outputs": (1, t.encoder_size, self._window_frames["chunk"]),
            "input_states_1": (t.layers, 1, t.hidden),
            "input_states_2": (t.layers, 1, t.hidden),
        }
        lengths = {"waveforms_lens": samples, "length": features, "target_length": 1}
        files = {}
        for sample in config.model_warmup:
            for name, tensor in sample.inputs.items():
                if name in dims:
                    tensor.dims[:] = dims[name]
                if name in lengths:
                    tensor.input_data_file = name
                    files[name] = lengths[name].to_bytes(8 if tensor.data_type == pb.TYPE_INT64 else 4, "little")
        return files

    def _write_decoder(self) -> None:
        config = _template("rnnt_greedy_bls", f"{self._name}_decoder")
        del config.parameters["lone_encoder_model"]
        t = self._transducer
        values: dict[str, Any] = {
            **{f"{role}_model": f"{self._name}_{role}" for role in ROLES},
            "kind": t.kind,
            "blank": t.pieces - 1,
            "blank_penalty": 0,
            "predictor_layers": t.layers,
            "predictor_hidden": t.hidden,
            "max_symbols_per_step": self._max_symbols,
            "frame_samples": self._frame_samples,
            **{f"{part}_frames": frames for part, frames in self._window_frames.items()},
            **{name: ",".join(map(str, map(self._frames, secs))) for name, secs in LATENCY_WINDOW_SECS.items()},
        }
        if t.durations:
            values["durations"] = ",".join(map(str, t.durations))
        for key, value in values.items():
            config.parameters[key].string_value = str(value)
        self._write_model(config, code_of="rnnt_greedy_bls")

    def _write_detokenizer(self) -> None:
        config = _template("detokenizer", f"{self._name}_detokenizer")
        config.parameters["vocabulary"].string_value = "vocab.txt"
        _link(self._transducer.vocabulary, self._write_model(config, code_of="detokenizer") / "vocab.txt")

    def _write_ensemble(self) -> None:
        config = _template("asr_ensemble", self._name)
        for step in config.ensemble_scheduling.step:
            step.model_name = f"{self._name}_{'decoder' if step.model_name == 'rnnt_greedy_bls' else step.model_name}"
        self._write_model(config)

    def _write_model(self, config: pb.ModelConfig, code_of: str | None = None) -> Path:
        """Write a model's configuration, and its code where it has some; return its directory."""
        directory = self._repository / str(config.name)
        self._written.append(directory)
        (directory / "1").mkdir(parents=True, exist_ok=True)
        if code_of:
            for path in (MODEL_REPOSITORY / code_of / "1").glob("*.py"):
                shutil.copyfile(path, directory / "1" / path.name)
        (directory / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
        return directory


def _template(model: str, name: str) -> pb.ModelConfig:
    config = read_config(MODEL_REPOSITORY / model / "config.pbtxt")
    config.name = name
    return config


def _set_graph_dims(config: pb.ModelConfig, transducer: Transducer) -> None:
    """Put the model's sizes where the bundled model's are; every other dimension of its graphs is open."""
    states = {f"{side}_states_{i}": (transducer.layers, -1, transducer.hidden) for side in ("input", "output") for i in (1, 2)}
    sizes: dict[str, tuple[int, ...]] = {
        "features": (-1, transducer.features, -1),
        "audio_signal": (-1, transducer.features, -1),
        "encoder_outputs": (-1, transducer.encoder_size, -1),
        **states,
    }
    is_joint = any(tensor.name == "targets" for tensor in config.input)
    logits = transducer.pieces + len(transducer.durations)
    sizes["outputs"] = (-1, -1, -1, logits) if is_joint else (-1, transducer.encoder_size, -1)
    for tensor in (*config.input, *config.output):
        if tensor.name in sizes:
            tensor.dims[:] = sizes[tensor.name]


def _link(source: Path, target: Path) -> None:
    """A hard link where both are on one file system, else a copy: Triton's container sees no links to elsewhere."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _check(repository: Path, configs: Mapping[str, pb.ModelConfig], name: str) -> Recogniser:
    path = repository / name / "config.pbtxt"
    steps = [step.model_name for step in configs[name].ensemble_scheduling.step]
    for step in steps:
        if step not in configs:
            raise ModelError(f"{path}: step {step} is no model of this repository")
    decoders = [step for step in steps if configs[step].HasField("sequence_batching")]
    if len(decoders) != 1:
        raise ModelError(f"{path}: {len(decoders)} of its steps have sequence_batching; expected 1, the decoder")
    decoder = repository / decoders[0] / "config.pbtxt"
    parameters = {key: value.string_value for key, value in configs[decoders[0]].parameters.items()}
    for role in ROLES:
        callee = parameters.get(f"{role}_model", "")
        if callee not in configs:
            raise ModelError(f"{decoder}: parameter {role}_model is {callee!r}; expected a model of this repository")
        _check_graph(repository, configs[callee])
    lone = parameters.get("lone_encoder_model", parameters["encoder_model"])
    if lone not in configs:
        raise ModelError(f"{decoder}: parameter lone_encoder_model is {lone!r}; expected a model of this repository")
    return Recogniser(name, decoders[0], parameters)


def _check_graph(repository: Path, config: pb.ModelConfig) -> None:
    """Hold a graph against its configuration."""
    types = {pb.TYPE_FP32: 1, pb.TYPE_INT32: 6, pb.TYPE_INT64: 7}
    graph = Graph(repository / config.name / "1" / (config.default_model_filename or "model.onnx"))
    for kind, tensors in (("input", config.input), ("output", config.output)):
        graph.check(kind, {tensor.name: (types.get(tensor.data_type, 0), _shape(tensor.dims)) for tensor in tensors})


def _shape(dims: Iterable[int]) -> tuple[int | None, ...]:
    return tuple(None if dim == -1 else dim for dim in dims)
