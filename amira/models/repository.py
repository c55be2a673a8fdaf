"""Find the recognisers of a model repository, and check that their files fit each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tritonclient.grpc import model_config_pb2 as pb

from amira.models.configs import ModelError, read_configs
from amira.models.graphs import FLOAT, FLOAT16, INT32, INT64, OPEN, Graph, TransducerGraphs
from amira.models.memory import Growth, measure_growth
from gateway.triton.geometry import CACHED_PREFIXES, LATENCY_PARAMETERS

ROLES = ("preprocessor", "encoder", "decoder_joint")
"""Graphs of a recogniser, named as in the parameters of its decoder."""

ONNX_TYPES = {pb.TYPE_FP16: FLOAT16, pb.TYPE_FP32: FLOAT, pb.TYPE_INT32: INT32, pb.TYPE_INT64: INT64}
"""ONNX element types by Triton's types."""


DEFAULT_ENCODER_BATCH = 4
"""The decoder's default for ``encoder_batch``."""

CACHED_NUMBERS = "window_features", "chunk_features", "cache_size", "hop_samples", "edge_features", "frame_samples"
"""Parameters of a decoder with a cached encoder that must be whole numbers."""


class CachedSizes(NamedTuple):
    """Sizes of a cached encoder.

    Attributes:
        path: the graph's file.
        window_features: feature frames of a call.
        chunk_features: feature frames by which the next window begins later.
        cache_bytes: size of a stream's cache.
    """

    path: Path
    window_features: int
    chunk_features: int
    cache_bytes: int


@dataclass(frozen=True)
class Recogniser:
    """An ensemble of a model repository, with its decoder and graphs.

    Attributes:
        name: name of the ensemble.
        decoder: name of its decoder.
        parameters: parameters of the decoder.
        features: number of values in a feature frame.
        preprocessor, encoder, decoder_joint: paths of its graphs.
        whole_encoder: path of the encoder for whole recordings, if the encoder of streams is not used for them.
        vocabulary: path of its vocabulary.
    """

    name: str
    decoder: str
    parameters: Mapping[str, str]
    features: int
    preprocessor: Path
    encoder: Path
    decoder_joint: Path
    vocabulary: Path
    whole_encoder: Path | None = None

    def describe(self) -> str:
        """Return a description of one line."""
        p = self.parameters
        if self.is_cached:
            return f"{self.name}: {p['kind']}, {p['blank']} pieces, {self._describe_cached()}"
        frame_ms = int(p["frame_samples"]) / 16
        balanced = ",".join(p[f"{part}_frames"] for part in ("left", "chunk", "right"))
        geometries = {"windows of": balanced, **{word: p[name] for word, name in LATENCY_PARAMETERS.items() if name in p}}
        windows = (
            f"{word} {' + '.join(f'{int(frames) * frame_ms / 1000:.2f}' for frames in geometry.split(','))} s"
            for word, geometry in geometries.items()
        )
        return f"{self.name}: {p['kind']}, {p['blank']} pieces, {frame_ms:g} ms a frame, {', '.join(windows)}"

    @property
    def is_cached(self) -> bool:
        """Whether its encoders carry their context in a cache."""
        return self.parameters.get("encoder_kind") == "cached"

    @property
    def right_features(self) -> int:
        """Feature frames of a cached encoder's look-ahead."""
        return int(self.parameters.get("right_features", 0))

    def _describe_cached(self) -> str:
        """Return frames, chunks and the cache's memory."""
        p = self.parameters
        hop_ms = int(p["hop_samples"]) / 16
        chunks = {latency: sizes.chunk_features * hop_ms for latency, sizes in self.cached_encoders.items()}
        ahead = f" + {self.right_features * hop_ms:g}" if self.right_features else ""
        chunk_texts = ", ".join(f"{latency} {ms:g}{ahead} ms" for latency, ms in chunks.items())
        stream_mb = max(sizes.cache_bytes for sizes in self.cached_encoders.values()) / 1e6
        batch = int(p.get("encoder_batch", DEFAULT_ENCODER_BATCH))
        shared_mb = 2 * batch * int(p.get("encoder_calls", 2)) * stream_mb
        languages = f", {p['languages'].count('=')} languages" if p.get("languages") else ""
        return (
            f"{int(p['frame_samples']) / 16:g} ms a frame, cached, chunks of {chunk_texts}{languages}, "
            f"{stream_mb:.1f} MB a stream, up to {shared_mb:.0f} MB of shared memory for its encoder calls"
        )

    @property
    def cached_encoders(self) -> dict[str, CachedSizes]:
        """Sizes of the cached encoders by latency; a latency without its own is left out."""
        p = self.parameters
        values = 2 if p.get("cache_type", "fp16") == "fp16" else 4
        balanced = CachedSizes(self.encoder, int(p["window_features"]), int(p["chunk_features"]), int(p["cache_size"]) * values)
        found = {"balanced": balanced}
        for latency, prefix in CACHED_PREFIXES.items():
            if text := p.get(f"{prefix}_features"):
                window, chunk, size = map(int, text.split(","))
                path = self.encoder.parents[2] / p[f"{prefix}_encoder_model"] / "1" / self.encoder.name
                found[latency] = CachedSizes(path, window, chunk, size * values)
        return found

    def check_memory(self) -> Growth:
        """Measure the growth of a window's memory, and compare the decoder's parameters with it.

        Raises:
            ModelError: the parameters declare no growth or too little; the message has correct parameters.
        """
        measured = measure_growth(self.preprocessor, self.whole_encoder or self.encoder)
        declared = Growth.declared(self.parameters)
        if declared and declared.covers(measured):
            return measured
        declares = f"{declared.window_bytes(60) / 1e9:.2f} GB" if declared else "nothing"
        lines = (
            f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}' for key, value in measured.parameters.items()
        )
        raise ModelError(
            f"{self.decoder}/config.pbtxt declares {declares} for a window of 60 s, which takes up to "
            f"{measured.window_bytes(60) / 1e9:.2f} GB; write into it {' '.join(lines)}"
        )


