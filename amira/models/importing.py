"""Import transducers into a model repository: ``amira models import``.

A source is a directory with ``encoder-model.onnx``, ``decoder_joint-model.onnx`` and ``vocab.txt`` (NeMo's ONNX export and the
onnx-asr layout), or a Hugging Face repository with these files. The configurations of the bundled model are the templates.
"""

from __future__ import annotations

import importlib.resources
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from google.protobuf import text_format
from pydantic import BaseModel, Field, ValidationError
from tritonclient.grpc import model_config_pb2 as pb

from amira.models.check import features_per_frame
from amira.models.configs import ModelError, read_config
from amira.models.graphs import Graph, TransducerGraphs, data_files
from amira.models.memory import measure_growth
from amira.models.repository import ROLES
from amira.paths import MODEL_REPOSITORY

SAMPLE_RATE = 16_000
MEL_HOP_SAMPLES = 160
MEL_BINS = (80, 128)
"""Numbers of mel bins for which onnx-asr has NeMo's front end as a graph."""

WINDOW_SECS = {"left": 10.0, "chunk": 2.0, "right": 2.0}
"""Windows for encoders that were trained on whole utterances; NeMo's buffered streaming loses 0.3 points (PR 9106)."""

LATENCY_WINDOW_SECS = {"low_latency_frames": (10.0, 1.0, 1.0), "high_throughput_frames": (10.0, 4.0, 2.0)}
"""Left context, chunk and right context of the other latencies, in seconds; ``low`` was not measured."""

ASSUMED_DURATIONS = (0, 1, 2, 3, 4)
"""Durations of a TDT without declared durations; all published TDTs have these."""

LARGE_ENCODER_BYTES = 200_000_000
"""Size from which an encoder gets one session with all cores, since each session has the weights in memory."""

GPU_PARAMETERS = {"encoder_batch": "16", "block_frames": "32"}
"""Parameters for a GPU, which computes many windows in little more time than one; not measured."""

VOCABULARY = "vocab.txt"
"""File name of the vocabulary in the directory of each model that reads it."""

NEMO_RECIPE = """\
{path} is a NeMo checkpoint; export it where NeMo is installed, then import the directory that this writes to:
  import json, pathlib; import nemo.collections.asr as nemo_asr
  m = nemo_asr.models.ASRModel.restore_from({path!r}); m.export("model.onnx")
  lines = [f"{{token}} {{i}}\\n" for i, token in enumerate([*m.tokenizer.vocab, "<blk>"])]
  pathlib.Path("vocab.txt").write_text("".join(lines), encoding="utf-8")
  durations = list(m.cfg.model_defaults.get("tdt_durations") or [])
  config = {{"model_type": f"nemo-conformer-{{'tdt' if durations else 'rnnt'}}", "features_size": m.cfg.preprocessor.features}}
  config |= {{"subsampling_factor": m.cfg.encoder.subsampling_factor, "durations": durations}}
  pathlib.Path("config.json").write_text(json.dumps(config))"""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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


def import_model(
    source: str, name: str, repository: Path, quantization: str | None, durations: Sequence[int] = (), *, gpu: bool
) -> TransducerGraphs:
    """Write the models of a recogniser into a repository.

    Args:
        source: a directory, or the id of a Hugging Face repository.
        name: name of the new ensemble; its other models are called ``name_…``.
        repository: model repository to write to; created if missing.
        quantization: variant of the graphs, such as ``int8`` for ``encoder-model.int8.onnx``.
        durations: durations of a TDT in frames; default: those of ``config.json``, or 0, 1, 2, 3, 4.
        gpu: whether the graphs run on a GPU.

    Raises:
        ModelError: the source cannot be used, the name is taken, or the repository cannot be written.
    """
    if not NAME.fullmatch(name):
        raise ModelError(
            f"name {name!r} is not allowed: up to 40 letters, digits, '.', '_' and '-', the first a letter or digit; use --name"
        )
    writer = _Writer(name, repository)
    for directory in writer.directories:
        if directory.exists():
            raise ModelError(f"{directory} exists; choose another --name, or remove it")
    suffix = f".{quantization}" if quantization else ""
    directory = _locate(source, suffix)
    encoder, decoder_joint = (directory / f"{role}-model{suffix}.onnx" for role in ("encoder", "decoder_joint"))
    if not encoder.exists() and (checkpoints := sorted(directory.glob("*.nemo"))):
        raise ModelError(NEMO_RECIPE.format(path=str(checkpoints[0])))
    config = SourceConfig.read(directory / "config.json")
    transducer = TransducerGraphs.read(Graph(encoder), Graph(decoder_joint), directory / "vocab.txt", config.features_size)
    declared = config.model_type.partition("nemo-conformer-")[2]
    if declared and declared != transducer.kind:
        raise ModelError(
            f"{directory / 'config.json'}: model_type is {config.model_type!r}, but {decoder_joint.name} and vocab.txt are "
            f"those of {transducer.kind!r}"
        )
    transducer = _with_durations(transducer, tuple(durations) or config.durations)
    front_end = _front_end(transducer, gpu=gpu)
    factor = features_per_frame(encoder, transducer.features)
    if config.subsampling_factor not in (None, factor):
        raise ModelError(
            f"{directory / 'config.json'}: subsampling_factor is {config.subsampling_factor}, but {encoder.name} makes a frame "
            f"of {factor} feature frames"
        )
    try:
        writer.write(transducer, config, front_end, factor * MEL_HOP_SAMPLES, gpu=gpu)
    except OSError as error:
        raise ModelError(f"{error.filename or repository} can't be written: {error.strerror}") from error
    return transducer


