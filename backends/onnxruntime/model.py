"""ONNX Runtime for the embedded Triton, as a Python-based backend.

The engine that comes from PyPI has no native ONNX Runtime backend. A model repository whose models say
``backend: "onnxruntime"`` loads here unchanged: this file takes the native backend's place, and the stock Triton container,
which has the native one, never sees it. Of the native backend's settings it honours ``instance_group`` (CPU), ``optimization
{ graph { level } }`` and the parameters ``intra_op_thread_count``, ``inter_op_thread_count`` and ``execution_mode``. It also
takes ``optimization { priority }`` as a wish about the processor: a model of ``PRIORITY_MIN`` gives way to all others.
"""

from __future__ import annotations

import json
import os
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
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
}
"""The native backend's numbers for ``optimization { graph { level } }``."""

LOW_NICENESS = 5
"""Of a model of ``PRIORITY_MIN``: a third of the time of one that wants the same processor (sched(7): 1.25 a step)."""


class TritonPythonModel:
    """One instance of one ONNX model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open ``model.onnx``, hold its tensors against ``config.pbtxt``, and warm it up.

        Raises:
            pb_utils.TritonModelException: the file is missing or no model, the configuration's tensors are not its own, or a
                sample of ``model_warmup`` can't be run.
        """
        config = json.loads(args["model_config"])
        self._name = args["model_name"]
        if args["model_instance_kind"] == "GPU":
            raise pb_utils.TritonModelException(
                f"{self._name}: instance_group is KIND_GPU, but the embedded engine has no GPU; use the Triton container"
            )
        filename = config.get("default_model_filename") or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / filename
        if not path.is_file():
            raise pb_utils.TritonModelException(f"{self._name}: {path} is missing")
        if config.get("optimization", {}).get("priority") == "PRIORITY_MIN":
            os.nice(LOW_NICENESS)  # before the session's threads begin, which inherit it
        try:
            self._session = ort.InferenceSession(path, session_options(config), providers=["CPUExecutionProvider"])
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
        """Run each request by itself; one that fails gets its own error."""
        with self._stall_guard:
            return [self._run(request) for request in requests]

    def _run(self, request: Any) -> Any:
        feeds = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        if missing := [name for name in self._inputs if name not in feeds]:
            return self._error(f"inputs {missing} are missing")
        names = request.requested_output_names()
        try:
            results = self._infer(feeds, names)
        except RuntimeError as error:
            return self._error(str(error))
        tensors = [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in zip(names, results, strict=True)]
        return pb_utils.InferenceResponse(output_tensors=tensors)

    def _infer(self, feeds: dict[str, npt.NDArray[Any]], outputs: list[str]) -> list[npt.NDArray[Any]]:
        try:
            results: list[npt.NDArray[Any]] = self._session.run(outputs, feeds)
        except Exception as error:  # ONNX Runtime has a class of its own for every status code
            shapes = {name: list(array.shape) for name, array in feeds.items()}
            raise RuntimeError(f"inference failed on inputs {shapes}: {error}") from error
        return results

    def _error(self, message: str) -> Any:
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{self._name}: {message}"))

    def _warm_up(self, samples: list[dict[str, Any]], data: Path) -> None:
        """Run the configuration's samples, before Triton does so again.

        Triton itself must never see one fail: the thread that reports the failure puts its instance back into a list, another
        thread meanwhile takes the last of that list to end it, and where it is still empty Triton dies by SIGSEGV without a
        word (``StopBackendThread`` in its core).
        """
        for sample in samples:
            inputs = sample["inputs"]
            try:
                feeds = {name: _sample_input(inputs[name], data) for name in self._inputs if name in inputs}
                self._infer(feeds, self._outputs)
            except (OSError, ValueError, RuntimeError) as error:
                raise pb_utils.TritonModelException(f"{self._name}: warm-up {sample['name']!r}: {error}") from error

    def _check(self, kind: str, configured: list[dict[str, Any]], nodes: list[Any], batch: list[int]) -> None:
        """Raise unless every configured tensor is in the graph with its type and a shape that the native backend takes.

        It wants an output's shape as it is, -1 for what the graph leaves open; an input may be narrower than the graph's.
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
    """An input of a warm-up sample: what its file holds, else zeros."""
    dtype = pb_utils.triton_string_to_numpy(tensor["data_type"])
    shape = [int(dim) for dim in tensor["dims"]]
    if file := tensor.get("input_data_file"):
        return np.fromfile(data / file, dtype).reshape(shape)
    return np.zeros(shape, dtype)


def session_options(config: dict[str, Any]) -> ort.SessionOptions:
    """ONNX Runtime options from a model's configuration, by the native backend's names and defaults."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", 0))
    options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", 0))
    if parameters.get("execution_mode") == "1":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    level = config.get("optimization", {}).get("graph", {}).get("level", 0)
    options.graph_optimization_level = GRAPH_LEVELS.get(int(level), ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    return options
