"""One Triton as the gateway sees it: which models are behind an ensemble, whether they are ready, sequences of requests."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import struct
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import orjson
import structlog
from tritonclient.grpc import InferInput
from tritonclient.grpc import aio as grpcclient
from tritonclient.utils import InferenceServerException

from gateway import metrics, tracing
from gateway.config.settings import Address, Settings
from gateway.errors import ApiError, ErrorKind
from gateway.transcript.transcript import Answer
from gateway.triton.breaker import Breaker
from gateway.triton.canary import MAX_FAILURES, MIN_ID, Canary, Health, ask
from gateway.triton.retry import DEADLINE_EXCEEDED, UNAVAILABLE, Death, Fault, classify

READY_POLL_SECS = 1.0
UNREADY_POLL_SECS = 0.2
READY_TIMEOUT_SECS = 2.0

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # 120 s by default: too long to find a Triton that is back
    ("grpc.use_local_subchannel_pool", 1),  # else a new client would be given the connection of the old one
]

ABANDON_PAUSES_SECS = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Before each try to end a sequence on a Triton that does not answer."""

LAST_LOOK_SECS = 0.5
"""Within this time a connection that was left has to show that it is not lost, once another has shown that Triton is well."""

MOST_PATIENCE = 4
"""No request takes more than so many times ``inference_timeout_secs``."""

CANARY_PATIENCE = MOST_PATIENCE / MAX_FAILURES
"""Time limit of a canary, as a multiple of ``inference_timeout_secs``. A Triton that decodes nothing for as long as the most
patient request waits is dead to all of them."""

MIN_CANARY_TIMEOUT_SECS = 2.0
"""Shortest time limit of a canary."""

SLOW_SHARE = 0.8
"""A call that takes this share of its time limit counts against its endpoint, though it succeeds."""

GEOMETRY_PARAMETERS = {"low": "low_latency_frames", "throughput": "high_throughput_frames"}
"""Which parameter of the decoder has the windows of a latency, if the model has any; else they are those of ``balanced``."""

CONNECTION_LOST = "the connection to the recogniser was lost; please retry"

Samples = npt.NDArray[np.int16]

T = TypeVar("T")

log = structlog.get_logger()


class TritonError(ApiError):
    """Triton failed a request.

    Attributes:
        fault: what its error means.
        death: the backend's death that the request was in flight at, if any.
    """

    def __init__(self, kind: ErrorKind, message: str, fault: Fault, death: Death | None = None) -> None:
        super().__init__(kind, message)
        self.fault = fault
        self.death = death


class ModelState(Enum):
    """A model as Triton's repository index tells it."""

    READY = "ready"
    UNAVAILABLE = "unavailable"
    UNKNOWN = "unknown"


class Windows(NamedTuple):
    """What a stream's windows are made of, in samples.

    Attributes:
        left: audio before a chunk that its window holds.
        chunk: audio that a window decodes for good.
        right: audio that must follow a chunk before it is decoded.
    """

    left: int
    chunk: int
    right: int

    def due(self, sent: int) -> int:
        """How many samples a stream must have for its next window, when ``sent`` samples gave it all windows they could."""
        windows = max(0, sent - self.right) // self.chunk
        return (windows + 1) * self.chunk + self.right


@dataclass(frozen=True)
class Recogniser:
    """What the model configurations behind an ensemble tell.

    Attributes:
        ensemble: its name.
        models: every model that it needs, itself included.
        windows: of streams, by latency.
        max_whole_secs: longest recording in one piece.
        max_idle_secs: after this long without a request Triton drops a sequence.
        max_sequences: how many sequences can live at once.
        encoder_calls: how many calls of the encoder run at once.
    """

    ensemble: str
    models: tuple[str, ...]
    windows: Mapping[str, Windows]
    max_whole_secs: float
    max_idle_secs: float
    max_sequences: int
    encoder_calls: int = 1

    @classmethod
    def from_config(cls, ensemble: str, steps: Iterable[str], decoder: Mapping[str, Any]) -> Recogniser:
        """Read the configuration of an ensemble's sequence model.

        Raises:
            KeyError, ValueError: it is none of this project's decoder.
        """
        parameters = {name: entry.get("string_value", "") for name, entry in decoder["parameters"].items()}
        batching = decoder["sequence_batching"]
        instances = sum(int(group["count"]) for group in decoder["instance_group"])
        callees = {parameters[f"{role}_model"] for role in ("preprocessor", "encoder", "decoder_joint")}
        callees.add(parameters.get("exclusive_encoder_model", parameters["encoder_model"]))
        return cls(
            ensemble=ensemble,
            models=(ensemble, *steps, *sorted(callees)),
            windows=_read_windows(parameters),
            max_whole_secs=float(parameters["max_whole_secs"]),
            max_idle_secs=int(batching["max_sequence_idle_microseconds"]) / 1e6,
            max_sequences=instances * int(batching["oldest"]["max_candidate_sequences"]),
            encoder_calls=int(parameters.get("encoder_calls", 1)),
        )


