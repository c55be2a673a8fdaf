"""The bundled model repository as the tests serve it: its decoder reports metrics more often."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path

from amira.paths import MODEL_REPOSITORY
from tests.support.cache import cached

REPORT_SECS = 0.05
"""Interval at which the decoder of a copy reports its metrics, in seconds; ten times as often as users' decoders."""

REPORTED_SECS = 0.3
"""Time after which a copy's metrics have what its decoder did, with room for a machine that is busy."""


def copy_repository(directory: Path, *, warm: bool = True) -> Path:
    """Copy the bundled repository into a directory that does not exist, and return that directory.

    A test may change every file but the graphs, which are links.

    Args:
        directory: where to.
        warm: whether models are warmed up while they load, which takes more than half of the CPU time of Triton's start.
    """
    shutil.copytree(
        MODEL_REPOSITORY, directory, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"), copy_function=_link_graphs
    )
    model = directory / "rnnt_greedy_bls" / "1" / "model.py"
    code = model.read_text(encoding="utf-8")
    assert "\nREPORT_SECS = 0.5\n" in code
    model.write_text(code.replace("\nREPORT_SECS = 0.5\n", f"\nREPORT_SECS = {REPORT_SECS}\n"), encoding="utf-8")
    for config in directory.glob("*/config.pbtxt") if not warm else ():
        text = config.read_text(encoding="utf-8")
        config.write_text(re.sub(r"^model_warmup \[\n.*?^\]\n", "", text, flags=re.DOTALL | re.MULTILINE), encoding="utf-8")
    return directory


@functools.cache
def served_repository(*, warm: bool = True) -> Path:
    """Return a copy that all tests share; they must not change it."""
    sources = sorted(path for path in MODEL_REPOSITORY.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return (
        cached(
            "bundled" if warm else "bundled-cold",
            lambda directory: copy_repository(directory / "models", warm=warm),
            (Path(__file__), *sources),
        )
        / "models"
    )


def _link_graphs(source: str, target: str) -> None:
    if source.endswith(".onnx"):
        Path(target).symlink_to(source)
    else:
        shutil.copy2(source, target)
