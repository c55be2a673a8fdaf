"""Files of a model's source: a directory, or a Hugging Face repository that is downloaded."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from amira.models.configs import ModelError
from amira.models.graphs import data_files
from amira.models.vocabularies import FILES, TOKENIZERS

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
GRAPH = re.compile(r"(encoder|decoder_joint|decoder|joiner)([-_.].*)?\.onnx")
"""Names of graphs: the part, then what the exporter adds, such as an epoch or a variant."""

WEIGHT_SUFFIXES = (".onnx.data", ".onnx_data", ".data", ".weights")
"""What graphs' files of weights are called after, by exporters; others are not counted before a download."""

VARIANT = re.compile(r"[-_.](int8|uint8|int4|fp16|float16|quant|quantized|q4|q8|q4f16|bnb4)\.onnx$")
"""Suffix of graphs that are a variant of another, and the variant's name."""

HASHED_BYTES = 2**20
"""Size of the pieces in which a file is hashed."""

ARCHIVES = (".tar.bz2", ".tar.gz", ".tgz", ".tar", ".zip")

NEMO_RECIPE = """\
{path} is a NeMo checkpoint; export it where NeMo is installed, then import the directory that this writes to:
  import json, pathlib; import nemo.collections.asr as nemo_asr
  m = nemo_asr.models.ASRModel.restore_from({path!r}); m.export("model.onnx")
  lines = [f"{{token}} {{i}}\\n" for i, token in enumerate([*m.tokenizer.vocab, "<blk>"])]
  pathlib.Path("vocab.txt").write_text("".join(lines), encoding="utf-8")
  pieces = getattr(m.tokenizer, "tokenizer", None)  # of SentencePiece, if it has one
  if hasattr(pieces, "serialized_model_proto"): pathlib.Path("tokenizer.model").write_bytes(pieces.serialized_model_proto())
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
        return _find_in(path, quantization, files)
    if path.is_file() and path.name.endswith(ARCHIVES):
        raise ModelError(f"{source} is an archive; unpack it, and import the directory with the .onnx files")
    if path.exists() or not HUB_ID.fullmatch(source):
        raise ModelError(f"{source} is neither a directory nor the id of a Hugging Face repository (owner/name)")
    return _download(source, quantization, files)


def _find_in(directory: Path, quantization: str | None, files: str) -> dict[str, Path]:
    """Return a directory's graphs by part; see ``locate``."""
    names = sorted(file.name for file in directory.iterdir())
    found = choose_graphs(names, quantization, files, str(directory))
    if "encoder" not in found:
        if checkpoints := sorted(directory.glob("*.nemo")):
            raise ModelError(NEMO_RECIPE.format(path=str(checkpoints[0])))
        if inner := sorted(file.parent for file in directory.glob("*/*.onnx") if GRAPH.fullmatch(file.name)):
            raise ModelError(f"{directory} has no encoder, but {inner[0]} has .onnx files; import that directory")
    if missing := missing_graph(found, quantization):
        graphs = [name for name in names if name.endswith((".onnx", ".ort", ".incomplete"))]
        raise ModelError(f"{directory / missing} is missing" + (f"; there are {', '.join(graphs)}" if graphs else ""))
    return {part: directory / name for part, name in found.items()}


def choose_graphs(names: Collection[str], quantization: str | None, files: str, source: str) -> dict[str, str]:
    """Return the names of a source's graphs by part.

    A part without the wanted variant is taken as it is, since exporters leave small parts alone; the encoder must have it. If
    none is wanted, and the whole model exists in one variant only, it is taken so.

    Raises:
        ModelError: several files could be a part.
    """
    by_part: dict[str, list[str]] = {}
    for name in sorted(names):
        if graph := GRAPH.fullmatch(name):
            by_part.setdefault(graph[1], []).append(name)
    if "decoder_joint" in by_part:
        by_part = {part: by_part[part] for part in ("encoder", "decoder_joint") if part in by_part}
    named = {part: [name for name in found if files in name] or found for part, found in by_part.items()}
    wanted = quantization or _only_variant(named, source)
    chosen = {}
    for part, found in named.items():
        suiting = [name for name in found if _variant(name) == wanted]
        if not suiting and part != "encoder":
            suiting = [name for name in found if _variant(name) is None]
        if len(suiting) > 1:
            raise ModelError(f"{source} has {suiting[0]} and {suiting[1]}; choose one by --files with a part of its name")
        if suiting:
            chosen[part] = suiting[0]
    return chosen


def _variant(name: str) -> str | None:
    """Return the variant that a graph is by its name; None for a graph as it was exported."""
    match = VARIANT.search(name)
    return match[1] if match else None


def _only_variant(by_part: Mapping[str, Collection[str]], source: str) -> str | None:
    """Return the variant of a model that exists in one only; None if a part is there both as it was exported and as a variant.

    Raises:
        ModelError: the encoder exists in several variants, and not as it was exported.
    """
    variants = {part: {_variant(name) for name in names} for part, names in by_part.items()}
    found = variants.get("encoder", {None})
    if None in found or any(None in others and len(others) > 1 for others in variants.values()):
        return None
    if len(found) > 1:
        raise ModelError(f"{source} has the encoder as {' and '.join(sorted(map(str, found)))}; choose one by --quantization")
    return next(iter(found))


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
        info = HfApi().model_info(source, files_metadata=True)
        siblings = info.siblings or []
        digests = {file.rfilename: file.lfs.sha256 for file in siblings if file.lfs}
        found = _choose_on_hub(source, [file.rfilename for file in siblings], quantization, files)

        def download(patterns: Sequence[str]) -> Path:
            directory = Path(snapshot_download(source, allow_patterns=list(patterns), revision=info.sha))
            for name in patterns:
                if name in digests:
                    _check_digest(directory / name, digests[name])
            return directory

        directory = download([*found.values(), *dict.fromkeys((*FILES, *TOKENIZERS)), "config.json"])
        if weights := [data for name in found.values() for data in data_files(directory / name)]:
            download(weights)
    return {part: directory / name for part, name in found.items()}


def _check_digest(path: Path, expected: str) -> None:
    """Check the content of a downloaded file; huggingface_hub checks its size alone.

    Raises:
        ModelError: it differs from the published one. The file is removed, so that the next try downloads it again.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASHED_BYTES):
            digest.update(block)
    if digest.hexdigest() != expected:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise ModelError(f"{path.name} has the SHA-256 {digest.hexdigest()}; published is {expected}; try again to download it")


def _choose_on_hub(source: str, names: Sequence[str], quantization: str | None, files: str) -> dict[str, str]:
    """Return the names of a repository's graphs by part.

    Raises:
        ModelError: it lacks one, or has several.
    """
    found = choose_graphs(names, quantization, files, source)
    if missing := missing_graph(found, quantization):
        graphs = ", ".join(name for name in names if name.endswith((".onnx", ".nemo"))) or "no .onnx files"
        advice = "; export the .nemo file first: docs/Models.md#your-own-model" if ".nemo" in graphs else ""
        raise ModelError(f"{source} on Hugging Face has no {missing}; it has {graphs}{advice}")
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
