"""Import transducers into a model repository: ``amira models import``.

A source is a directory or a Hugging Face repository in one of the layouts of ``amira.models.layouts``. The bundled model's
configurations are the templates of an imported model's.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
from google.protobuf import text_format
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from pydantic import BaseModel, Field, ValidationError
from tritonclient.grpc import model_config_pb2 as pb

from amira.models.check import ELEMENT_TYPES, ProjectionError, check_cached_encoder, check_projection, features_per_frame
from amira.models.configs import ModelError, read_config
from amira.models.front_ends import HOP_SAMPLES, NEMO_BINS, nemo_front_end
from amira.models.graphs import Graph, TransducerGraphs, weights_of
from amira.models.layouts import icefall, nemo, nemo_cached
from amira.models.layouts.parts import LATENCIES, CachedEncoder, GraphSource, Parts
from amira.models.memory import measure_growth
from amira.models.repository import ONNX_TYPES, ROLES
from amira.models.sources import NEMO_RECIPE as NEMO_RECIPE  # noqa: PLC0414 (part of this module's interface)
from amira.models.sources import locate
from amira.models.vocabularies import to_text
from amira.paths import MODEL_REPOSITORY

SAMPLE_RATE = 16_000

WINDOW_SECS = {"left": 10.0, "chunk": 2.0, "right": 2.0}
"""Windows for encoders that were trained on whole utterances; NeMo's buffered streaming loses 0.3 points (PR 9106)."""

LATENCY_WINDOW_SECS = {"low_latency_frames": (10.0, 1.0, 1.0), "high_throughput_frames": (10.0, 4.0, 2.0)}
"""Left context, chunk and right context of the other latencies, in seconds; ``low`` was not measured."""

ASSUMED_DURATIONS = (0, 1, 2, 3, 4)
"""Durations of a TDT without declared durations; all published TDTs have these."""

LARGE_ENCODER_BYTES = 200_000_000
"""Size from which an encoder gets one session with all cores, since each session has the weights in memory."""

CACHED_BATCH = 8
"""Maximum number of cached streams in one encoder call. A call reads all weights, whether for one stream's short chunk or for
eight: on a CPU, eight chunks of 560 ms take 40 % of what they take one by one (perf/caches.py)."""

GPU_PARAMETERS = {"encoder_batch": "16", "block_frames": "32"}
"""Parameters for a GPU, which computes many windows in little more time than one; not measured."""

EDGE_FEATURES = 2
"""Feature frames around a cached encoder's window whose audio its features need: a frame's 25 ms, and the sample before."""

LATENCY_PREFIXES = {"low": "low_latency", "throughput": "high_throughput"}
"""Beginning of the parameters of a latency that is not ``balanced``."""

BUNDLED_PARAMETERS = (
    "encoder_kind",
    "whole_encoder_model",
    "exclusive_encoder_model",
    "encoder_batch",
    "hop_samples",
    "window_features",
    "chunk_features",
    "right_features",
    "edge_features",
    "warm_up_features",
    "max_cache_features",
    "fresh_features",
    "final_padding_ms",
    "cache_size",
    "cache_type",
    "cache_reset",
    "low_latency_encoder_model",
    "low_latency_features",
    "high_throughput_encoder_model",
    "high_throughput_features",
)
"""Parameters of the template that describe the bundled model's encoders. An imported model has one encoder for streams and
recordings, whether a window is alone or not."""

MEMORY_PARAMETERS = ("window_bytes_per_sec", "window_bytes_per_sec_squared", "max_encode_bytes")
"""Parameters of the template that a decoder of a cached encoder does not have: its windows do not grow."""

LANGUAGE_PARAMETERS = "language_model", "piece_scores", "beam", "stream_beam"
"""Parameters of the template that suit its own pieces only, and its beams, which were measured with its language model."""

CACHE_TYPES = {"fp16": onnx.TensorProto.FLOAT16, "fp32": onnx.TensorProto.FLOAT}
"""Element types of a packed cache."""