def inspect_repository(repository: Path) -> list[Recogniser | ModelError]:
    """Return the recognisers of a repository, or an error in place of each ensemble that cannot be used.

    Raises:
        ModelError: the repository has no ensemble, or a configuration cannot be read.
    """
    configs = read_configs(repository)
    found: list[Recogniser | ModelError] = []
    for name in (name for name, config in configs.items() if config.HasField("ensemble_scheduling")):
        try:
            found.append(_check(repository, configs, name))
        except ModelError as error:
            found.append(error)
    if not found:
        raise ModelError(f"model repository {repository} has no ensemble")
    return found


def recognisers(repository: Path) -> list[Recogniser]:
    """Return the recognisers of a repository.

    Raises:
        ModelError: an ensemble or the whole repository cannot be used.
    """
    found = []
    for recogniser in inspect_repository(repository):
        if isinstance(recogniser, ModelError):
            raise recogniser
        found.append(recogniser)
    return found


def _check(repository: Path, configs: Mapping[str, pb.ModelConfig], name: str) -> Recogniser:
    path = repository / name / "config.pbtxt"
    steps = [step.model_name for step in configs[name].ensemble_scheduling.step]
    for step in steps:
        if step not in configs:
            raise ModelError(f"{path}: step {step} is no model of this repository")
    decoder = _only(
        path, "sequence_batching, as the decoder has", [s for s in steps if configs[s].HasField("sequence_batching")]
    )
    others = [step for step in steps if step != decoder]
    detokenizer = _only(path, "a vocabulary", [s for s in others if "vocabulary" in configs[s].parameters])
    parameters = {key: value.string_value for key, value in configs[decoder].parameters.items()}
    decoder_path = repository / decoder / "config.pbtxt"
    for role in ROLES:
        if (callee := parameters.get(f"{role}_model", "")) not in configs:
            raise ModelError(f"{decoder_path}: parameter {role}_model is {callee!r}; expected a model of this repository")
    preprocessor, encoder, decoder_joint = (_graph(repository, configs[parameters[f"{role}_model"]]) for role in ROLES)
    vocabulary = repository / detokenizer / configs[detokenizer].parameters["vocabulary"].string_value
    preprocessor.check("input", {"waveforms": (FLOAT, (OPEN, OPEN)), "waveforms_lens": (INT64, (OPEN,))})
    preprocessor.check_no_others(("waveforms", "waveforms_lens"))
    preprocessor.check("output", {"features": (FLOAT, (OPEN, None, OPEN)), "features_lens": (INT64, (OPEN,))})
    features = preprocessor.outputs["features"].shape[1]
    transducer = TransducerGraphs.read(encoder, decoder_joint, vocabulary, features)
    if (exclusive := parameters.get("exclusive_encoder_model")) is not None:
        if exclusive not in configs:
            raise ModelError(
                f"{decoder_path}: parameter exclusive_encoder_model is {exclusive!r}; expected a model of this repository"
            )
        TransducerGraphs.read(_graph(repository, configs[exclusive]), decoder_joint, vocabulary, transducer.features)
    more: dict[str, Graph] = {}
    for key in ("whole_encoder_model", *(f"{prefix}_encoder_model" for prefix in CACHED_PREFIXES.values())):
        if (other := parameters.get(key)) is not None:
            if other not in configs:
                raise ModelError(f"{decoder_path}: parameter {key} is {other!r}; expected a model of this repository")
            more[key] = _graph(repository, configs[other])
            TransducerGraphs.read(more[key], decoder_joint, vocabulary, transducer.features)
    _check_kind(decoder_path, parameters, encoder)
    _check_parameters(decoder_path, parameters, transducer)
    _check_same(repository / decoder / parameters.get("vocabulary", ""), vocabulary)
    whole = more.get("whole_encoder_model")
    return Recogniser(
        name,
        decoder,
        parameters,
        transducer.features,
        preprocessor.path,
        encoder.path,
        decoder_joint.path,
        vocabulary,
        whole.path if whole else None,
    )


