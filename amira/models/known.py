"""Public models by short names, and their download and import on first use: ``amira models known``, ``amira run --model``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from amira.models.configs import ModelError
from amira.models.importing import ImportOptions, import_model
from amira.models.sources import HUB_ID, hub_bytes

SPACE_FACTOR = 2.1
"""Disk space that an import takes, in sizes of the files: the download, the copy in the repository, and a margin."""


@dataclass(frozen=True)
class KnownModel:
    """A public model.

    Attributes:
        source: id of its Hugging Face repository.
        licence: of its weights.
        languages: that it recognises.
        kind: how it streams.
        download_mb: size of its files, in MB; about.
        memory_mb: memory for its weights, in MB; about, with one session of the encoder.
        checked: what was seen on pages and in programs that use it (2026-11-28); the files themselves were not tried.
        options: how it is imported.
    """

    source: str
    licence: str
    languages: str
    kind: str
    download_mb: int
    memory_mb: int
    checked: str = ""
    options: ImportOptions = field(default_factory=ImportOptions)


_FAST_CONFORMER = "csukuangfj/sherpa-onnx-nemo-streaming-fast-conformer-transducer-en-{}ms"
_NEMOTRON = "csukuangfj2/sherpa-onnx-nemotron-{}ms-int8-{}"
_INT8 = ImportOptions("int8")
_ALL = "id, files, size, licence"

KNOWN: Mapping[str, KnownModel] = {
    "parakeet-tdt-0.6b-v2": KnownModel(
        "istupakov/parakeet-tdt-0.6b-v2-onnx", "CC-BY-4.0", "English", "windows", 660, 1000, "id, files", _INT8
    ),
    "parakeet-tdt-0.6b-v3": KnownModel(
        "istupakov/parakeet-tdt-0.6b-v3-onnx", "CC-BY-4.0", "25 European", "windows", 670, 1000, _ALL, _INT8
    ),
    "parakeet-rnnt-0.6b": KnownModel(
        "istupakov/parakeet-rnnt-0.6b-onnx", "CC-BY-4.0", "English", "windows", 650, 1000, "id", _INT8
    ),
    "fastconformer-streaming": KnownModel(
        _FAST_CONFORMER.format(480),
        "CC-BY-4.0",
        "English",
        "cached, 80, 480 and 1040 ms",
        1430,
        1800,
        "id, files, size",
        ImportOptions(latencies={"low": _FAST_CONFORMER.format(80), "throughput": _FAST_CONFORMER.format(1040)}),
    ),
    "nemotron-streaming": KnownModel(
        _NEMOTRON.format("speech-streaming-en-0.6b-560", "2026-04-25"),
        "NVIDIA Open Model",
        "English",
        "cached, 560 ms",
        660,
        1000,
        _ALL,
        _INT8,
    ),
    "nemotron-3.5-streaming": KnownModel(
        _NEMOTRON.format("3.5-asr-streaming-0.6b-560", "2026-06-11"),
        "NVIDIA Open Model",
        "40 locales, by language=",
        "cached, 560 ms",
        700,
        1100,
        "id, files",
        _INT8,
    ),
    "zipformer-streaming-en": KnownModel(
        "csukuangfj/sherpa-onnx-streaming-zipformer-en-2023-06-26",
        "Apache-2.0",
        "English",
        "cached, 320 ms",
        265,
        400,
        _ALL,
        ImportOptions(files="left-128"),
    ),
    "zipformer-streaming-zh": KnownModel(
        "k2-fsa/sherpa-onnx-streaming-zipformer-multi-zh-hans-2023-12-12",
        "Apache-2.0",
        "Chinese",
        "cached, 320 ms",
        270,
        400,
        "id, files, licence",
    ),
    "zipformer-gigaspeech": KnownModel(
        "k2-fsa/sherpa-onnx-zipformer-gigaspeech-2023-12-12", "Apache-2.0", "English", "windows", 265, 500, _ALL
    ),
}
"""Public models by short name. Sizes are rounded."""


def ensure_imported(model: str, models_home: Path) -> tuple[Path, str]:
    """Return the repository and ensemble of a model; download and import it the first time.

    The repository is complete or absent: nothing is left of an import that was cut short. huggingface_hub keeps what it has
    downloaded, and resumes there.

    Args:
        model: a short name, the id of a Hugging Face repository, or a directory.
        models_home: where imported models are kept.

    Raises:
        ModelError: the model is not known, can't be had or used, or the disk has too little space.
    """
    known = KNOWN.get(model)
    source, options = (known.source, known.options) if known else (model, ImportOptions())
    if not known and not HUB_ID.fullmatch(model) and not Path(model).is_dir():
        raise ModelError(f"model {model!r} is unknown; expected {', '.join(KNOWN)}, owner/name on Hugging Face, or a directory")
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", model if known else Path(model).absolute().name)[:40]
    repository = models_home / re.sub(r"[^A-Za-z0-9_.-]+", "_", model).strip("_")
    if repository.is_dir():
        return repository, name
    models_home.mkdir(parents=True, exist_ok=True)
    check_space(models_home, [source, *options.latencies.values()], options)
    partial = repository.with_name(f".{repository.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        import_model(source, name, partial, options)
        partial.rename(repository)
    except OSError as error:
        raise ModelError(f"{error.filename or repository} can't be written: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return repository, name


def check_space(directory: Path, sources: list[str], options: ImportOptions) -> None:
    """Check that the disk has space for the download and the import of sources.

    Raises:
        ModelError: it has too little, or a source can't be had.
    """
    needed = SPACE_FACTOR * sum(
        hub_bytes(source, options.quantization, options.files) for source in sources if not Path(source).is_dir()
    )
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ModelError(f"{directory} has {free / 1e9:.1f} GB of free space; the model needs about {needed / 1e9:.1f} GB")