VOCABULARY = "vocab.txt"
"""File name of the vocabulary in the directory of each model that reads it."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")


class SourceConfig(BaseModel):
    """``config.json`` of a source, with onnx-asr's keys and ``durations``; other keys are ignored."""

    model_type: str = ""
    features_size: Annotated[int, Field(gt=0)] | None = None
    subsampling_factor: Annotated[int, Field(gt=0)] | None = None
    durations: tuple[Annotated[int, Field(ge=0)], ...] = ()
    max_tokens_per_step: Annotated[int, Field(ge=1, le=1000)] = 10

    @classmethod
    def read(cls, path: Path) -> SourceConfig:
        """Read the file; return the defaults if it is missing.

        Raises:
            ModelError: the file is not JSON, or a value is not allowed.
        """
        if not path.is_file():
            return cls()
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = f": {first['loc'][0]} is {first['input']!r}" if first["loc"] else ""
            raise ModelError(f"{path}{where}: {first['msg']}") from error


@dataclass(frozen=True)
class ImportOptions:
    """How a model is imported.

    Attributes:
        quantization: which variant to take, such as ``int8`` for ``encoder-model.int8.onnx``.
        files: text that the names of the graphs contain, where several would do.
        durations: frames that each duration of a TDT jumps, where they are not 0, 1, 2, 3, 4.
        latencies: sources of the encoders for ``low`` and ``throughput``, of a model with a cached encoder.
        cache_type: element type of the packed cache: ``fp16`` or ``fp32``.
        gpu: whether its graphs are to run on a GPU.
        projected: whether a cache has keys and values, where the graph allows it: more memory, and less time on a CPU. A GPU
            has time, and copies its caches through the CPU.
    """

    quantization: str | None = None
    files: str = ""
    durations: Sequence[int] = ()
    latencies: Mapping[str, str] = field(default_factory=dict)
    cache_type: str = "fp16"
    gpu: bool = False
    projected: bool = True


DEFAULTS = ImportOptions()


def import_model(source: str, name: str, repository: Path, options: ImportOptions = DEFAULTS) -> TransducerGraphs:
    """Write a model's parts into a repository.

    Args:
        source: a directory, or the id of a Hugging Face repository.
        name: name of the new ensemble; its parts are called ``name_…``.
        repository: where to; made if it does not exist.
        options: how.

    Raises:
        ModelError: the source can't be used, the name is taken, or nothing can be written there.
    """
    if not NAME.fullmatch(name):
        raise ModelError(
            f"name {name!r} is not allowed: up to 40 letters, digits, '.', '_' and '-', the first a letter or digit; use --name"
        )
    writer = _Writer(name, repository, gpu=options.gpu)
    for directory in writer.directories:
        if directory.exists():
            raise ModelError(f"{directory} exists; choose another --name, or remove it")
    files = locate(source, options.quantization, options.files)
    config = SourceConfig.read(files["encoder"].parent / "config.json")
    while True:
        parts = _convert(files, config, options)
        encoders = _latency_encoders(parts, options)
        try:
            return writer.write(parts, encoders)
        except ProjectionError:
            options = replace(options, projected=False)
        except OSError as error:
            raise ModelError(f"{error.filename or repository} can't be written: {error.strerror}") from error


def _convert(files: Mapping[str, Path], config: SourceConfig, options: ImportOptions) -> Parts:
    """Convert a source by its layout, which its encoder's tensors tell."""
    cache_type = CACHE_TYPES[options.cache_type]
    encoder = Graph(files["encoder"])
    if nemo_cached.is_cached(encoder):
        return nemo_cached.convert(files, cache_type, gpu=options.gpu, projected=options.projected and not options.gpu)
    if icefall.is_icefall(encoder):
        return icefall.convert(files, cache_type)
    if options.latencies:
        raise ModelError(f"{encoder.path} has no cache, so --latency has no use: its windows are parameters of one graph")
    if "joiner" in files:
        return nemo.convert(files, gpu=options.gpu)
    return _convert_nemo(files, config, options)


