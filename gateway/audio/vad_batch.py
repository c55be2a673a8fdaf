"""Compute voice activity for all streams together: a frame among those of ten streams costs half of a frame alone."""

from __future__ import annotations

import asyncio
import math
from collections import deque

from gateway.audio.vad import Request, Voice, probabilities

GATHER_SECS = 0.005
"""Shortest time between two calls of the network, in seconds, while several streams use it. The start of speech may be found
later by as much; 200 streams of 100 ms messages are ten per call."""

MAX_FRAMES = 128
"""Maximum number of frames per call, about 10 ms of computation, in which the event loop stands still."""

_Waiting = tuple[Request, "asyncio.Future[list[float]]"]


class VoiceBatch:
    """Gathers the requests of streams. Each stream has at most one request at a time."""

    def __init__(self) -> None:
        self._waiting: deque[_Waiting] = deque()
        self._called_at = -math.inf
        self._alone: Voice | None = None  # the stream that had the last call for itself

    async def probabilities(self, request: Request) -> list[float]:
        """Return the probability of speech, 0 to 1, of each frame."""
        if not request.loud.any():
            request.voice.skip(request.samples, forget=bool(request.forget.any()))
            return [0.0] * len(request.loud)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[float]] = loop.create_future()
        self._waiting.append((request, answer))
        if len(self._waiting) == 1:
            due = self._called_at + GATHER_SECS
            if request.voice is self._alone or due <= loop.time():
                loop.call_soon(self._call)
            else:
                loop.call_at(due, self._call)
        return await answer

    def _call(self) -> None:
        """Call the network for the requests that wait."""
        loop = asyncio.get_running_loop()
        taken = [self._waiting.popleft()]
        frames = len(taken[0][0].loud)
        while self._waiting and (frames := frames + len(self._waiting[0][0].loud)) <= MAX_FRAMES:
            taken.append(self._waiting.popleft())
        requests, answers = zip(*taken, strict=True)
        self._alone = requests[0].voice if len(requests) == 1 else None
        for answer, found in zip(answers, probabilities(requests), strict=True):
            if not answer.cancelled():  # a stream may end while it waits
                answer.set_result(found)
        self._called_at = loop.time()
        if self._waiting:
            loop.call_soon(self._call)
