"""Where the package's files are: in a checkout, the checkout's; from a wheel, those that the wheel carries."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_WHEEL_DATA = _PACKAGE / "data"
"""Directory of the data in an installed wheel, which ``pyproject.toml`` fills; a checkout has none."""

ROOT = _PACKAGE.parent
"""The checkout; from a wheel, the directory that the package is installed in."""

IN_CHECKOUT = (ROOT / "pyproject.toml").is_file()
"""Whether the package runs from a checkout."""

MODEL_REPOSITORY = ROOT / "model-repo" if IN_CHECKOUT else _WHEEL_DATA / "model-repo"
"""The bundled models; templates for imported ones too."""

ONNXRUNTIME_BACKEND = (ROOT if IN_CHECKOUT else _WHEEL_DATA) / "backends" / "onnxruntime"
"""The embedded engine's stand-in for Triton's ONNX Runtime backend."""

SPEECH = ROOT / "tests" / "speech" if IN_CHECKOUT else _WHEEL_DATA / "speech"
"""The bundled recordings."""


def _engine_home() -> Path:
    """Return the directory that the embedded Triton is prepared in and logs to.

    From a wheel it is in the user's cache, one for each Python environment: it holds a stub for one version of Python, and a
    link to the environment's packages.
    """
    if IN_CHECKOUT:
        return ROOT / ".engine"
    # As the XDG Base Directory Specification has it: a relative path counts as not set.
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = configured if configured.is_absolute() else Path("~/.cache").expanduser()
    environment = hashlib.sha256(f"{sys.prefix} {sys.version_info[:2]}".encode()).hexdigest()[:12]
    return cache / "amira-asr" / f"engine-{environment}"


ENGINE_HOME = _engine_home()
"""Directory of the embedded Triton's own: its backends and its logs. It can be deleted while no Triton runs."""
