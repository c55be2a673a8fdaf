"""Results that are expensive to make and depend on files only, kept in ``.test-cache`` under a digest of those files."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from tests.support import synthetic
from tests.support.synthetic import SPEECH, Kind, build

CACHE = Path(__file__).resolve().parents[2] / ".test-cache"
PACKAGES = ("numpy", "onnx", "onnx-asr", "onnxruntime")
"""Packages that decide what is made."""


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return the directory that ``make`` fills; an earlier run's or another process's, if it depends on the same files.

    Args:
        name: what is made, arguments included.
        make: fills an empty directory.
    """
    directory = CACHE / f"{name}-{_digest()}"
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
    )


def copied(kind: Kind, directory: Path, seed: int = 0, external_data: bool = False) -> Path:
    """Copy a synthetic model into a directory of a test's own, and return that directory."""
    shutil.copytree(built(kind, seed, external_data), directory, dirs_exist_ok=True)
    return directory


@functools.cache
def _digest() -> str:
    """Digest of what every synthetic model is made from."""
    digest = hashlib.sha256()
    for path in (Path(synthetic.__file__), *sorted(SPEECH.glob("*.flac"))):
        digest.update(path.read_bytes())
    digest.update(" ".join(f"{package}={version(package)}" for package in PACKAGES).encode())
    return digest.hexdigest()[:16]
