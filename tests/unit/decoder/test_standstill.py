"""A model's process that was stopped ends, where Triton could take an answer of it for another's."""

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

import standstill

MODEL = """
import sys, time
from standstill import Standstill

watch = Standstill("model")
for line in sys.stdin:
    with watch:
        time.sleep(float(line))
    print("answered", flush=True)
"""


class Model:
    """A process that answers requests one after the other; what a request says is how long it takes."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(standstill.__file__).parent)}
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

    def stand_still(self, secs: float, then_ask: float | None = None) -> None:
        """Be stopped for so long; what is asked meanwhile is found afterwards."""
        process = psutil.Process(self._process.pid)
        process.suspend()
        time.sleep(secs)
        if then_ask is not None:
            self.ask(then_ask)
        process.resume()

    def end(self) -> tuple[int, str]:
        """Ask for nothing more; its exit code and last words."""
        _, words = self._process.communicate(timeout=10)
        return self._process.returncode, words


@pytest.fixture
def model() -> Iterator[Model]:
    running = Model()
    running.ask(0)
    assert running.answer() == "answered"
    yield running
    running.end()


def assert_ended(model: Model) -> None:
    assert model.answer() == "", "what would be somebody else's answer"
    code, words = model.end()
    assert code == 1
    assert re.match(r"model: stood still for \d\.\d s; its process ends", words)  # both threads may say so


def test_with_a_request_under_way(model: Model) -> None:
    model.ask(0.5)
    time.sleep(0.1)
    model.stand_still(0.8)
    assert_ended(model)


def test_with_one_that_takes_long(model: Model) -> None:
    model.ask(10)
    time.sleep(1.5)
    model.stand_still(0.8)
    resumed = time.monotonic()
    assert_ended(model)
    assert time.monotonic() - resumed < 5, "it waited for the answer"


def test_with_one_that_came_meanwhile(model: Model) -> None:
    time.sleep(standstill.MARGIN_SECS + 0.2)
    model.stand_still(0.8, then_ask=0)
    assert_ended(model)


def test_right_after_an_answer(model: Model) -> None:
    model.ask(0)
    assert model.answer() == "answered"
    model.stand_still(0.8)
    assert_ended(model)


def test_without_a_request_it_goes_on(model: Model) -> None:
    time.sleep(standstill.MARGIN_SECS + 0.2)
    model.stand_still(0.8)
    time.sleep(standstill.MARGIN_SECS + 0.2)
    model.ask(0)
    assert model.answer() == "answered"


def test_so_short_that_triton_waits(model: Model) -> None:
    model.ask(0.5)
    time.sleep(0.1)
    model.stand_still(0.3)
    assert model.answer() == "answered"
