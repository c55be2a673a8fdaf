"""Measure what cached encoders cost: the encoder against windows, and carrying caches through the embedded Triton.

    python -m perf.caches [--quick]

Encoders have random weights: 17 layers of 512 values, as FastConformer large has. CPU time is that of one thread, so other work
on the machine matters little. Carrying is measured with a tiny encoder whose cache is filled up to a size: what Triton's
processes take more than with the tiny cache alone.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
from google.protobuf import text_format
from onnx import TensorProto

from amira.models.configs import read_config
from amira.models.importing import ImportOptions, import_model
from amira.models.layouts.nemo_cached import convert_encoder
from amira.models.layouts.parts import CachedEncoder
from amira.models.surgery import Assembly, EditedGraph, opset_of, value
from gateway.triton.geometry import read_windows
from perf.clients import GrpcClient
from perf.output import circumstances
from perf.processes import Meter
from perf.recogniser import MODEL, parameters
from perf.server import triton_server
from tests.support.streaming_models import NemoShape, build_nemo_cached

LAYERS, SIZE, CONTEXT, KERNEL, FEATURES = 17, 512, 70, 8, 80
WINDOW_FRAMES, WINDOW_SECS = 175, 2.0
"""A window of 10 + 2 + 2 s in frames of 80 ms, and the audio that it decodes for good."""

CHUNK_FRAMES = (2, 7, 14)
BATCHES = (1, 4, 16)
FRAME_SECS = 0.08
TURNS = 5

CACHE_MB = (2.7, 7.7)
"""Sizes of published caches as FP32, carried as FP16: FastConformer large, Nemotron 0.6B."""

STREAMS = (1, 8, 16)
CHUNKS = 40
"""Number of chunks of each stream."""


class EncoderCost(NamedTuple):
    """CPU time of an encoder.

    Attributes:
        kind: of the windows or the cache.
        chunk_ms: audio that a call decodes for good, in ms.
        batch: streams that share a call.
        ms: CPU time per second of audio of a stream, in ms.
        calls: calls per second of audio of a stream, shared ones as a share.
        cache_mb: a stream's cache as FP16, in MB.
    """

    kind: str
    chunk_ms: float
    batch: int
    ms: float
    calls: float
    cache_mb: float


class CarryCost(NamedTuple):
    """CPU time of carrying a cache for one chunk of one stream, in ms, of all of Triton's processes."""

    cache_mb: float
    streams: int
    ms: float


def encoder_costs(quick: bool) -> Iterator[EncoderCost]:
    """Measure an encoder over windows, and with a cache of frames and of keys and values."""
    kinds = [("windows", WINDOW_FRAMES, 1, False)]
    for frames in CHUNK_FRAMES[1:2] if quick else CHUNK_FRAMES:
        kinds += [("frames cached", frames, CONTEXT, False), ("keys and values cached", frames, CONTEXT, True)]
    for kind, frames, context, projected in kinds:
        shape = NemoShape(FEATURES, frames - 1, context, KERNEL, layers=2 if quick else LAYERS, size=SIZE, feed_forward=2)
        with tempfile.TemporaryDirectory() as directory:
            build_nemo_cached(Path(directory), shape)
            encoder = convert_encoder(Path(directory) / "encoder.onnx", TensorProto.FLOAT16, projected=projected)
        secs = WINDOW_SECS if kind == "windows" else frames * FRAME_SECS
        for batch, cpu_secs in _time(encoder, (1,) if kind == "windows" else BATCHES):
            cache_mb = 0.0 if kind == "windows" else 2 * encoder.cache_size / 1e6
            yield EncoderCost(kind, 1000 * secs, batch, 1000 * cpu_secs / batch / secs, 1 / batch / secs, cache_mb)


