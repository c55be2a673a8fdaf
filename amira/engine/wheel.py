"""Find the Triton server in the ``nvidia-pytriton`` wheel, and prepare it to run.

Only the engine's own directory is written, and root is not needed. If this Triton cannot run, its container can.
"""

from __future__ import annotations

import filecmp
import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from amira.engine.errors import EngineError

MIN_GLIBC = (2, 35)
PYTHONS = ("3.10", "3.11", "3.12")
"""Versions of CPython for which the wheel has a stub and numpy 1 has wheels. The stub was built for numpy 1."""

CONTAINER_HINT = "use the Triton container instead (docs/Deployment.md)"


@dataclass(frozen=True)
class Engine:
    """An installed Triton server.

    Attributes:
        binary: executable of the server.
        backends: directory for ``--backend-directory``.
        environment: environment variables of the process.
    """

    binary: Path
    backends: Path
    environment: dict[str, str]

    @classmethod
    def prepare(cls, home: Path, onnxruntime_backend: Path) -> Engine:
        """Copy the backends of the installed wheel to ``home``, unless they are there.

        Args:
            home: directory that the engine may write to.
            onnxruntime_backend: directory of the replacement for Triton's ONNX Runtime backend.

        Raises:
            EngineError: the wheel is missing, or cannot run on this machine or with this Python.
        """
        check_platform()
        try:
            wheel = importlib.metadata.distribution("nvidia-pytriton")
        except importlib.metadata.PackageNotFoundError:
            raise EngineError("nvidia-pytriton is not installed; pip install 'amira-asr[engine]' installs it") from None
        server = Path(str(wheel.locate_file("pytriton/tritonserver")))
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        python_backend = home / "backends" / "python"
        python_backend.mkdir(parents=True, exist_ok=True)
        binary = server / "bin" / "tritonserver"
        stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
        for executable in (binary, stub):
            if not os.access(executable, os.X_OK):
                executable.chmod(0o755)
        for source in (*(server / "backends" / "python").glob("*.*"), stub):
            _copy_if_changed(source, python_backend / source.name)
        _link(home / "backends" / "onnxruntime", onnxruntime_backend)
        libraries = [wheel.locate_file("nvidia_pytriton.libs"), find_libpython().parent]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            # The stub finds packages like Python: those of the virtual environment whose python is first in PATH.
            "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ.get('PATH', '')}",
            "PYTHONUTF8": "1",
        }
        return cls(binary, home / "backends", environment)


def check_platform() -> None:
    """Check that the wheel's binaries can run on this machine.

    Raises:
        EngineError: they cannot.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise EngineError(
            f"the embedded Triton needs x86-64 Linux, this is {platform.machine()} {sys.platform}; {CONTAINER_HINT}"
        )
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split(".")[:2])) < MIN_GLIBC:
        found = f"{library} {version}".strip() or "another C library"
        raise EngineError(
            f"the embedded Triton needs glibc {MIN_GLIBC[0]}.{MIN_GLIBC[1]} or newer, this is {found}; {CONTAINER_HINT}"
        )
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python not in PYTHONS:
        raise EngineError(
            f"the embedded Triton needs Python {', '.join(PYTHONS)}, this is {python}; install with one of those "
            "(in a checkout: make PYTHON=python3.12)"
        )


def find_libpython() -> Path:
    """Return the path of the running interpreter's shared library, which Triton's Python stub loads.

    Raises:
        EngineError: the library is not in the usual directories.
    """
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    folders = [
        sysconfig.get_config_var("LIBDIR"),
        f"{sys.base_prefix}/lib",
        f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib",
    ]
    for folder in filter(None, folders):
        path = Path(folder) / name
        if path.exists():
            return path
    package = name.removesuffix(".so.1.0")
    raise EngineError(f"{name} is missing; install it (Debian, Ubuntu: apt-get install {package}), or use a Python that has it")


def _copy_if_changed(source: Path, target: Path) -> None:
    """Copy a file if it has changed. A link would not do: Triton refuses a backend whose library is a link."""
    if target.is_symlink() or not target.exists() or not filecmp.cmp(source, target):
        target.unlink(missing_ok=True)
        shutil.copy2(source, target)


def _link(link: Path, target: Path) -> None:
    if not (link.is_symlink() and link.readlink() == target):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
