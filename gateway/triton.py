"""Triton as the gateway sees it: which models are behind an ensemble, whether they are ready, and sequences of requests."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import orjson
import structlog
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc import aio as grpcclient
from tritonclient.utils import InferenceServerException

from gateway import metrics
from gateway.errors import ApiError, ErrorKind
from gateway.settings import Settings
from gateway.transcript import Answer

OUTPUTS = ("TEXT", "TOKENS", "WORDS", "CONFIDENCE", "STABLE_CHARS", "SEGMENT", "LENGTHS")
READY_POLL_SECS = 1.0
READY_TIMEOUT_SECS = 2.0

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    (
        "grpc.max_reconnect_backoff_ms",
        1000,
    ),  # 120 s by default: too long to find a Triton that is back
]

Samples = npt.NDArray[np.int16]

log = structlog.get_logger()


class ModelState(Enum):
    """A model as Triton's repository index tells it."""

    READY = "ready"
    UNAVAILABLE = "unavailable"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Recogniser:
    """What the model configurations behind an ensemble tell.

    Attributes:
        ensemble: its name.
        models: every model that it needs, itself included.
        chunk_samples: audio that a window decodes for good.
        right_samples: audio that must follow a chunk before it is decoded.
        max_whole_secs: longest recording in one piece.
        max_idle_secs: after this long without a request Triton drops a sequence.
        max_sequences: how many sequences can live at once.
    """

    ensemble: str
    models: tuple[str, ...]
    chunk_samples: int
    right_samples: int
    max_whole_secs: float
    max_idle_secs: float
    max_sequences: int

    @classmethod
    def from_config(cls, ensemble: str, steps: Sequence[str], decoder: Mapping[str, Any]) -> Recogniser:
        """Read the configuration of an ensemble's sequence model.

        Raises:
            KeyError, ValueError: it is none of this project's decoder.
        """
        parameters = {name: entry.get("string_value", "") for name, entry in decoder["parameters"].items()}
        frame_samples = int(parameters["frame_samples"])
        batching = decoder["sequence_batching"]
        instances = sum(int(group["count"]) for group in decoder["instance_group"])
        callees = [parameters[f"{role}_model"] for role in ("preprocessor", "encoder", "decoder_joint")]
        return cls(
            ensemble=ensemble,
            models=(ensemble, *steps, *callees),
            chunk_samples=int(parameters["chunk_frames"]) * frame_samples,
            right_samples=int(parameters["right_frames"]) * frame_samples,
            max_whole_secs=float(parameters["max_whole_secs"]),
            max_idle_secs=int(batching["max_sequence_idle_microseconds"]) / 1e6,
            max_sequences=instances * int(batching["oldest"]["max_candidate_sequences"]),
        )

    def due_samples(self, sent: int) -> int:
        """How many samples a stream must have for its next window, when ``sent`` samples gave it all windows they could."""
        windows = max(0, sent - self.right_samples) // self.chunk_samples
        return (windows + 1) * self.chunk_samples + self.right_samples


