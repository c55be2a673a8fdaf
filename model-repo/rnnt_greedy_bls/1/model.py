"""Streaming transducer recognition inside Triton: requests of Triton's sequence batcher in, tokens out.

All state of a stream is one ``Stream`` in ``_sequences``. Decoding is in ``greedy.py``, ``stream.py`` and ``batching.py``,
which do not depend on Triton. This module turns requests into calls of these and results into responses.

``execute`` only takes requests. Each is answered by itself when it is ready, from the event loop in which everything else runs
(response senders in the default mode: Triton 24.06 and later).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from batching import Decoder, Encoder, recognise
from greedy import Transducer
from metrics import Metrics
from network import TRACE, Network, own
from parameters import SAMPLE_RATE, ParameterError, Parameters
from stall_guard import StallGuard
from stream import Answer, Samples, Stream
from vocabulary import continuations, read_vocabulary

REPORT_SECS = 0.5
"""Interval between two reports of the metrics, in seconds."""

TRIM_SECS = 5.0
"""Interval at which freed memory is returned to the system, in seconds."""


SequenceId = int | str
"""A sequence's id as its client chose it. Triton keeps ``5`` and ``"5"`` apart, and so does a ``dict``."""


@dataclass(frozen=True)
class Request:
    """A request, copied out of Triton's memory, which does not outlive ``execute``.

    Attributes:
        sequence: id of its sequence, 64 bits or a string.
        start, end: whether it is the first, and the last, of its sequence.
        samples: 16 kHz audio [n]; n may be 0.
        parameters: its request parameters, a JSON object.
        sender: takes the answer.
    """

    sequence: SequenceId
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
            sequence=_sequence_id(request),
            start=bool(_input(request, "START").item()),
            end=bool(_input(request, "END").item()),
            samples=own(_input(request, "AUDIO").reshape(-1)),
            parameters=request.parameters() or "{}",
            sender=request.get_response_sender(),
        )


@dataclass(eq=False)
class Sequence:
    """One of Triton's sequences.

    Attributes:
        stream: its state.
        turn: held by the request in service; Triton may send the next one before that is answered.
        used_at: when the last request arrived, in seconds of ``time.monotonic``.
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
        self._parameters = parameters = _read_parameters(config, Path(args["model_repository"]))
        self._idle_secs = int(config["sequence_batching"]["max_sequence_idle_microseconds"]) / 1e6
        self._metrics = Metrics(args["model_name"], args["model_instance_name"])
        network = Network(parameters, self._metrics)
        self._encoder = Encoder(network.encode, parameters.encoder_calls, parameters.windows_per_call)
        transducer = Transducer(parameters.blank, parameters.durations, parameters.blank_penalty)
        self._decoder = Decoder(network.step, transducer, parameters.block_frames, self._encoder.is_busy)
        self._sequences: dict[SequenceId, Sequence] = {}  # in the order of their last use
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="recogniser", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._report(), self._loop)
        asyncio.run_coroutine_threadsafe(_trim(), self._loop)
        self._stall_guard = StallGuard(self._name)

    def execute(self, requests: list[Any]) -> None:
        """Take requests, and answer them later, each by itself."""
        traced = []
        with self._stall_guard:
            for request in requests:
                try:
                    taken = Request.read(request)
                except ParameterError as error:
                    self._refuse(request.get_response_sender(), error)
                    continue
                trace = request.trace()
                serving = self._serve(taken, trace if trace.get_context() else None)
                served = asyncio.run_coroutine_threadsafe(serving, self._loop)
                if trace.get_context():
                    traced.append(served)
            # A request's trace ends when this method returns.
            for served in traced:
                served.result()

    def finalize(self) -> None:
        """Stop the event loop, and report that no streams are left."""
        asyncio.run_coroutine_threadsafe(_end_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._sequences.clear()
        self._report_now()

    async def _serve(self, request: Request, trace: Any) -> None:
        """Answer one request."""
        TRACE.set(trace)
        self._evict()
        try:
            response = self._response(*await self._recognise(request))
        except Exception as error:  # noqa: BLE001 (the client gets an answer to any error)
            self._refuse(request.sender, error)
        else:
            request.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _refuse(self, sender: Any, error: Exception) -> None:
        """Answer one request with its error."""
        kind = pb_utils.TritonError.INVALID_ARG if isinstance(error, ParameterError) else pb_utils.TritonError.INTERNAL
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{self._name}: {error}", kind))
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    async def _recognise(self, request: Request) -> tuple[Answer, str]:
        """Add a request's audio to its stream, and decode the windows that became due.

        Returns:
            The answer, and the state behind it if the stream saves its state.

        Raises:
            ParameterError: the sequence or an option is not valid.
            RuntimeError, ValueError: decoding failed; the stream's state is lost.
        """
        sequence = self._begin(request) if request.start else self._sequences.get(request.sequence)
        if sequence:
            sequence.used_at = time.monotonic()
            self._sequences.pop(request.sequence, None)
            self._sequences[request.sequence] = sequence
            async with sequence.turn:
                if self._sequences.get(request.sequence) is sequence:
                    return await self._decode(sequence, request)
        raise ParameterError(f"sequence {request.sequence!r} is not known: it was idle for too long, failed, or never started")

    async def _decode(self, sequence: Sequence, request: Request) -> tuple[Answer, str]:
        stream, done = sequence.stream, request.end
        try:
            stream.push(request.samples)
            self._metrics.add("audio_seconds", len(request.samples) / SAMPLE_RATE)
            answer = await recognise(stream, self._encoder, self._decoder, end=request.end)
        except Exception:
            done = True
            raise
        finally:
            if done and self._sequences.get(request.sequence) is sequence:  # else another START replaced it
                del self._sequences[request.sequence]
        self._metrics.add("segments", answer.final)
        self._metrics.add("tokens", answer.stable if answer.final else 0)
        return answer, stream.save() if stream.options.save_state and not request.end else ""

    def _begin(self, request: Request) -> Sequence:
        """Return a new sequence, or a restored one, by the parameters of its first request."""
        self._sequences.pop(request.sequence, None)  # a START on a live id replaces its sequence
        given = json.loads(request.parameters)
        options = self._parameters.options.override(given)
        if saved := given.get("restore"):
            return Sequence(Stream.restore(self._parameters, options, str(saved)))
        return Sequence(Stream(self._parameters, options))

    def _response(self, answer: Answer, state: str) -> Any:
        seconds_a_frame = self._parameters.frame_samples / SAMPLE_RATE
        times = np.array(answer.spans, np.float64).reshape(-1, 2) * seconds_a_frame
        probabilities = np.array([token.probability for token in answer.tokens], np.float32)
        tensors = {
            "TOKENS": np.array([token.id for token in answer.tokens], np.int32),
            "TIMES": times.reshape(-1),
            "PROBABILITIES": probabilities,
            "CONFIDENCE": np.array([probabilities.mean() if len(probabilities) else np.nan], np.float32),
            "STABLE": np.array([answer.stable], np.int32),
            "SEGMENT": np.array([answer.segment, answer.final], np.int32),
            "LENGTHS": np.array([answer.samples, answer.features, answer.frames], np.int64),
            "STATE": np.array([state], np.object_),
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array[None]) for name, array in tensors.items()])

    def _evict(self) -> None:
        """Remove streams that Triton has given up: it frees an idle sequence's slot without informing the model."""
        oldest = time.monotonic() - self._idle_secs
        stale = []
        for number, sequence in self._sequences.items():
            if sequence.used_at >= oldest:
                break
            if not sequence.turn.locked():
                stale.append(number)
        for number in stale:
            del self._sequences[number]
        self._metrics.add("evictions", len(stale))

    async def _report(self) -> None:
        while True:
            self._report_now()
            await asyncio.sleep(REPORT_SECS)

    def _report_now(self) -> None:
        self._metrics.report(sequences=len(self._sequences), waiting_windows=self._encoder.backlog)


