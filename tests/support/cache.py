"""Results that are expensive to make and depend on files only, kept in ``.test-cache`` under a digest of those files."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from tests.support import synthetic
from tests.support.synthetic import SPEECH, Kind, build

CACHE = Path(__file__).resolve().parents[2] / ".test-cache"
PACKAGES = ("numpy", "onnx", "onnx-asr", "onnxruntime")
"""Packages that decide what is made."""

SYNTHETIC_SOURCES = (Path(synthetic.__file__), *sorted(SPEECH.glob("*.flac")))
"""Files that decide what a synthetic model is."""


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


def built(kind: Kind, seed: int = 0, external_data: bool = False) -> Path:
    """Return the directory of a synthetic model, as ``synthetic.build`` writes it. Tests must not change it."""
    return cached(
        f"{kind}-{seed}-{'external' if external_data else 'inline'}",
        lambda directory: build(directory, kind, seed, external_data),
        SYNTHETIC_SOURCES,
    )


def copied(kind: Kind, directory: Path, seed: int = 0, external_data: bool = False) -> Path:
    """Copy a synthetic model into a directory of a test's own, and return that directory."""
    shutil.copytree(built(kind, seed, external_data), directory, dirs_exist_ok=True)
    return directory


@functools.cache
def _digest(sources: tuple[Path, ...]) -> str:
    """Digest of the names and contents of files, and of the versions of packages."""
    digest = hashlib.sha256()
    for path in sources:
        digest.update(str(path).encode() + path.read_bytes())
    digest.update(" ".join(f"{package}={version(package)}" for package in PACKAGES).encode())
    return digest.hexdigest()[:16]
