"""Decode audio to tokens inside Triton: a model for Triton's sequence batcher.

The state of each sequence is a ``Stream`` in ``_sequences``. Decoding is in ``greedy.py``, ``stream.py`` and ``batching.py``,
which do not depend on Triton. This module converts requests to calls of these modules, and results to responses.

``execute`` only queues requests. Each response is sent separately when it is ready, from the event loop that runs everything
else (response senders in the default mode: Triton 24.06 and later).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from batching import Decoder, Encoder, recognise
from fusions import Fusions
from greedy import JointOutputs
from metrics import Metrics
from network import TRACE, Network, own
from parameters import SAMPLE_RATE, ParameterError, Parameters
from stall_guard import StallGuard
from stream import Decoded, Stream
from vocabulary import continuations, read_vocabulary
from windows import Samples

REPORT_SECS = 0.5
"""Interval between two reports of the metrics, in seconds."""

TRIM_SECS = 5.0
"""Interval at which freed memory is returned to the system, in seconds."""

SequenceId = int | str
"""Id of a sequence as the client set it. Triton distinguishes ``5`` and ``"5"``, as a ``dict`` does."""


@dataclass(frozen=True)
class Request:
    """A copy of a request outside Triton's memory, which is valid only during ``execute``.

    Attributes:
        sequence_id: id of its sequence, 64 bits or a string.
        start, end: whether it is the first, and the last, of its sequence.
        samples: 16 kHz audio [n]; n may be 0.
        parameters: its request parameters, a JSON object.
        sender: sends the response.
    """

    sequence_id: SequenceId
    start: bool
    end: bool
    samples: Samples
    parameters: str
    sender: Any

    @classmethod
    def read(cls, request: Any) -> Request:
        """Copy a request out of Triton's memory.

        Raises:
            ParameterError: its sequence id is not UTF-8.
        """
        return cls(
            sequence_id=_sequence_id(request),
            start=bool(_input(request, "START").item()),
            end=bool(_input(request, "END").item()),
            samples=own(_input(request, "AUDIO").reshape(-1)),
            parameters=request.parameters() or "{}",
            sender=request.get_response_sender(),
        )


@dataclass(eq=False)
class OpenSequence:
    """A sequence that has started and not ended.

    Attributes:
        stream: its state.
        turn: lock of the request that is being served; Triton may send the next request before the response.
        used_at: arrival of the last request, in seconds of ``time.monotonic``.
    """

    stream: Stream
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    used_at: float = 0.0


class TritonPythonModel:
    """The model ``rnnt_greedy_bls``."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read parameters and vocabulary, and start the event loop.

        Raises:
            pb_utils.TritonModelException: a parameter or the vocabulary is missing or not allowed.
        """
        config = json.loads(args["model_config"])
        self._name = args["model_name"]
        parameters, self._fusions = _read_parameters(config, Path(args["model_repository"]))
        self._parameters = parameters
        self._idle_secs = int(config["sequence_batching"]["max_sequence_idle_microseconds"]) / 1e6
        self._metrics = Metrics(args["model_name"], args["model_instance_name"])
        network = Network(parameters, self._metrics)
        self._encoder = Encoder(network.encode, parameters.encoder_calls, parameters.windows_per_call)
        joint = JointOutputs(parameters.blank, parameters.durations, parameters.blank_penalty)
        self._decoder = Decoder(network.step, joint, parameters.block_frames, self._encoder.is_busy)
        self._sequences: dict[SequenceId, OpenSequence] = {}  # in the order of their last use
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="recogniser", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._report(), self._loop)
        asyncio.run_coroutine_threadsafe(_trim(), self._loop)
        self._stall_guard = StallGuard(self._name)

    def execute(self, requests: list[Any]) -> None:
        """Queue requests; each response is sent when it is ready."""
        traced = []
        with self._stall_guard:
            for request in requests:
                try:
                    copied = Request.read(request)
                except ParameterError as error:
                    self._refuse(request.get_response_sender(), error)
                    continue
                trace = request.trace()
                serving = self._serve(copied, trace if trace.get_context() else None)
                served = asyncio.run_coroutine_threadsafe(serving, self._loop)
                if trace.get_context():
                    traced.append(served)
            # The trace of a request ends when this method returns.
            for served in traced:
                served.result()

    def finalize(self) -> None:
        """Stop the event loop, and report that there are no streams."""
        asyncio.run_coroutine_threadsafe(_end_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._sequences.clear()
        self._report_now()

    async def _serve(self, request: Request, trace: Any) -> None:
        """Decode a request, and send its response."""
        TRACE.set(trace)
        self._evict()
        try:
            response = self._response(*await self._recognise(request))
        except Exception as error:  # noqa: BLE001 (every request needs a response)
            self._refuse(request.sender, error)
        else:
            request.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _refuse(self, sender: Any, error: Exception) -> None:
        """Send an error response."""
        kind = pb_utils.TritonError.INVALID_ARG if isinstance(error, ParameterError) else pb_utils.TritonError.INTERNAL
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{self._name}: {error}", kind))
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    async def _recognise(self, request: Request) -> tuple[Decoded, str]:
        """Add a request's audio to its stream, and decode the windows that became due.

        Returns:
            The result, and the state of the stream after it if the stream saves its state, else "".

        Raises:
            ParameterError: the sequence or an option is not valid.
            RuntimeError, ValueError: decoding failed; the stream's state is lost.
        """
        sequence = self._begin(request) if request.start else self._sequences.get(request.sequence_id)
        if sequence:
            sequence.used_at = time.monotonic()
            self._sequences.pop(request.sequence_id, None)
            self._sequences[request.sequence_id] = sequence
            async with sequence.turn:
                if self._sequences.get(request.sequence_id) is sequence:
                    return await self._decode(sequence, request)
        raise ParameterError(
            f"sequence {request.sequence_id!r} is not known: it was idle for too long, failed, or never started"
        )

    async def _decode(self, sequence: OpenSequence, request: Request) -> tuple[Decoded, str]:
        stream, done = sequence.stream, request.end
        try:
            stream.push(request.samples)
            self._metrics.add("audio_seconds", len(request.samples) / SAMPLE_RATE)
            decoded = await recognise(stream, self._encoder, self._decoder, end=request.end)
        except Exception:
            done = True
            raise
        finally:
            if done and self._sequences.get(request.sequence_id) is sequence:  # else another START has replaced it
                del self._sequences[request.sequence_id]
        self._metrics.add("segments", decoded.final)
        self._metrics.add("tokens", decoded.stable if decoded.final else 0)
        return decoded, stream.save() if stream.options.save_state and not request.end else ""

    def _begin(self, request: Request) -> OpenSequence:
        """Return a new or a restored sequence, according to the parameters of its first request."""
        self._sequences.pop(request.sequence_id, None)  # a START with the id of an open sequence replaces the sequence
        given = json.loads(request.parameters)
        options = self._parameters.options.override(given)
        fusion = self._fusions.of(options)
        if saved := given.get("restore"):
            samples = _restore_samples(given)
            return OpenSequence(Stream.restore(self._parameters, options, str(saved), samples, fusion))
        return OpenSequence(Stream(self._parameters, options, fusion))

    def _response(self, decoded: Decoded, state: str) -> Any:
        frame_secs = self._parameters.frame_samples / SAMPLE_RATE
        times = np.array(decoded.spans, np.float64).reshape(-1, 2) * frame_secs
        probabilities = np.array([token.probability for token in decoded.tokens], np.float32)
        tensors = {
            "TOKENS": np.array([token.id for token in decoded.tokens], np.int32),
            "TIMES": times.reshape(-1),
            "PROBABILITIES": probabilities,
            "CONFIDENCE": np.array([probabilities.mean() if len(probabilities) else np.nan], np.float32),
            "STABLE": np.array([decoded.stable], np.int32),
            "SEGMENT": np.array([decoded.segment, decoded.final], np.int32),
            "LENGTHS": np.array([decoded.samples, decoded.features, decoded.frames], np.int64),
            "STATE": np.array([state], np.object_),
            "ALTERNATIVES": np.array([_alternatives(decoded)], np.object_),
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array[None]) for name, array in tensors.items()])

    def _evict(self) -> None:
        """Remove sequences that Triton has dropped: it frees the slot of an idle sequence without informing the model."""
        oldest = time.monotonic() - self._idle_secs
        stale = []
        for sequence_id, sequence in self._sequences.items():
            if sequence.used_at >= oldest:
                break
            if not sequence.turn.locked():
                stale.append(sequence_id)
        for sequence_id in stale:
            del self._sequences[sequence_id]
        self._metrics.add("evictions", len(stale))

    async def _report(self) -> None:
        while True:
            self._report_now()
            await asyncio.sleep(REPORT_SECS)

    def _report_now(self) -> None:
        self._metrics.report(sequences=len(self._sequences), waiting_windows=self._encoder.backlog)


def _read_parameters(config: dict[str, Any], directory: Path) -> tuple[Parameters, Fusions]:
    """Read the parameters of a configuration, and the files that they name, relative to the model's directory.

    Raises:
        pb_utils.TritonModelException: a parameter is missing or not allowed, or a file is missing or malformed.
    """
    name = config["name"]
    try:
        parameters = Parameters.from_config(config)
        pieces = read_vocabulary((directory / parameters.vocabulary).resolve())[: parameters.blank]
    except ParameterError as error:
        raise pb_utils.TritonModelException(f"{name}: config.pbtxt: {error}") from error
    except (OSError, ValueError) as error:
        raise pb_utils.TritonModelException(f"{name}: vocabulary: {error}") from error
    parameters = replace(parameters, continuations=continuations(pieces))
    try:
        return parameters, Fusions(parameters, pieces, directory)
    except (OSError, ValueError) as error:
        raise pb_utils.TritonModelException(f"{name}: {error}") from error


async def _trim() -> None:
    """Return freed memory, such as the audio of streams, to the system at intervals; glibc would keep it (malloc_trim(3))."""
    with contextlib.suppress(AttributeError):  # not glibc
        trim = ctypes.CDLL(None).malloc_trim
        while True:
            await asyncio.sleep(TRIM_SECS)
            trim(0)


async def _end_all() -> None:
    """Cancel all other tasks of the event loop. Otherwise asyncio reports them as destroyed but pending."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _sequence_id(request: Any) -> SequenceId:
    """Return the id of a request's sequence with the type that the client gave it.

    ``correlation_id()`` keeps both types since python_backend 24.04 ("correlation_id" in ``pb_stub.cc``; checked up to commit
    f9088ff of July 2026). A control input CORRID does not: ``SetControlTensors`` in Triton's ``sequence_batch_scheduler.cc``
    writes the length and characters of a string over the end of a UINT64, and longer strings do not fit a batched tensor.

    Raises:
        ParameterError: the id is not UTF-8.
    """
    try:
        sequence_id: SequenceId = request.correlation_id()
    except UnicodeDecodeError as error:  # Triton's JSON parser accepts any byte
        raise ParameterError(f"sequence id is not UTF-8: {error.reason} at byte {error.start}") from error
    return sequence_id


def _restore_samples(given: Mapping[str, Any]) -> int | None:
    """Return where in the stream the audio of a restored sequence begins; None if its first request does not say so.

    Raises:
        ParameterError: it is not a whole number from 0 on.
    """
    if (value := given.get("restore_samples")) is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ParameterError(f"restore_samples is {value!r}; it must be a whole number from 0 on")
    return value


def _alternatives(decoded: Decoded) -> str:
    """Return the texts of a segment as JSON for the detokenizer; empty if they were not requested."""
    listed = [
        {"tokens": [token.id for token in text.tokens], "probabilities": [round(token.probability, 4) for token in text.tokens]}
        for text in decoded.alternatives
    ]
    return json.dumps(listed) if listed else ""


def _input(request: Any, name: str) -> Any:
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()
