"""Users' own models, imported and served, held against onnx-asr token for token."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import onnx
import onnx_asr
import onnxruntime
import pytest
from google.protobuf import text_format

from amira.models.configs import read_config
from amira.models.importing import ImportOptions, import_model
from amira.models.repository import ROLES, recognisers
from tests.support.clients import END, converse, cut
from tests.support.commands import edit, triton_with
from tests.support.repositories import copy_repository
from tests.support.servers import KINDS, Gateway, Recordings, Samples, run_gateway

FEATURES = {"rnnt": 80, "tdt": 128}
FULL_CONTEXT = {f"cut-{chunk_frames}": chunk_frames for chunk_frames in (1, 7)}
QUANTIZED = {f"int8-{block_frames}": block_frames for block_frames in (1, 32)}
ON_GPU = "gpu"
BLOCK_FRAMES = (1, 5, 32, 200)
OCTETS = {"Content-Type": "application/octet-stream"}


class Served(NamedTuple):
    """A gateway before a Triton that serves imported models at every block size, and the bundled one."""

    gateway: Gateway
    repository: Path


@pytest.fixture(scope="module")
def wanted(sources: dict[str, Path], recordings: Recordings) -> dict[str, list[list[int]]]:
    """The tokens that onnx-asr gives for each case, by kind."""
    tokens = {}
    for kind, path in sources.items():
        peer = onnx_asr.load_model(f"nemo-conformer-{kind}", path).with_timestamps()
        vocabulary = read_vocabulary(path)
        tokens[kind] = [expected(peer, samples, vocabulary) for samples in cases(recordings)]
    return tokens


@pytest.fixture(scope="module")
async def served(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    repository = tmp_path_factory.mktemp("served") / "models"
    copy_repository(repository, warm=False)
    names = {}
    for kind, source in sources.items():
        for block_frames in BLOCK_FRAMES:
            name = names[f"{kind}-{block_frames}"] = f"{kind}_{block_frames}"
            import_model(str(source), name, repository)
            set_parameters(repository / f"{name}_decoder" / "config.pbtxt", {"block_frames": block_frames})
            if block_frames != BLOCK_FRAMES[0]:
                share_models(repository, name, f"{kind}_{BLOCK_FRAMES[0]}")
        add_local_front_end(repository, kind)
        for public, chunk_frames in FULL_CONTEXT.items():
            name = names[f"{kind}-{public}"] = f"{kind}_cut_{chunk_frames}"
            import_model(str(source), name, repository)
            share_models(repository, name, f"{kind}_{BLOCK_FRAMES[0]}")
            decoder = repository / f"{name}_decoder" / "config.pbtxt"
            edit(decoder, f'"{kind}_{BLOCK_FRAMES[0]}_preprocessor"', f'"{kind}_local"')
            values = {"left_frames": 15, "chunk_frames": chunk_frames, "right_frames": 15, "endpoint_silence_ms": 0}
            set_parameters(decoder, values)
        first_quantized = next(iter(QUANTIZED.values()))
        for public, block_frames in QUANTIZED.items():
            name = names[f"{kind}-{public}"] = f"{kind}_int8_{block_frames}"
            import_model(str(source), name, repository, ImportOptions("int8"))
            set_parameters(repository / f"{name}_decoder" / "config.pbtxt", {"block_frames": block_frames})
            if block_frames != first_quantized:
                share_models(repository, name, f"{kind}_int8_{first_quantized}")
        name = names[f"{kind}-{ON_GPU}"] = f"{kind}_gpu"
        import_model(str(source), name, repository, ImportOptions(gpu=True))
        for role in ROLES:
            edit(repository / f"{name}_{role}" / "config.pbtxt", "KIND_GPU", "KIND_CPU")
    async with (
        triton_with(repository) as ports,
        run_gateway(
            triton_endpoint=f"{ports.host}:{ports.grpc}",
            models={"amira": "asr_ensemble", **names},
            canary_interval_secs=3600,  # those of so many models would keep the machine busy
        ) as gateway,
    ):
        yield Served(gateway, repository)


def set_parameters(config_file: Path, values: dict[str, int]) -> None:
    config = read_config(config_file)
    for name, value in values.items():
        config.parameters[name].string_value = str(value)
    config_file.write_text(text_format.MessageToString(config), encoding="utf-8")


def share_models(repository: Path, name: str, other: str) -> None:
    """Let a recogniser use graphs and detokenizer of another instead of its own; each costs a process."""
    users = {**dict.fromkeys(ROLES, f"{name}_decoder"), "detokenizer": name}
    for part, user in users.items():
        shutil.rmtree(repository / f"{name}_{part}")
        edit(repository / user / "config.pbtxt", f'"{name}_{part}"', f'"{other}_{part}"')


def add_local_front_end(repository: Path, kind: str) -> None:
    """Add a front end whose frames depend on nothing but their own 160 samples; NeMo's normalises over its window."""
    source, target = repository / f"{kind}_{BLOCK_FRAMES[0]}_preprocessor", repository / f"{kind}_local"
    shutil.copytree(source, target)
    edit(target / "config.pbtxt", source.name, target.name)
    onnx.save(local_front_end(FEATURES[kind]), target / "1" / "model.onnx")