@dataclass(eq=False)
class Connection:
    """A connection to one Triton.

    Attributes:
        client: Triton's.
        began_at: in seconds of ``time.monotonic``.
        waiting: for each call that somebody waits for, what ends the wait when the connection is given up.
    """

    client: grpcclient.InferenceServerClient
    began_at: float = field(default_factory=time.monotonic)
    waiting: set[asyncio.Future[None]] = field(default_factory=set)

    def give_up(self) -> None:
        """Wait no more for what it owes."""
        for wait in self.waiting:
            if not wait.done():
                wait.set_result(None)


class Endpoint:
    """One Triton server, with the ensembles that the settings name.

    Attributes:
        address: its ``host:port`` for gRPC.
        models: state of every model that an ensemble needs, as of the last look.
        latency_secs: how long that look took; None if it failed.
        breaker: whether new sequences may come here.
        sequences: how many of ours live here.
        in_flight: sequences with a request that is not answered yet.
    """

    def __init__(self, address: Address, settings: Settings) -> None:
        self.address = address.target
        self._tls = address.tls
        self.models: dict[str, ModelState] = {}
        self.latency_secs: float | None = None
        self.breaker = Breaker()
        self.sequences = 0
        self.in_flight: set[Sequence] = set()
        self._settings = settings
        self._connection = self._connect()
        self._left: list[Connection] = []  # while no other has shown that Triton is well
        self._recognisers: dict[str, Recogniser] = {}
        self._rejected: dict[str, str] = {}  # ensembles that are none of ours, and why
        self._doubted = asyncio.Event()
        self._looks_begun = self._looks_done = 0
        self._looked = asyncio.Event()  # replaced after each look
        self._generation = 0  # of the Triton behind the address: a new one after each look that failed
        self._death: _NoticedDeath | None = None  # of this generation
        timeout_secs = max(MIN_CANARY_TIMEOUT_SECS, CANARY_PATIENCE * settings.inference_timeout_secs)
        self._canaries = {
            ensemble: Canary(
                partial(self._ask, ensemble), f"{self.address} {ensemble}", timeout_secs, settings.canary_interval_secs
            )
            for ensemble in sorted(set(settings.models.values()))
        }
        self._background: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Look and send canaries once, and from then on in the background."""
        await self._look()
        self._in_background(self._poll())
        for ensemble, canary in self._canaries.items():
            self._in_background(canary.run(partial(self.loaded, ensemble), partial(self._encoder_calls, ensemble)))
        judged = [asyncio.create_task(canary.judged.wait()) for name, canary in self._canaries.items() if self.loaded(name)]
        if judged:
            _, late = await asyncio.wait(judged, timeout=READY_TIMEOUT_SECS)
            for task in late:
                task.cancel()

    async def close(self) -> None:
        """Stop looking and close the connection."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._connection.client.close()

    def loaded(self, ensemble: str) -> bool:
        """Return whether every model that the ensemble needs was loaded at the last look."""
        recogniser = self._recognisers.get(ensemble)
        return recogniser is not None and all(self.models.get(m) is ModelState.READY for m in recogniser.models)

    def ready(self, ensemble: str) -> bool:
        """Return whether the ensemble is loaded and recognises speech."""
        return self.loaded(ensemble) and self._canaries[ensemble].health.well

    def health(self, ensemble: str) -> Health:
        """Return what the canaries have shown of an ensemble that the settings name."""
        return self._canaries[ensemble].health

    @property
    def was_ready(self) -> bool:
        """Whether some ensemble has ever recognised speech."""
        return any(canary.ever_answered for canary in self._canaries.values())

    def see_progress(self, ensemble: str) -> None:
        """Take note that the ensemble has just decoded audio."""
        self._canaries[ensemble].see_progress()

    def suspect_failure(self, ensemble: str) -> None:
        """Send canaries at once: a request has failed."""
        self._canaries[ensemble].hurry()

    def recogniser(self, ensemble: str) -> Recogniser:
        """What is known of an ensemble that is ready."""
        return self._recognisers[ensemble]

    def open(self, ensemble: str, options: Mapping[str, str | int], *, suspect: bool = False) -> Sequence:
        """Return a new sequence: the state of one stream in the decoder, made by its first request.

        Args:
            ensemble: its name.
            options: request parameters of the first request.
            suspect: whether its audio was in flight at a backend's death.
        """
        return Sequence(self, ensemble, options, self._settings.inference_timeout_secs, suspect=suspect)

    def doubt(self) -> None:
        """Take nothing for ready until the next look, which comes at once."""
        self.models = dict.fromkeys(self.models, ModelState.UNKNOWN)
        self._doubted.set()

    async def find_death(self, sequence: Sequence, fault: Fault) -> Death | None:
        """Return the backend's death that a request was in flight at, if it was one.

        A broken connection is a death unless Triton is ready at the next look: a new Triton takes longer to load its models.
        A process that died or stands still fails requests from then on; those that came afterwards are not involved.

        Args:
            sequence: its request has just failed, and is in ``in_flight`` still.
            fault: what its error means.
        """
        generation = self._generation
        if not self._death or self._death.generation != generation:
            suspects = sum(other.suspect for other in self.in_flight)
            self._death = _NoticedDeath(generation, time.perf_counter(), suspects)
        death = self._death
        if fault is Fault.DISCONNECTED and not death.confirmed:
            await self._look_anew()
            if generation == self._generation and any(map(self.loaded, self._recognisers)):
                if self._death is death:
                    self._death = None
                return None
        if not death.confirmed:
            death.confirmed = True
            metrics.BACKEND_DEATHS.labels(self.address).inc()
            log.error("backend died", endpoint=self.address, requests_in_flight=len(self.in_flight))
        if sequence.sent_at > death.noticed_at:
            return None
        return Death((self.address, generation), sole=sequence.suspect and death.suspects == 1)

    def abandon(self, sequence: Sequence) -> None:
        """Free the decoder's state of a sequence that nobody waits for; failures don't matter, it ages out."""
        self._in_background(sequence.abandon())

    async def infer(
        self,
        ensemble: str,
        samples: Samples,
        timeout_secs: float,
        on_answer: Callable[[Any], None] = lambda _: None,
        **arguments: Any,
    ) -> Any:
        """Send one request with 16 kHz audio [n].

        One that takes too long goes on, but nobody waits for it: Triton would decode it though it were cancelled, and the gRPC
        front end of Triton 2.51 may crash when a request is cancelled soon after it came.

        Args:
            ensemble: its name.
            samples: audio [n].
            timeout_secs: how long to wait for the answer.
            on_answer: called with the answer, also with one that comes too late.
            arguments: more of the client's ``infer``.

        Raises:
            TritonError: its connection was left, and Triton is well by another.
            InferenceServerException: it failed, or took too long.
        """
        connection = self._connection
        audio = InferInput("AUDIO", [1, len(samples)], "INT16")
        audio.set_data_from_numpy(samples[None])
        call = self._in_background(connection.client.infer(ensemble, [audio], **arguments))
        call.add_done_callback(partial(_report_answer, on_answer))
        given_up = asyncio.get_running_loop().create_future()
        connection.waiting.add(given_up)
        try:
            await asyncio.wait({call, given_up}, timeout=timeout_secs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            connection.waiting.discard(given_up)
        if call.done():
            return call.result()
        if given_up.done():
            raise TritonError(ErrorKind.BACKEND_FAILED, CONNECTION_LOST, Fault.DISCONNECTED)
        raise InferenceServerException("Deadline Exceeded", DEADLINE_EXCEEDED)

    async def _ask(self, ensemble: str) -> None:
        await ask(self._connection.client, ensemble)

    def _encoder_calls(self, ensemble: str) -> int:
        return self._recognisers[ensemble].encoder_calls

    def _connect(self) -> Connection:
        return Connection(grpcclient.InferenceServerClient(self.address, ssl=self._tls, channel_args=CHANNEL_OPTIONS))

    def _reconnect(self) -> None:
        """Leave a connection that leads nowhere.

        A silent network would keep it for minutes, and gRPC asks ever more seldom for the address of a name that was unknown.
        """
        left, self._connection = self._connection, self._connect()
        self._left = [connection for connection in (*self._left, left) if connection.waiting]
        self._in_background(_close_later(left.client, MOST_PATIENCE * self._settings.inference_timeout_secs))

    def _in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _poll(self) -> None:
        while True:
            pause_secs = READY_POLL_SECS if any(map(self.loaded, self._recognisers)) else UNREADY_POLL_SECS
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._doubted.wait(), pause_secs)
            self._doubted.clear()
            await self._look()

    async def _look_anew(self) -> None:
        """Wait for a look that begins from now on."""
        self.doubt()
        begun = self._looks_begun
        while self._looks_done <= begun:
            await self._looked.wait()

    async def _look(self) -> None:
        self._looks_begun += 1
        look = self._looks_begun
        try:
            await self._look_once()
        finally:
            self._looks_done = look
            self._looked.set()
            self._looked = asyncio.Event()

        for ensemble, canary in self._canaries.items():
            if not self.loaded(ensemble):
                canary.forget()
            elif not canary.health.answered:
                canary.hurry()

    async def _look_once(self) -> None:
        started = time.perf_counter()
        before = self.models
        try:
            index = await self._connection.client.get_model_repository_index(client_timeout=READY_TIMEOUT_SECS)
            states = {model.name: _model_state(model.state) for model in index.models}
            for ensemble in set(self._settings.models.values()) - self._recognisers.keys():
                if states.get(ensemble) is ModelState.READY:
                    await self._discover(ensemble)
            needed = {name for recogniser in self._recognisers.values() for name in recogniser.models}
            needed |= set(self._settings.models.values())
            self.models = {name: states.get(name, ModelState.UNKNOWN) for name in sorted(needed)}
            self._generation += self.latency_secs is None
            self.latency_secs = time.perf_counter() - started
            for connection in self._left:
                if connection.waiting:
                    self._in_background(_give_up_if_lost(connection))
            self._left.clear()
        except InferenceServerException as error:
            self.models = dict.fromkeys(before or self._settings.models.values(), ModelState.UNKNOWN)
            self.latency_secs = None
            self._recognisers.clear()  # it may come back with another configuration
            self._rejected.clear()
            if time.monotonic() - self._connection.began_at >= READY_TIMEOUT_SECS:
                self._reconnect()
            if before != self.models:
                log.warning("triton unreachable", endpoint=self.address, reason=error.message())
        if before != self.models:
            log.info("triton models", endpoint=self.address, **{name: state.value for name, state in self.models.items()})

    async def _discover(self, ensemble: str) -> None:
        """Learn what the configurations behind an ensemble tell."""
        config = await self._config(ensemble)
        try:
            steps = [step["model_name"] for step in config["ensemble_scheduling"]["step"]]
            configs = [await self._config(step) for step in steps]
            (decoder,) = (config for config in configs if "sequence_batching" in config)
            recogniser = Recogniser.from_config(ensemble, steps, decoder)
        except (KeyError, ValueError) as error:
            if self._rejected.get(ensemble) != repr(error):
                self._rejected[ensemble] = repr(error)
                log.error("ensemble is no recogniser", ensemble=ensemble, reason=repr(error))
            return
        self._recognisers[ensemble] = recogniser
        settings = self._settings
        name = GEOMETRY_PARAMETERS.get(settings.latency)
        if name and not decoder["parameters"].get(name):
            log.warning("latency not available", latency=settings.latency, lacks=name, consequence="streams are balanced")
        if recogniser.max_idle_secs <= settings.stream_timeout_secs:
            log.warning(
                "stream timeout too long",
                stream_timeout_secs=settings.stream_timeout_secs,
                max_idle_secs=recogniser.max_idle_secs,
                consequence="Triton may drop streams whose clients may still go on",
            )
        if recogniser.max_sequences < settings.max_concurrent_streams + settings.max_concurrent_batches:
            log.warning(
                "too few sequence slots",
                slots=recogniser.max_sequences,
                admitted=settings.max_concurrent_streams + settings.max_concurrent_batches,
                consequence="streams and batches may wait in Triton",
            )

    async def _config(self, model: str) -> dict[str, Any]:
        answer = await self._connection.client.get_model_config(model, as_json=True, client_timeout=READY_TIMEOUT_SECS)
        config: dict[str, Any] = answer["config"]
        return config


