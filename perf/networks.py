"""Decode labelled recordings in this process: the decoder's own code with a model's graphs, without Triton."""

from __future__ import annotations

import asyncio
import hashlib
import queue
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from amira.models.repository import Recogniser
from amira.paths import MODEL_REPOSITORY
from perf.floor import open_graph
from perf.labelled import Recording, normalise
from perf.recogniser import joint_step

sys.path += [str(MODEL_REPOSITORY / model / "1") for model in ("rnnt_greedy_bls", "detokenizer")]
from batching import Decoder, Encode, Encoded, Encoder, recognise
from cached_calls import cached_inputs, cached_results
from fusions import Fusions
from greedy import JointOutputs
from parameters import Parameters
from stream import Stream
from vocabulary import read_vocabulary
from windows import Window
from words import text_of, words_of

SESSIONS = 2
"""Number of encoder sessions with one thread each, as in ``instance_group`` of the encoder."""


def read_parameters(recogniser: Recogniser) -> Parameters:
    """Return the parameters of a recogniser's decoder."""
    return Parameters.from_config(
        {"parameters": {name: {"string_value": value} for name, value in recogniser.parameters.items()}}
    )


class Networks:
    """The graphs with the interfaces that the decoder calls.

    Args:
        recogniser: the model.
        p: parameters of its decoder.

    Attributes:
        step: calls the decoder's graph.
        pieces: of the vocabulary, by token id.
        directory: of the decoder, which the paths in the parameters are relative to.
        fusions: language model and phrases.
    """

    def __init__(self, recogniser: Recogniser, p: Parameters) -> None:
        self._parameters = p
        self._paths = {p.encoder_model: recogniser.encoder}
        if p.cached:
            self._paths = {
                p.cached.encoders[latency].model: sizes.path for latency, sizes in recogniser.cached_encoders.items()
            }
        if recogniser.whole_encoder:
            self._paths[p.whole_encoder_model] = recogniser.whole_encoder
        self._paths["preprocessor"] = recogniser.preprocessor
        self._idle: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        for _ in range(SESSIONS):
            self._idle.put({})
        self.step = joint_step(open_graph(recogniser.decoder_joint, 1))
        self.pieces = read_vocabulary(recogniser.vocabulary)
        self.directory = recogniser.preprocessor.parents[2] / recogniser.decoder
        self.fusions = Fusions(p, self.pieces[: p.blank], self.directory)

    def encode(self, windows: Sequence[Window], exclusive: bool = False) -> list[Encoded]:  # noqa: ARG002 (an ``Encode``)
        """Encode windows of one kind in one call."""
        sessions = self._idle.get()
        try:
            return self._encode(sessions, windows)
        finally:
            self._idle.put(sessions)

    def _encode(self, sessions: dict[str, Any], windows: Sequence[Window]) -> list[Encoded]:
        p = self._parameters
        waveforms = np.stack([window.samples for window in windows]).astype(np.float32) / np.float32(32768)
        samples = {"waveforms": waveforms, "waveforms_lens": np.full(len(windows), waveforms.shape[1], np.int64)}
        features, lengths = self._open(sessions, "preprocessor").run(["features", "features_lens"], samples)
        carried = [window.carried for window in windows if window.carried]
        if p.cached and carried:
            model = carried[0].model
            inputs = cached_inputs(features, carried, p.cached.cache_size(model), p.cached.element)
            frames, encoded, caches = self._open(sessions, model).run(["outputs", "encoded_lengths", "cache_next"], inputs)
            return cached_results(frames, encoded, caches, carried)
        inputs = {"audio_signal": features, "length": lengths}
        encoder = self._open(sessions, p.whole_encoder_model or p.encoder_model)
        frames, encoded = encoder.run(["outputs", "encoded_lengths"], inputs)
        return [Encoded(frames[b, :, : encoded[b]], int(lengths[b])) for b in range(len(windows))]

    def _open(self, sessions: dict[str, Any], model: str) -> Any:
        if model not in sessions:
            sessions[model] = open_graph(self._paths[model], threads=1)
        return sessions[model]


class EncodedOnce:
    """Encodes each window once, and returns the kept result from then on; an ``Encode``.

    Args:
        encode: encodes windows.
    """

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._kept: dict[bytes, Encoded] = {}

    def __call__(self, windows: Sequence[Window], exclusive: bool) -> list[Encoded]:
        """Return the frames of windows."""
        found = []
        for window in windows:
            key = _digest(window)
            if key not in self._kept:
                (self._kept[key],) = self._encode([window], exclusive)
            found.append(self._kept[key])
        return found


def _digest(window: Window) -> bytes:
    digest = hashlib.sha256(window.samples.tobytes())
    if carried := window.carried:
        digest.update(repr(carried._replace(cache=None)).encode())
        digest.update(b"" if carried.cache is None else carried.cache.tobytes())
    return digest.digest()


async def decode(
    networks: Networks,
    p: Parameters,
    recordings: Sequence[Recording],
    make_stream: Callable[[Recording], Stream],
    done: Callable[[], None],
    encode: Encode | None = None,
) -> list[str]:
    """Return the normalised texts of recordings, which are decoded at once.

    Args:
        networks: the graphs.
        p: parameters of the decoder.
        recordings: the recordings.
        make_stream: returns the stream of a recording.
        done: called after each recording.
        encode: encodes windows; None: the networks.
    """
    encoder = Encoder(encode or networks.encode, SESSIONS, p.windows_per_call)
    decoder = Decoder(networks.step, JointOutputs(p.blank, p.durations, p.blank_penalty), p.block_frames, encoder.is_busy)

    async def one(recording: Recording) -> str:
        stream = make_stream(recording)
        stream.push(recording.samples)
        answer = await recognise(stream, encoder, decoder, end=True)
        done()
        starts, ends = zip(*answer.spans, strict=True) if answer.spans else ((), ())
        pieces = [networks.pieces[token.id] for token in answer.tokens]
        return normalise(text_of(words_of(pieces, starts, ends, [1.0] * len(starts)), segment=0))

    return list(await asyncio.gather(*map(one, recordings)))
