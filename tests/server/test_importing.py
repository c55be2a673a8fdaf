"""Users' own models: imported from directories and a hub, checked, and refused with a line that says what is wrong."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb
from typer.testing import CliRunner

from amira.cli import app
from amira.engine.errors import EngineError
from amira.models.check import check_frames, check_warmups
from amira.models.configs import ModelError, read_config
from amira.models.importing import NEMO_RECIPE, ImportOptions, import_model
from amira.models.repository import ROLES, recognisers
from amira.paths import MODEL_REPOSITORY
from amira.ports import LOOPBACK, free_ports
from tests.support.commands import edit, run_amira, triton_with
from tests.support.hub import hub_with
from tests.support.servers import KINDS
from tests.support.streaming_models import sentencepiece_model


async def test_import_check_and_list_from_the_command_line(sources: dict[str, Path], tmp_path: Path) -> None:
    into = tmp_path / "new"
    code, output, errors = await run_amira("models", "import", str(sources["tdt"]), "--name", "mine", "--into", str(into))
    assert code == 0, errors
    imported, check, serve = output.splitlines()
    assert imported == f"imported mine into {into}: tdt, 1024 pieces, 128 mel bins, durations 0,1,2,3,4"
    assert check == f"check it: amira models check {into}"
    assert serve == f"""serve it: AMIRA_MODEL_REPOSITORY={into} AMIRA_MODELS='{{"mine": "mine"}}' amira run"""
    assert {path.name for path in into.iterdir()} == {
        "mine", "mine_decoder", "mine_detokenizer", "mine_preprocessor", "mine_encoder", "mine_decoder_joint",
    }  # fmt: skip
    code, output, errors = await run_amira("models", "check", str(into))
    assert code == 0, errors
    assert "mine: 176000 samples" in output
    code, output, _ = await run_amira("models", "list", str(into))
    assert output == (
        "mine: tdt, 1024 pieces, 80 ms a frame, "
        "windows of 10.00 + 2.00 + 2.00 s, low 10.00 + 0.96 + 0.96 s, throughput 10.00 + 4.00 + 2.00 s\n"
    )
    code, _, errors = await run_amira("models", "import", str(sources["tdt"]), "--name", "mine", "--into", str(into))
    assert code == 2
    assert "exists; choose another --name" in errors


def test_vocabulary_of_a_tdt_that_is_too_short_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    """Not taken for a TDT with seven durations, unless that is what it is."""
    source = Path(shutil.copytree(sources["tdt"], tmp_path / "source"))
    lines = (source / "vocab.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (source / "vocab.txt").write_text("".join([*lines[:1022], "<blk> 1022\n"]), encoding="utf-8")
    message = refusal(source, tmp_path)
    assert (
        "has 1030 logits a frame; vocab.txt has 1023 pieces with the blank, so 7 more would be durations, expected 5" in message
    )
    found = import_model(str(source), "mine", tmp_path / "into", ImportOptions(durations=range(7)))
    assert found.parameters["durations"] == "0,1,2,3,4,5,6"


async def test_durations_are_taken_from_the_command_line(sources: dict[str, Path], tmp_path: Path) -> None:
    command = ["models", "import", str(sources["tdt"]), "--name", "mine", "--into", str(tmp_path / "new"), "--durations"]
    code, output, errors = await run_amira(*command, "0,1,2,4,8")
    assert code == 0, errors
    assert "128 mel bins, durations 0,1,2,4,8\n" in output
    (recogniser,) = recognisers(tmp_path / "new")
    assert recogniser.parameters["durations"] == "0,1,2,4,8"
    code, _, errors = await run_amira(*command, "0;1")
    assert (code, errors) == (2, "amira: --durations is '0;1'; expected whole numbers with commas, such as 0,1,2,3,4\n")


@pytest.mark.parametrize("frame_samples", ["640", "2560"])
def test_wrong_frame_length_is_refused(sources: dict[str, Path], tmp_path: Path, frame_samples: str) -> None:
    import_model(str(sources["rnnt"]), "mine", tmp_path)
    check_frames(*recognisers(tmp_path))
    edit(tmp_path / "mine_decoder" / "config.pbtxt", '"1280"', f'"{frame_samples}"')
    with pytest.raises(
        ModelError, match=f"frame_samples is '{frame_samples}'; .*encoder/1/model.onnx makes a frame of 1280 samples"
    ):
        check_frames(*recognisers(tmp_path))


def test_bundled_model_passes_the_checks() -> None:
    check_frames(*recognisers(MODEL_REPOSITORY))
    check_warmups(MODEL_REPOSITORY)


@pytest.mark.parametrize(
    ("role", "old", "new", "named"),
    [
        ("encoder", 'key: "length"', 'key: "lengths"', ["encoder", "one window", "length"]),
        ("decoder_joint", "dims: 256", "dims: 255", ["decoder_joint", "one block", "encoder_outputs", "255"]),
        ("preprocessor", 'input_data_file: "waveforms_lens"', 'input_data_file: "none"', ["preprocessor", "warmup/none"]),
    ],
)
async def test_failing_warmup_is_named(
    sources: dict[str, Path], tmp_path: Path, role: str, old: str, new: str, named: list[str]
) -> None:
    import_model(str(sources["rnnt"]), "mine", tmp_path)
    check_warmups(tmp_path)
    config = tmp_path / f"mine_{role}" / "config.pbtxt"
    head, warmup, tail = config.read_text().partition("model_warmup")
    config.write_text(head + warmup + tail.replace(old, new))
    code, _, errors = await run_amira("models", "check", str(tmp_path))
    assert code == 2
    for part in (f"{config}: warm-up ", *named):
        assert part in errors


async def test_gpu_model_is_refused_by_the_engine(sources: dict[str, Path], tmp_path: Path) -> None:
    code, output, _ = await run_amira(
        "models", "import", str(sources["rnnt"]), "--name", "mine", "--gpu", "--into", str(tmp_path)
    )
    assert code == 0
    assert "serve it: by a Triton with a GPU" in output
    assert "amira models check" not in output
    code, _, errors = await run_amira("models", "check", str(tmp_path))
    assert code == 2
    assert "KIND_GPU" in errors


async def test_broken_ensemble_does_not_hide_others(sources: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        import_model(str(sources["rnnt"]), name, tmp_path)
    (tmp_path / "b_encoder" / "1" / "model.onnx").unlink()
    code, output, errors = await run_amira("models", "list", str(tmp_path))
    assert code == 2
    assert [line.partition(":")[0] for line in output.splitlines()] == ["a", "c"]
    assert errors == f"amira: {tmp_path}/b_encoder/1/model.onnx is missing\n"


def test_missing_package_for_models_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = CliRunner().invoke(app, ["models", "list"])
    assert result.exit_code == 2
    assert result.stderr == "amira: onnx is not installed; this command needs pip install 'amira-asr[server,models]'\n"


async def test_imported_graphs_are_warmed_up(sources: dict[str, Path], tmp_path: Path) -> None:
    """On sizes of one window of this model. That Triton does run them shows by one that can't be run: it isn't loaded."""
    import_model(str(sources["tdt"]), "mine", tmp_path)
    for role, name, dims in (
        ("preprocessor", "waveforms", [1, 224000]),
        ("encoder", "audio_signal", [1, 128, 1400]),
        ("decoder_joint", "encoder_outputs", [1, 256, 25]),
        ("decoder_joint", "input_states_2", [2, 1, 640]),
    ):
        config = read_config(tmp_path / f"mine_{role}" / "config.pbtxt")
        assert list(config.model_warmup[0].inputs[name].dims) == dims
    joint = tmp_path / "mine_decoder_joint"
    config = read_config(joint / "config.pbtxt")
    config.model_warmup[0].inputs["targets"].input_data_file = "targets"
    (joint / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
    (joint / "warmup" / "targets").write_bytes((99_999).to_bytes(4, "little"))  # no such token
    with pytest.raises(EngineError, match=r"model mine_decoder_joint failed to load: .*warm-up 'one block': .*idx=99999"):
        async with triton_with(tmp_path):
            pass


def test_large_encoder_has_one_instance(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sessions(name: str) -> tuple[int, str, str]:
        import_model(str(source), name, tmp_path / "into")
        encoder, decoder = (
            read_config(tmp_path / "into" / f"{name}_{part}" / "config.pbtxt") for part in ("encoder", "decoder")
        )
        threads, calls = encoder.parameters["intra_op_thread_count"], decoder.parameters["encoder_calls"]
        return encoder.instance_group[0].count, threads.string_value, calls.string_value

    assert sessions("small") == (2, "1", "2")
    monkeypatch.setattr("amira.models.importing.LARGE_ENCODER_BYTES", 1_000_000)
    assert sessions("large") == (1, "0", "1"), "0 is all cores"


def test_gpu_instances(sources: dict[str, Path], tmp_path: Path) -> None:
    import_model(str(sources["rnnt"]), "mine", tmp_path, ImportOptions(gpu=True))
    for role in ROLES:
        (group,) = read_config(tmp_path / f"mine_{role}" / "config.pbtxt").instance_group
        assert (group.kind, group.count) == (pb.ModelInstanceGroup.KIND_GPU, 1)
    decoder = read_config(tmp_path / "mine_decoder" / "config.pbtxt")
    assert decoder.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU
    parameters = {name: decoder.parameters[name].string_value for name in ("encoder_calls", "encoder_batch", "block_frames")}
    assert parameters == {"encoder_calls": "1", "encoder_batch": "16", "block_frames": "32"}
    front_end = onnx.load(tmp_path / "mine_preprocessor" / "1" / "model.onnx")
    assert "STFT" not in {node.op_type for node in front_end.graph.node}, "for which CUDA has no kernel"


def keep_constants_apart(path: Path, name: str) -> None:
    """Turn a graph's weights into constants of operators, one of them in a branch, and keep those in a file beside it."""
    model = onnx.load(path)
    graph = model.graph
    constants = [onnx.helper.make_node("Constant", [], [weight.name], value=weight) for weight in graph.initializer]
    large = next(i for i, weight in enumerate(graph.initializer) if weight.ByteSize() > 100_000)
    output = onnx.helper.make_tensor_value_info(constants[large].output[0], graph.initializer[large].data_type, None)
    branch = onnx.helper.make_graph([constants[large]], "branch", [], [output])
    condition = onnx.helper.make_node("Constant", [], ["condition"], value=onnx.numpy_helper.from_array(np.array(True)))
    constants[large] = onnx.helper.make_node("If", ["condition"], [output.name], then_branch=branch, else_branch=branch)
    nodes = [condition, *constants, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.node.extend(nodes)
    onnx.external_data_helper.convert_model_to_external_data(model, location=name, convert_attribute=True)
    onnx.save(model, path)


@pytest.fixture
def hub(sources: dict[str, Path], tmp_path: Path) -> Iterator[str]:
    """URL of a server that answers as the Hugging Face hub does, with one repository: owner/model, the RNN-T.

    What keeps its weights apart has for them a name of its own, as large exports do.
    """
    published = Path(shutil.copytree(sources["rnnt"], tmp_path / "published", ignore=shutil.ignore_patterns("*.int8.*")))
    keep_constants_apart(published / "decoder_joint-model.onnx", "Constant_7_attr__value")
    with hub_with({"owner/model": published}) as url:
        yield url


async def test_hub_repository_is_downloaded(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    into = tmp_path / "into"
    code, output, errors = await run_amira("models", "import", "owner/model", "--into", str(into))
    assert code == 0, errors
    assert "imported model into" in output
    assert "100%" in errors, "its progress bar"
    for role in ("encoder", "decoder_joint"):
        onnxruntime.InferenceSession(into / f"model_{role}" / "1" / "model.onnx")  # with its weights
    assert [recogniser.name for recogniser in recognisers(into)] == ["model"]
    code, _, errors = await run_amira(
        "models", "import", "owner/model", "--name", "q", "--quantization", "int8", "--into", str(into)
    )
    assert code == 2
    assert "amira: owner/model on Hugging Face has no encoder-model.int8.onnx" in errors


async def test_unreachable_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://{LOOPBACK}:{free_ports(LOOPBACK, 1)[0]}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    code, _, errors = await run_amira("models", "import", "owner/model", "--into", str(tmp_path / "into"))
    assert code == 2
    (line,) = errors.splitlines()
    assert line.startswith("amira: owner/model is no directory here, and can't be had from Hugging Face: ")


@pytest.fixture
def source(sources: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a published model, for a test to break."""
    return Path(shutil.copytree(sources["rnnt"], tmp_path / "source"))


def refusal(source: Path | str, tmp_path: Path, quantization: str | None = None, name: str = "mine") -> str:
    into = tmp_path / "into"
    with pytest.raises(ModelError) as raised:
        import_model(str(source), name, into, ImportOptions(quantization))
    assert not into.exists() or not list(into.iterdir()), "something was left"
    return str(raised.value)


@pytest.mark.parametrize("name", ["encoder-model.onnx", "decoder_joint-model.onnx", "vocab.txt", "encoder-model.onnx.data"])
def test_missing_files_are_named(source: Path, tmp_path: Path, name: str) -> None:
    (source / name).unlink()
    message = refusal(source, tmp_path)
    assert name in message
    assert "missing" in message


def test_missing_variant_is_named(source: Path, tmp_path: Path) -> None:
    assert "encoder-model.fp16.onnx is missing" in refusal(source, tmp_path, "fp16")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"\xff\x00garbage", "encoder-model.onnx is no ONNX model: "),
        (b"", "encoder-model.onnx is no ONNX model: it has no outputs"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "encoder-model.onnx is a Git LFS pointer"),
    ],
)
def test_invalid_graph_is_named(source: Path, tmp_path: Path, data: bytes, named: str) -> None:
    (source / "encoder-model.onnx").write_bytes(data)
    assert named in refusal(source, tmp_path)


def test_truncated_weights_are_named(source: Path, tmp_path: Path) -> None:
    data = source / "encoder-model.onnx.data"
    size = data.stat().st_size
    os.truncate(data, 1000)
    assert f"encoder-model.onnx.data, which has 1000 bytes; expected {size} at least" in refusal(source, tmp_path)


def test_external_constants_are_weights_too(source: Path, tmp_path: Path) -> None:
    path = source / "decoder_joint-model.onnx"
    keep_constants_apart(path, "constants")
    size = (source / "constants").stat().st_size
    import_model(str(source), "mine", tmp_path / "all")
    onnxruntime.InferenceSession(tmp_path / "all" / "mine_decoder_joint" / "1" / "model.onnx")
    os.truncate(source / "constants", size - 1)
    assert f"constants, which has {size - 1} bytes; expected {size} at least" in refusal(source, tmp_path)


def test_weights_named_as_the_copied_graph_are_refused(source: Path, tmp_path: Path) -> None:
    path = source / "decoder_joint-model.onnx"
    keep_constants_apart(path, "model.onnx")
    assert f"{path} keeps weights in model.onnx" in refusal(source, tmp_path)


def test_source_and_copy_share_no_file(source: Path, tmp_path: Path) -> None:
    """Neither sees what is written to the other; and onnx refuses weights in a file with two names."""
    import_model(str(source), "mine", tmp_path / "into")
    assert {path.stat().st_nlink for path in [*source.iterdir(), *(tmp_path / "into").rglob("*.*")] if path.is_file()} == {1}


@pytest.mark.parametrize("outside", ["../../outside", "/outside", "folder/inside"])
def test_graph_with_files_elsewhere_is_refused(source: Path, tmp_path: Path, outside: str) -> None:
    path = source / "encoder-model.onnx"
    graph = onnx.load(path, load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = outside
    path.write_bytes(graph.SerializeToString())
    assert f"keeps weights in {outside!r}; expected a file beside it" in refusal(source, tmp_path)


def test_swapped_graphs_are_named(source: Path, tmp_path: Path) -> None:
    shutil.copy(source / "decoder_joint-model.onnx", source / "encoder-model.onnx")
    message = refusal(source, tmp_path)
    assert "encoder-model.onnx: input audio_signal is missing; the graph has encoder_outputs" in message


def test_encoder_of_another_model_is_refused(source: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(sources["tdt"] / "encoder-model.onnx", source / "encoder-model.onnx")
    message = refusal(source, tmp_path)
    assert "input audio_signal is FLOAT [?, 128, ?]; expected FLOAT [?, 80, ?]" in message


def _in_half_precision(graph: onnx.GraphProto) -> None:
    for tensor in (*graph.input, *graph.output):
        if tensor.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            tensor.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


def _with_one_state(graph: onnx.GraphProto) -> None:
    for tensors in (graph.input, graph.output):
        tensors.remove(next(tensor for tensor in tensors if tensor.name.endswith("put_states_2")))


def _with_states_of_two_sizes(graph: onnx.GraphProto) -> None:
    state = next(tensor for tensor in graph.input if tensor.name == "input_states_2")
    state.type.tensor_type.shape.dim[2].dim_value = 320


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_in_half_precision, "input encoder_outputs is FLOAT16 [?, 256, ?]; expected FLOAT [?, 256, ?]"),
        (_with_one_state, "input input_states_2 is missing; the graph has encoder_outputs, targets, target_length, "),
        (_with_states_of_two_sizes, "input input_states_2 is FLOAT [1, ?, 320]; expected FLOAT [1, ?, 640]"),
    ],
)
def test_wrong_tensors_are_named(source: Path, tmp_path: Path, change: Callable[[onnx.GraphProto], None], named: str) -> None:
    path = source / "decoder_joint-model.onnx"
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    assert f"{path}: {named}" in refusal(source, tmp_path)


def _open(tensors: str, name: str, axis: int) -> Callable[[onnx.GraphProto], None]:
    """Leaves a tensor's size open, as some exports do."""

    def change(graph: onnx.GraphProto) -> None:
        tensor = next(tensor for tensor in getattr(graph, tensors) if tensor.name == name)
        tensor.type.tensor_type.shape.dim[axis].dim_param = "open"

    return change


def _edit_graph(path: Path, *changes: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(path, load_external_data=False)
    for change in changes:
        change(model.graph)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("role", "changes", "named"),
    [
        ("encoder", [_open("input", "audio_signal", 1)], "input audio_signal leaves its size open"),
        ("decoder_joint", [_open("input", "input_states_1", 2)], "input input_states_1 leaves its size open"),
        ("decoder_joint", [_open("input", "encoder_outputs", 1)], None),  # the encoder tells
        ("decoder_joint", [_open("output", "outputs", 3)], None),  # a step tells
    ],
)
def test_sizes_that_graphs_leave_open(
    source: Path, tmp_path: Path, role: str, changes: list[Callable[[onnx.GraphProto], None]], named: str | None
) -> None:
    (source / "config.json").unlink()
    _edit_graph(source / f"{role}-model.onnx", *changes)
    if named:
        assert f"{source}/{role}-model.onnx: {named}; export it with fixed sizes" in refusal(source, tmp_path)
    else:
        found = import_model(str(source), "mine", tmp_path / "into")
        assert (found.encoder_size, found.hidden, found.pieces, found.durations) == (256, 640, 513, ())


def test_size_that_no_graph_fixes_is_refused(source: Path, tmp_path: Path) -> None:
    _edit_graph(source / "encoder-model.onnx", _open("output", "outputs", 1))
    _edit_graph(source / "decoder_joint-model.onnx", _open("input", "encoder_outputs", 1))
    assert "input encoder_outputs leaves its size open" in refusal(source, tmp_path)


def test_encoder_without_a_front_end_is_refused(source: Path, tmp_path: Path) -> None:
    """Its graph may leave them open: then config.json tells."""
    (source / "config.json").write_text('{"features_size": 64}')
    _edit_graph(source / "encoder-model.onnx", _open("input", "audio_signal", 1))
    assert "takes 64 features; front ends exist for 80 and 128" in refusal(source, tmp_path)


def test_vocabulary_of_another_model_is_refused(source: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(sources["tdt"] / "vocab.txt", source / "vocab.txt")
    message = refusal(source, tmp_path)
    assert "output outputs has 513 logits a frame; vocab.txt has 1025 pieces" in message


@pytest.mark.parametrize("pieces", [300, 511, 512, 514])
def test_vocabulary_of_another_length_is_refused(source: Path, tmp_path: Path, pieces: int) -> None:
    """Too short by two, or by hundreds, it makes no TDT of an RNN-T."""
    (source / "config.json").unlink()
    lines = [f"x {index}\n" for index in range(pieces - 1)] + [f"<blk> {pieces - 1}\n"]
    (source / "vocab.txt").write_text("".join(lines))
    assert f"has 513 logits a frame; vocab.txt has {pieces} pieces" in refusal(source, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("<blk> 512\n", "", "ends with 'tit 511'; expected the blank, '<blk> 512', behind it"),
        ("<unk> 0", "<unk> 1", "vocab.txt line 1 is '<unk> 1'; expected"),
    ],
)
def test_malformed_vocabularies_are_named(source: Path, tmp_path: Path, old: str, new: str, named: str) -> None:
    edit(source / "vocab.txt", old, new)
    assert named in refusal(source, tmp_path)


@pytest.mark.parametrize(("data", "named"), [(b"", "is empty"), (b"\xe9 0\n<blk> 1\n", "is no UTF-8 text")])
def test_invalid_vocabulary_is_named(source: Path, tmp_path: Path, data: bytes, named: str) -> None:
    (source / "vocab.txt").write_bytes(data)
    assert f"vocab.txt {named}" in refusal(source, tmp_path)


def test_piece_may_be_a_line_separator(source: Path, tmp_path: Path) -> None:
    edit(source / "vocab.txt", "tit 511", "\u2028 511")
    import_model(str(source), "mine", tmp_path / "into")
    assert [recogniser.name for recogniser in recognisers(tmp_path / "into")] == ["mine"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            '{"model_type": "nemo-conformer-tdt"}',
            "model_type is 'nemo-conformer-tdt', but decoder_joint-model.onnx and vocab.txt",
        ),
        ('{"subsampling_factor": 0}', "subsampling_factor is 0: "),
        ('{"subsampling_factor": 4}', "subsampling_factor is 4, but encoder-model.onnx makes a frame of 8 feature frames"),
        ('{"max_tokens_per_step": "many"}', "max_tokens_per_step is 'many': "),
        ("{", "Invalid JSON"),
        ("[]", "should be an object"),
    ],
)
def test_wrong_configurations_of_a_source_are_named(source: Path, tmp_path: Path, text: str, named: str) -> None:
    (source / "config.json").write_text(text)
    message = refusal(source, tmp_path)
    assert "config.json: " in message
    assert named in message


def test_configuration_of_a_source_is_used(source: Path, tmp_path: Path) -> None:
    """What other tools write there is ignored."""
    (source / "config.json").write_text('{"model_type": "parakeet", "subsampling_factor": 8, "max_tokens_per_step": 7}')
    import_model(str(source), "mine", tmp_path / "into")
    (recogniser,) = recognisers(tmp_path / "into")
    assert recogniser.describe().startswith("mine: rnnt, 512 pieces, 80 ms a frame, windows of 10.00 + 2.00 + 2.00 s, low ")
    assert recogniser.parameters["max_symbols_per_step"] == "7"


def test_nemo_files_get_the_recipe(tmp_path: Path) -> None:
    """Lines of Python that can be copied; also where the file lies in a directory. They write all that an import reads."""
    (tmp_path / "source").mkdir()
    inside = tmp_path / "source" / "parakeet.nemo"
    inside.touch()
    for source, path in (("other.nemo", "other.nemo"), (str(inside.parent), str(inside))):
        _, *lines = refusal(source, tmp_path).splitlines()
        program = "\n".join(line.strip() for line in lines)
        compile(program, "recipe", "exec")
        assert f"restore_from({path!r})" in program
        assert 'm.export("model.onnx")' in program


def test_recipe_writes_what_an_import_reads(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's own lines, on what NeMo's classes have of them."""
    _, *lines = NEMO_RECIPE.format(path="x.nemo").splitlines()
    tokens = [line.rpartition(" ")[0] for line in (sources["tdt"] / "vocab.txt").read_text(encoding="utf-8").splitlines()[:-1]]
    serialized = sentencepiece_model(tokens)
    model = SimpleNamespace(
        tokenizer=SimpleNamespace(vocab=tokens, tokenizer=SimpleNamespace(serialized_model_proto=lambda: serialized)),
        cfg=SimpleNamespace(
            model_defaults={"tdt_durations": [0, 1, 2, 4, 8]},
            preprocessor=SimpleNamespace(features=128),
            encoder=SimpleNamespace(subsampling_factor=8),
        ),
    )
    exported = Path(shutil.copytree(sources["tdt"], tmp_path / "exported"))
    for name in ("vocab.txt", "config.json"):
        (exported / name).unlink()
    monkeypatch.chdir(exported)
    exec("\n".join(["import json, pathlib", *(line.strip() for line in lines[2:])]), {"m": model})  # noqa: S102
    found = import_model(str(exported), "mine", tmp_path / "into")
    assert (found.kind, found.durations, found.features, found.pieces) == ("tdt", (0, 1, 2, 4, 8), 128, 1025)
    assert (exported / "tokenizer.model").read_bytes() == serialized
    assert "piece_scores" in recognisers(tmp_path / "into")[0].parameters


def test_invalid_names_and_places_are_refused(source: Path, tmp_path: Path) -> None:
    assert "neither a directory nor the id" in refusal(tmp_path / "nothing", tmp_path)
    for name in ("a/b", "..", ".", "", "-a", "a" * 41):
        assert f"name {name!r} is not allowed" in refusal(source, tmp_path, name=name)
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="can't be written: Not a directory"):
        import_model(str(source), "mine", tmp_path / "file")


def written(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written or replaced, and not when it is read."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def test_existing_models_are_not_touched(sources: dict[str, Path], tmp_path: Path) -> None:
    """Nor are parts whose ensemble has another name or is gone."""
    import_model(str(sources["rnnt"]), "mine", tmp_path)
    shutil.rmtree(tmp_path / "mine")
    before = {path: written(path) for path in tmp_path.rglob("*")}
    for name, named in (("mine", "mine_decoder"), ("mine_encoder", "mine_encoder")):
        with pytest.raises(ModelError, match=f"/{named} exists; choose another --name, or remove it"):
            import_model(str(sources["tdt"]), name, tmp_path)
    assert {path: written(path) for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("asr_ensemble", 'model_name: "detokenizer"', 'model_name: "nobody"', "step nobody is no model of this repository"),
        ("asr_ensemble", 'model_name: "detokenizer"', 'model_name: "encoder"', "0 of its steps have a vocabulary; expected 1"),
        ("rnnt_greedy_bls", 'string_value: "encoder"', 'string_value: "coder"', "parameter whole_encoder_model is 'coder'"),
        ("rnnt_greedy_bls", 'string_value: "encoder_stream"', 'string_value: "coder"', "parameter encoder_model is 'coder'"),
        ("rnnt_greedy_bls", 'string_value: "cached"', 'string_value: "windowed"', "encoder_kind is 'windowed'"),
        ("rnnt_greedy_bls", '"encoder_exclusive"', '"nobody"', "parameter exclusive_encoder_model is 'nobody'"),
        (
            "rnnt_greedy_bls",
            '"encoder_exclusive"',
            '"preprocessor"',
            "preprocessor/1/model.onnx: input audio_signal is missing",
        ),
        (
            "rnnt_greedy_bls",
            'string_value: "preprocessor"',
            'string_value: "encoder"',
            "input waveforms is missing",
        ),
        ("rnnt_greedy_bls", '"blank" value: { string_value: "512"', '"blank" value: { string_value: "511"', "blank is '511'"),
        (
            "rnnt_greedy_bls",
            'string_value: "rnnt"',
            'string_value: "tdt"',
            "kind is 'tdt'; its graphs and vocabulary have 'rnnt'",
        ),
        (
            "rnnt_greedy_bls",
            'string_value: "1536"',
            'string_value: "96 ms"',
            "frame_samples is '96 ms'; expected a whole number",
        ),
        (
            "rnnt_greedy_bls",
            '"44,24,398785"',
            '"44,24"',
            "low_latency_features is '44,24'; expected three whole numbers with commas",
        ),
        ("encoder", "[ -1, 256, -1 ]", "[ -1, 255, -1 ]", "output outputs is FLOAT [?, 256, ?]; expected FLOAT [?, 255, ?]"),
        ("encoder", "max_batch_size: 0", "max_batch_size 0", "encoder/config.pbtxt"),
        ("detokenizer", "../vocab.txt", "vocab.txt", "detokenizer/vocab.txt is missing"),
    ],
)
def test_broken_repositories_are_named(tmp_path: Path, file: str, old: str, new: str, named: str) -> None:
    repository = tmp_path / "models"
    shutil.copytree(MODEL_REPOSITORY, repository, ignore=shutil.ignore_patterns("__pycache__"))
    assert [recogniser.name for recogniser in recognisers(repository)] == ["asr_ensemble"]
    edit(repository / file / "config.pbtxt", old, new)
    with pytest.raises(ModelError) as raised:
        recognisers(repository)
    assert named in str(raised.value)


def test_front_end_and_encoder_must_fit(sources: dict[str, Path], tmp_path: Path) -> None:
    for kind in KINDS:
        import_model(str(sources[kind]), kind, tmp_path)
    edit(tmp_path / "rnnt_decoder" / "config.pbtxt", '"rnnt_preprocessor"', '"tdt_preprocessor"')
    with pytest.raises(ModelError, match=r"input audio_signal is FLOAT \[\?, 80, \?\]; expected FLOAT \[\?, 128, \?\]"):
        recognisers(tmp_path)


def test_durations_of_a_repository_may_be_others(sources: dict[str, Path], tmp_path: Path) -> None:
    """The graphs tell how many there are, not which."""
    import_model(str(sources["tdt"]), "mine", tmp_path)
    decoder = tmp_path / "mine_decoder" / "config.pbtxt"
    edit(decoder, '"0,1,2,3,4"', '"0,1,2,4,8"')
    assert [recogniser.name for recogniser in recognisers(tmp_path)] == ["mine"]
    edit(decoder, '"0,1,2,4,8"', '"0,1,2,4"')
    with pytest.raises(ModelError, match="parameter durations is '0,1,2,4'"):
        recognisers(tmp_path)