@dataclass(eq=False)
class _NoticedDeath:
    """The end of a Triton, or of one of its models' processes.

    Attributes:
        generation: of the Triton.
        noticed_at: when a request first failed by it, in seconds of ``time.perf_counter``.
        suspects: requests in flight then that had been in flight at an earlier death.
        confirmed: whether it is sure that it was not the network.
    """

    generation: int
    noticed_at: float
    suspects: int
    confirmed: bool = False


class Sequence:
    """One sequence of requests to one Triton, one in flight at a time: Triton may reorder those of one sequence.

    Attributes:
        endpoint: where it is.
        suspect: whether its audio was in flight at a backend's death.
        sent_at: when its newest request was sent, in seconds of ``time.perf_counter``.
    """

    def __init__(
        self, endpoint: Endpoint, ensemble: str, options: Mapping[str, str | int], timeout_secs: float, *, suspect: bool
    ) -> None:
        self.endpoint = endpoint
        self.suspect = suspect
        self.sent_at = 0.0
        self._ensemble = ensemble
        self._options = dict(options)
        # How long a recording takes tells of its length, and of those beside it, more than of Triton.
        self._may_be_slow = options.get("context") == "whole"
        self._timeout_secs = timeout_secs
        self._id = secrets.randbelow(MIN_ID - 1) + 1  # 0 is no sequence; random, so that several gateways can share a Triton
        self._alive = False
        self._frames = 0

    async def send(self, samples: Samples, *, end: bool, patience: int = 1) -> Answer:
        """Send new audio and give the decoder's answer.

        Args:
            samples: 16 kHz audio [n]; may be empty.
            end: the sequence ends with it.
            patience: how many times ``inference_timeout_secs`` it may take.

        Raises:
            TritonError: it is gone, failed or took too long; the sequence's state is then unknown.
        """
        start, timeout_secs = not self._alive, patience * self._timeout_secs
        self._live(True)  # from here on the decoder may hold state, whatever comes back
        self.sent_at = time.perf_counter()
        self.endpoint.in_flight.add(self)
        try:
            with metrics.TRITON_DURATION.labels(self._ensemble).time():
                result = await self.endpoint.infer(
                    self._ensemble,
                    samples,
                    sequence_id=self._id,
                    sequence_start=start,
                    sequence_end=end,
                    parameters=self._options if start else None,
                    timeout_secs=timeout_secs,
                    on_answer=partial(self._note_progress, restored=start and "restore" in self._options),
                    headers=tracing.headers(),
                )
        except InferenceServerException as error:
            fault = classify(error.status(), error.message(), restores=start and "restore" in self._options)
            raise await self._failure(fault, error, timeout_secs) from error
        finally:
            self.endpoint.in_flight.discard(self)
        seconds = time.perf_counter() - self.sent_at
        self.endpoint.breaker.record(success=self._may_be_slow or seconds < SLOW_SHARE * timeout_secs)
        if end:
            self._live(False)
        return _parse(result)

    def _note_progress(self, result: Any, *, restored: bool) -> None:
        """Tell the endpoint where an answer shows that frames were decoded; a restored sequence counts old ones too."""
        frames = _decoded_frames(result)
        if frames > self._frames and not restored:
            self.endpoint.see_progress(self._ensemble)
        self._frames = frames

    async def _failure(self, fault: Fault, error: InferenceServerException, timeout_secs: float) -> TritonError:
        """Return what to raise for an error of Triton's, after telling the endpoint."""
        log.warning(
            "inference failed",
            endpoint=self.endpoint.address,
            sequence=self._id,
            fault=fault.name.lower(),
            status=error.status(),
            reason=error.message(),
        )
        blameless = fault in (Fault.UNKNOWN_SEQUENCE, Fault.FOREIGN_STATE) or (fault is Fault.LATE and self._may_be_slow)
        if not blameless:
            self.endpoint.breaker.record(success=False)
            self.endpoint.suspect_failure(self._ensemble)
        death = None
        if fault in (Fault.ABSENT, Fault.DISCONNECTED):
            self.endpoint.doubt()
        if fault in (Fault.DISCONNECTED, Fault.BACKEND_DIED):
            death = await self.endpoint.find_death(self, fault)
        if fault is Fault.FOREIGN_STATE:
            message = "the recogniser is another one than the stream began with, and can't go on with it; begin a new stream"
            return TritonError(ErrorKind.INVALID_SESSION, message, fault)
        if fault is Fault.LATE:
            message = f"the recogniser took longer than {timeout_secs:g} s; please retry"
            return TritonError(ErrorKind.BACKEND_TIMEOUT, message, fault)
        gone = fault in (Fault.ABSENT, Fault.DISCONNECTED)
        message = "the recogniser is gone; please retry" if gone else "the recogniser failed; please retry"
        return TritonError(ErrorKind.BACKEND_FAILED, message, fault, death)

    async def abandon(self) -> None:
        """Free the decoder's state, if there may be any; what can't be freed ages out."""
        if not self._alive:
            return
        for pause_secs in ABANDON_PAUSES_SECS:
            await asyncio.sleep(pause_secs)
            try:
                await self.endpoint.infer(
                    self._ensemble,
                    np.zeros(0, np.int16),
                    sequence_id=self._id,
                    sequence_end=True,
                    timeout_secs=self._timeout_secs,
                )
            except TritonError:
                continue
            except InferenceServerException as error:
                if error.status() in (UNAVAILABLE, DEADLINE_EXCEEDED):
                    continue
            break
        self._live(False)

    def _live(self, alive: bool) -> None:
        self.endpoint.sequences += alive - self._alive
        self._alive = alive


