"""ONNX Runtime backend for the embedded Triton, as a Python-based backend.

The embedded engine comes from PyPI without a native ONNX Runtime backend. This file replaces the native backend, so a model
repository with ``backend: "onnxruntime"`` loads without changes. The stock Triton container has the native backend and does not
use this file. Settings have the meaning that they have in the native backend, and invalid ones are refused as there
(``onnxruntime.cc`` of onnxruntime_backend, ``ModelState::ModelState`` and ``LoadModel``, as of commit 00fd3e8 of June 2026):

- ``instance_group`` of KIND_CPU, ``default_model_filename``, ``model_operations { op_library_filename }``, ``model_warmup``
- ``optimization { graph { level } }``, and ``optimization { execution_accelerators }``; there are no accelerators
- the parameters ``intra_op_thread_count``, ``inter_op_thread_count``, ``execution_mode``, ``enable_mem_arena``,
  ``enable_mem_pattern``, ``session.use_device_allocator_for_initializers`` and ``memory.enable_memory_arena_shrinkage``

In addition, ``optimization { priority }`` sets the priority of the process: a model of ``PRIORITY_MIN`` yields to all others.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

from stall_guard import StallGuard

ONNX_TYPES = {
    "TYPE_BOOL": "tensor(bool)",
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_INT8": "tensor(int8)",
    "TYPE_INT16": "tensor(int16)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP64": "tensor(double)",
}
GRAPH_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
"""Optimization levels by the native backend's numbers for ``optimization { graph { level } }``; others mean all."""

EXECUTION_MODES = {0: ort.ExecutionMode.ORT_SEQUENTIAL, 1: ort.ExecutionMode.ORT_PARALLEL}
BOOLEANS = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
INTEGER = re.compile(r"\s*([+-]?\d+)")
"""Beginning of a text that C++'s ``std::stoi`` parses as a number; it ignores the rest."""

INT32_MAX = 2**31 - 1

DEVICE_ALLOCATOR = "session.use_device_allocator_for_initializers"
ARENA_SHRINKAGE = "memory.enable_memory_arena_shrinkage"

LOW_NICENESS = 5
"""Niceness of a model of ``PRIORITY_MIN``. The model gets a third of the CPU time of another one on the same core (sched(7): a
factor of 1.25 for each step)."""


