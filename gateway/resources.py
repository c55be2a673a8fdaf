"""Objects that both engines use, made once per gateway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.config.settings import Settings
from gateway.limits.places import Places
from gateway.limits.quotas import Quotas
from gateway.triton.pool import TritonPool

DECODER_SETTINGS = ("latency", "max_symbols_per_step", "max_total_tokens")
"""Settings that are passed to the decoder as options of the same names."""


@dataclass(frozen=True)
class Resources:
    """The Triton servers, and the limits on their use.

    Attributes:
        settings: settings of the gateway.
        triton: the Triton servers.
        places: places for concurrent streams and recordings.
        quotas: quotas of callers.
        options: options of the decoder for every stream and recording.
    """

    settings: Settings
    triton: TritonPool
    places: Places
    quotas: Quotas
    options: Mapping[str, str | int]

    @classmethod
    def from_settings(cls, settings: Settings) -> Resources:
        """Return the resources of a gateway with these settings; ``triton.start()`` connects."""
        options = {name: value for name in DECODER_SETTINGS if (value := getattr(settings, name)) is not None}
        return cls(settings, TritonPool(settings), Places(settings), Quotas(settings), options)
