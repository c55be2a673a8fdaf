"""A model's process that stood still ends, before it gives an answer that would be taken for somebody else's.

Triton's Python backend takes a process for dead that gave no sign for a second: one that was stopped or swapped out, or all of
them where the machine was paused or its clock set forward. It answers the request with an error, frees the memory of its
tensors, and goes on. From then on it takes each answer of that process for the answer to the request after it, so that speakers
get the words of others (``SendMessageAndReceiveResponse`` in python_backend's ``python_be.cc``, which has no way back).
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time

TICK_SECS = 0.1
LIMIT_SECS = 0.6
"""A sign is given every 0.3 s, so that less than 0.7 s can't be taken for a second without one."""

MARGIN_SECS = 1.0
"""A request so long before or after a standstill may have been under way in it."""


class Standstill:
    """Watches whether this process stands still; the context of ``execute``.

    Args:
        name: of the model, for the last words.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen_at = time.time()  # the clock by which Triton waits
        self._stood = (math.inf, math.inf)  # from, to; none yet
        self._busy = False
        self._busy_at = 0.0
        threading.Thread(target=self._watch, name="standstill", daemon=True).start()

    def __enter__(self) -> None:
        self._busy = True
        self._look()

    def __exit__(self, *_: object) -> None:
        self._look()
        self._busy = False

    def _watch(self) -> None:
        while True:
            time.sleep(TICK_SECS)
            self._look()
            self._seen_at = time.time()

    def _look(self) -> None:
        """End the process if it stood still while a request may have been under way."""
        now = time.time()
        if now - self._seen_at > LIMIT_SECS:
            self._stood = (self._seen_at, now)
        if self._busy:
            self._busy_at = now
        began, ended = self._stood
        if began - MARGIN_SECS < self._busy_at < ended + MARGIN_SECS:
            print(f"{self._name}: stood still for {ended - began:.1f} s; its process ends", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(1)
