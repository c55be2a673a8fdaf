"""Read the configuration of an ensemble from Triton."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import aio as grpcclient

from gateway.audio import RATE
from gateway.config.settings import Settings
from gateway.triton.geometry import CACHED_PREFIXES, LATENCY_PARAMETERS, Windows, read_windows

MAX_REPLAY_SECS = 60.0
"""Maximum audio kept for a cached encoder, in seconds. A restored stream fills its cache from this audio; older audio changes
little, since attention sees at most 6 s per layer."""


class NoRecogniserError(ValueError):
    """A model is not an ensemble with this project's decoder."""


@dataclass(frozen=True)
class Ensemble:
    """Properties of an ensemble.

    Attributes:
        name: name in Triton.
        models: all models that the ensemble needs, and the ensemble itself.
        windows: windows of streams by latency.
        max_whole_secs: maximum length of a recording in one request, in seconds.
        max_idle_secs: time without a request after which Triton drops a sequence, in seconds.
        max_sequences: maximum number of open sequences.
        encoder_calls: maximum number of encoder calls at once.
        lacks: latencies without windows of their own, each with the missing parameter.
        cached: whether the encoder carries its context in a cache.
        languages: languages that a stream can choose; empty if the encoder takes none.
        beam, stream_beam: default number of hypotheses of a recording and of a stream; 1: greedy.
    """

    name: str
    models: tuple[str, ...]
    windows: Mapping[str, Windows]
    max_whole_secs: float
    max_idle_secs: float
    max_sequences: int
    encoder_calls: int = 1
    lacks: tuple[tuple[str, str], ...] = ()
    cached: bool = False
    languages: tuple[str, ...] = ()
    beam: int = 1
    stream_beam: int = 1

    @classmethod
    def from_config(cls, name: str, steps: Iterable[str], decoder: Mapping[str, Any]) -> Ensemble:
        """Read the configuration of the ensemble's decoder.

        Args:
            name: name of the ensemble.
            steps: names of its models.
            decoder: configuration of the model with sequences, as JSON.

        Raises:
            KeyError, ValueError: it is not this project's decoder.
        """
        parameters = {key: entry.get("string_value", "") for key, entry in decoder["parameters"].items()}
        batching = decoder["sequence_batching"]
        instances = sum(int(group["count"]) for group in decoder["instance_group"])
        callees = {parameters[f"{role}_model"] for role in ("preprocessor", "encoder", "decoder_joint")}
        others = (
            "exclusive_encoder_model",
            "whole_encoder_model",
            *(f"{prefix}_encoder_model" for prefix in CACHED_PREFIXES.values()),
        )
        callees |= {parameters[name] for name in others if name in parameters}
        cached = parameters.get("encoder_kind") == "cached"
        needed = (
            {latency: f"{prefix}_features" for latency, prefix in CACHED_PREFIXES.items()} if cached else LATENCY_PARAMETERS
        )
        return cls(
            name=name,
            models=(name, *steps, *sorted(callees)),
            windows=read_windows(parameters),
            max_whole_secs=float(parameters["max_whole_secs"]),
            max_idle_secs=int(batching["max_sequence_idle_microseconds"]) / 1e6,
            max_sequences=instances * int(batching["oldest"]["max_candidate_sequences"]),
            encoder_calls=int(parameters.get("encoder_calls", 1)),
            lacks=tuple(item for item in needed.items() if not parameters.get(item[1])),
            cached=cached,
            languages=tuple(part.partition("=")[0].strip() for part in parameters.get("languages", "").split(",") if part),
            beam=int(parameters.get("beam", 1)),
            stream_beam=int(parameters.get("stream_beam", 1)),
        )

    def context_secs(self, latency: str) -> float:
        """Return the maximum audio before a chunk that restoring a stream takes, in seconds."""
        return MAX_REPLAY_SECS if self.cached else self.windows[latency].left / RATE

    def misfits(self, settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield a log event with its fields for each setting that does not fit this ensemble."""
        if missing := dict(self.lacks).get(settings.latency):
            yield (
                "latency not available",
                {
                    "latency": settings.latency,
                    "lacks": missing,
                    "consequence": "streams are balanced",
                },
            )
        if self.max_idle_secs <= settings.stream_timeout_secs:
            yield (
                "stream timeout too long",
                {
                    "stream_timeout_secs": settings.stream_timeout_secs,
                    "max_idle_secs": self.max_idle_secs,
                    "consequence": "Triton may drop streams that are idle for less than stream_timeout_secs",
                },
            )
        admitted = settings.max_concurrent_streams + settings.max_concurrent_batches
        if self.max_sequences < admitted:
            yield (
                "too few sequence slots",
                {
                    "slots": self.max_sequences,
                    "admitted": admitted,
                    "consequence": "streams and batches may wait in Triton",
                },
            )


async def read_ensemble(client: grpcclient.InferenceServerClient, name: str, timeout_secs: float) -> Ensemble:
    """Read the configurations of an ensemble's models from Triton.

    Args:
        client: client of the Triton.
        name: name of the ensemble.
        timeout_secs: timeout of each request.

    Raises:
        NoRecogniserError: it is not an ensemble with this project's decoder.
        InferenceServerException: Triton did not respond.
    """

    async def read(model: str) -> dict[str, Any]:
        response = await client.get_model_config(model, as_json=True, client_timeout=timeout_secs)
        config: dict[str, Any] = response["config"]
        return config

    config = await read(name)
    try:
        steps = [step["model_name"] for step in config["ensemble_scheduling"]["step"]]
        configs = [await read(step) for step in steps]
        (decoder,) = (config for config in configs if "sequence_batching" in config)
        return Ensemble.from_config(name, steps, decoder)
    except (KeyError, ValueError) as error:
        raise NoRecogniserError(repr(error)) from error