async def _give_up_if_lost(connection: Connection) -> None:
    """Wait no more for what a connection owes that still leads nowhere; one of a Triton that is merely slow is waited for."""
    try:
        await connection.client.is_server_live(client_timeout=LAST_LOOK_SECS)
    except InferenceServerException:
        connection.give_up()


def _report_answer(on_answer: Callable[[Any], None], call: asyncio.Task[Any]) -> None:
    """Hand over the answer of a call that may be nobody's concern any more; its error then is nobody's either."""
    if not call.cancelled() and not call.exception():
        on_answer(call.result())


async def _close_later(client: grpcclient.InferenceServerClient, delay_secs: float) -> None:
    """Close a connection when the calls that it still has are over: closing cancels those, and with them who waits."""
    try:
        await asyncio.sleep(delay_secs)
    finally:
        await client.close()


def _read_windows(parameters: Mapping[str, str]) -> dict[str, Windows]:
    """The windows of each latency, from the decoder's parameters."""
    balanced = ",".join(parameters[f"{part}_frames"] for part in Windows._fields)
    texts = {
        "balanced": balanced,
        **{latency: parameters.get(name) or balanced for latency, name in GEOMETRY_PARAMETERS.items()},
    }
    frame_samples = int(parameters["frame_samples"])
    return {latency: Windows(*(int(part) * frame_samples for part in text.split(","))) for latency, text in texts.items()}