def _only(path: Path, what: str, found: list[str]) -> str:
    if len(found) != 1:
        raise ModelError(f"{path}: {len(found)} of its steps have {what}; expected 1")
    return found[0]


def _graph(repository: Path, config: pb.ModelConfig) -> Graph:
    """Return a model's graph after comparing it with its configuration, as Triton's ONNX Runtime backend does.

    The configuration must have all inputs, with sizes that the graph allows, and outputs with exactly the graph's sizes.
    """
    graph = Graph(repository / config.name / "1" / (config.default_model_filename or "model.onnx"))
    graph.resolve()
    batch = (OPEN,) if config.max_batch_size else ()
    for kind, tensors in (("input", config.input), ("output", config.output)):
        expected = {tensor.name: (ONNX_TYPES.get(tensor.data_type, 0), (*batch, *tensor.dims)) for tensor in tensors}
        graph.check(kind, expected, exact=kind == "output")
    if missing := graph.inputs.keys() - {tensor.name for tensor in config.input}:
        path = repository / config.name / "config.pbtxt"
        raise ModelError(f"{path}: input {', '.join(sorted(missing))} is missing; {graph.path} has it")
    return graph


def _check_same(decoders: Path, vocabulary: Path) -> None:
    """Raise ModelError unless the decoder and the detokenizer read the same vocabulary."""
    if not decoders.is_file():
        raise ModelError(f"{decoders.resolve()} is missing; the decoder's parameter vocabulary names it")
    if decoders.read_bytes() != vocabulary.read_bytes():
        raise ModelError(f"{decoders.resolve()} differs from {vocabulary.resolve()}; decoder and detokenizer need the same one")


def _check_kind(path: Path, parameters: Mapping[str, str], encoder: Graph) -> None:
    """Raise ModelError unless the decoder expects a cache where the encoder has one, of the same size and type."""
    cache = encoder.inputs.get("cache")
    kind, expected = parameters.get("encoder_kind", "windowed"), "cached" if cache else "windowed"
    if kind != expected:
        raise ModelError(f"{path}: parameter encoder_kind is {kind!r}; {encoder.path} is {expected!r}")
    if cache:
        named = {"cache_size": str(cache.shape[-1]), "cache_type": "fp16" if cache.type == FLOAT16 else "fp32"}
        for name, value in named.items():
            if (found := parameters.get(name, "fp16")) != value:
                raise ModelError(f"{path}: parameter {name} is {found!r}; {encoder.path} has {value!r}")


def _check_parameters(path: Path, parameters: Mapping[str, str], transducer: TransducerGraphs) -> None:
    """Compare the decoder's parameters with graphs and vocabulary, which have the number of durations but not their values."""
    for name, expected in transducer.parameters.items():
        found = parameters.get(name, "")
        if found != expected and not (name == "durations" and found.count(",") == expected.count(",")):
            raise ModelError(f"{path}: parameter {name} is {found!r}; its graphs and vocabulary have {expected!r}")
    cached = parameters.get("encoder_kind") == "cached"
    for name in CACHED_NUMBERS if cached else ("frame_samples", "left_frames", "chunk_frames", "right_frames"):
        if not (found := parameters.get(name, "")).isdecimal():
            raise ModelError(f"{path}: parameter {name} is {found!r}; expected a whole number")
    for name in [f"{prefix}_features" for prefix in CACHED_PREFIXES.values()] if cached else LATENCY_PARAMETERS.values():
        if not re.fullmatch(r"\d+,\d+,\d+", found := parameters.get(name, "0,0,0")):
            raise ModelError(f"{path}: parameter {name} is {found!r}; expected three whole numbers with commas")