class Triton:
    """One Triton server, with the ensembles that the settings name.

    Attributes:
        models: state of every model that an ensemble needs, as of the last look.
        latency_secs: how long that look took; None if it failed.
        was_ready: whether some ensemble has ever been ready.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = grpcclient.InferenceServerClient(
            settings.triton_address, ssl=settings.triton_ssl, channel_args=CHANNEL_OPTIONS
        )
        self._recognisers: dict[str, Recogniser] = {}
        self._poller: asyncio.Task[None] | None = None
        self.models: dict[str, ModelState] = {}
        self.latency_secs: float | None = None
        self.was_ready = False

    async def start(self) -> None:
        """Look once, and from then on in the background."""
        await self._look()
        self._poller = asyncio.create_task(self._poll(), name="triton readiness")

    async def close(self) -> None:
        """Stop looking and close the connection."""
        if self._poller:
            self._poller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poller
        await self._client.close()

    def ready(self, ensemble: str) -> bool:
        """Whether every model that the ensemble needs was ready at the last look."""
        recogniser = self._recognisers.get(ensemble)
        return recogniser is not None and all(self.models.get(m) is ModelState.READY for m in recogniser.models)

    def recogniser(self, ensemble: str) -> Recogniser:
        """What is known of an ensemble.

        Raises:
            ApiError: it is not ready.
        """
        if not self.ready(ensemble):
            raise ApiError(ErrorKind.NOT_READY, "the recogniser is not ready; please retry")
        return self._recognisers[ensemble]

    def open(self, recogniser: Recogniser, options: dict[str, str | int]) -> Utterance:
        """A new sequence: the state of one stream in the decoder, made by its first request."""
        return Utterance(self._client, recogniser, options, self._settings.inference_timeout_secs)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(READY_POLL_SECS)
            await self._look()

    async def _look(self) -> None:
        started = time.perf_counter()
        before = self.models
        try:
            index = await self._client.get_model_repository_index(client_timeout=READY_TIMEOUT_SECS)
            states = {model.name: _model_state(model.state) for model in index.models}
            for ensemble in set(self._settings.models.values()) - self._recognisers.keys():
                if states.get(ensemble) is ModelState.READY:
                    await self._discover(ensemble)
            needed = {name for recogniser in self._recognisers.values() for name in recogniser.models}
            needed |= set(self._settings.models.values())
            self.models = {name: states.get(name, ModelState.UNKNOWN) for name in sorted(needed)}
            self.latency_secs = time.perf_counter() - started
            self.was_ready |= any(map(self.ready, self._recognisers))
        except InferenceServerException as error:
            self.models = dict.fromkeys(before or self._settings.models.values(), ModelState.UNKNOWN)
            self.latency_secs = None
            self._recognisers.clear()  # it may come back with another configuration
            if before != self.models:
                log.warning("triton unreachable", endpoint=self._settings.triton_address, reason=error.message())
        if before != self.models:
            log.info("triton models", **{name: state.value for name, state in self.models.items()})

    async def _discover(self, ensemble: str) -> None:
        """Learn what the configurations behind an ensemble tell."""
        config = await self._config(ensemble)
        try:
            steps = [step["model_name"] for step in config["ensemble_scheduling"]["step"]]
            configs = [await self._config(step) for step in steps]
            (decoder,) = (config for config in configs if "sequence_batching" in config)
            recogniser = Recogniser.from_config(ensemble, steps, decoder)
        except (KeyError, ValueError) as error:
            log.error("ensemble is no recogniser", ensemble=ensemble, reason=repr(error))
            return
        self._recognisers[ensemble] = recogniser
        settings = self._settings
        if recogniser.max_idle_secs <= settings.stream_timeout_secs:
            log.warning(
                "streams may be dropped: stream_timeout_secs is not below the model's max_sequence_idle_microseconds",
                stream_timeout_secs=settings.stream_timeout_secs,
                max_idle_secs=recogniser.max_idle_secs,
            )
        if recogniser.max_sequences < settings.max_concurrent_streams + settings.max_concurrent_batches:
            log.warning(
                "requests may wait in Triton: it has fewer sequence slots than the gateway admits streams and batches",
                slots=recogniser.max_sequences,
                admitted=settings.max_concurrent_streams + settings.max_concurrent_batches,
            )

    async def _config(self, model: str) -> dict[str, Any]:
        answer = await self._client.get_model_config(model, as_json=True, client_timeout=READY_TIMEOUT_SECS)
        config: dict[str, Any] = answer["config"]
        return config


class Utterance:
    """One stream as a sequence of requests to Triton, one in flight at a time: Triton may reorder those of one sequence."""

    def __init__(
        self,
        client: grpcclient.InferenceServerClient,
        recogniser: Recogniser,
        options: dict[str, str | int],
        timeout_secs: float,
    ) -> None:
        self._client = client
        self._recogniser = recogniser
        self._options = options
        self._timeout_secs = timeout_secs
        self._id = secrets.randbelow(2**63 - 1) + 1  # 0 is no sequence; random, so that several gateways can share a Triton
        self.started = False

    async def send(self, samples: Samples, *, end: bool) -> Answer:
        """Send new audio and give the decoder's answer.

        Args:
            samples: 16 kHz audio [n]; may be empty.
            end: the stream ends with it.

        Raises:
            ApiError: Triton failed or took too long; the sequence's state is then unknown.
        """
        audio = InferInput("AUDIO", [1, len(samples)], "INT16")
        audio.set_data_from_numpy(samples[None])
        start, self.started = not self.started, True  # from here on the decoder may hold state, whatever comes back
        began = time.perf_counter()
        try:
            result = await self._client.infer(
                self._recogniser.ensemble,
                [audio],
                outputs=[InferRequestedOutput(name) for name in OUTPUTS],
                sequence_id=self._id,
                sequence_start=start,
                sequence_end=end,
                parameters=self._options if start else None,
                client_timeout=self._timeout_secs,
            )
        except InferenceServerException as error:
            log.warning("inference failed", sequence=self._id, status=error.status(), reason=error.message())
            if error.status() == str(grpc.StatusCode.DEADLINE_EXCEEDED):
                raise ApiError(
                    ErrorKind.BACKEND_TIMEOUT, f"the recogniser took longer than {self._timeout_secs:g} s; please retry"
                ) from error
            raise ApiError(ErrorKind.BACKEND_FAILED, "the recogniser failed; please retry") from error
        finally:
            metrics.TRITON_DURATION.labels(self._recogniser.ensemble).observe(time.perf_counter() - began)
        self.started = not end
        return _parse(result)

    async def abandon(self) -> None:
        """Free the decoder's state of a stream that nobody waits for any more; failures don't matter, it ages out."""
        if self.started:
            with contextlib.suppress(ApiError):
                await self.send(np.zeros(0, np.int16), end=True)


def _model_state(state: str) -> ModelState:
    return ModelState.READY if state == "READY" else ModelState.UNAVAILABLE


def _parse(result: Any) -> Answer:
    text, tokens, words, confidence, stable, segment, lengths = (result.as_numpy(name)[0] for name in OUTPUTS)
    samples, features, frames = lengths.tolist()
    return Answer(
        text=text[0].decode(),
        tokens=tokens.tolist(),
        words=orjson.loads(words[0]),
        confidence=float(confidence[0]),
        stable_chars=int(stable[0]),
        segment_final=bool(segment[1]),
        samples=samples,
        features=features,
        frames=frames,
    )
