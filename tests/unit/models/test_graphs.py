"""What is imported, and what passes for a model repository, is also what Triton's own ONNX Runtime backend takes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2 as pb

from amira.models.configs import ModelError, read_config
from amira.models.importing import ImportOptions, import_model
from amira.models.repository import recognisers
from amira.paths import MODEL_REPOSITORY, ONNXRUNTIME_BACKEND
from tests.support.cache import built
from tests.support.native_backend import refused_by_triton

Change = Callable[[onnx.GraphProto], None]
Edit = Callable[[pb.ModelConfig], None]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of the bundled models, for a test to break."""
    return Path(shutil.copytree(MODEL_REPOSITORY, tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture
def source(tmp_path: Path, quick_imports: None) -> Path:  # noqa: ARG001 (needed for its effect)
    """A copy of a published model, for a test to break."""
    return Path(shutil.copytree(built("tdt"), tmp_path / "source"))


def edit_graph(path: Path, *changes: Change) -> None:
    model = onnx.load(path)
    for change in changes:
        change(model.graph)
    onnx.save(model, path)


def edit_config(repository: Path, name: str, edit: Edit) -> None:
    path = repository / name / "config.pbtxt"
    config = read_config(path)
    edit(config)
    path.write_text(text_format.MessageToString(config), encoding="utf-8")


def resize(name: str, axis: int, size: int | str) -> Change:
    """Declare another size of a tensor; a name is an open one."""

    def change(graph: onnx.GraphProto) -> None:
        (tensor,) = (tensor for tensor in (*graph.input, *graph.output) if tensor.name == name)
        dim = tensor.type.tensor_type.shape.dim[axis]
        dim.CopyFrom(type(dim)(dim_value=size) if isinstance(size, int) else type(dim)(dim_param=size))

    return change


def veil(name: str, axis: int) -> Change:
    """Compute an output so that nobody can infer its size on an axis."""

    def change(graph: onnx.GraphProto) -> None:
        (maker,) = (node for node in graph.node if name in node.output)
        maker.output[list(maker.output).index(name)] = f"{name}_made"
        for suffix, values in (("start", [0]), ("axis", [axis]), ("more", [9999])):
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, np.int64), f"{name}_{suffix}"))
        graph.node.extend(
            [
                onnx.helper.make_node("Shape", [graph.input[1].name], [f"{name}_rows"], end=1),
                onnx.helper.make_node("Add", [f"{name}_rows", f"{name}_more"], [f"{name}_end"]),
                onnx.helper.make_node("Slice", [f"{name}_{part}" for part in ("made", "start", "end", "axis")], [name]),
            ]
        )
        resize(name, axis, "veiled")(graph)

    return change


def add_input(name: str) -> Change:
    return lambda graph: graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["B", 4]))


def test_triton_accepts_the_bundled_models() -> None:
    assert refused_by_triton(MODEL_REPOSITORY) == []


@pytest.mark.parametrize(
    ("encoder", "decoder_joint", "dims"),
    [
        ([], [], {}),
        ([], [resize("outputs", 3, "open")], {"outputs": [-1, -1, -1, 1030]}),  # which ONNX Runtime infers
        ([], [veil("outputs", 3)], {"outputs": [-1, -1, -1, -1]}),
        ([], [veil("output_states_1", 2)], {"output_states_1": [2, -1, -1], "output_states_2": [2, -1, 640]}),
        ([veil("outputs", 1)], [], {"encoder_outputs": [-1, 256, -1]}),
        ([resize("audio_signal", 1, "open")], [], {}),  # config.json tells, and then the front end
        ([], [resize("encoder_outputs", 1, "open")], {"encoder_outputs": [-1, -1, -1]}),
        ([], [resize("targets", 1, 1)], {"targets": [-1, 1], "outputs": [-1, -1, 1, 1030]}),
    ],
)
def test_triton_accepts_imported_models(
    source: Path, tmp_path: Path, encoder: list[Change], decoder_joint: list[Change], dims: dict[str, list[int]]
) -> None:
    edit_graph(source / "encoder-model.onnx", *encoder)
    edit_graph(source / "decoder_joint-model.onnx", *decoder_joint)
    into = tmp_path / "into"
    import_model(str(source), "mine", into)
    assert refused_by_triton(into) == []
    assert [recogniser.name for recogniser in recognisers(into)] == ["mine"]
    config = read_config(into / "mine_decoder_joint" / "config.pbtxt")
    written = {tensor.name: list(tensor.dims) for tensor in (*config.input, *config.output)}
    assert written == {**written, **dims}


def test_triton_accepts_the_front_end_for_gpus(source: Path, tmp_path: Path) -> None:
    import_model(str(source), "mine", tmp_path / "models", ImportOptions(gpu=True))
    assert refused_by_triton(tmp_path / "models") == []


@pytest.mark.parametrize(
    ("role", "change", "named"),
    [
        ("encoder", resize("audio_signal", 0, 1), "input audio_signal is FLOAT [1, 128, ?]; expected FLOAT [?, 128, ?]"),
        ("encoder", resize("audio_signal", 2, 900), "input audio_signal is FLOAT [?, 128, 900]; expected FLOAT [?, 128, ?]"),
        ("encoder", resize("outputs", 2, 113), "output outputs is FLOAT [?, 256, 113]; expected FLOAT [?, any, ?]"),
        ("encoder", resize("length", 0, 1), "input length is INT64 [1]; expected INT64 [?]"),
        ("decoder_joint", resize("encoder_outputs", 2, 1), "input encoder_outputs is FLOAT [?, 256, 1]; expected"),
        ("decoder_joint", resize("targets", 0, 1), "input targets is INT32 [1, ?]; expected INT32 [?, any]"),
        ("decoder_joint", resize("input_states_2", 1, 1), "input input_states_2 is FLOAT [2, 1, 640]; expected"),
        ("decoder_joint", resize("outputs", 1, 1), "output outputs is FLOAT [?, 1, ?, 1030]; expected FLOAT [?, ?, any, any]"),
        ("encoder", add_input("speaker"), "nothing feeds speaker; expected the inputs audio_"),
        ("decoder_joint", add_input("speaker"), "nothing feeds speaker; expected the inputs encoder_outputs, targets, "),
    ],
)
def test_graphs_without_batches_or_blocks_are_refused(
    source: Path, tmp_path: Path, role: str, change: Change, named: str
) -> None:
    path = source / f"{role}-model.onnx"
    edit_graph(path, change)
    into = tmp_path / "into"
    with pytest.raises(ModelError) as raised:
        import_model(str(source), "mine", into)
    assert f"{path}: {named}" in str(raised.value)
    assert not into.exists()


