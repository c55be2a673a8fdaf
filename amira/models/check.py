"""Check properties of a model by running its graphs: the length of its frames, and its warm-up samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import model_config_pb2 as pb

from amira.models.configs import ModelError, read_configs
from amira.models.graphs import open_session
from amira.models.repository import Recogniser

FEATURE_COUNTS = (160, 640)
"""Input lengths for measuring a subsampling factor; their difference is a multiple of all usual factors."""

SAMPLE_COUNTS = (9_600, 48_000)
"""Input lengths for measuring a front end; their difference is a multiple of all usual hops: 160, 384, …"""

ELEMENT_TYPES = {
    pb.TYPE_FP16: np.float16,
    pb.TYPE_FP32: np.float32,
    pb.TYPE_INT32: np.int32,
    pb.TYPE_INT64: np.int64,
}
"""Numpy types by Triton's types, for all types in the repository's convention."""


PROJECTED_WINDOWS = 4
"""Number of windows by which ``check_projection`` compares: the frames of the first reach into all others."""

MAX_DIFFERENCE = 0.1
"""Largest allowed difference of the frames, in their own mean size. FP16 caches differ by 0.001, int8 graphs by 0.02, and a
cache with an error by 1."""

Floats = npt.NDArray[np.float32]


class ProjectionError(ModelError):
    """An encoder whose cache has keys and values makes other frames than the published one."""


def check_frames(recogniser: Recogniser) -> None:
    """Check the decoder's parameter for the length of an encoder frame.

    Raises:
        ModelError: the parameter ``frame_samples`` differs from the length that the graphs have.
    """
    samples = _frame_samples(recogniser)
    if (found := recogniser.parameters["frame_samples"]) != str(samples):
        raise ModelError(
            f"{recogniser.decoder}/config.pbtxt: parameter frame_samples is {found!r}; "
            f"{recogniser.encoder} makes a frame of {samples} samples"
        )


def _frame_samples(recogniser: Recogniser) -> int:
    """Return how many samples an encoder frame stands for."""
    hop = samples_per_feature(recogniser.preprocessor)
    if not recogniser.is_cached:
        return hop * features_per_frame(recogniser.encoder, recogniser.features)
    lengths = {
        hop * sizes.chunk_features // check_cached_encoder(sizes.path, sizes.window_features, sizes.chunk_features)
        for sizes in recogniser.cached_encoders.values()
    }
    if len(lengths) > 1:
        raise ModelError(f"{recogniser.name}: the encoders' frames have {sorted(lengths)} samples; expected one length")
    return lengths.pop()


def samples_per_feature(preprocessor: Path) -> int:
    """Return the number of samples per feature frame.

    Raises:
        ModelError: the graph cannot be run, or its frames differ in length.
    """

    def count(session: Any, samples: int) -> int:
        feeds = {"waveforms": _noise(1, samples), "waveforms_lens": np.array([samples], np.int64)}
        return int(session.run(["features_lens"], feeds)[0][0])

    return _ratio(preprocessor, count, SAMPLE_COUNTS, "samples")


def features_per_frame(encoder: Path, features: int) -> int:
    """Return the number of feature frames per encoder frame: the subsampling factor.

    Args:
        encoder: path of the graph.
        features: number of values in a feature frame.

    Raises:
        ModelError: the graph cannot be run, or its frames differ in length.
    """

    def count(session: Any, frames: int) -> int:
        feeds = {"audio_signal": _noise(1, features, frames), "length": np.array([frames], np.int64)}
        return int(session.run(["encoded_lengths"], feeds)[0][0])

    return _ratio(encoder, count, FEATURE_COUNTS, "feature frames")


def check_cached_encoder(encoder: Path, window_features: int, chunk_features: int) -> int:
    """Run a cached encoder on two windows, and return how many encoder frames it makes of a chunk.

    Args:
        encoder: the graph's file, in the repository's convention.
        window_features: feature frames of a call.
        chunk_features: feature frames by which the next window begins later.

    Raises:
        ModelError: the graph can't be run, or its cache or its number of frames is not as expected.
    """
    session = open_session(encoder)
    bins, size = (
        next(node.shape[1] for node in session.get_inputs() if node.name == name) for name in ("audio_signal", "cache")
    )
    windows = [_noise(1, bins, window_features)] * 2
    results = list(_encode(encoder, session, windows))
    frames, counts, caches = results[0][0], [count for _, count, _ in results], [cache for *_, cache in results]
    if caches[0].shape != (1, size) or np.array_equal(caches[0], caches[1]):
        raise ModelError(f"{encoder}: output cache_next is {list(caches[0].shape)} or does not change; expected [1, {size}]")
    count = counts[0]
    if counts != [count, count] or not 0 < count <= frames.shape[2] or chunk_features % count:
        raise ModelError(
            f"{encoder} makes {counts} encoder frames of windows of {window_features} feature frames; "
            f"expected a divisor of {chunk_features}"
        )
    return count


def check_projection(encoder: Path, window_features: int, published: Callable[[Sequence[Floats]], Sequence[Floats]]) -> None:
    """Check that an encoder whose cache has keys and values makes the frames of the published one.

    Args:
        encoder: the graph's file, in the repository's convention.
        window_features: feature frames of a call.
        published: encodes consecutive windows [1, F, W] with the published graph.

    Raises:
        ProjectionError: it makes others.
    """
    session = open_session(encoder)
    bins = {node.name: node.shape for node in session.get_inputs()}["audio_signal"][1]
    random = np.random.default_rng(0)
    windows = [random.standard_normal((1, bins, window_features), np.float32) for _ in range(PROJECTED_WINDOWS)]
    found = np.concatenate([frames for frames, *_ in _encode(encoder, session, windows)], axis=2)
    del session  # its weights, before those of the other graph
    expected = np.concatenate(published(windows), axis=2)
    difference = float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))
    if not difference <= MAX_DIFFERENCE:
        raise ProjectionError(f"{encoder}: with a cache of keys and values the frames differ by {difference:.0%}")


def _encode(encoder: Path, session: Any, windows: Sequence[Floats]) -> Iterator[tuple[Floats, int, npt.NDArray[Any]]]:
    """Yield the frames, their number, and the next cache, of consecutive windows [1, F, W] of one stream.

    Raises:
        ModelError: the graph can't be run.
    """
    inputs = {node.name: node for node in session.get_inputs()}
    carried = inputs["cache"]
    cache = np.zeros((1, carried.shape[1]), np.float16 if "float16" in carried.type else np.float32)
    others = {"prompt_index": np.zeros(1, np.int64)} if "prompt_index" in inputs else {}
    for window in windows:
        feeds = {"audio_signal": window, "length": np.array([window.shape[2]], np.int64), "cache": cache, **others}
        try:
            frames, encoded, cache = session.run(["outputs", "encoded_lengths", "cache_next"], feeds)
        except Exception as error:  # see check_warmups
            raise ModelError(f"{encoder} can't be run: {' '.join(str(error).split())}") from error
        yield frames, int(encoded[0]), cache


def check_warmups(repository: Path) -> None:
    """Run each warm-up sample of a repository's graphs.

    Triton may end with SIGSEGV when a sample fails, without naming the sample.

    Raises:
        ModelError: a sample failed.
    """
    for name, config in read_configs(repository).items():
        if config.backend == "onnxruntime" and config.model_warmup:
            directory = repository / name
            session = open_session(directory / "1" / (config.default_model_filename or "model.onnx"))
            for sample in config.model_warmup:
                try:
                    feeds = {key: _warmup_tensor(directory, tensor) for key, tensor in sample.inputs.items()}
                    session.run(None, feeds)
                except Exception as error:  # ONNX Runtime has one class per status code
                    reason = " ".join(str(error).split())
                    raise ModelError(f"{directory}/config.pbtxt: warm-up {sample.name!r} fails: {reason}") from error


def _warmup_tensor(directory: Path, tensor: pb.ModelWarmup.Input) -> npt.NDArray[Any]:
    """Return the tensor that Triton feeds for an input of a warm-up sample.

    Raises:
        OSError: the sample's file cannot be read.
        ValueError: the type is not supported, or the file has another size.
    """
    if tensor.data_type not in ELEMENT_TYPES:
        raise ValueError(f"data type {pb.DataType.Name(tensor.data_type)}; expected FP16, FP32, INT32 or INT64")
    element_type = ELEMENT_TYPES[tensor.data_type]
    if tensor.input_data_file:
        values = np.frombuffer((directory / "warmup" / tensor.input_data_file).read_bytes(), element_type)
        return values.reshape(tensor.dims)
    return np.zeros(tensor.dims, element_type)


def _ratio(graph: Path, count: Callable[[Any, int], int], inputs: tuple[int, int], unit: str) -> int:
    session = open_session(graph)
    try:
        outputs = [count(session, size) for size in inputs]
    except Exception as error:  # see check_warmups
        raise ModelError(f"{graph} can't be run: {' '.join(str(error).split())}") from error
    more_in, more_out = (sizes[1] - sizes[0] for sizes in (inputs, outputs))
    if more_out <= 0 or more_in % more_out:
        made = f"{outputs[0]} frames of {inputs[0]} {unit} and {outputs[1]} of {inputs[1]}"
        raise ModelError(f"{graph} makes {made}; expected frames of one length")
    return more_in // more_out


def _noise(*shape: int) -> npt.NDArray[np.float32]:
    return 0.1 * np.random.default_rng(0).standard_normal(shape, np.float32)
