"""Check properties of a model by running its graphs: the length of its frames, and its warm-up samples."""

from __future__ import annotations

from collections.abc import Callable
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
    lengths = set()
    for sizes in recogniser.cached_encoders.values():
        encoded = sizes.chunk_features + recogniser.right_features
        lengths.add(hop * encoded // check_cached_encoder(sizes.path, sizes.window_features, encoded))
    if recogniser.whole_encoder:
        lengths.add(hop * features_per_frame(recogniser.whole_encoder, recogniser.features))
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
    features, size = (next(node for node in session.get_inputs() if node.name == name) for name in ("audio_signal", "cache"))
    element = np.float16 if "float16" in size.type else np.float32
    cache, counts, caches = np.zeros((1, size.shape[1]), element), [], []
    others = {node.name: np.zeros(1, np.int64) for node in session.get_inputs() if node.name == "prompt_index"}
    for _ in range(2):
        feeds = {
            "audio_signal": _noise(1, features.shape[1], window_features),
            "length": np.array([window_features], np.int64),
            "cache": cache,
            **others,
        }
        try:
            frames, encoded, cache = session.run(["outputs", "encoded_lengths", "cache_next"], feeds)
        except Exception as error:  # see check_warmups
            raise ModelError(f"{encoder} can't be run: {' '.join(str(error).split())}") from error
        counts.append(int(encoded[0]))
        caches.append(cache)
    if caches[0].shape != (1, size.shape[1]) or np.array_equal(*caches):
        raise ModelError(
            f"{encoder}: output cache_next is {list(cache.shape)} or does not change; expected [1, {size.shape[1]}]"
        )
    count = counts[0]
    if counts != [count, count] or not 0 < count <= frames.shape[2] or chunk_features % count:
        raise ModelError(
            f"{encoder} makes {counts} encoder frames of windows of {window_features} feature frames; "
            f"expected a divisor of {chunk_features}"
        )
    return count


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
