"""Detect where speech starts and stops, from the probability of speech of each frame."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gateway.audio import RATE
from gateway.audio.vad import FRAME_SAMPLES, VoiceActivity, powers_of
from gateway.triton.connection import Samples

START_FRAMES = 2
"""Frames in a row above the threshold that start speech, 64 ms: one alone is often a click."""

RELEASE = 0.15
"""How far below the threshold a frame counts as silence; between both it changes nothing."""


BLOCK_FRAMES = 16
"""Maximum number of frames per call of the detector, about half a second of audio."""


HELD_FRAMES = 4
"""Frames that are looked at together once speech has started, 128 ms: a stop may be found late, and each costs half as much."""

SMOOTHED_FRAMES = 3
"""Frames over which power is averaged, about 0.1 s: less than a syllable."""

BACKGROUND_FRAMES, BACKGROUND_BLOCKS = 16, 6
"""Number of half-second blocks whose minimum power is the background; in 3 s, speech has pauses."""

QUIET = 30.0
"""Root mean square, of a full scale of 32768, below which a frame is silence: -61 dB, as of a muted microphone."""

ABOVE_BACKGROUND = 10**0.7
"""Power of speech relative to the background, 7 dB: a room full of voices is speech too, and fluctuates by as much."""


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
        more: whether another piece follows.
    """

    samples: Samples
    change: Change | None = None
    more: bool = False


class Background:
    """Follows the power of the background, by its minimum (Martin, 2001, without the correction of its bias)."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=SMOOTHED_FRAMES)
        self._least: deque[float] = deque(maxlen=BACKGROUND_BLOCKS)  # of complete blocks
        self._lowest = math.inf  # of the current block
        self._frames = 0

    def stands_out(self, power: float) -> bool:
        """Take the power of the next frame; return whether it is clearly above the background, or none is known yet."""
        self._recent.append(power)
        smooth = sum(self._recent) / len(self._recent)
        background = min(self._least, default=0.0)
        if len(self._recent) == SMOOTHED_FRAMES:
            self._lowest = min(self._lowest, smooth)
        self._frames += 1
        if self._frames % BACKGROUND_FRAMES == 0:
            self._least.append(self._lowest)
            self._lowest = math.inf
        return max(power, smooth) >= max(QUIET**2, background * ABOVE_BACKGROUND)


class SpeechDetector:
    """Detects changes in one stream.

    Args:
        detection: when speech starts and stops.
        start: samples of the stream before the first audio.
        voice: the probability of speech; a new one by default.
    """

    def __init__(self, detection: Detection, start: int = 0, voice: VoiceActivity | None = None) -> None:
        self.detection = detection
        self._voice = voice or VoiceActivity()
        self._background = Background()
        self._rest: Samples = np.empty(0, np.int16)  # of an incomplete frame
        self._position = start  # of the rest
        self._speaking = False
        self._run = 0  # frames of speech in a row
        self._last_speech = start  # end of the last frame of speech

    def feed(self, samples: Samples) -> Iterator[Piece]:
        """Yield audio [n] in pieces, as far as it is looked at: up to each change, and the rest.

        Each piece costs the time of its frames, so a caller may do other work between them.
        """
        audio = np.concatenate((self._rest, samples))
        frames = len(audio) // FRAME_SAMPLES
        if self._speaking:
            frames -= frames % HELD_FRAMES
        taken = -len(self._rest)  # of ``samples``
        yielded = 0
        for first in range(0, frames, BLOCK_FRAMES):
            block = audio[first * FRAME_SAMPLES : min(first + BLOCK_FRAMES, frames) * FRAME_SAMPLES]
            loud = [self._background.stands_out(float(power)) for power in powers_of(block)]
            for probability in self._voice.probabilities(block, np.array(loud)):
                self._position += FRAME_SAMPLES
                taken += FRAME_SAMPLES
                if change := self._step(probability):
                    end = max(yielded, taken)
                    yield Piece(samples[yielded:end], change, more=True)
                    yielded = end
            if first + BLOCK_FRAMES < frames:
                end = max(yielded, taken)
                yield Piece(samples[yielded:end], more=True)
                yielded = end
        self._rest = audio[frames * FRAME_SAMPLES :]
        yield Piece(samples[yielded:])

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