def _model_state(state: str) -> ModelState:
    return ModelState.READY if state == "READY" else ModelState.UNAVAILABLE


def _decoded_frames(result: Any) -> int:
    """Return how many encoder frames an answer says were decoded since the start of its sequence."""
    response = result.get_response()
    index = [output.name for output in response.outputs].index("LENGTHS")
    frames: int = struct.unpack("<3q", response.raw_output_contents[index])[2]
    return frames


def _parse(result: Any) -> Answer:
    """Read the tensors of an answer.

    They are little-endian, and strings begin with 4 bytes of their length ("tensor data" in KServe's open inference protocol).
    The client's arrays would take five times as long to make, for one element each.
    """
    response = result.get_response()
    raw = dict(zip((output.name for output in response.outputs), response.raw_output_contents, strict=True))
    samples, features, frames = struct.unpack("<3q", raw["LENGTHS"])
    return Answer(
        text=raw["TEXT"][4:].decode(),
        tokens=np.frombuffer(raw["TOKENS"], "<i4").tolist(),
        words=orjson.loads(raw["WORDS"][4:]),
        confidence=struct.unpack("<f", raw["CONFIDENCE"])[0],
        stable_chars=struct.unpack("<i", raw["STABLE_CHARS"])[0],
        segment_final=struct.unpack("<2i", raw["SEGMENT"])[1] > 0,
        samples=samples,
        features=features,
        frames=frames,
        state=raw["STATE"][4:].decode(),
    )
