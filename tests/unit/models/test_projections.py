"""Caches of keys and values: the same frames as with the published cache, in every layout and batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from amira.models.importing import ImportOptions, import_model
from amira.models.layouts.nemo_cached import convert_encoder
from amira.models.layouts.parts import CachedEncoder
from amira.models.projections import project_cache
from amira.models.repository import recognisers
from amira.models.surgery import State
from tests.support.streaming_models import NemoShape, build_nemo_cached

Floats = npt.NDArray[np.float32]

CALLS = 6
"""Enough for the cache of 14 frames to be full, and replaced."""


def session_of(encoder: CachedEncoder) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(encoder.graph.proto.SerializeToString(), options)


def frames_of(encoder: CachedEncoder, windows: list[Floats]) -> Floats:
    """The frames of consecutive windows [B, F, W]."""
    session = session_of(encoder)
    inputs = {node.name: node for node in session.get_inputs()}
    rows = len(windows[0])
    cache = np.zeros((rows, encoder.cache_size), np.float16 if "float16" in inputs["cache"].type else np.float32)
    prompts = {"prompt_index": np.zeros(rows, np.int64)} if "prompt_index" in inputs else {}
    frames = []
    for window in windows:
        feeds = {"audio_signal": window, "length": np.full(rows, window.shape[2], np.int64), "cache": cache, **prompts}
        made, _, cache = session.run(["outputs", "encoded_lengths", "cache_next"], feeds)
        frames.append(made)
    return np.concatenate(frames, axis=2)


def windows_for(encoder: CachedEncoder, rows: int, features: int = 80) -> list[Floats]:
    random = np.random.default_rng(1)
    return [random.normal(-8, 3, (rows, features, encoder.window_features)).astype(np.float32) for _ in range(CALLS)]


@pytest.mark.parametrize("layout", ["sherpa-onnx", "nemotron", "eou"])
@pytest.mark.parametrize("right", [0, 1, 6])
def test_frames_stay_the_same(tmp_path: Path, layout: str, right: int) -> None:
    """Bit for bit, from the empty cache on."""
    build_nemo_cached(tmp_path, NemoShape(right=right, prompted=layout == "nemotron"), layout=layout)
    published, projected = (
        convert_encoder(tmp_path / "encoder.onnx", TensorProto.FLOAT, projected=projected) for projected in (False, True)
    )
    assert projected.cache_size == published.cache_size + 2 * 14 * 32, "keys and values instead of frames, in two layers"
    windows = windows_for(published, 1 if layout == "nemotron" else 3)
    assert np.array_equal(frames_of(published, windows), frames_of(projected, windows))


@pytest.mark.parametrize("element_type", [TensorProto.FLOAT, TensorProto.FLOAT16])
@pytest.mark.parametrize("projected", [False, True])
def test_batch_of_sixteen_equals_single_streams(tmp_path: Path, element_type: int, projected: bool) -> None:
    """Bit for bit."""
    build_nemo_cached(tmp_path, NemoShape(right=6))
    encoder = convert_encoder(tmp_path / "encoder.onnx", element_type, projected=projected)
    windows = windows_for(encoder, 16)
    together = frames_of(encoder, windows)
    for row in range(16):
        assert np.array_equal(frames_of(encoder, [window[row : row + 1] for window in windows]), together[row : row + 1])


def test_int8_graph_stays_within_its_rounding(tmp_path: Path) -> None:
    """Dynamic quantisation takes the scale of the new frames instead of that of old and new ones."""
    build_nemo_cached(tmp_path, NemoShape(right=6))
    quantize_dynamic(tmp_path / "encoder.onnx", tmp_path / "encoder.int8.onnx", weight_type=QuantType.QInt8)
    encoders = {
        name: convert_encoder(tmp_path / name, TensorProto.FLOAT, projected=projected)
        for name, projected in (("encoder.onnx", False), ("encoder.int8.onnx", True))
    }
    plain = convert_encoder(tmp_path / "encoder.int8.onnx", TensorProto.FLOAT, projected=False)
    assert encoders["encoder.int8.onnx"].cache_size > plain.cache_size
    windows = windows_for(plain, 2)
    exact, rounded, projected = (
        frames_of(encoder, windows) for encoder in (encoders["encoder.onnx"], plain, encoders["encoder.int8.onnx"])
    )
    assert np.abs(projected - exact).mean() < 1.5 * np.abs(rounded - exact).mean()


def nemo_attention(layers: int = 2, size: int = 8, context: int = 5) -> onnx.GraphProto:
    """The cached attention of NeMo's own export: layers first, projections with a bias, a next cache of cut parts."""
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def add(operator: str, *inputs: str, output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def weight(name: str, values: npt.NDArray[Any]) -> str:
        weights.append(numpy_helper.from_array(values, name))
        return name

    x, following = "x", []
    zero, axis, end = (weight(name, np.array([number])) for name, number in (("zero", 0), ("axis", 1), ("end", 2**31)))
    for layer in range(layers):
        index = weight(f"index{layer}", np.array(layer))
        cache = add("Gather", "cache", index, output=f"cache{layer}", axis=0)
        joined = add("Concat", cache, x, output=f"joined{layer}", axis=1)
        projected = []
        for kind in ("key", "value"):
            matrix = weight(f"{kind}{layer}", random.standard_normal((size, size), np.float32) / 3)
            bias = weight(f"{kind}_bias{layer}", random.standard_normal(size, np.float32))
            product = add("MatMul", joined, matrix, output=f"{kind}_product{layer}")
            projected.append(add("Add", bias, product, output=f"{kind}_projected{layer}"))
        turned = add("Transpose", projected[0], output=f"turned{layer}", perm=[0, 2, 1])
        attention = add("Softmax", add("MatMul", x, turned, output=f"scores{layer}"), output=f"weights{layer}", axis=-1)
        heard = add("MatMul", attention, projected[1], output=f"heard{layer}")
        shape = add("Shape", x, output=f"shape{layer}")
        count = add("Gather", shape, axis, output=f"count{layer}")
        kept = add("Slice", cache, count, end, axis, output=f"kept{layer}")
        fresh = add("Slice", x, zero, count, axis, output=f"fresh{layer}")
        both = add("Concat", kept, fresh, output=f"both{layer}", axis=1)
        following.append(add("Unsqueeze", both, zero, output=f"stacked{layer}"))
        x = add("Tanh", add("Add", x, heard, output=f"sum{layer}"), output=f"y{layer}")
    add("Concat", *following, output="cache_next", axis=0)
    add("Identity", x, output="frames")
    declare = helper.make_tensor_value_info
    return helper.make_graph(
        nodes,
        "attention",
        [declare("x", 1, ["B", 3, size]), declare("cache", 1, [layers, "B", context, size])],
        [declare("frames", 1, ["B", 3, size]), declare("cache_next", 1, [layers, "B", context, size])],
        weights,
    )


def run_attention(graph: onnx.GraphProto, states: dict[str, Floats], windows: list[Floats]) -> Floats:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session, frames = onnxruntime.InferenceSession(model.SerializeToString()), []
    names = [node.name for node in session.get_outputs()]
    for window in windows:
        outputs = dict(zip(names, session.run(None, {"x": window, **states}), strict=True))
        states = {name: outputs[f"{name}_next"] for name in states}
        frames.append(outputs["frames"])
    return np.concatenate(frames, axis=1)


def test_structure_of_nemos_export_is_known() -> None:
    """Its cache is empty at first; keys and values of empty frames count here, so both begin with what they are then."""
    graph = nemo_attention()
    windows = [np.random.default_rng(i).standard_normal((2, 3, 8), np.float32) for i in range(CALLS)]
    state = State("cache", "cache_next", (2, 1, 5, 8), 1, TensorProto.FLOAT)
    filled = [np.random.default_rng(9 + layer).standard_normal((2, 5, 8), np.float32) for layer in range(2)]
    expected = run_attention(graph, {"cache": np.stack(filled)}, windows)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    states = project_cache(graph, state, TensorProto.FLOAT)
    assert states
    assert [new.shape for new in states] == [(1, 5, 8)] * 4
    first = {
        new.input: filled[layer] @ weights[f"{kind}{layer}"] + weights[f"{kind}_bias{layer}"]
        for new, (layer, kind) in zip(states, ((n, k) for n in range(2) for k in ("key", "value")), strict=True)
    }
    assert np.allclose(run_attention(graph, first, windows), expected, atol=1e-5)


def test_other_structures_are_left_alone() -> None:
    graph = nemo_attention()
    for node in graph.node:
        node.op_type = "Sub" if node.output[0].endswith("_product1") else node.op_type
    before = graph.SerializeToString()
    assert project_cache(graph, State("cache", "cache_next", (2, 1, 5, 8), 1, TensorProto.FLOAT), TensorProto.FLOAT) is None
    assert graph.SerializeToString() == before


def test_encoder_that_keeps_other_frames_has_the_published_cache(tmp_path: Path) -> None:
    """A graph that drops its newest frame from the cache: keys and values would be others, which the import sees."""
    shape = NemoShape(right=1)
    build_nemo_cached(tmp_path / "source", shape)
    path = tmp_path / "source" / "encoder.onnx"
    model = onnx.load(path)
    joined = {node.output[0] for node in model.graph.node if node.op_type == "Concat" and node.attribute[0].i == 1}
    bounds = {"older": -(shape.context + 1), "newest": -1}
    model.graph.initializer.extend(numpy_helper.from_array(np.array([number]), name) for name, number in bounds.items())
    for node in model.graph.node:
        if node.op_type == "Slice" and node.input[0] in joined:
            node.input[1], node.input[2] = bounds
    onnx.save(model, path)
    import_model(str(tmp_path / "source"), "mine", tmp_path / "into", ImportOptions(cache_type="fp32"))
    (recogniser,) = recognisers(tmp_path / "into")
    assert recogniser.parameters["cache_size"] == "1153", "2 layers of 14 and 4 frames of 32, and the count"