def local_front_end(features: int) -> onnx.ModelProto:
    bands = np.random.default_rng(features).standard_normal((160, features)).astype(np.float32)
    nodes = onnx.parser.parse_graph("""
        front_end (float[B, N] waveforms, int64[B] waveforms_lens) => (float[B, F, T] features, int64[B] features_lens)
        {
            hop = Constant <value = int64[1] {160}> ()
            zero = Constant <value = int64[1] {0}> ()
            one = Constant <value = int64[1] {1}> ()
            shape = Constant <value = int64[3] {0, -1, 160}> ()
            floor = Constant <value = float {0.001}> ()
            mean = Constant <value = float {2.5}> ()
            size = Shape (waveforms)
            samples = Slice (size, one, shape_end, zero)
            frames = Div (samples, hop)
            used = Mul (frames, hop)
            cut = Slice (waveforms, zero, used, one)
            framed = Reshape (cut, shape)
            bands_out = MatMul (framed, bands)
            energy = Abs (bands_out)
            floored = Add (energy, floor)
            logs = Log (floored)
            centred = Add (logs, mean)
            features = Transpose <perm = [0, 2, 1]> (centred)
            features_lens = Div (waveforms_lens, hop)
        }""")
    nodes.initializer.append(onnx.numpy_helper.from_array(bands, "bands"))
    nodes.initializer.append(onnx.numpy_helper.from_array(np.array([2], np.int64), "shape_end"))
    return onnx.helper.make_model(nodes, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def cases(recordings: Recordings) -> list[Samples]:
    """Every recording, whole and in parts of many lengths."""
    whole = list(recordings.values())
    return whole + [samples[start : start + length] for samples in whole for start, length in ((0, 20000), (30000, 47777))]


def expected(peer: Any, samples: Samples, vocabulary: dict[str, int]) -> list[int]:
    result = peer.recognize(samples.astype(np.float32) / 32768)
    return [vocabulary[token] for token in result.tokens]


def read_vocabulary(source: Path) -> dict[str, int]:
    """Ids by piece as onnx-asr shows it: with a space for ▁."""
    lines = (source / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return {line.rpartition(" ")[0].replace("▁", " "): index for index, line in enumerate(lines)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_frames", BLOCK_FRAMES)
async def test_tokens_are_those_of_onnx_asr(
    served: Served, wanted: dict[str, list[list[int]]], recordings: Recordings, kind: str, block_frames: int
) -> None:
    """Recordings of mixed lengths at once, so that they share the decoder's calls."""
    url = served.gateway.batch_url(f"{kind}-{block_frames}")
    async with httpx.AsyncClient(timeout=60) as http:
        answers = await asyncio.gather(
            *(http.post(url, content=samples.tobytes(), headers=OCTETS) for samples in cases(recordings))
        )
    assert [answer.json()["tokens"] for answer in answers] == wanted[kind]
    assert sum(map(len, wanted[kind])) > 50


@pytest.mark.parametrize("kind", KINDS)
async def test_quantized_models_give_the_tokens_of_onnx_asr(
    served: Served, sources: dict[str, Path], recordings: Recordings, kind: str
) -> None:
    """Where they are one thing: rounding to int8 makes so much of differences in the last digit that onnx-asr itself gives
    other tokens with two threads than with one on some recordings."""
    one_thread, two_threads = (load_quantized(sources[kind], kind, threads) for threads in (1, 2))
    vocabulary = read_vocabulary(sources[kind])
    compared = 0
    async with httpx.AsyncClient(timeout=60) as http:
        for samples in cases(recordings):
            wanted = expected(one_thread, samples, vocabulary)
            if wanted != expected(two_threads, samples, vocabulary):
                continue
            compared += 1
            for name in QUANTIZED:
                url = served.gateway.batch_url(f"{kind}-{name}")
                answer = await http.post(url, content=samples.tobytes(), headers=OCTETS)
                assert answer.json()["tokens"] == wanted
    assert compared > len(cases(recordings)) / 2


def load_quantized(source: Path, kind: str, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    graphs: Any = {"use_numpy_preprocessors": False, "use_conv_preprocessors": False}  # the front end that we have too
    model = f"nemo-conformer-{kind}"
    peer = onnx_asr.load_model(model, source, quantization="int8", preprocessor_config=graphs, sess_options=options)
    return peer.with_timestamps()


@pytest.mark.parametrize("kind", KINDS)
async def test_gpu_front_end_gives_the_tokens_of_onnx_asr(
    served: Served, sources: dict[str, Path], recordings: Recordings, kind: str
) -> None:
    """With the front end that onnx-asr takes there; all but the device is as ``--gpu`` writes it."""
    graphs: Any = {"use_numpy_preprocessors": False, "use_conv_preprocessors": True}
    peer = onnx_asr.load_model(f"nemo-conformer-{kind}", sources[kind], preprocessor_config=graphs).with_timestamps()
    vocabulary = read_vocabulary(sources[kind])
    async with httpx.AsyncClient(timeout=60) as http:
        for samples in cases(recordings):
            url = served.gateway.batch_url(f"{kind}-{ON_GPU}")
            answer = await http.post(url, content=samples.tobytes(), headers=OCTETS)
            assert answer.json()["tokens"] == expected(peer, samples, vocabulary)


@pytest.mark.parametrize("kind", KINDS)
async def test_full_context_windows_equal_the_recording(served: Served, recordings: Recordings, kind: str) -> None:
    """Windows that hold all that a frame depends on, decoded a few frames at a time: jumps cross from one into the next."""
    samples = recordings["jfk"]
    for name in FULL_CONTEXT:
        async with httpx.AsyncClient(timeout=60) as http:
            answer = await http.post(served.gateway.batch_url(f"{kind}-{name}"), content=samples.tobytes(), headers=OCTETS)
        whole = answer.json()
        assert len(whole["tokens"]) > 10
        final = (await converse(served.gateway.stream_url(f"{kind}-{name}"), [*cut(samples, 1600), END])).final
        assert final["tokens"] == whole["tokens"]
        starts = [word["start"] for word in whole["words"]]
        assert [word["start"] for word in final["words"]] == pytest.approx(starts, abs=0.1)  # a frame, where two are as good


async def test_models_are_served_side_by_side(served: Served, recordings: Recordings) -> None:
    body = recordings["jfk"].tobytes()
    async with httpx.AsyncClient(timeout=60) as http:
        names = ("amira", "rnnt-32", "tdt-32")
        answers = await asyncio.gather(
            *(http.post(served.gateway.batch_url(name), content=body, headers=OCTETS) for name in names)
        )
        ready = (await http.get(f"{served.gateway.url}/health/ready")).json()["models"]
        unknown = await http.post(served.gateway.batch_url("rnnt"), content=body, headers=OCTETS)
    bundled, rnnt, tdt = (answer.json() for answer in answers)
    assert "country" in bundled["text"]
    assert len({bundled["text"], rnnt["text"], tdt["text"]}) == 3
    assert rnnt["encoded_length"] == -(-rnnt["features_length"] // 8)
    assert all(ready.values())
    assert len(ready) == 19
    assert unknown.status_code == 404


def test_served_repository_is_listed(served: Served) -> None:
    lines = {recogniser.name: recogniser.describe() for recogniser in recognisers(served.repository)}
    assert lines["asr_ensemble"].startswith("asr_ensemble: rnnt, 512 pieces, 96 ms a frame")
    assert lines["tdt_1"].startswith("tdt_1: tdt, 1024 pieces, 80 ms a frame, windows of 10.00 + 2.00 + 2.00 s, low")
