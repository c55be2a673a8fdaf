"""Transcription of a recording: admission, quota, a place at Triton, decoding."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from gateway import metrics
from gateway.audio import RATE
from gateway.config.settings import Settings
from gateway.limits.places import Places
from gateway.limits.quotas import Quotas
from gateway.transcript.words import Word
from gateway.triton.connection import Samples
from gateway.triton.pool import TritonPool
from gateway.triton.utterance import Utterance


@dataclass(frozen=True)
class Segment:
    """A part of a recording's transcript.

    Attributes:
        text: its words.
        tokens: ids in the model's vocabulary.
        words: with times in seconds since the start of the recording.
        confidence: mean probability of the tokens, 0 to 1; None where there are none.
    """

    text: str
    tokens: Sequence[int]
    words: Sequence[Word]
    confidence: float | None


@dataclass(frozen=True)
class Transcription:
    """A recording's transcript.

    Attributes:
        segments: in the order of their times; at least one.
        samples, features, frames: length of the recording in 16 kHz samples, feature frames and encoder frames.
    """

    segments: Sequence[Segment]
    samples: int
    features: int
    frames: int


class Recording:
    """A recording that is admitted.

    Args:
        model: public name of the model.
        max_secs: maximum length of the audio.
        spend: charges seconds of audio to the caller; raises ``ApiError`` when its quota is used up.
        utterance: the recording at Triton.
        places: the gateway's.
    """

    def __init__(
        self, model: str, max_secs: float, spend: Callable[[float], None], utterance: Utterance, places: Places
    ) -> None:
        self.max_secs = max_secs
        self._model = model
        self._spend = spend
        self._utterance = utterance
        self._places = places

    async def transcribe(self, samples: Samples, caller_gone: Callable[[], Awaitable[object]]) -> Transcription:
        """Decode the recording, once.

        Args:
            samples: 16 kHz mono audio [n].
            caller_gone: called only if the recording must wait for a place at Triton; its result ends the wait.

        Raises:
            ApiError: the caller's quota is used up, no place came free in time, or Triton failed.
            CallerGoneError: the caller left during the wait.
        """
        audio_secs = len(samples) / RATE
        self._spend(audio_secs)
        metrics.AUDIO_SECONDS.labels("batch", self._model).inc(audio_secs)
        async with self._places.decoding(caller_gone):
            answer = await self._utterance.send(samples, end=True)
        confidence = None if math.isnan(answer.confidence) else answer.confidence
        segment = Segment(answer.text, answer.tokens, answer.words, confidence)
        return Transcription([segment], answer.samples, answer.features, answer.frames)


class Transcriber:
    """The engine of recordings.

    Args:
        settings: the gateway's.
        triton: what decodes.
        places: the gateway's.
        quotas: of its callers.
        options: of the decoder, for every recording.
    """

    def __init__(
        self, settings: Settings, triton: TritonPool, places: Places, quotas: Quotas, options: Mapping[str, str | int]
    ) -> None:
        self._settings = settings
        self._triton = triton
        self._places = places
        self._quotas = quotas
        self._options = options

    @contextmanager
    def admit(self, model: str, caller: int, options: Mapping[str, str | int] | None = None) -> Iterator[Recording]:
        """Hold a place in the queue for one recording, whose bytes are there.

        Args:
            model: public name of the model, one of the settings'.
            caller: who is charged for the audio.
            options: of the decoder, which override those of every recording.

        Raises:
            ApiError: the queue is full, the gateway drains, or no Triton can serve the model now.
        """
        with self._places.batch():
            ensemble = self._triton.ensemble(self._settings.models[model])
            utterance = self._triton.recording(ensemble, {**self._options, **(options or {})})
            max_secs = min(self._settings.max_batch_audio_length_secs, ensemble.max_whole_secs)
            yield Recording(model, max_secs, partial(self._quotas.spend, caller), utterance, self._places)
