"""The three models that the decoder calls inside Triton: preprocessor, encoder, decoder_joint."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from greedy import Floats, States
from parameters import Parameters
from stream import Window

INT16_SCALE = np.float32(1 / 32768)


class NetworkError(RuntimeError):
    """A model refused or failed a call; the message names the model."""


class Network:
    """Calls of the three models, with NeMo's tensor names.

    Attributes:
        trace: what Triton's traces have the calls under; None where the requests that are being served are not traced.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._decoder_calls = 0
        self._decoder_rows = 0
        self.trace: Any = None

    async def encode(self, windows: Sequence[Window]) -> list[tuple[Floats, int] | NetworkError]:
        """Encode windows, all calls at once; only windows of equal length share a call, since padding costs more than it saves.

        Returns:
            For each window its frames [D, T] and the number of feature frames they were made from, or what went wrong.
        """
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, window in enumerate(windows):
            by_length[len(window.samples)].append(i)
        size = self._parameters.encoder_batch
        batches = [group[i : i + size] for group in by_length.values() for i in range(0, len(group), size)]
        answers = await asyncio.gather(
            *(self._encode_batch([windows[i].samples for i in batch]) for batch in batches), return_exceptions=True
        )
        results: dict[int, tuple[Floats, int] | NetworkError] = {}
        for batch, answer in zip(batches, answers, strict=True):
            for row, i in enumerate(batch):
                if isinstance(answer, NetworkError):
                    results[i] = answer
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    results[i] = answer[row]
        return [results[i] for i in range(len(windows))]

    def step(self, frames: Floats, last_tokens: npt.NDArray[np.int32], states: States) -> tuple[Floats, States]:
        """One call of decoder_joint; see ``greedy.Step``.

        Raises:
            NetworkError: it failed.
        """
        rows = len(last_tokens)
        inputs = [
            pb_utils.Tensor("encoder_outputs", frames),
            pb_utils.Tensor("targets", last_tokens[:, None]),
            pb_utils.Tensor("target_length", np.ones(rows, np.int32)),
            pb_utils.Tensor("input_states_1", states[0]),
            pb_utils.Tensor("input_states_2", states[1]),
        ]
        name = self._parameters.decoder_joint_model
        response = self._request(name, inputs, ["outputs", "output_states_1", "output_states_2"]).exec()
        self._decoder_calls += 1
        self._decoder_rows += rows
        logits, state_1, state_2 = _arrays(name, response, "outputs", "output_states_1", "output_states_2")
        return logits[:, :, 0], (state_1, state_2)

    def take_counts(self) -> tuple[int, int]:
        """Calls of decoder_joint, and rows in them, since this was last asked."""
        counts = self._decoder_calls, self._decoder_rows
        self._decoder_calls = self._decoder_rows = 0
        return counts

    async def _encode_batch(self, batch: list[npt.NDArray[np.int16]]) -> list[tuple[Floats, int]]:
        waveforms = np.stack(batch).astype(np.float32) * INT16_SCALE
        inputs = [
            pb_utils.Tensor("waveforms", waveforms),
            pb_utils.Tensor("waveforms_lens", np.full(len(batch), waveforms.shape[1], np.int64)),
        ]
        name = self._parameters.preprocessor_model
        response = await self._request(name, inputs, ["features", "features_lens"]).async_exec()
        features, lengths = _arrays(name, response, "features", "features_lens")
        inputs = [pb_utils.Tensor("audio_signal", features), pb_utils.Tensor("length", lengths)]
        name = self._parameters.encoder_model
        response = await self._request(name, inputs, ["outputs", "encoded_lengths"]).async_exec()
        frames, encoded = _arrays(name, response, "outputs", "encoded_lengths")
        return [(frames[b, :, : encoded[b]], int(lengths[b])) for b in range(len(batch))]

    def _request(self, model: str, inputs: list[Any], outputs: list[str]) -> Any:
        # numpy reads answers in the CPU's memory only; unasked, a GPU model's answer stays on the GPU.
        options = {"preferred_memory": pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU)}
        if self.trace is not None:
            options["trace"] = self.trace
        return pb_utils.InferenceRequest(model_name=model, inputs=inputs, requested_output_names=outputs, **options)


def _arrays(model: str, response: Any, *names: str) -> list[npt.NDArray[Any]]:
    """The outputs of a response as arrays of their own, so that Triton's memory is free again.

    Raises:
        NetworkError: the response is an error.
    """
    if response.has_error():
        raise NetworkError(f"{model} failed: {response.error().message()}")
    return [pb_utils.get_output_tensor_by_name(response, name).as_numpy().copy() for name in names]