def _convert_nemo(files: Mapping[str, Path], config: SourceConfig, options: ImportOptions) -> Parts:
    """Take a model that has NeMo's convention already."""
    encoder, decoder_joint = files["encoder"], files["decoder_joint"]
    directory = encoder.parent
    transducer = TransducerGraphs.read(Graph(encoder), Graph(decoder_joint), directory / VOCABULARY, config.features_size)
    declared = config.model_type.partition("nemo-conformer-")[2]
    if declared and declared != transducer.kind:
        raise ModelError(
            f"{directory / 'config.json'}: model_type is {config.model_type!r}, but {decoder_joint.name} and vocab.txt are "
            f"those of {transducer.kind!r}"
        )
    transducer = _with_durations(transducer, tuple(options.durations) or config.durations)
    if transducer.features not in NEMO_BINS:
        raise ModelError(
            f"{encoder}: input audio_signal takes {transducer.features} features; "
            f"front ends exist for {' and '.join(map(str, NEMO_BINS))}"
        )
    factor = features_per_frame(encoder, transducer.features)
    if config.subsampling_factor not in (None, factor):
        raise ModelError(
            f"{directory / 'config.json'}: subsampling_factor is {config.subsampling_factor}, but {encoder.name} makes a frame "
            f"of {factor} feature frames"
        )
    return Parts(
        nemo_front_end(transducer.features, gpu=options.gpu),
        encoder,
        decoder_joint,
        transducer.vocabulary,
        transducer.features,
        max_symbols=config.max_tokens_per_step,
        transducer=transducer,
    )


def _latency_encoders(parts: Parts, options: ImportOptions) -> dict[str, CachedEncoder]:
    """Return a cached model's encoder of each latency; nothing for another model.

    Raises:
        ModelError: an encoder does not suit the others.
    """
    if not isinstance(parts.encoder, CachedEncoder):
        return {}
    encoders = {"balanced": parts.encoder}
    for latency, source in options.latencies.items():
        path, cache_type = locate(source, options.quantization, options.files)["encoder"], CACHE_TYPES[options.cache_type]
        if nemo_cached.is_cached(Graph(path)):
            encoder = nemo_cached.convert_encoder(path, cache_type, projected=options.projected and not options.gpu)
        else:
            encoder = icefall.convert_encoder(path, cache_type)
        encoders[latency] = encoder
        found, expected = (_sizes_of(each.graph.proto.graph) for each in (encoder, parts.encoder))
        if found != expected:
            raise ModelError(
                f"{path} has {found[0]} features and {found[1]} values per frame; expected {expected[0]} and {expected[1]}, "
                "as the encoder of balanced has"
            )
    return encoders


def _sizes_of(graph: onnx.GraphProto) -> tuple[int, int]:
    """Return the sizes of an encoder's feature frames and encoder frames."""
    features, frames = (tensor.type.tensor_type.shape.dim[1].dim_value for tensor in (graph.input[0], graph.output[0]))
    return features, frames


def _with_durations(transducer: TransducerGraphs, durations: tuple[int, ...]) -> TransducerGraphs:
    """Return a transducer with these durations, or with those that published TDTs have.

    Raises:
        ModelError: its graphs have another number of them.
    """
    chosen = durations or (ASSUMED_DURATIONS if transducer.durations else ())
    if (found := len(transducer.durations)) != len(chosen):
        raise ModelError(
            f"{transducer.decoder_joint.path}: output outputs has {transducer.pieces + found} logits a frame; "
            f"{transducer.vocabulary.name} has {transducer.pieces} pieces with the blank, so {found} more would be durations, "
            f"expected {len(chosen)}; the vocabulary is too short, or name the durations by --durations"
        )
    return replace(transducer, durations=chosen)


@dataclass(frozen=True)
class _Sizes:
    """Sizes that warm-ups need.

    Attributes:
        samples: audio of one window.
        features: feature frames of an encoder call.
        frames: encoder frames of a decoder call.
    """

    samples: int
    features: int
    frames: int


