"""Call the three networks inside Triton: preprocessor, encoder and decoder_joint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from batching import Encoded
from cached_calls import cached_inputs, cached_results
from greedy import Floats, States
from metrics import Metrics
from parameters import CachedEncoders, Parameters
from windows import Carried, Window

INT16_SCALE = np.float32(1 / 32768)

TRACE: ContextVar[Any] = ContextVar("TRACE", default=None)
"""Triton's trace of the request that the calls belong to; None if the request is not traced."""


class NetworkError(RuntimeError):
    """A call of a model failed. The message names the model."""


class Network:
    """Calls the three models with NeMo's tensor names. Calls block.

    Args:
        parameters: parameters of the decoder.
        metrics: counts the calls.
    """

    def __init__(self, parameters: Parameters, metrics: Metrics) -> None:
        self._parameters = parameters
        self._metrics = metrics

    def encode(self, windows: Sequence[Window], exclusive: bool) -> list[Encoded]:
        """Call preprocessor and encoder once on windows of one kind; see ``batching.Encode``.

        Raises:
            NetworkError: a call failed.
        """
        began = time.perf_counter()
        waveforms = np.empty((len(windows), len(windows[0].samples)), np.float32)
        for waveform, window in zip(waveforms, windows, strict=True):
            np.multiply(window.samples, INT16_SCALE, out=waveform)
        inputs = [
            pb_utils.Tensor("waveforms", waveforms),
            pb_utils.Tensor("waveforms_lens", np.full(len(windows), waveforms.shape[1], np.int64)),
        ]
        features, lengths = self._call(self._parameters.preprocessor_model, inputs, "features", "features_lens")
        carried = [window.carried for window in windows if window.carried]
        if carried and (cached := self._parameters.cached):
            results = self._encode_cached(cached, features, carried)
        else:
            inputs = [pb_utils.Tensor("audio_signal", features), pb_utils.Tensor("length", lengths)]
            p = self._parameters
            model = p.exclusive_encoder_model if exclusive else p.whole_encoder_model or p.encoder_model
            frames, encoded = self._call(model, inputs, "outputs", "encoded_lengths")
            results = [Encoded(frames[b, :, : encoded[b]], int(lengths[b])) for b in range(len(windows))]
        self._metrics.add("encode_calls")
        self._metrics.add("windows", len(windows))
        self._metrics.add("encode_seconds", time.perf_counter() - began)
        return results

    def _encode_cached(self, cached: CachedEncoders, features: Floats, carried: Sequence[Carried]) -> list[Encoded]:
        """Call a cached encoder once.

        Args:
            cached: the encoders.
            features: of the windows' audio [B, F, T].
            carried: of each window.
        """
        feeds = cached_inputs(features, carried, cached.cache_size(carried[0].model), cached.element)
        inputs = [pb_utils.Tensor(name, array) for name, array in feeds.items()]
        frames, encoded, caches = self._call(carried[0].model, inputs, "outputs", "encoded_lengths", "cache_next")
        return cached_results(frames, encoded, caches, carried)

    def step(self, frames: Floats, last_tokens: npt.NDArray[np.int32], states: States) -> tuple[Floats, States]:
        """Call decoder_joint once; see ``greedy.Step``.

        Raises:
            NetworkError: the call failed.
        """
        began, rows = time.perf_counter(), len(last_tokens)
        inputs = [
            pb_utils.Tensor("encoder_outputs", frames),
            pb_utils.Tensor("targets", last_tokens[:, None]),
            pb_utils.Tensor("target_length", np.ones(rows, np.int32)),
            pb_utils.Tensor("input_states_1", states[0]),
            pb_utils.Tensor("input_states_2", states[1]),
        ]
        outputs = self._call(self._parameters.decoder_joint_model, inputs, "outputs", "output_states_1", "output_states_2")
        self._metrics.add("calls")
        self._metrics.add("rows", rows)
        self._metrics.add("decode_seconds", time.perf_counter() - began)
        logits, state_1, state_2 = outputs
        return logits[:, :, 0], (state_1, state_2)

    def _call(self, model: str, inputs: list[Any], *outputs: str) -> list[npt.NDArray[Any]]:
        """Call a model and return its outputs.

        Raises:
            NetworkError: the call failed.
        """
        # Numpy can only read CPU memory; by default the outputs of a GPU model stay on the GPU.
        options: dict[str, Any] = {"preferred_memory": pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU)}
        if trace := TRACE.get():
            options["trace"] = trace
        request = pb_utils.InferenceRequest(model_name=model, inputs=inputs, requested_output_names=list(outputs), **options)
        response = request.exec()
        if response.has_error():
            raise NetworkError(f"{model} failed: {response.error().message()}")
        tensors = {tensor.name(): tensor for tensor in response.output_tensors()}
        return [own(tensors[name].as_numpy()) for name in outputs]


def own(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array outside Triton's memory: a copy, unless the backend has already copied it."""
    owner = array if array.base is None else array.base
    return array if isinstance(owner, np.ndarray) and owner.flags.owndata else array.copy()