def _time(encoder: CachedEncoder, batches: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Yield the CPU time of a call by its batch."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(encoder.graph.proto.SerializeToString(), options)
    for batch in batches:
        feeds = {
            "audio_signal": np.random.default_rng(0).standard_normal((batch, FEATURES, encoder.window_features), np.float32),
            "length": np.full(batch, encoder.window_features, np.int64),
            "cache": np.zeros((batch, encoder.cache_size), np.float16),
        }
        turns = []
        for _ in range(TURNS + 1):
            began = time.thread_time()
            feeds["cache"] = session.run(["outputs", "encoded_lengths", "cache_next"], feeds)[2]
            turns.append(time.thread_time() - began)
        yield batch, statistics.median(turns[1:])


async def carry_costs(quick: bool) -> list[CarryCost]:
    """Measure Triton's CPU time for a chunk with caches of each size, less that with a tiny one."""
    measured: dict[float, dict[int, float]] = {}
    for cache_mb in (0.0, *(CACHE_MB[:1] if quick else CACHE_MB)):
        with tempfile.TemporaryDirectory() as directory:
            repository = Path(directory) / "models"
            build_nemo_cached(Path(directory), NemoShape(right=6))
            import_model(directory, MODEL, repository, ImportOptions(projected=False))
            fill_cache(repository, int(cache_mb * 1e6 / 4))
            measured[cache_mb] = await _serve(repository, STREAMS[:2] if quick else STREAMS)
    tiny = measured.pop(0.0)
    return [CarryCost(mb, n, 1000 * (secs - tiny[n])) for mb, found in measured.items() for n, secs in found.items()]


def fill_cache(repository: Path, size: int) -> None:
    """Make the encoder's cache larger: the values behind its own are returned as they come."""
    path = repository / f"{MODEL}_encoder" / "1" / "model.onnx"
    source = EditedGraph.load(path)
    inputs = {tensor.name: tensor for tensor in source.proto.graph.input}
    outputs = {tensor.name: tensor for tensor in source.proto.graph.output}
    own = inputs["cache"].type.tensor_type.shape.dim[1].dim_value
    if size <= own:
        return
    assembly = Assembly(path, opset_of(source, path))
    sizes = assembly.integers(own, size - own)
    kept, rest = assembly.add_many("Split", "cache", sizes, outputs=2, axis=1)
    feeds = {name: name for name in inputs} | {"cache": kept}
    assembly.insert(source, "inner/", feeds, {name: name for name in outputs} | {"cache_next": "own_next"})
    assembly.add("Concat", "own_next", rest, output="cache_next", axis=1)
    inputs["cache"], outputs["cache_next"] = (value(name, TensorProto.FLOAT16, "B", size) for name in ("cache", "cache_next"))
    graph = assembly.build([*inputs.values()], [*outputs.values()], path.parent)
    onnx.save(graph.proto, path)
    config = read_config(repository / f"{MODEL}_encoder" / "config.pbtxt")
    tensors = (*config.input, *config.output, *(tensor for sample in config.model_warmup for tensor in sample.inputs.values()))
    for tensor in tensors:
        tensor.dims[:] = [size if dim == own else dim for dim in tensor.dims]
    (repository / f"{MODEL}_encoder" / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
    decoder = read_config(repository / f"{MODEL}_decoder" / "config.pbtxt")
    decoder.parameters["cache_size"].string_value = str(size)
    (repository / f"{MODEL}_decoder" / "config.pbtxt").write_text(text_format.MessageToString(decoder), encoding="utf-8")


async def _serve(repository: Path, streams: Sequence[int]) -> dict[int, float]:
    """Return the CPU time of Triton's processes for a chunk of a stream, by the number of streams at once."""
    windows = read_windows(parameters(repository))["balanced"]
    samples = np.random.default_rng(0).integers(-3000, 3000, windows.chunk_due(CHUNKS - 1)).astype(np.int16)
    found = {}
    async with triton_server(None, repository) as target:
        client = GrpcClient(target.endpoint)

        async def stream() -> None:
            async for _ in client.chunks(samples, windows):
                pass

        meter = Meter({"triton": target.pid or 0})
        for count in streams:
            await asyncio.gather(*(stream() for _ in range(count)))  # allocates what stays allocated
            meter.start()
            await asyncio.gather(*(stream() for _ in range(count)))
            found[count] = sum(meter.stop().cpu_secs.values()) / count / CHUNKS
        await client.close()
    return found


def main() -> None:
    """Parse the command line, measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller encoders and fewer sizes, to see that it runs")
    quick = parser.parse_args().quick
    about = circumstances()
    print(f"{about['date']}, {about['cpu']}, {about['cores']} cores{', quick' if quick else ''}\n")
    print("| encoder | chunk ms | streams a call | CPU ms per audio second | times less | calls per audio second | cache MB |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    windows_ms = 0.0
    for cost in encoder_costs(quick):
        windows_ms = windows_ms or cost.ms
        print(
            f"| {cost.kind} | {cost.chunk_ms:.0f} | {cost.batch} | {cost.ms:.1f} | {windows_ms / cost.ms:.1f} "
            f"| {cost.calls:.2f} | {cost.cache_mb:.1f} |",
            flush=True,
        )
    print("\n| cache MB as FP32 | streams | CPU ms to carry it, per chunk of a stream |\n|--:|--:|--:|")
    for carried in asyncio.run(carry_costs(quick)):
        print(f"| {carried.cache_mb} | {carried.streams} | {carried.ms:.1f} |")


if __name__ == "__main__":
    main()
