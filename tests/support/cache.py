"""Expensive results that depend only on files, cached in ``.test-cache`` by a digest of those files."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic

from amira.models import memory
from amira.models.graphs import data_files
from amira.models.memory import Growth, measure_growth
from tests.support import synthetic
from tests.support.synthetic import SPEECH, Kind, build, move_weights

CACHE = Path(__file__).resolve().parents[2] / ".test-cache"
PACKAGES = ("numpy", "onnx", "onnx-asr", "onnxruntime")
"""Packages on which the results depend."""

SYNTHETIC_SOURCES = (Path(synthetic.__file__), *sorted(SPEECH.glob("*.flac")))
"""Files on which synthetic models depend."""


def cached(name: str, make: Callable[[Path], object], sources: Sequence[Path]) -> Path:
    """Return the directory that ``make`` fills; an earlier run's or another process's, if it depends on the same files.

    Args:
        name: what is made, arguments included.
        make: fills an empty directory.
        sources: files that decide what is made.
    """
    directory = CACHE / f"{name}-{_digest(tuple(sources))}"
    if not directory.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            make(made)
            try:
                made.rename(directory)
            except OSError:  # another process was faster
                if not directory.exists():
                    raise
    return directory


def built(kind: Kind, seed: int = 0) -> Path:
    """Return the directory of a synthetic model, as ``synthetic.build`` writes it. Tests must not change it."""
    return cached(f"{kind}-{seed}", lambda directory: build(directory, kind, seed), SYNTHETIC_SOURCES)


def published(kind: Kind) -> Path:
    """Return the directory of a synthetic model with ``int8`` variants beside it. Tests must not change it.

    The RNN-T's encoder keeps its weights in a file of their own.
    """

    def make(directory: Path) -> None:
        shutil.copytree(built(kind), directory, dirs_exist_ok=True)
        if kind == "rnnt":
            move_weights(directory)
        for part in ("encoder", "decoder_joint"):
            plain, quantized = (directory / f"{part}-model{suffix}.onnx" for suffix in ("", ".int8"))
            quantize_dynamic(plain, quantized, weight_type=QuantType.QUInt8)

    return cached(f"{kind}-published", make, (Path(__file__), *SYNTHETIC_SOURCES))


def remembered_growth(preprocessor: Path, encoder: Path) -> Growth:
    """Return what ``measure_growth`` returns; measure it once for each pair of graphs."""

    def make(directory: Path) -> None:
        (directory / "growth.json").write_text(json.dumps(asdict(measure_growth(preprocessor, encoder))), encoding="utf-8")

    weights = [encoder.parent / name for name in data_files(encoder)]
    made = cached("growth", make, (Path(memory.__file__), preprocessor, encoder, *weights))
    return Growth(**json.loads((made / "growth.json").read_text(encoding="utf-8")))


@functools.cache
def _digest(sources: tuple[Path, ...]) -> str:
    """Return the digest of the names and contents of files, and of the versions of packages."""
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(" ".join(f"{package}={version(package)}" for package in PACKAGES).encode())
    return digest.hexdigest()[:16]
