"""Streaming transducer recognition inside Triton: requests of Triton's sequence batcher in, tokens out.

All state of a live stream is one ``Stream`` in ``_streams``; the decoding itself is in ``greedy.py`` and ``stream.py``, which
know nothing of Triton. This module turns requests into calls of those and back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from greedy import Token, Transducer
from metrics import Metrics
from network import Network, NetworkError
from parameters import SAMPLE_RATE, ParameterError, Parameters
from stream import Stream, decode_tails, decode_windows


@dataclass
class Job:
    """One request of a stream on its way through ``execute``."""

    sequence: int
    end: bool
    stream: Stream
    error: str = ""


class TritonPythonModel:
    """The model ``rnnt_greedy_bls``."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the parameters.

        Raises:
            pb_utils.TritonModelException: one of them is missing or not allowed.
        """
        config = json.loads(args["model_config"])
        self._name = args["model_name"]
        try:
            self._parameters = Parameters.from_config(config)
        except ParameterError as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: config.pbtxt: {error}") from error
        self._transducer = Transducer(self._parameters.blank, self._parameters.durations, self._parameters.blank_penalty)
        self._idle_secs = int(config["sequence_batching"]["max_sequence_idle_microseconds"]) / 1e6
        self._network = Network(self._parameters)
        self._metrics = Metrics(args["model_name"], args["model_instance_name"])
        self._streams: dict[int, Stream] = {}
        self._last_use: dict[int, float] = {}  # seconds of time.monotonic; the order is that of use

    async def execute(self, requests: list[Any]) -> list[Any]:
        """Take the new audio of every request's stream, decode what became due, and answer each request by itself."""
        self._evict()
        # Calls are shared; a trace has those of the batches in which its request is the first that is traced.
        self._network.trace = next((trace for request in requests if (trace := request.trace()).get_context()), None)
        jobs = [self._accept(request) for request in requests]
        good = [job for job in jobs if isinstance(job, Job)]
        await self._decode(good)
        responses = self._answer(good)
        for job in good:
            if job.end or job.error:
                self._forget(job.sequence)
        self._network.trace = None  # it ends with its request
        self._metrics.decoder_calls(*self._network.take_counts())
        self._metrics.sequences(len(self._streams))
        return [responses[job.sequence] if isinstance(job, Job) else job for job in jobs]

    def finalize(self) -> None:
        """Report no streams once the model is unloaded."""
        self._metrics.sequences(0)

    def _accept(self, request: Any) -> Job | Any:
        """Add a request's audio to its stream; an error response where that can't be."""
        sequence = int(_input(request, "CORRID")[0])
        start, end = bool(_input(request, "START")[0]), bool(_input(request, "END")[0])
        samples = _input(request, "AUDIO").reshape(-1)
        try:
            if start:
                self._streams[sequence] = self._begin(json.loads(request.parameters() or "{}"))
            elif sequence not in self._streams:
                raise ParameterError(f"sequence {sequence} is not known: it idled for too long, failed, or never started")
            self._last_use.pop(sequence, None)
            self._last_use[sequence] = time.monotonic()
            stream = self._streams[sequence]
            stream.push(samples)
        except ValueError as error:
            self._forget(sequence)
            return self._error(str(error))
        self._metrics.audio(len(samples) / SAMPLE_RATE)
        return Job(sequence, end, stream)

    def _begin(self, given: dict[str, Any]) -> Stream:
        """A new stream, or one that another sequence began, for the parameters of a first request."""
        options = self._parameters.options.override(given)
        if saved := given.get("restore"):
            return Stream.restore(self._parameters, self._transducer, options, str(saved))
        return Stream(self._parameters, self._transducer, options)

    async def _decode(self, jobs: Sequence[Job]) -> None:
        """Decode due windows, one of each stream a round; a job that fails is marked and the others go on."""
        while True:
            due = [(job, window) for job in jobs if not job.error and (window := job.stream.next_window(job.end))]
            if not due:
                return
            encoded = await self._network.encode([window for _, window in due])
            for (job, window), result in zip(due, encoded, strict=True):
                try:
                    if isinstance(result, NetworkError):
                        raise result
                    job.stream.receive(window, *result)
                except (NetworkError, ValueError) as error:
                    job.error = str(error)
            ready = [job for job, _ in due if not job.error]
            try:
                decode_windows(self._network.step, [job.stream for job in ready])
            except (NetworkError, ValueError) as error:
                for job in ready:
                    job.error = str(error)

    def _answer(self, jobs: Sequence[Job]) -> dict[int, Any]:
        """A response for every job, by its sequence."""
        live = [job for job in jobs if not job.error]
        try:
            tails = decode_tails(self._network.step, [job.stream for job in live])
        except (NetworkError, ValueError) as error:
            tails = [[] for _ in live]
            for job in live:
                job.error = str(error)
        responses = {job.sequence: self._error(job.error) for job in jobs if job.error}
        for job, tail in zip(live, tails, strict=True):
            if not job.error:
                responses[job.sequence] = self._response(job, tail)
        return responses

    def _response(self, job: Job, tail: Sequence[Token]) -> Any:
        answer = job.stream.answer(tail, job.end)
        self._metrics.tokens(answer.stable if answer.final else 0)
        seconds_a_frame = self._parameters.frame_samples / SAMPLE_RATE
        spans = [(token.frame, token.frame + token.frames) for token in answer.tokens]
        times = np.array(spans, np.float32).reshape(-1, 2) * np.float32(seconds_a_frame)
        probabilities = np.array([token.probability for token in answer.tokens], np.float32)
        tensors = {
            "TOKENS": np.array([token.id for token in answer.tokens], np.int32),
            "TIMES": times.reshape(-1),
            "PROBABILITIES": probabilities,
            "CONFIDENCE": np.array([probabilities.mean() if len(probabilities) else np.nan], np.float32),
            "STABLE": np.array([answer.stable], np.int32),
            "SEGMENT": np.array([answer.segment, answer.final], np.int32),
            "LENGTHS": np.array([answer.samples, answer.features, answer.frames], np.int64),
            "STATE": np.array([job.stream.save() if job.stream.options.save_state and not job.end else ""], np.object_),
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array[None]) for name, array in tensors.items()])

    def _evict(self) -> None:
        """Forget streams that Triton has given up: it frees an idle sequence's slot without telling the model."""
        oldest = time.monotonic() - self._idle_secs
        stale = [sequence for sequence, used in self._last_use.items() if used < oldest]
        for sequence in stale:
            self._forget(sequence)
        self._metrics.evictions(len(stale))

    def _error(self, message: str) -> Any:
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{self._name}: {message}"))

    def _forget(self, sequence: int) -> None:
        self._streams.pop(sequence, None)
        self._last_use.pop(sequence, None)


def _input(request: Any, name: str) -> Any:
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()
