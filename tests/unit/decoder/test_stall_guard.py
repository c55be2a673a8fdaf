"""A stalled model process ends where Triton could take its answer for another request's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import stall_guard

MODEL = """
import sys, time
from stall_guard import StallGuard

guard = StallGuard("model")
for line in sys.stdin:
    with guard:
        time.sleep(float(line))
    print("answered", flush=True)
"""


class Model:
    """A process that answers requests one after the other; a request is the seconds that it takes."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(stall_guard.__file__).parent)}
        command = [sys.executable, "-c", MODEL]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def ask(self, secs: float) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{secs}\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def stall(self, secs: float, then_ask: float | None = None) -> None:
        """Stop the process for a time; it finds a request sent meanwhile afterwards."""
        process = psutil.Process(self._process.pid)
        process.suspend()
        time.sleep(secs)
        if then_ask is not None:
            self.ask(then_ask)
        process.resume()

    def end(self) -> tuple[int, str]:
        """Send no more requests; return the exit code and standard error."""
        _, errors = self._process.communicate(timeout=10)
        return self._process.returncode, errors


@pytest.fixture
def model() -> Iterator[Model]:
    running = Model()
    running.ask(0)
    assert running.answer() == "answered"
    yield running
    running.end()


def assert_ended(model: Model) -> None:
    assert model.answer() == "", "an answer that Triton would give to another request"
    code, errors = model.end()
    assert code == 1
    assert re.match(r"model: stalled for \d\.\d s; its process ends", errors)  # either thread or both may print it


def test_stall_during_a_request(model: Model) -> None:
    model.ask(0.5)
    time.sleep(0.1)
    model.stall(0.8)
    assert_ended(model)


def test_stall_during_a_long_request(model: Model) -> None:
    model.ask(10)
    time.sleep(1.5)
    model.stall(0.8)
    resumed = time.monotonic()
    assert_ended(model)
    assert time.monotonic() - resumed < 5, "the process finished the request first"


def test_request_during_a_stall(model: Model) -> None:
    time.sleep(stall_guard.MARGIN_SECS + 0.2)
    model.stall(0.8, then_ask=0)
    assert_ended(model)


def test_stall_right_after_an_answer(model: Model) -> None:
    model.ask(0)
    assert model.answer() == "answered"
    model.stall(0.8)
    assert_ended(model)


def test_idle_stall_is_survived(model: Model) -> None:
    time.sleep(stall_guard.MARGIN_SECS + 0.2)
    model.stall(0.8)
    time.sleep(stall_guard.MARGIN_SECS + 0.2)
    model.ask(0)
    assert model.answer() == "answered"


def test_short_stall_is_survived(model: Model) -> None:
    model.ask(0.5)
    time.sleep(0.1)
    model.stall(0.3)
    assert model.answer() == "answered"


@pytest.mark.parametrize("directory", ["backends/onnxruntime", "model-repo/detokenizer/1"])
def test_other_models_link_to_the_one_file(directory: str) -> None:
    link = Path(__file__).parents[3] / directory / "stall_guard.py"
    assert link.is_symlink()
    assert link.resolve() == Path(stall_guard.__file__).resolve()
