"""The model repository for a GPU, made by the commands of docs/Deployment.md."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from amira.models.configs import read_config
from amira.models.importing import GPU_PARAMETERS
from amira.models.repository import ROLES, recognisers
from amira.paths import MODEL_REPOSITORY, ROOT
from perf.networks import read_parameters

BATCH, BLOCK = (int(GPU_PARAMETERS[name]) for name in ("encoder_batch", "block_frames"))
"""Parameters of an import for a GPU."""

NUMPY = {pb.TYPE_FP16: np.float16, pb.TYPE_FP32: np.float32, pb.TYPE_INT64: np.int64}


@pytest.fixture(scope="module")
def section() -> str:
    """Return the section of the documentation."""
    (found,) = re.findall(
        r"^### Models for a GPU\n(.*?)^### ", (ROOT / "docs/Deployment.md").read_text(), re.MULTILINE | re.DOTALL
    )
    return str(found)


@pytest.fixture(scope="module")
def gpu_repo(section: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkout")
    shutil.copytree(MODEL_REPOSITORY, directory / MODEL_REPOSITORY.name)
    commands = "\n".join(re.findall(r"^\$ (.*)$", section.replace("\\\n", " "), re.MULTILINE))
    subprocess.run(["bash", "-euc", commands], cwd=directory, check=True)
    return directory / "gpu-repo"


def test_networks_are_on_the_gpu_once_each(gpu_repo: Path) -> None:
    for role in (*ROLES, "encoder_stream"):
        (group,) = read_config(gpu_repo / role / "config.pbtxt").instance_group
        assert (group.kind, group.count) == (pb.ModelInstanceGroup.KIND_GPU, 1)
    for model in ("rnnt_greedy_bls", "detokenizer"):
        assert read_config(gpu_repo / model / "config.pbtxt").instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU


def test_the_decoder_calls_one_encoder_with_many_windows(gpu_repo: Path) -> None:
    (recogniser,) = recognisers(gpu_repo)
    parameters = read_parameters(recogniser)
    assert (parameters.encoder_calls, parameters.encoder_batch, parameters.block_frames) == (1, BATCH, BLOCK)
    assert parameters.exclusive_encoder_model == parameters.whole_encoder_model == "encoder"
    assert not (gpu_repo / "encoder_exclusive").exists()


def test_the_sample_for_warming_up_is_a_full_batch_of_windows(gpu_repo: Path, section: str) -> None:
    (block,) = re.findall(r"^  (model_warmup \{.*?^  \})$", section, re.MULTILINE | re.DOTALL)
    path = gpu_repo / "encoder_stream" / "config.pbtxt"
    config = text_format.Parse(f"{path.read_text()}\n{block}", pb.ModelConfig())
    one, full = config.model_warmup
    for name, tensor in one.inputs.items():
        assert list(full.inputs[name].dims) == [BATCH, *tensor.dims[1:]]
        assert full.inputs[name].data_type == tensor.data_type
    given = {name: np.zeros(tensor.dims, NUMPY[tensor.data_type]) for name, tensor in full.inputs.items()}
    outputs, *_ = onnxruntime.InferenceSession(gpu_repo / "encoder_stream" / "1" / "model.onnx").run(None, given)
    assert len(outputs) == BATCH


def test_tensorrt_is_one_more_entry_of_the_encoders_optimization(gpu_repo: Path, section: str) -> None:
    (entry,) = re.findall(r"`(execution_accelerators .*?)`", section, re.DOTALL)
    path = gpu_repo / "encoder" / "config.pbtxt"
    text, before = path.read_text(), read_config(path).optimization
    (block,) = re.findall(r"^optimization \{.*\}$", text, re.MULTILINE)
    after = text_format.Parse(text.replace(block, f"{block[:-1]} {entry} }}"), pb.ModelConfig()).optimization
    assert after.execution_accelerators.gpu_execution_accelerator[0].name == "tensorrt"
    assert after.priority == before.priority == pb.ModelOptimizationPolicy.PRIORITY_MIN
