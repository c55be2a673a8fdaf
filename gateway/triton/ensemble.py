"""An ensemble that recognises speech: what the configurations of its models tell the gateway."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import aio as grpcclient

from gateway.config.settings import Settings
from gateway.triton.geometry import LATENCY_PARAMETERS, Windows, read_windows


class NoRecogniserError(ValueError):
    """A model is not an ensemble around this project's decoder."""


@dataclass(frozen=True)
class Ensemble:
    """What the gateway must know of an ensemble.

    Attributes:
        name: its name in Triton.
        models: every model that it needs, itself included.
        windows: of streams, by latency.
        max_whole_secs: longest recording in one request, in seconds.
        max_idle_secs: Triton drops a sequence after this time without a request, in seconds.
        max_sequences: how many sequences can live at once.
        encoder_calls: how many calls of the encoder run at once.
        lacks: latencies for which the model has no windows, and the parameter that is missing.
    """

    name: str
    models: tuple[str, ...]
    windows: Mapping[str, Windows]
    max_whole_secs: float
    max_idle_secs: float
    max_sequences: int
    encoder_calls: int = 1
    lacks: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_config(cls, name: str, steps: Iterable[str], decoder: Mapping[str, Any]) -> Ensemble:
        """Read the configuration of the ensemble's decoder.

        Args:
            name: the ensemble's.
            steps: the models that it is made of.
            decoder: configuration of the one of them that has sequences, as JSON.

        Raises:
            KeyError, ValueError: it is not this project's decoder.
        """
        parameters = {key: entry.get("string_value", "") for key, entry in decoder["parameters"].items()}
        batching = decoder["sequence_batching"]
        instances = sum(int(group["count"]) for group in decoder["instance_group"])
        callees = {parameters[f"{role}_model"] for role in ("preprocessor", "encoder", "decoder_joint")}
        callees.add(parameters.get("exclusive_encoder_model", parameters["encoder_model"]))
        return cls(
            name=name,
            models=(name, *steps, *sorted(callees)),
            windows=read_windows(parameters),
            max_whole_secs=float(parameters["max_whole_secs"]),
            max_idle_secs=int(batching["max_sequence_idle_microseconds"]) / 1e6,
            max_sequences=instances * int(batching["oldest"]["max_candidate_sequences"]),
            encoder_calls=int(parameters.get("encoder_calls", 1)),
            lacks=tuple(item for item in LATENCY_PARAMETERS.items() if not parameters.get(item[1])),
        )

    def misfits(self, settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what of the settings does not suit this ensemble, as events for the log and their fields."""
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
                    "consequence": "Triton may drop streams whose clients may still go on",
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
    """Ask a Triton for the configurations behind an ensemble.

    Args:
        client: of that Triton.
        name: the ensemble's.
        timeout_secs: of each request.

    Raises:
        NoRecogniserError: it is not an ensemble around this project's decoder.
        InferenceServerException: Triton did not answer.
    """

    async def read(model: str) -> dict[str, Any]:
        answer = await client.get_model_config(model, as_json=True, client_timeout=timeout_secs)
        config: dict[str, Any] = answer["config"]
        return config

    config = await read(name)
    try:
        steps = [step["model_name"] for step in config["ensemble_scheduling"]["step"]]
        configs = [await read(step) for step in steps]
        (decoder,) = (config for config in configs if "sequence_batching" in config)
        return Ensemble.from_config(name, steps, decoder)
    except (KeyError, ValueError) as error:
        raise NoRecogniserError(repr(error)) from error
