"""Frame-synchronous greedy decoding of an RNN-T inside Triton, as in published recipes: a peer for the benchmark.

All recordings of one ``execute`` are decoded frame by frame together. Each frame takes one call of decoder_joint, and one more
while any recording emits a token on the frame. Preprocessor and encoder are called as in ``rnnt_greedy_bls``, for all
recordings at the same time and without padding, so the two models differ only in their decoding.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

Floats = npt.NDArray[np.float32]


class TritonPythonModel:
    """The model ``frame_synchronous``."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the parameters."""
        given = {name: entry["string_value"] for name, entry in json.loads(args["model_config"])["parameters"].items()}
        self._blank = int(given["blank"])
        self._state_shape = int(given["predictor_layers"]), int(given["predictor_hidden"])
        self._max_symbols = int(given["max_symbols_per_step"])
        self._blank_penalty = np.float32(given["blank_penalty"])

    async def execute(self, requests: list[Any]) -> list[Any]:
        """Return the tokens of each request's recording. A failed call fails all requests."""
        audio = [pb_utils.get_input_tensor_by_name(request, "AUDIO").as_numpy()[0] for request in requests]
        tokens = self._decode(await asyncio.gather(*map(_encode, audio)))
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("TOKENS", np.array([row], np.int32).reshape(1, -1))]) for row in tokens
        ]

    def _decode(self, rows: list[Floats]) -> list[list[int]]:
        """Return the tokens of each row of frames [D, T_i]."""
        layers, hidden = self._state_shape
        tokens: list[list[int]] = [[] for _ in rows]
        states = [np.zeros((layers, len(rows), hidden), np.float32) for _ in range(2)]
        last = np.full(len(rows), self._blank, np.int32)
        for t in range(max(row.shape[1] for row in rows)):
            active = np.array([i for i, row in enumerate(rows) if t < row.shape[1]])
            for _ in range(self._max_symbols):
                frames = np.stack([rows[i][:, t : t + 1] for i in active])
                logits, *after = _call(
                    "decoder_joint",
                    {
                        "encoder_outputs": frames,
                        "targets": last[active, None],
                        "target_length": np.ones(len(active), np.int32),
                        "input_states_1": states[0][:, active],
                        "input_states_2": states[1][:, active],
                    },
                    ["outputs", "output_states_1", "output_states_2"],
                )
                scores = logits[:, 0, 0]
                scores[:, self._blank] -= self._blank_penalty
                best = scores.argmax(axis=1)
                emitting = np.flatnonzero(best != self._blank)
                active = active[emitting]
                if not len(active):
                    break
                last[active] = best[emitting]
                for state, new in zip(states, after, strict=True):
                    state[:, active] = new[:, emitting]
                for i in active:
                    tokens[i].append(int(last[i]))
        return tokens


async def _encode(samples: npt.NDArray[np.int16]) -> Floats:
    """Return the encoder frames [D, T] of one recording."""
    waveforms = samples[None].astype(np.float32) / np.float32(32768)
    lengths = np.array([len(samples)], np.int64)
    inputs = {"waveforms": waveforms, "waveforms_lens": lengths}
    response = await _request("preprocessor", inputs, ["features", "features_lens"]).async_exec()
    features, lengths = _arrays(response, ["features", "features_lens"])
    inputs = {"audio_signal": features, "length": lengths}
    response = await _request("encoder", inputs, ["outputs", "encoded_lengths"]).async_exec()
    frames, encoded = _arrays(response, ["outputs", "encoded_lengths"])
    return frames[0, :, : encoded[0]]


def _call(model: str, inputs: dict[str, npt.NDArray[Any]], outputs: list[str]) -> list[npt.NDArray[Any]]:
    return _arrays(_request(model, inputs, outputs).exec(), outputs)


def _request(model: str, inputs: dict[str, npt.NDArray[Any]], outputs: list[str]) -> Any:
    tensors = [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()]
    on_cpu = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU)
    return pb_utils.InferenceRequest(model_name=model, inputs=tensors, requested_output_names=outputs, preferred_memory=on_cpu)


def _arrays(response: Any, names: list[str]) -> list[npt.NDArray[Any]]:
    if response.has_error():
        raise pb_utils.TritonModelException(response.error().message())
    return [pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in names]