class _Writer:
    """Writes the models of one recogniser into a repository.

    Args:
        name: of the ensemble.
        repository: where to.
        gpu: whether the graphs are to run on a GPU.

    Attributes:
        directories: all directories that it may write.
    """

    def __init__(self, name: str, repository: Path, *, gpu: bool) -> None:
        self._name, self._repository, self._gpu = name, repository, gpu
        parts = ("", "decoder", "detokenizer", "preprocessor", "decoder_joint", *LATENCIES.values())
        self.directories = [self._directory(part) for part in parts]

    def _directory(self, part: str) -> Path:
        return self._repository / (f"{self._name}_{part}" if part else self._name)

    def write(self, parts: Parts, encoders: Mapping[str, CachedEncoder]) -> TransducerGraphs:
        """Write all models, and return the transducer's sizes; remove what was written if something fails."""
        try:
            self._write_vocabulary(parts)
            graphs = {"preprocessor": parts.preprocessor, "decoder_joint": parts.decoder_joint}
            if isinstance(parts.encoder, CachedEncoder):
                graphs |= {LATENCIES[latency]: encoder.graph for latency, encoder in encoders.items()}
            else:
                graphs["encoder"] = parts.encoder
            written = {part: _write_graph(graph, self._directory(part) / "1") for part, graph in graphs.items()}
            transducer = parts.transducer or TransducerGraphs.read(
                written["encoder"], written["decoder_joint"], self._directory("decoder") / VOCABULARY, parts.features
            )
            if encoders:
                parameters = self._write_cached(parts, encoders, written, transducer)
            else:
                parameters = self._write_windowed(written, transducer)
            self._write_decoder(parts, transducer, parameters)
            self._write_python_model("detokenizer", "detokenizer", {"vocabulary": VOCABULARY})
            self._write_ensemble()
        except BaseException:
            for directory in self.directories:
                shutil.rmtree(directory, ignore_errors=True)
            raise
        return transducer

    def _write_vocabulary(self, parts: Parts) -> None:
        """Write the vocabulary twice: Triton copies only a model's own directory from a bucket."""
        for part in ("decoder", "detokenizer"):
            directory = self._directory(part)
            directory.mkdir(parents=True)
            if parts.pieces:
                (directory / VOCABULARY).write_text(to_text(parts.pieces), encoding="utf-8")
            else:
                shutil.copyfile(parts.vocabulary, directory / VOCABULARY)

    def _write_windowed(self, written: Mapping[str, Graph], transducer: TransducerGraphs) -> dict[str, str]:
        """Configure the graphs of an encoder that is run over windows; return the decoder's parameters for it."""
        frame_samples = features_per_frame(written["encoder"].path, transducer.features) * HOP_SAMPLES
        window_frames = {part: round(secs * SAMPLE_RATE / frame_samples) for part, secs in WINDOW_SECS.items()}
        samples = sum(window_frames.values()) * frame_samples
        sizes = _Sizes(samples, samples // HOP_SAMPLES, window_frames["chunk"])
        counts = {role: self._configure_graph(role, role, written[role], transducer, sizes) for role in ROLES}
        return {
            "encoder_calls": str(counts["encoder"]),
            "frame_samples": str(frame_samples),
            **measure_growth(written["preprocessor"].path, written["encoder"].path).parameters,
            **{f"{part}_frames": str(frames) for part, frames in window_frames.items()},
            **{
                name: ",".join(str(round(part * SAMPLE_RATE / frame_samples)) for part in secs)
                for name, secs in LATENCY_WINDOW_SECS.items()
            },
        }

    def _write_cached(
        self, parts: Parts, encoders: Mapping[str, CachedEncoder], written: Mapping[str, Graph], transducer: TransducerGraphs
    ) -> dict[str, str]:
        """Configure the graphs of a cached model; return the decoder's parameters for them."""
        frame_samples, counts = set(), []
        for latency, encoder in encoders.items():
            part = LATENCIES[latency]
            frames = _check_encoder(written[part].path, encoder)
            frame_samples.add(encoder.chunk_features * HOP_SAMPLES // frames)
            sizes = _Sizes(0, encoder.window_features, frames)
            counts.append(self._configure_graph("encoder", part, written[part], transducer, sizes))
        if len(frame_samples) > 1:
            raise ModelError(f"the encoders' frames have {sorted(frame_samples)} samples; expected one length")
        balanced = encoders["balanced"]
        window = (balanced.window_features + 2 * EDGE_FEATURES) * HOP_SAMPLES
        for role in ("preprocessor", "decoder_joint"):
            sizes = _Sizes(window, balanced.window_features, balanced.chunk_features * HOP_SAMPLES // min(frame_samples))
            self._configure_graph(role, role, written[role], transducer, sizes)
        parameters = {
            "encoder_kind": "cached",
            "encoder_calls": str(min(counts)),
            "frame_samples": str(min(frame_samples)),
            "hop_samples": str(HOP_SAMPLES),
            "edge_features": str(EDGE_FEATURES),
            "window_features": str(balanced.window_features),
            "chunk_features": str(balanced.chunk_features),
            "cache_size": str(balanced.cache_size),
            "cache_type": _cache_type(balanced),
            "fresh_features": parts.fresh_features,
            "final_padding_ms": str(parts.final_padding_ms),
        }
        for latency, prefix in LATENCY_PREFIXES.items():
            if latency in encoders:
                encoder = encoders[latency]
                parameters[f"{prefix}_encoder_model"] = self._directory(LATENCIES[latency]).name
                numbers = encoder.window_features, encoder.chunk_features, encoder.cache_size
                parameters[f"{prefix}_features"] = ",".join(map(str, numbers))
        if any(encoder.fixed_batch for encoder in encoders.values()) or not self._gpu:
            parameters["encoder_batch"] = str(min(1 if encoder.fixed_batch else CACHED_BATCH for encoder in encoders.values()))
        if parts.endpoint_tokens:
            parameters["endpoint_tokens"] = ",".join(map(str, parts.endpoint_tokens))
        if balanced.prompts:
            parameters["languages"] = ",".join(f"{language}={number}" for language, number in balanced.prompts.items())
            parameters["default_language"] = balanced.default_prompt
        return parameters

    def _configure_graph(self, template: str, part: str, graph: Graph, transducer: TransducerGraphs, sizes: _Sizes) -> int:
        """Write a graph's configuration and its warm-up's files; return its number of instances."""
        config = read_config(MODEL_REPOSITORY / template / "config.pbtxt")
        _set_tensors(config, graph)
        if self._gpu:
            config.instance_group[0].kind = pb.ModelInstanceGroup.KIND_GPU
            config.instance_group[0].count = 1
        elif template == "encoder" and graph.size >= LARGE_ENCODER_BYTES:
            config.instance_group[0].count = 1
            config.parameters["intra_op_thread_count"].string_value = "0"
        files = _set_warmup(config, transducer, sizes)
        directory = self._write_config(config, part)
        (directory / "warmup").mkdir()
        for name, data in files.items():
            (directory / "warmup" / name).write_bytes(data)
        return int(config.instance_group[0].count)

    def _write_decoder(self, parts: Parts, transducer: TransducerGraphs, parameters: Mapping[str, str]) -> None:
        chosen = {
            **{f"{role}_model": f"{self._name}_{role}" for role in ROLES},
            **transducer.parameters,
            "blank_penalty": "0",
            "max_symbols_per_step": str(parts.max_symbols),
            "vocabulary": VOCABULARY,
            **(GPU_PARAMETERS if self._gpu else {}),
            **parameters,
        }
        removed = (*BUNDLED_PARAMETERS, *LANGUAGE_PARAMETERS, *(MEMORY_PARAMETERS if "encoder_kind" in parameters else ()))
        self._write_python_model("rnnt_greedy_bls", "decoder", chosen, removed)

    def _write_python_model(self, template: str, part: str, parameters: Mapping[str, str], without: Sequence[str] = ()) -> None:
        config = read_config(MODEL_REPOSITORY / template / "config.pbtxt")
        for key in without:
            config.parameters.pop(key, None)
        for key, value in parameters.items():
            config.parameters[key].string_value = value
        directory = self._write_config(config, part)
        for path in (MODEL_REPOSITORY / template / "1").glob("*.py"):
            shutil.copyfile(path, directory / "1" / path.name)

    def _write_ensemble(self) -> None:
        config = read_config(MODEL_REPOSITORY / "asr_ensemble" / "config.pbtxt")
        for step in config.ensemble_scheduling.step:
            step.model_name = f"{self._name}_{'decoder' if step.model_name == 'rnnt_greedy_bls' else step.model_name}"
        self._write_config(config, "")

    def _write_config(self, config: pb.ModelConfig, part: str) -> Path:
        """Write a model's configuration under its new name; return its directory."""
        directory = self._directory(part)
        config.name = directory.name
        (directory / "1").mkdir(parents=True, exist_ok=True)
        (directory / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
        return directory


def _check_encoder(path: Path, encoder: CachedEncoder) -> int:
    """Run a written encoder; return how many frames it makes of a chunk.

    Raises:
        ProjectionError: it makes other frames than the published one.
        ModelError: it can't be run, or is not as expected.
    """
    frames = check_cached_encoder(path, encoder.window_features, encoder.chunk_features)
    if encoder.published:
        check_projection(path, encoder.window_features, encoder.published)
    return frames


def _cache_type(encoder: CachedEncoder) -> str:
    cache = next(value for value in encoder.graph.proto.graph.input if value.name == "cache")
    return next(name for name, element in CACHE_TYPES.items() if element == cache.type.tensor_type.elem_type)


def _set_tensors(config: pb.ModelConfig, graph: Graph) -> None:
    """Replace the template's shapes by the graph's; Triton requires outputs to be exactly as open as they are.

    Tensors that the template lacks, such as those of a cache, are added with the graph's types.
    """
    graph.resolve()
    triton_types: dict[int, pb.DataType] = {onnx_type: triton_type for triton_type, onnx_type in ONNX_TYPES.items()}
    for tensors, found in ((config.input, graph.inputs), (config.output, graph.outputs)):
        present = {tensor.name for tensor in tensors}
        for name in (name for name in found if name not in present):
            tensors.add(name=name).data_type = triton_types[found[name].type]
        for tensor in tensors:
            tensor.dims[:] = found[tensor.name].dims


def _set_warmup(config: pb.ModelConfig, transducer: TransducerGraphs, sizes: _Sizes) -> dict[str, bytes]:
    """Fit the template's warm-up to one window of this model; return the contents of the files with its lengths."""
    state = (transducer.layers, 1, transducer.hidden)
    dims = {
        "waveforms": (1, sizes.samples),
        "audio_signal": (1, transducer.features, sizes.features),
        "encoder_outputs": (1, transducer.encoder_size, sizes.frames),
        "input_states_1": state,
        "input_states_2": state,
    }
    lengths = {"waveforms_lens": sizes.samples, "length": sizes.features, "target_length": 1}
    files = {}
    for sample in config.model_warmup:
        for tensor in config.input:
            if tensor.name not in sample.inputs:  # of a cache
                added = sample.inputs[tensor.name]
                added.data_type, added.zero_data = tensor.data_type, True
                added.dims[:] = (1, *tensor.dims[1:])
        for name, tensor in sample.inputs.items():
            if name in dims:
                tensor.dims[:] = dims[name]
            if name in lengths:
                tensor.input_data_file = name
                files[name] = lengths[name].to_bytes(np.dtype(ELEMENT_TYPES[tensor.data_type]).itemsize, "little")
    return files


def _write_graph(graph: GraphSource, directory: Path) -> Graph:
    """Write a graph as ``model.onnx``, and copy its files of weights under their own names; return the written graph.

    Not as links: a write to one name would change the other, and onnx refuses weights with two names and symbolic links.
    """
    directory.mkdir(parents=True)
    path = directory / "model.onnx"
    if isinstance(graph, Path):
        source = Graph(graph)
        folder, names = graph.parent, source.data_files
        refused = f"{graph} keeps weights in model.onnx, as the graph itself is called in a model repository"
    else:
        folder, names = graph.directory, external_files(graph.proto)
        refused = f"a graph of {folder} keeps weights in model.onnx, as the graph itself is called in a model repository"
    if "model.onnx" in names:
        raise ModelError(refused)
    for name in names:
        shutil.copyfile(folder / name, directory / name)
    if isinstance(graph, Path):
        shutil.copyfile(graph, path)
    else:
        onnx.save(graph.proto, path)
    return Graph(path)


def external_files(proto: onnx.ModelProto) -> list[str]:
    """Return the names of the files with a graph's external weights."""
    tensors = filter(uses_external_data, weights_of(proto.graph))
    return list(dict.fromkeys(ExternalDataInfo(tensor).location for tensor in tensors))
