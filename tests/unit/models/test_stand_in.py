"""The embedded engine's backend takes and refuses the settings that Triton's native ONNX Runtime backend does.

The table follows ``onnxruntime.cc`` of triton-inference-server/onnxruntime_backend and ``backend_common.cc`` of
triton-inference-server/backend, read in 2026-11.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import onnxruntime as ort
import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2 as pb

from amira.paths import ONNXRUNTIME_BACKEND

LEVELS = ort.GraphOptimizationLevel
MODES = ort.ExecutionMode


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend's module, without Triton."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    monkeypatch.setitem(sys.modules, "stall_guard", SimpleNamespace(StallGuard=lambda _: None))
    spec = importlib.util.spec_from_file_location("stand_in", ONNXRUNTIME_BACKEND / "model.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config(text: str) -> dict[str, Any]:
    """A ``config.pbtxt`` as Triton hands it to a backend."""
    parsed = text_format.Parse(text, pb.ModelConfig())
    converted: dict[str, Any] = json_format.MessageToDict(parsed, preserving_proto_field_name=True)
    return converted


def parameter(name: str, value: str) -> str:
    return f'parameters {{ key: "{name}" value: {{ string_value: "{value}" }} }}'


TAKEN = [
    ("", "graph_optimization_level", LEVELS.ORT_ENABLE_ALL),
    ("optimization { graph { level: -1 } }", "graph_optimization_level", LEVELS.ORT_ENABLE_BASIC),
    ("optimization { graph { level: 0 } }", "graph_optimization_level", LEVELS.ORT_ENABLE_ALL),
    ("optimization { graph { level: 1 } }", "graph_optimization_level", LEVELS.ORT_ENABLE_EXTENDED),
    ("optimization { graph { level: 2 } }", "graph_optimization_level", LEVELS.ORT_DISABLE_ALL),
    ("optimization { graph { level: 3 } }", "graph_optimization_level", LEVELS.ORT_ENABLE_ALL),
    ("", "execution_mode", MODES.ORT_SEQUENTIAL),
    (parameter("execution_mode", "0"), "execution_mode", MODES.ORT_SEQUENTIAL),
    (parameter("execution_mode", "1"), "execution_mode", MODES.ORT_PARALLEL),
    (parameter("execution_mode", " 1 of 2"), "execution_mode", MODES.ORT_PARALLEL),
    ("", "intra_op_num_threads", 0),
    (parameter("intra_op_thread_count", "2"), "intra_op_num_threads", 2),
    (parameter("intra_op_thread_count", "2.9"), "intra_op_num_threads", 2),
    (parameter("intra_op_thread_count", "-1"), "intra_op_num_threads", 0),
    (parameter("inter_op_thread_count", "+3"), "inter_op_num_threads", 3),
    (parameter("inter_op_thread_count", "-3"), "inter_op_num_threads", 0),
    ("", "enable_cpu_mem_arena", True),
    *((parameter("enable_mem_arena", text), "enable_cpu_mem_arena", True) for text in ("true", "On", "1")),
    *((parameter("enable_mem_arena", text), "enable_cpu_mem_arena", False) for text in ("FALSE", "off", "0")),
    ("", "enable_mem_pattern", True),
    (parameter("enable_mem_pattern", "off"), "enable_mem_pattern", False),
    (parameter("cudnn_conv_algo_search", "1"), "intra_op_num_threads", 0),
    (
        'optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" } } }',
        "graph_optimization_level",
        LEVELS.ORT_ENABLE_ALL,
    ),
]
"""Settings that the native backend takes on a CPU, and what they mean."""

REFUSED = [
    (parameter("execution_mode", "2"), "parameter execution_mode is '2'; it must be 0"),
    (parameter("execution_mode", "-1"), "parameter execution_mode is '-1'; it must be 0"),
    (parameter("execution_mode", "parallel"), "parameter execution_mode is 'parallel'; it must be a whole number"),
    (parameter("execution_mode", ""), "parameter execution_mode is ''; it must be a whole number"),
    (parameter("intra_op_thread_count", "many"), "parameter intra_op_thread_count is 'many'; it must be a whole number"),
    (parameter("intra_op_thread_count", "3000000000"), "parameter intra_op_thread_count is '3000000000'; it must be"),
    (parameter("inter_op_thread_count", "x2"), "parameter inter_op_thread_count is 'x2'; it must be a whole number"),
    (parameter("enable_mem_arena", "maybe"), "parameter enable_mem_arena is 'maybe'; it must be true"),
    (parameter("enable_mem_arena", "2"), "parameter enable_mem_arena is '2'; it must be true"),
    (parameter("enable_mem_pattern", ""), "parameter enable_mem_pattern is ''; it must be true"),
    ('optimization { execution_accelerators { cpu_execution_accelerator { name: "warp" } } }', "no CPU accelerator 'warp'"),
    ('model_operations { op_library_filename: "/nowhere.so" }', "model_operations: /nowhere.so cannot be loaded"),
]
"""Settings that the native backend refuses."""


@pytest.mark.parametrize(("text", "attribute", "value"), TAKEN)
def test_settings_equal_those_of_the_native_backend(stand_in: Any, text: str, attribute: str, value: object) -> None:
    assert getattr(stand_in.session_options(config(text)), attribute) == value


@pytest.mark.parametrize(("text", "named"), REFUSED)
def test_settings_that_the_native_backend_refuses_are_refused_by_name(stand_in: Any, text: str, named: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        stand_in.session_options(config(text))
    assert named in str(error.value)


def test_unavailable_accelerator_is_named(stand_in: Any) -> None:
    openvino = 'optimization { execution_accelerators { cpu_execution_accelerator { name: "openvino" } } }'
    with pytest.raises(ValueError, match=r"no CPU accelerator 'openvino'; .* use the Triton container"):
        stand_in.session_options(config(openvino))


def test_entries_are_passed_on_to_onnx_runtime(stand_in: Any) -> None:
    allocator, shrinkage = "session.use_device_allocator_for_initializers", "memory.enable_memory_arena_shrinkage"
    given = config(parameter(allocator, "1") + parameter(shrinkage, "cpu:0"))
    assert stand_in.session_options(given).get_session_config_entry(allocator) == "1"
    assert stand_in.run_options(given).get_run_config_entry(shrinkage) == "cpu:0"