def _read_parameters(config: dict[str, Any], directory: Path) -> Parameters:
    """Read the parameters and, from the model's directory, the vocabulary that they name.

    Raises:
        pb_utils.TritonModelException: a parameter is missing or not allowed, or the vocabulary is missing or malformed.
    """
    name = config["name"]
    try:
        parameters = Parameters.from_config(config)
        pieces = read_vocabulary((directory / parameters.vocabulary).resolve())
    except ParameterError as error:
        raise pb_utils.TritonModelException(f"{name}: config.pbtxt: {error}") from error
    except (OSError, ValueError) as error:
        raise pb_utils.TritonModelException(f"{name}: vocabulary: {error}") from error
    return replace(parameters, continuations=continuations(pieces[: parameters.blank]))


async def _trim() -> None:
    """Return memory to the system that glibc would keep, such as a stream's audio (malloc_trim(3))."""
    with contextlib.suppress(AttributeError):  # another C library
        trim = ctypes.CDLL(None).malloc_trim
        while True:
            await asyncio.sleep(TRIM_SECS)
            trim(0)


async def _end_all() -> None:
    """Cancel the tasks of the event loop; asyncio reports a task that ends with its loop as destroyed."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _sequence_id(request: Any) -> SequenceId:
    """Return the id of a request's sequence, with the type that its client gave it.

    ``correlation_id()`` keeps both types since python_backend 24.04 (its ``pb_stub.cc``, "correlation_id"; read up to commit
    f9088ff of July 2026). A control input CORRID does not: ``SetControlTensors`` of Triton's ``sequence_batch_scheduler.cc``
    writes the length and characters of a string over the end of a UINT64, and no longer string fits a tensor of a batch.

    Raises:
        ParameterError: the id is not UTF-8.
    """
    try:
        sequence: SequenceId = request.correlation_id()
    except UnicodeDecodeError as error:  # Triton's JSON parser lets any byte pass
        raise ParameterError(f"sequence id is not UTF-8: {error.reason} at byte {error.start}") from error
    return sequence


def _input(request: Any, name: str) -> Any:
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()
