"""End a stalled model process before it answers a request with the result of another request.

Triton's Python backend gives up a process that sent no heartbeat for one second. This happens to a process that was stopped or
swapped out, and to all processes after a pause of the machine or a forward step of its clock. Triton then answers the request
with an error, frees the memory of its tensors, and keeps the process. From then on, Triton takes each response of the process
as the response to the next request, so clients get the words of others (``SendMessageAndReceiveResponse`` in python_backend's
``python_be.cc``).

``backends/onnxruntime`` and ``detokenizer`` have symbolic links to this file. Triton adds only a model's own directory to the
module path, and copies only this directory from a bucket, so models cannot share a module.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time

TICK_SECS = 0.1
"""Interval between two checks of the clock, in seconds."""

LIMIT_SECS = 0.6
"""Shortest stall that ends the process, in seconds. Heartbeats are sent every 0.3 s, so a stall of less than 0.7 s cannot delay
one by a second."""

MARGIN_SECS = 1.0
"""Maximum time between a request and a stall at which the request may have been in flight during the stall, in seconds."""


class StallGuard:
    """Context manager for ``execute`` that ends the process after a stall with a request in flight.

    Args:
        name: the model's name, for the log.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._checked_at = time.time()  # the wall clock, as Triton's timeout uses it
        self._stall = (math.inf, math.inf)  # start and end of the last stall; none yet
        self._busy = False
        self._busy_at = 0.0
        threading.Thread(target=self._watch, name="stall guard", daemon=True).start()

    def __enter__(self) -> None:
        self._busy = True
        self._check()

    def __exit__(self, *_: object) -> None:
        self._check()
        self._busy = False

    def _watch(self) -> None:
        while True:
            time.sleep(TICK_SECS)
            self._check()
            self._checked_at = time.time()

    def _check(self) -> None:
        """End the process if it stalled while a request may have been in flight."""
        now = time.time()
        if now - self._checked_at > LIMIT_SECS:
            self._stall = (self._checked_at, now)
        if self._busy:
            self._busy_at = now
        start, end = self._stall
        if start - MARGIN_SECS < self._busy_at < end + MARGIN_SECS:
            print(f"{self._name}: stalled for {end - start:.1f} s; its process ends", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(1)