def test_graph_that_fails_is_refused(source: Path, tmp_path: Path) -> None:
    path = source / "encoder-model.onnx"
    edit_graph(path, lambda graph: graph.node[0].ClearField("input"))
    into = tmp_path / "into"
    with pytest.raises(ModelError, match=f"{path} can't be loaded by ONNX Runtime: "):
        import_model(str(source), "mine", into)
    assert not into.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (resize("waveforms", 0, 1), "input waveforms is FLOAT [1, ?]; expected FLOAT [?, ?]"),
        (resize("features", 2, 46), "output features is FLOAT [?, 384, 46]; expected FLOAT [?, 384, ?]"),
        (add_input("dither"), "preprocessor/config.pbtxt: input dither is missing"),
    ],
)
def test_front_end_without_batches_is_refused(repository: Path, change: Change, named: str) -> None:
    edit_graph(repository / "preprocessor" / "1" / "model.onnx", change)
    with pytest.raises(ModelError) as raised:
        recognisers(repository)
    assert named in str(raised.value)


class Refusal(Exception):  # noqa: N818 (it stands for pb_utils.TritonModelException)
    """Why the stand-in does not load a model."""


@pytest.fixture
def load_stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """The embedded engine's backend, without the engine, as it loads a model's directory."""
    utils: Any = ModuleType("triton_python_backend_utils")
    utils.TritonModelException = Refusal
    types = {"TYPE_FP32": np.float32, "TYPE_INT32": np.int32, "TYPE_INT64": np.int64}
    utils.triton_string_to_numpy = types.__getitem__
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    monkeypatch.setattr(os, "nice", lambda _: 0)  # the process is that of all tests
    monkeypatch.setitem(sys.modules, "stall_guard", SimpleNamespace(StallGuard=lambda _: None))
    spec = importlib.util.spec_from_file_location("stand_in", ONNXRUNTIME_BACKEND / "model.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def load(directory: Path) -> None:
        config = json_format.MessageToJson(read_config(directory / "config.pbtxt"), preserving_proto_field_name=True)
        module.TritonPythonModel().initialize(
            {
                "model_name": directory.name,
                "model_config": config,
                "model_instance_kind": "CPU",
                "model_repository": str(directory),
                "model_version": "1",
            }
        )

    return load


def set_dims(tensors: str, index: int, *dims: int) -> Edit:
    def edit(config: pb.ModelConfig) -> None:
        getattr(config, tensors)[index].dims[:] = dims

    return edit


def remove_input(config: pb.ModelConfig) -> None:
    del config.input[-1]
    for sample in config.model_warmup:
        sample.inputs.pop("length", None)


def with_batches(config: pb.ModelConfig) -> None:
    """Triton adds the batch to the shapes of a model that it may batch."""
    config.max_batch_size = 8


@pytest.mark.parametrize(
    ("name", "edit", "named"),
    [
        ("encoder", lambda _: None, None),
        ("encoder", set_dims("input", 0, 1, 384, 184), None),
        ("encoder", set_dims("input", 0, -1, -1, -1), "input audio_signal"),
        ("encoder", set_dims("output", 0, -1, -1, -1), "output outputs"),
        ("encoder", set_dims("output", 0, 1, 256, -1), "output outputs"),
        ("encoder", set_dims("output", 0, -1, 256), "output outputs"),
        ("encoder", with_batches, "input audio_signal"),
        ("encoder", remove_input, "length"),
        ("decoder_joint", set_dims("output", 0, -1, -1, 1, 513), "output outputs"),
    ],
)
def test_checks_refuse_what_triton_refuses(
    repository: Path, load_stand_in: Callable[[Path], None], name: str, edit: Edit, named: str | None
) -> None:
    edit_config(repository, name, edit)
    if named is None:
        recognisers(repository)
        load_stand_in(repository / name)
        return
    with pytest.raises(ModelError, match=f"{name}/.*{named}"):
        recognisers(repository)
    with pytest.raises(Refusal, match=f"{name}: .*{named}"):
        load_stand_in(repository / name)


def test_decoder_and_detokenizer_need_one_vocabulary(source: Path, tmp_path: Path) -> None:
    import_model(str(source), "mine", tmp_path / "into")
    decoders = tmp_path / "into" / "mine_decoder" / "vocab.txt"
    recognisers(tmp_path / "into")
    decoders.write_text(decoders.read_text(encoding="utf-8").replace("▁", "_", 1), encoding="utf-8")
    with pytest.raises(ModelError, match=r"mine_decoder/vocab.txt differs from .*/mine_detokenizer/vocab.txt"):
        recognisers(tmp_path / "into")
    decoders.unlink()
    with pytest.raises(ModelError, match=r"mine_decoder/vocab.txt is missing; the decoder's parameter vocabulary names it"):
        recognisers(tmp_path / "into")