def _with_durations(transducer: TransducerGraphs, durations: tuple[int, ...]) -> TransducerGraphs:
    """Return a transducer with the given durations, or with those of published TDTs.

    Raises:
        ModelError: the graphs have another number of durations.
    """
    chosen = durations or (ASSUMED_DURATIONS if transducer.durations else ())
    if (found := len(transducer.durations)) != len(chosen):
        raise ModelError(
            f"{transducer.decoder_joint.path}: output outputs has {transducer.pieces + found} logits a frame; "
            f"{transducer.vocabulary.name} has {transducer.pieces} pieces with the blank, so {found} more would be durations, "
            f"expected {len(chosen)}; the vocabulary is too short, or name the durations by --durations"
        )
    return replace(transducer, durations=chosen)


def _locate(source: str, suffix: str) -> Path:
    """Return the directory of a source; download it if it is a Hugging Face repository."""
    path = Path(source)
    if path.suffix == ".nemo":
        raise ModelError(NEMO_RECIPE.format(path=source))
    if path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(source):
        raise ModelError(f"{source} is neither a directory nor the id of a Hugging Face repository (owner/name)")
    from huggingface_hub import snapshot_download  # noqa: PLC0415 (the import takes half a second)

    def download(files: list[str], revision: str | None = None) -> Path:
        try:
            return Path(snapshot_download(source, allow_patterns=files, revision=revision))
        except Exception as error:  # every layer below has its own errors
            reason = str(error).partition("\n")[0]
            raise ModelError(f"{source} is no directory here, and can't be had from Hugging Face: {reason}") from error

    graphs = [f"{role}-model{suffix}.onnx" for role in ("encoder", "decoder_joint")]
    directory = download([*graphs, "vocab.txt", "config.json"])
    for graph in graphs:
        if not (directory / graph).exists():
            raise ModelError(
                f"{source} on Hugging Face has no {graph}; if it has a .nemo file, export that first: "
                "docs/Models.md#your-own-model"
            )
    if weights := [name for graph in graphs for name in data_files(directory / graph)]:
        download(weights, revision=directory.name)
    return directory


def _front_end(transducer: TransducerGraphs, *, gpu: bool) -> Path:
    """Return the mel front end for a model. For a GPU, it has no STFT operator: CUDA has no kernel for it."""
    if transducer.features not in MEL_BINS:
        raise ModelError(
            f"{transducer.encoder.path}: input audio_signal takes {transducer.features} features; "
            f"front ends exist for {' and '.join(map(str, MEL_BINS))}"
        )
    name = f"nemo{transducer.features}{'_conv' if gpu else ''}.onnx"
    return Path(str(importlib.resources.files("onnx_asr") / "preprocessors" / "data" / name))


