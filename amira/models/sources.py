"""Files of a model's source: a directory, or a Hugging Face repository that is downloaded."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from amira.models.configs import ModelError
from amira.models.graphs import data_files
from amira.models.vocabularies import FILES

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
GRAPH = re.compile(r"(encoder|decoder_joint|decoder|joiner)([-_.].*)?\.onnx")
"""Names of graphs: the part, then what the exporter adds, such as an epoch or a variant."""

WEIGHT_SUFFIXES = (".onnx.data", ".onnx_data", ".data", ".weights")
"""What graphs' files of weights are called after, by exporters; others are not counted before a download."""

VARIANT = re.compile(r"\.(int8|uint8|fp16|quant|q4|int4)\.onnx$")
"""Suffix of graphs that are a variant of another."""

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


def locate(source: str, quantization: str | None, files: str = "") -> dict[str, Path]:
    """Return a source's graphs by part: ``encoder``, and ``decoder_joint`` or ``decoder`` and ``joiner``.

    Args:
        source: a directory, or the id of a Hugging Face repository, which is downloaded as far as it is needed.
        quantization: variant of the graphs, such as ``int8``.
        files: text that the names of the graphs contain, where several would do.

    Raises:
        ModelError: the source is neither, can't be had, or lacks a graph.
    """
    path = Path(source)
    if path.suffix == ".nemo":
        raise ModelError(NEMO_RECIPE.format(path=source))
    if path.is_dir():
        found = choose_graphs([file.name for file in path.iterdir()], quantization, files, source)
        if "encoder" not in found and (checkpoints := sorted(path.glob("*.nemo"))):
            raise ModelError(NEMO_RECIPE.format(path=str(checkpoints[0])))
        missing = missing_graph(found, quantization)
        if missing:
            raise ModelError(f"{path / missing} is missing")
        return {part: path / name for part, name in found.items()}
    if path.exists() or not HUB_ID.fullmatch(source):
        raise ModelError(f"{source} is neither a directory nor the id of a Hugging Face repository (owner/name)")
    return _download(source, quantization, files)


def choose_graphs(names: Collection[str], quantization: str | None, files: str, source: str) -> dict[str, str]:
    """Return the names of a source's graphs by part.

    Raises:
        ModelError: several files could be a part.
    """
    chosen: dict[str, str] = {}
    for name in sorted(names):
        graph = GRAPH.fullmatch(name)
        variant = VARIANT.search(name)
        suits = name.endswith(f".{quantization}.onnx") if quantization else not variant
        if not graph or not suits or files not in name:
            continue
        if other := chosen.get(graph[1]):
            raise ModelError(f"{source} has {other} and {name}; choose one by --files with a part of its name")
        chosen[graph[1]] = name
    if "decoder_joint" in chosen:
        return {part: chosen[part] for part in ("encoder", "decoder_joint") if part in chosen}
    return chosen


def missing_graph(found: Collection[str], quantization: str | None) -> str:
    """Return the name of a graph that is missing, or an empty text."""
    suffix = f".{quantization}.onnx" if quantization else ".onnx"
    if "encoder" not in found:
        return f"encoder-model{suffix}" if "decoder" not in found else f"encoder{suffix}"
    if "decoder_joint" in found or {"decoder", "joiner"} <= set(found):
        return ""
    if "decoder" in found or "joiner" in found:
        return ("joiner" if "decoder" in found else "decoder") + suffix
    return f"decoder_joint-model{suffix}"


def hub_bytes(source: str, quantization: str | None, files: str = "") -> int:
    """Return the size of the files that a Hugging Face repository is downloaded for; weights in files of their own included.

    Raises:
        ModelError: the repository can't be had, or lacks a graph.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415 (see _download)

    with _one_error(source):
        info = HfApi().model_info(source, files_metadata=True)
        siblings = {file.rfilename: file.size or 0 for file in info.siblings or []}
        found = _choose_on_hub(source, list(siblings), quantization, files)
        weights = [f"{graph.removesuffix('.onnx')}{suffix}" for graph in found.values() for suffix in WEIGHT_SUFFIXES]
        return sum(siblings.get(name, 0) for name in {*found.values(), *weights})


def _download(source: str, quantization: str | None, files: str) -> dict[str, Path]:
    """Download a Hugging Face repository's graphs and vocabulary; the cache of huggingface_hub keeps them and resumes."""
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415 (half a second that other commands need not wait)

    with _one_error(source):
        info = HfApi().model_info(source)
        found = _choose_on_hub(source, [file.rfilename for file in info.siblings or []], quantization, files)

        def download(patterns: Sequence[str]) -> Path:
            return Path(snapshot_download(source, allow_patterns=list(patterns), revision=info.sha))

        directory = download([*found.values(), *FILES, "config.json"])
        if weights := [data for name in found.values() for data in data_files(directory / name)]:
            download(weights)
    return {part: directory / name for part, name in found.items()}


def _choose_on_hub(source: str, names: Sequence[str], quantization: str | None, files: str) -> dict[str, str]:
    """Return the names of a repository's graphs by part.

    Raises:
        ModelError: it lacks one, or has several.
    """
    found = choose_graphs(names, quantization, files, source)
    if missing := missing_graph(found, quantization):
        raise ModelError(
            f"{source} on Hugging Face has no {missing}; if it has a .nemo file, export that first: "
            "docs/Models.md#your-own-model"
        )
    return found


@contextlib.contextmanager
def _one_error(source: str) -> Iterator[None]:
    """Raise ModelError for any error of the layers below: each has errors of its own, and to the user they are one."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{source} is no directory here, and can't be had from Hugging Face: {reason}") from error
