"""Detect where speech starts and stops, from the probability of speech of each frame."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gateway.audio import RATE
from gateway.audio.vad import FRAME_SAMPLES, Request, Voice, powers_of
from gateway.audio.vad_batch import VoiceBatch
from gateway.triton.connection import Samples

START_FRAMES = 2
"""Frames in a row above the threshold that start speech, 64 ms: one alone is often a click."""

RELEASE = 0.15
"""How far below the threshold a frame counts as silence; between both it changes nothing."""

BLOCK_FRAMES = 16
"""Maximum number of frames per request to the network, about half a second of audio."""

HELD_FRAMES = 4
"""Frames per request once speech has started, 128 ms: a stop may be found late by as much, and a frame costs half as much."""

SMOOTHED_FRAMES = 3
"""Frames over which power is averaged, about 0.1 s: less than a syllable."""

BACKGROUND_FRAMES, BACKGROUND_BLOCKS = 16, 6
"""Number of half-second blocks whose minimum power is the background; in 3 s, speech has pauses."""

WARM_FRAMES = 8
"""Frames of a background that has become steady which the network gets, 0.25 s: it then detects speech in it at once."""

QUIET = 30.0
"""Root mean square, of a full scale of 32768, below which a frame is silence: -61 dB, as of a muted microphone."""

LEAST_ABOVE, SPREAD_EXPONENT, MOST_ABOVE = 10**0.3, 2.0, 10**0.7
"""Power of speech relative to the background, 3 to 7 dB: 3 dB, and 2 dB for each dB by which the background changed in 3 s. The
noise of a fan is steady, so that weak speech stands out; a room full of voices is speech too, and changes by as much."""


@dataclass(frozen=True)
class Detection:
    """When speech starts and stops.

    Attributes:
        threshold: probability of speech of a frame, 0 to 1, from which on it is speech.
        silence_ms: silence that stops speech.
    """

    threshold: float = 0.5
    silence_ms: int = 500


class Change(NamedTuple):
    """Speech started or stopped.

    Attributes:
        speaking: whether it started.
        at: where, in samples since the start of the stream: the first frame of speech, or the end of the last.
    """

    speaking: bool
    at: int


class Piece(NamedTuple):
    """Audio, and what was detected at its end.

    Attributes:
        samples: 16 kHz audio [n].
        change: what was detected; None if nothing was.
    """

    samples: Samples
    change: Change | None = None


class Background:
    """Follows the power of the background, by its minimum (Martin, 2001, without the correction of its bias).

    Attributes:
        steady: whether it changed little in the last seconds.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=SMOOTHED_FRAMES)
        self._least: deque[float] = deque(maxlen=BACKGROUND_BLOCKS)  # of complete blocks
        self._lowest = math.inf  # of the current block
        self._frames = 0
        self._limit = QUIET**2
        self._steady_frames = 0
        self.steady = False

    def hides(self, power: float) -> bool:
        """Take the power of the next frame; return whether a known background hides it, so that the network need not get it."""
        self._recent.append(power)
        smooth = sum(self._recent) / len(self._recent)
        hides = max(power, smooth) < self._limit
        if self.steady and self._steady_frames < WARM_FRAMES:
            self._steady_frames += 1
            hides = False
        if len(self._recent) == SMOOTHED_FRAMES:
            self._lowest = min(self._lowest, smooth)
        self._frames += 1
        if self._frames % BACKGROUND_FRAMES == 0:
            self._least.append(self._lowest)
            self._lowest = math.inf
            self._measure()
        return hides

    def _measure(self) -> None:
        """Measure the background by its last blocks."""
        background = min(self._least)
        above = LEAST_ABOVE * (max(self._least) / max(background, 1e-9)) ** SPREAD_EXPONENT
        self.steady = len(self._least) > 1 and above < MOST_ABOVE
        if not self.steady:
            self._steady_frames = 0
        self._limit = max(QUIET**2, background * (above if self.steady else MOST_ABOVE))


class SpeechDetector:
    """Detects changes in one stream.

    Args:
        detection: when speech starts and stops.
        voices: computes the probability of speech.
        start: samples of the stream before the first audio.
    """

    def __init__(self, detection: Detection, voices: VoiceBatch, start: int = 0) -> None:
        self.detection = detection
        self._voices = voices
        self._voice = Voice()
        self._background = Background()
        self._rest: Samples = np.empty(0, np.int16)  # of an incomplete frame
        self._position = start  # of the rest
        self._speaking = False
        self._run = 0  # frames of speech in a row
        self._last_speech = start  # end of the last frame of speech

    async def feed(self, samples: Samples) -> list[Piece]:
        """Take audio [n], and return it in pieces: up to each change, and the rest, which may be empty."""
        background = self._background
        audio = np.concatenate((self._rest, samples))
        frames = len(audio) // FRAME_SAMPLES
        if self._speaking:
            frames -= frames % HELD_FRAMES
        taken = -len(self._rest)  # of ``samples``
        self._rest = audio[frames * FRAME_SAMPLES :]
        pieces: list[Piece] = []
        start = 0  # of the next piece
        for first in range(0, frames, BLOCK_FRAMES):
            block = audio[first * FRAME_SAMPLES : min(first + BLOCK_FRAMES, frames) * FRAME_SAMPLES]
            looks = [(not background.steady, not background.hides(power)) for power in powers_of(block).tolist()]
            forget, loud = np.array(looks).T
            for probability in await self._voices.probabilities(Request(self._voice, block, loud, forget)):
                self._position += FRAME_SAMPLES
                taken += FRAME_SAMPLES
                if change := self._step(probability):
                    end = max(start, taken)
                    pieces.append(Piece(samples[start:end], change))
                    start = end
        return [*pieces, Piece(samples[start:])]

    def reset(self) -> None:
        """Forget that speech has started."""
        self._speaking = False
        self._run = 0

    def _step(self, probability: float) -> Change | None:
        speech = probability >= self.detection.threshold
        self._run = self._run + 1 if speech else 0
        if speech or (self._speaking and probability >= self.detection.threshold - RELEASE):
            self._last_speech = self._position
        if not self._speaking and self._run >= START_FRAMES:
            self._speaking = True
            return Change(True, self._position - self._run * FRAME_SAMPLES)
        silence = (self._position - self._last_speech) * 1000 // RATE
        if self._speaking and silence >= self.detection.silence_ms:
            self._speaking = False
            return Change(False, self._last_speech)
        return None
