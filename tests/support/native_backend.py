"""Tensors that Triton's native ONNX Runtime backend would refuse."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from amira.models.configs import read_config


def refused_by_triton(repository: Path) -> list[str]:
    """Return the tensors that the backend would refuse, by the rules of its ValidateInputs and ValidateOutputs."""
    refused = []
    for path in sorted(repository.glob("*/config.pbtxt")):
        config = read_config(path)
        if config.backend != "onnxruntime":
            continue
        session = onnxruntime.InferenceSession(path.parent / "1" / "model.onnx", providers=["CPUExecutionProvider"])
        if len(config.input) != len(session.get_inputs()):
            refused.append(f"{config.name} inputs")
        for tensors, nodes, exact in (
            (config.input, session.get_inputs(), False),
            (config.output, session.get_outputs(), True),
        ):
            shapes = {node.name: [size if isinstance(size, int) else -1 for size in node.shape] for node in nodes}
            for tensor in tensors:
                pairs = zip(shapes[tensor.name], tensor.dims, strict=True)
                if not all(have == want or (have == -1 and not exact) for have, want in pairs):
                    refused.append(f"{config.name} {tensor.name}")
    return refused
