"""Fixtures for deploy/: a running server, as in tests/server, and the real tools that run or check the files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin"


@pytest.fixture(scope="session")
def need() -> Callable[[str], str]:
    """Return a function for the path of a command of tools/system-packages; without it a test is skipped, or fails in CI."""

    def find(command: str) -> str:
        path = shutil.which(command, path=SEARCHED)
        if path is None:
            reason = f"{command} is not installed; run tools/system-packages as root"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)
        return path

    return find


@pytest.fixture(scope="session")
def deploy() -> Path:
    """Return the directory of the deployment files."""
    return ROOT / "deploy"
