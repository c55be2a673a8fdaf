"""The decoder's own metrics on Triton's metrics port."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils


class Metrics:
    """Counters and gauges of one model instance."""

    def __init__(self, model: str, instance: str) -> None:
        self._labels = {"model": model, "instance": instance}
        self._families: list[Any] = []  # a metric dies with its family
        gauge, counter = pb_utils.MetricFamily.GAUGE, pb_utils.MetricFamily.COUNTER
        self._sequences = self._metric("asr_decoder_sequences", "Streams with state in the decoder", gauge)
        self._calls = self._metric("asr_decoder_calls_total", "Calls of decoder_joint", counter)
        self._rows = self._metric("asr_decoder_rows_total", "Streams in the calls of decoder_joint, summed", counter)
        self._tokens = self._metric("asr_decoder_tokens_total", "Tokens in final answers", counter)
        self._audio = self._metric("asr_decoder_audio_seconds_total", "Seconds of audio received", counter)
        self._evictions = self._metric("asr_decoder_evictions_total", "Streams forgotten because they idled", counter)
        self.sequences(0)

    def sequences(self, alive: int) -> None:
        """Report the streams alive."""
        self._sequences.set(alive)

    def decoder_calls(self, calls: int, rows: int) -> None:
        """Count calls of decoder_joint and the streams in them."""
        _add(self._calls, calls)
        _add(self._rows, rows)

    def tokens(self, count: int) -> None:
        """Count tokens of final answers."""
        _add(self._tokens, count)

    def audio(self, seconds: float) -> None:
        """Count audio received."""
        _add(self._audio, seconds)

    def evictions(self, count: int) -> None:
        """Count streams forgotten because they idled."""
        _add(self._evictions, count)

    def _metric(self, name: str, description: str, kind: Any) -> Any:
        family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
        self._families.append(family)
        return family.Metric(labels=self._labels)


def _add(counter: Any, amount: float) -> None:
    """Increment, unless by nothing: every call is a message to Triton's process."""
    if amount:
        counter.increment(amount)