class _Writer:
    """Writes the models of one recogniser into a repository.

    Args:
        name: name of the ensemble.
        repository: the repository.

    Attributes:
        directories: directories of the models.
    """

    def __init__(self, name: str, repository: Path) -> None:
        self._name, self._repository = name, repository
        self.directories = [self._directory(part) for part in ("", "decoder", "detokenizer", *ROLES)]

    def _directory(self, part: str) -> Path:
        return self._repository / (f"{self._name}_{part}" if part else self._name)

    def write(
        self, transducer: TransducerGraphs, config: SourceConfig, front_end: Path, frame_samples: int, *, gpu: bool
    ) -> None:
        """Write all models. If a step fails, remove them."""
        window_frames = {part: round(secs * SAMPLE_RATE / frame_samples) for part, secs in WINDOW_SECS.items()}
        try:
            graphs = dict(zip(ROLES, (Graph(front_end), transducer.encoder, transducer.decoder_joint), strict=True))
            counts = {
                role: self._write_graph(role, graph, transducer, window_frames, frame_samples, gpu=gpu)
                for role, graph in graphs.items()
            }
            parameters = {
                **{f"{role}_model": f"{self._name}_{role}" for role in ROLES},
                **transducer.parameters,
                "encoder_calls": str(counts["encoder"]),
                "blank_penalty": "0",
                "max_symbols_per_step": str(config.max_tokens_per_step),
                "frame_samples": str(frame_samples),
                **measure_growth(front_end, transducer.encoder.path).parameters,
                **{f"{part}_frames": str(frames) for part, frames in window_frames.items()},
                **{
                    name: ",".join(str(round(part * SAMPLE_RATE / frame_samples)) for part in secs)
                    for name, secs in LATENCY_WINDOW_SECS.items()
                },
                "vocabulary": VOCABULARY,
                **(GPU_PARAMETERS if gpu else {}),
            }
            # An imported recogniser has only one encoder.
            self._write_python_model("rnnt_greedy_bls", "decoder", parameters, without="exclusive_encoder_model")
            self._write_python_model("detokenizer", "detokenizer", {"vocabulary": VOCABULARY})
            for part in ("decoder", "detokenizer"):  # Triton copies only a model's own directory from a bucket
                shutil.copyfile(transducer.vocabulary, self._directory(part) / VOCABULARY)
            self._write_ensemble()
        except BaseException:
            for directory in self.directories:
                shutil.rmtree(directory, ignore_errors=True)
            raise

    def _write_graph(
        self,
        role: str,
        graph: Graph,
        transducer: TransducerGraphs,
        window_frames: dict[str, int],
        frame_samples: int,
        *,
        gpu: bool,
    ) -> int:
        """Write a graph, its configuration and its warm-up files; return its number of instances."""
        config = read_config(MODEL_REPOSITORY / role / "config.pbtxt")
        _set_dims(config, _copy_graph(graph, self._directory(role) / "1"))
        if gpu:
            config.instance_group[0].kind = pb.ModelInstanceGroup.KIND_GPU
            config.instance_group[0].count = 1
        elif role == "encoder" and transducer.encoder.size >= LARGE_ENCODER_BYTES:
            config.instance_group[0].count = 1
            config.parameters["intra_op_thread_count"].string_value = "0"
        files = _set_warmup(config, transducer, window_frames, frame_samples)
        directory = self._write_config(config, role)
        (directory / "warmup").mkdir()
        for name, data in files.items():
            (directory / "warmup" / name).write_bytes(data)
        return int(config.instance_group[0].count)

    def _write_python_model(self, template: str, part: str, parameters: dict[str, str], without: str = "") -> None:
        config = read_config(MODEL_REPOSITORY / template / "config.pbtxt")
        config.parameters.pop(without, None)
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


def _set_dims(config: pb.ModelConfig, graph: Graph) -> None:
    """Replace the template's shapes with the graph's. Triton requires the same dynamic sizes of outputs."""
    graph.resolve()
    for tensors, found in ((config.input, graph.inputs), (config.output, graph.outputs)):
        for tensor in tensors:
            tensor.dims[:] = found[tensor.name].dims


def _set_warmup(
    config: pb.ModelConfig, transducer: TransducerGraphs, window_frames: dict[str, int], frame_samples: int
) -> dict[str, bytes]:
    """Fit the template's warm-up to one window of this model; return its data files by name."""
    samples = sum(window_frames.values()) * frame_samples
    features = samples // MEL_HOP_SAMPLES
    state = (transducer.layers, 1, transducer.hidden)
    dims = {
        "waveforms": (1, samples),
        "audio_signal": (1, transducer.features, features),
        "encoder_outputs": (1, transducer.encoder_size, window_frames["chunk"]),
        "input_states_1": state,
        "input_states_2": state,
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


def _copy_graph(graph: Graph, directory: Path) -> Graph:
    """Copy a graph as ``model.onnx``, and its weight files under their names; return the copy.

    Links would not do: a write to the copy would change the source, and onnx refuses linked weight files.
    """
    if "model.onnx" in graph.data_files:
        raise ModelError(f"{graph.path} keeps weights in model.onnx, as the graph itself is called in a model repository")
    directory.mkdir(parents=True)
    shutil.copyfile(graph.path, directory / "model.onnx")
    for name in graph.data_files:
        shutil.copyfile(graph.path.parent / name, directory / name)
    return Graph(directory / "model.onnx")