class TritonPythonModel:
    """One instance of one ONNX model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph, check it against ``config.pbtxt``, and run the samples of ``model_warmup``.

        Raises:
            pb_utils.TritonModelException: the graph is missing or malformed, a setting is not allowed, the tensors of graph and
                configuration differ, or a warm-up sample failed.
        """
        config = json.loads(args["model_config"])
        self._name = args["model_name"]
        if args["model_instance_kind"] == "GPU":
            raise pb_utils.TritonModelException(
                f"{self._name}: instance_group is KIND_GPU, but the embedded engine has no GPU; use the Triton container"
            )
        path = Path(args["model_repository"]) / args["model_version"] / (config.get("default_model_filename") or "model.onnx")
        path = path / "model.onnx" if path.is_dir() else path
        if not path.is_file():
            raise pb_utils.TritonModelException(f"{self._name}: {path} is missing")
        try:
            options, self._run_options = session_options(config), run_options(config)
        except ValueError as error:
            raise pb_utils.TritonModelException(f"{self._name}: config.pbtxt: {error}") from error
        if config.get("optimization", {}).get("priority") == "PRIORITY_MIN":
            os.nice(LOW_NICENESS)  # before the session starts its threads, which inherit it
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise pb_utils.TritonModelException(f"{self._name}: {path} is not a usable ONNX model: {error}") from error
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        batch = [-1] if int(config.get("max_batch_size", 0)) else []
        self._check("input", config["input"], self._session.get_inputs(), batch)
        self._check("output", config["output"], self._session.get_outputs(), batch)
        unfed = {node.name for node in self._session.get_inputs()} - set(self._inputs)
        if unfed:
            raise pb_utils.TritonModelException(f"{self._name}: config.pbtxt lacks the graph's inputs {sorted(unfed)}")
        self._warm_up(config.get("model_warmup", []), Path(args["model_repository"]) / "warmup")
        self._stall_guard = StallGuard(self._name)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run each request separately. A failed request gets an error response."""
        with self._stall_guard:
            return [self._run(request) for request in requests]

    def _run(self, request: Any) -> Any:
        feeds = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        if missing := [name for name in self._inputs if name not in feeds]:
            return self._error(f"inputs {missing} are missing")
        names = list(request.requested_output_names())
        try:
            results = self._infer(feeds, names)
        except RuntimeError as error:
            return self._error(str(error))
        tensors = [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in zip(names, results, strict=True)]
        return pb_utils.InferenceResponse(output_tensors=tensors)

    def _infer(self, feeds: dict[str, npt.NDArray[Any]], outputs: list[str]) -> list[npt.NDArray[Any]]:
        try:
            results: list[npt.NDArray[Any]] = self._session.run(outputs, feeds, self._run_options)
        except Exception as error:  # ONNX Runtime has one class per status code
            shapes = {name: list(array.shape) for name, array in feeds.items()}
            raise RuntimeError(f"inference failed on inputs {shapes}: {error}") from error
        return results

    def _error(self, message: str) -> Any:
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{self._name}: {message}"))

    def _warm_up(self, samples: list[dict[str, Any]], data: Path) -> None:
        """Run the configuration's samples before Triton runs them again.

        Triton must not run a sample that fails: it would end with SIGSEGV and without a message. One thread appends the failed
        instance to a list, and another thread reads the last entry of the list, which may still be empty
        (``StopBackendThread`` in Triton's core).
        """
        for sample in samples:
            inputs = sample["inputs"]
            try:
                feeds = {name: _sample_input(inputs[name], data) for name in self._inputs if name in inputs}
                self._infer(feeds, self._outputs)
            except (OSError, ValueError, RuntimeError) as error:
                raise pb_utils.TritonModelException(f"{self._name}: warm-up {sample['name']!r}: {error}") from error

    def _check(self, kind: str, configured: list[dict[str, Any]], nodes: list[Any], batch: list[int]) -> None:
        """Raise unless the graph has every configured tensor with its type and a shape that the native backend accepts.

        An output's shape must equal the graph's, with -1 for dynamic sizes. An input may have a fixed size instead.
        """
        by_name = {node.name: node for node in nodes}
        for tensor in configured:
            name, dims = tensor["name"], [*batch, *(int(dim) for dim in tensor["dims"])]
            if name not in by_name:
                raise pb_utils.TritonModelException(
                    f"{self._name}: {kind} {name} of config.pbtxt is not in the graph, which has {sorted(by_name)}"
                )
            node = by_name[name]
            if node.type != ONNX_TYPES.get(tensor["data_type"]):
                raise pb_utils.TritonModelException(
                    f"{self._name}: {kind} {name} is {tensor['data_type']} in config.pbtxt and {node.type} in the graph"
                )
            shape = [size if isinstance(size, int) else -1 for size in node.shape]
            fits = len(dims) == len(shape) and all(
                dim == size or (size == -1 and kind == "input") for dim, size in zip(dims, shape, strict=True)
            )
            if not fits:
                raise pb_utils.TritonModelException(
                    f"{self._name}: {kind} {name} is {dims} in config.pbtxt and {shape} in the graph"
                )


def _sample_input(tensor: dict[str, Any], data: Path) -> npt.NDArray[Any]:
    """Return an input of a warm-up sample: the contents of its file, or zeros."""
    dtype = pb_utils.triton_string_to_numpy(tensor["data_type"])
    shape = [int(dim) for dim in tensor["dims"]]
    if file := tensor.get("input_data_file"):
        return np.fromfile(data / file, dtype).reshape(shape)
    return np.zeros(shape, dtype)


def session_options(config: dict[str, Any]) -> ort.SessionOptions:
    """Return ONNX Runtime's session options for a model's configuration, with the native backend's names and defaults.

    Raises:
        ValueError: the native backend refuses a setting, or it names an accelerator, which the embedded engine lacks.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    optimization = config.get("optimization", {})
    level = int(optimization.get("graph", {}).get("level", 0))
    options.graph_optimization_level = GRAPH_LEVELS.get(level, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    parameters = _parameters(config)
    mode = _integer(parameters, "execution_mode")
    if mode not in EXECUTION_MODES:
        raise ValueError(
            f"parameter execution_mode is {parameters['execution_mode']!r}; it must be 0 (sequential) or 1 (parallel)"
        )
    options.execution_mode = EXECUTION_MODES[mode]
    options.intra_op_num_threads = max(0, _integer(parameters, "intra_op_thread_count"))  # 0: ONNX Runtime chooses
    options.inter_op_num_threads = max(0, _integer(parameters, "inter_op_thread_count"))
    options.enable_cpu_mem_arena = _boolean(parameters, "enable_mem_arena")
    options.enable_mem_pattern = _boolean(parameters, "enable_mem_pattern")
    if DEVICE_ALLOCATOR in parameters:
        options.add_session_config_entry(DEVICE_ALLOCATOR, parameters[DEVICE_ALLOCATOR])
    for accelerator in optimization.get("execution_accelerators", {}).get("cpu_execution_accelerator", []):
        raise ValueError(
            f"execution_accelerators: the embedded engine has no CPU accelerator {accelerator.get('name', '')!r}; "
            "remove it, or use the Triton container if that has it"
        )
    for library in config.get("model_operations", {}).get("op_library_filename", []):
        _register(options, library)
    return options


def run_options(config: dict[str, Any]) -> ort.RunOptions:
    """Return ONNX Runtime's options for each run."""
    options = ort.RunOptions()
    if (devices := _parameters(config).get(ARENA_SHRINKAGE)) is not None:
        options.add_run_config_entry(ARENA_SHRINKAGE, devices)
    return options


def _parameters(config: dict[str, Any]) -> dict[str, str]:
    return {name: entry.get("string_value", "") for name, entry in config.get("parameters", {}).items()}


def _integer(parameters: dict[str, str], name: str) -> int:
    """Parse a parameter like the native backend's ``ParseIntValue``; 0 if it is not set."""
    text = parameters.get(name, "0")
    number = INTEGER.match(text)
    if not number or abs(int(number[1])) > INT32_MAX:
        raise ValueError(f"parameter {name} is {text!r}; it must be a whole number of 32 bits")
    return int(number[1])


def _boolean(parameters: dict[str, str], name: str) -> bool:
    """Parse a parameter like the native backend's ``ParseBoolValue``; true, ONNX Runtime's default, if it is not set."""
    text = parameters.get(name, "true")
    if text.lower() not in BOOLEANS:
        raise ValueError(f"parameter {name} is {text!r}; it must be true, on or 1, or false, off or 0")
    return BOOLEANS[text.lower()]


def _register(options: ort.SessionOptions, library: str) -> None:
    """Load a library of custom operators."""
    try:
        options.register_custom_ops_library(library)
    except Exception as error:  # ONNX Runtime has one class per status code
        raise ValueError(f"model_operations: {library} cannot be loaded: {error}") from error
