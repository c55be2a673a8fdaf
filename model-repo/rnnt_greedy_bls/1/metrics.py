"""Metrics of the decoder on Triton's metrics port."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import triton_python_backend_utils as pb_utils

GAUGES = {
    "sequences": "Streams with state in the decoder",
    "waiting_windows": "Windows that wait for a free encoder call",
}
COUNTERS = {
    "audio_seconds": "Seconds of audio received",
    "windows": "Windows encoded",
    "encode_calls": "Calls of preprocessor and encoder",
    "encode_seconds": "Total duration of the calls of preprocessor and encoder; several may run at once",
    "calls": "Calls of decoder_joint",
    "rows": "Total number of streams in the calls of decoder_joint",
    "decode_seconds": "Total duration of the calls of decoder_joint",
    "tokens": "Tokens in final results",
    "segments": "Segments ended",
    "evictions": "Idle streams evicted",
}


class Metrics:
    """Counters and gauges of one model instance: ``asr_decoder_NAME_total`` and ``asr_decoder_NAME``.

    Values are summed here and reported at intervals, since each report costs a round trip to Triton's process.

    Args:
        model: label of the model.
        instance: label of the instance.
    """

    def __init__(self, model: str, instance: str) -> None:
        self._labels = {"model": model, "instance": instance}
        self._families: list[Any] = []  # Triton removes a metric when its family is freed
        kind = pb_utils.MetricFamily
        self._gauges = {name: self._metric(f"asr_decoder_{name}", text, kind.GAUGE) for name, text in GAUGES.items()}
        self._counters = {
            name: self._metric(f"asr_decoder_{name}_total", text, kind.COUNTER) for name, text in COUNTERS.items()
        }
        self._lock = threading.Lock()
        self._added: defaultdict[str, float] = defaultdict(float)
        self._reported: dict[str, int] = {}

    def add(self, name: str, amount: float = 1) -> None:
        """Add to a counter; thread-safe."""
        with self._lock:
            self._added[name] += amount

    def report(self, **gauges: int) -> None:
        """Report all values that changed since the last report."""
        with self._lock:
            added, self._added = self._added, defaultdict(float)
        for name, amount in added.items():
            if amount:
                self._counters[name].increment(amount)
        for name, value in gauges.items():
            if self._reported.get(name) != value:
                self._gauges[name].set(value)
        self._reported = gauges

    def _metric(self, name: str, description: str, kind: Any) -> Any:
        family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
        self._families.append(family)
        return family.Metric(labels=self._labels)
