"""The decoder's own metrics on Triton's metrics port."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import triton_python_backend_utils as pb_utils

GAUGES = {
    "sequences": "Streams with state in the decoder",
    "waiting_windows": "Windows that wait for a call of the encoder",
}
COUNTERS = {
    "audio_seconds": "Seconds of audio received",
    "windows": "Windows encoded",
    "encode_calls": "Calls of preprocessor and encoder",
    "encode_seconds": "Seconds that those calls took; several may run at once",
    "calls": "Calls of decoder_joint",
    "rows": "Streams in the calls of decoder_joint, summed",
    "decode_seconds": "Seconds that those calls took",
    "tokens": "Tokens in final answers",
    "segments": "Segments that ended",
    "evictions": "Streams forgotten because they idled",
}


class Metrics:
    """Counters and gauges of one model instance: ``asr_decoder_NAME_total`` and ``asr_decoder_NAME``.

    They are added up here and reported now and then: every report is a message to Triton's process, and its answer.
    """

    def __init__(self, model: str, instance: str) -> None:
        self._labels = {"model": model, "instance": instance}
        self._families: list[Any] = []  # a metric dies with its family
        kind = pb_utils.MetricFamily
        self._gauges = {name: self._metric(f"asr_decoder_{name}", text, kind.GAUGE) for name, text in GAUGES.items()}
        self._counters = {
            name: self._metric(f"asr_decoder_{name}_total", text, kind.COUNTER) for name, text in COUNTERS.items()
        }
        self._lock = threading.Lock()
        self._added: defaultdict[str, float] = defaultdict(float)
        self._reported: dict[str, int] = {}

    def add(self, name: str, amount: float = 1) -> None:
        """Count; from any thread."""
        with self._lock:
            self._added[name] += amount

    def report(self, **gauges: int) -> None:
        """Report what changed since last time."""
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
