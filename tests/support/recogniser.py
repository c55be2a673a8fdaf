"""The decoder's own code around a repository's graphs, in this process: what Triton runs, without Triton."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime
from google.protobuf import json_format

from amira.models.configs import read_config
from batching import Decoder, Encoded, Encoder, recognise
from cached_calls import cached_inputs, cached_results
from gateway.triton.geometry import Windows
from greedy import Floats, JointOutputs, States, Token
from parameters import Parameters
from stream import Decoded, Stream
from windows import Samples, Window


class Recognised(NamedTuple):
    """A stream's outcome.

    Attributes:
        tokens: of all final segments.
        answers: to each request.
        states: saved behind each answer.
    """

    tokens: list[Token]
    answers: list[Decoded]
    states: list[str]

    @property
    def emitted(self) -> list[tuple[int, int]]:
        """Id and frame of each token."""
        return [(token.id, token.frame) for token in self.tokens]


class Recogniser:
    """A model of a repository.

    Args:
        repository: where it is.
        name: of its ensemble.
        decoder: of its decoder; None: as an imported model's is called.

    Attributes:
        parameters: of its decoder.
        calls: the windows of each encoder call.
    """

    def __init__(self, repository: Path, name: str, decoder: str | None = None) -> None:
        config = json_format.MessageToDict(
            read_config(repository / (decoder or f"{name}_decoder") / "config.pbtxt"), preserving_proto_field_name=True
        )
        self.parameters = parameters = Parameters.from_config({"parameters": config["parameters"]})
        encoders = {e.model for e in parameters.cached.encoders.values()} if parameters.cached else {parameters.encoder_model}
        encoders.add(parameters.whole_encoder_model or parameters.encoder_model)
        models = {parameters.preprocessor_model, parameters.decoder_joint_model, *encoders}
        self._sessions = {model: open_graph(repository / model / "1" / "model.onnx") for model in models}
        self.calls: list[list[Window]] = []

    def encode(self, windows: Sequence[Window], exclusive: bool) -> list[Encoded]:  # noqa: ARG002 (an ``Encode``)
        """As ``network.Network`` does it."""
        p = self.parameters
        self.calls.append(list(windows))
        waveforms = np.stack([window.samples for window in windows]).astype(np.float32) / np.float32(32768)
        lengths = np.full(len(windows), waveforms.shape[1], np.int64)
        features, lengths = self._sessions[p.preprocessor_model].run(
            ["features", "features_lens"], {"waveforms": waveforms, "waveforms_lens": lengths}
        )
        carried = [window.carried for window in windows if window.carried]
        if carried and p.cached:
            inputs = cached_inputs(features, carried, p.cached.cache_size(carried[0].model), p.cached.element)
            frames, encoded, caches = self._sessions[carried[0].model].run(["outputs", "encoded_lengths", "cache_next"], inputs)
            return cached_results(frames, encoded, caches, carried)
        frames, encoded = self._sessions[p.whole_encoder_model or p.encoder_model].run(
            ["outputs", "encoded_lengths"], {"audio_signal": features, "length": lengths}
        )
        return [Encoded(frames[b, :, : encoded[b]], int(lengths[b])) for b in range(len(windows))]

    def step(self, frames: Floats, last_tokens: npt.NDArray[np.int32], states: States) -> tuple[Floats, States]:
        """A ``greedy.Step``."""
        inputs = {
            "encoder_outputs": frames,
            "targets": last_tokens[:, None],
            "target_length": np.ones(len(last_tokens), np.int32),
            "input_states_1": states[0],
            "input_states_2": states[1],
        }
        logits, *after = self._sessions[self.parameters.decoder_joint_model].run(
            ["outputs", "output_states_1", "output_states_2"], inputs
        )
        return logits[:, :, 0], tuple(after)

    def networks(self) -> tuple[Encoder, Decoder]:
        """The networks that streams share; of one event loop."""
        p = self.parameters
        encoder = Encoder(self.encode, p.encoder_calls, p.windows_per_call)
        transducer = JointOutputs(p.blank, p.durations, p.blank_penalty)
        return encoder, Decoder(self.step, transducer, p.block_frames, encoder.is_busy)

    async def recognise(
        self, pieces: Sequence[Samples], networks: tuple[Encoder, Decoder] | None = None, **options: Any
    ) -> Recognised:
        """Recognise a stream that comes in these pieces."""
        return await self.go_on(Stream(self.parameters, self.parameters.options.override(options)), pieces, networks)

    async def go_on(
        self, stream: Stream, pieces: Sequence[Samples], networks: tuple[Encoder, Decoder] | None = None, end: bool = True
    ) -> Recognised:
        """Give a stream these pieces."""
        encoder, decoder = networks or self.networks()
        result = Recognised([], [], [])
        for i, piece in enumerate(pieces):
            stream.push(piece)
            answer = await recognise(stream, encoder, decoder, end=end and i == len(pieces) - 1)
            result.answers.append(answer)
            result.states.append(stream.save())
            result.tokens.extend(answer.tokens if answer.final else [])
        return result


def open_graph(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def check_when_chunks_are_due(stream: Stream, windows: Windows) -> None:
    """Check that the decoder gives a window out at the samples at which the gateway expects it, and not one sample earlier."""
    sent = 0
    for chunk in range(5):
        due = windows.chunk_due(chunk)
        stream.push(np.zeros(due - 1 - sent, np.int16))
        assert stream.next_window(end=False) is None
        stream.push(np.zeros(1, np.int16))
        window = stream.next_window(end=False)
        assert window is not None
        assert len(window.samples) <= windows.size
        sent = due
    assert windows.complete(sent) == 5
