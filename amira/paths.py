"""Paths of the package's files, in a checkout or from a wheel."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_WHEEL_DATA = _PACKAGE / "data"
"""Directory of data files in an installed wheel (see ``pyproject.toml``); missing in a checkout."""

ROOT = _PACKAGE.parent
"""The checkout; from a wheel, the directory of installed packages."""

IN_CHECKOUT = (ROOT / "pyproject.toml").is_file()
"""Whether the package runs from a checkout."""

MODEL_REPOSITORY = ROOT / "model-repo" if IN_CHECKOUT else _WHEEL_DATA / "model-repo"
"""The bundled models, and templates of imported ones."""

ONNXRUNTIME_BACKEND = (ROOT if IN_CHECKOUT else _WHEEL_DATA) / "backends" / "onnxruntime"
"""Replacement for Triton's ONNX Runtime backend in the embedded engine."""

SPEECH = ROOT / "tests" / "speech" if IN_CHECKOUT else _WHEEL_DATA / "speech"
"""The bundled recordings."""


def _engine_home() -> Path:
    """Return the directory of the embedded Triton's backends and logs.

    From a wheel, the directory is in the user's cache, one per Python environment: it has a stub for one version of Python, and
    a link to the environment's packages.
    """
    if IN_CHECKOUT:
        return ROOT / ".engine"
    # A relative path counts as not set (XDG Base Directory Specification).
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = configured if configured.is_absolute() else Path("~/.cache").expanduser()
    environment = hashlib.sha256(f"{sys.prefix} {sys.version_info[:2]}".encode()).hexdigest()[:12]
    return cache / "amira-asr" / f"engine-{environment}"


MODELS_HOME = ROOT / ".models" if IN_CHECKOUT else _engine_home().parent / "models"
"""Directory of the models that ``amira run --model`` imported. It can be deleted; a model is then downloaded again."""

ENGINE_HOME = _engine_home()
"""Directory of the embedded Triton's backends and logs. It can be deleted while no embedded Triton is running."""
