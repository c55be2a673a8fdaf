"""Directories as strangers have them: the names of published files, half of a download, archives, vocabularies of all kinds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from amira.models.configs import ModelError
from amira.models.importing import ImportOptions, import_model
from amira.models.repository import recognisers
from amira.models.sources import choose_graphs, locate
from amira.models.vocabularies import read_pieces, to_convention
from tests.support.streaming_models import IcefallShape, NemoShape, build_icefall, build_nemo_cached

PARTS = ("encoder", "decoder", "joiner")

ZIPFORMER_EN = [
    *(f"{part}-epoch-99-avg-1-chunk-16-left-{left}{suffix}" for part in PARTS for left in (64, 128)
      for suffix in (".onnx", ".int8.onnx")),
    "tokens.txt", "README.md",
]  # fmt: skip
"""csukuangfj/sherpa-onnx-streaming-zipformer-en-2023-06-26 on Hugging Face."""


@pytest.mark.parametrize(
    ("names", "quantization", "files", "chosen"),
    [
        (["encoder.int8.onnx", "decoder.int8.onnx", "joiner.int8.onnx"], "int8", "", [".int8", ".int8", ".int8"]),
        (["encoder.int8.onnx", "decoder.int8.onnx", "joiner.int8.onnx"], None, "", [".int8", ".int8", ".int8"]),
        (["encoder.int8.onnx", "decoder.onnx", "joiner.int8.onnx"], None, "", [".int8", "", ".int8"]),
        (["encoder.int8.onnx", "decoder.onnx", "joiner.int8.onnx"], "int8", "", [".int8", "", ".int8"]),
        (["encoder.onnx", "encoder.fp16.onnx", "decoder.onnx", "joiner.onnx"], None, "", ["", "", ""]),
        (["encoder.onnx", "encoder.fp16.onnx", "decoder.onnx", "joiner.onnx"], "fp16", "", [".fp16", "", ""]),
        (ZIPFORMER_EN, None, "left-128", ["-epoch-99-avg-1-chunk-16-left-128"] * 3),
        (ZIPFORMER_EN, "int8", "left-64", ["-epoch-99-avg-1-chunk-16-left-64.int8"] * 3),
        (["encoder-model-int8.onnx", "decoder-int8.onnx", "joiner_int8.onnx"], None, "", ["-model-int8", "-int8", "_int8"]),
    ],
)
def test_published_names_are_found(names: Sequence[str], quantization: str | None, files: str, chosen: Sequence[str]) -> None:
    expected = {part: f"{part}{suffix}.onnx" for part, suffix in zip(PARTS, chosen, strict=True)}
    assert choose_graphs(names, quantization, files, "source") == expected


@pytest.mark.parametrize(
    ("names", "quantization", "named"),
    [
        (
            ZIPFORMER_EN,
            None,
            "left-128.onnx and decoder-epoch-99-avg-1-chunk-16-left-64.onnx; choose one by --files with a part",
        ),
        (
            ["encoder.int8.onnx", "encoder.fp16.onnx"],
            None,
            "has the encoder as fp16 and int8; choose one by --quantization",
        ),
    ],
)
def test_choice_is_left_to_the_user(names: Sequence[str], quantization: str | None, named: str) -> None:
    with pytest.raises(ModelError) as raised:
        choose_graphs(names, quantization, "", "source")
    assert named in str(raised.value)


@pytest.mark.parametrize(
    ("names", "quantization", "named"),
    [
        ([], None, "encoder-model.onnx is missing"),
        (["encoder.onnx"], None, "decoder_joint-model.onnx is missing; there are encoder.onnx"),
        (["encoder.onnx", "decoder.onnx"], None, "joiner.onnx is missing; there are decoder.onnx, encoder.onnx"),
        (["encoder.onnx", "decoder.onnx", "joiner.onnx"], "int8", "encoder.int8.onnx is missing; there are decoder.onnx, enc"),
        (
            ["encoder.onnx.incomplete", "decoder.onnx", "joiner.onnx"],
            None,
            "encoder.onnx is missing; there are decoder.onnx, enc",
        ),
        (
            ["encoder.ort", "decoder.ort", "joiner.ort"],
            None,
            "encoder-model.onnx is missing; there are decoder.ort, encoder.ort",
        ),
        (["sherpa/encoder.onnx", "sherpa/decoder.onnx"], None, "/sherpa has .onnx files; import that directory"),
    ],
)
def test_missing_files_are_named_beside_what_is_there(
    tmp_path: Path, names: Sequence[str], quantization: str | None, named: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ModelError) as raised:
        locate(str(tmp_path), quantization)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_archive_is_named(tmp_path: Path) -> None:
    archive = tmp_path / "sherpa-onnx-streaming-zipformer-en-2023-06-26.tar.bz2"
    archive.touch()
    with pytest.raises(ModelError, match=r"tar.bz2 is an archive; unpack it, and import the directory with the .onnx files"):
        locate(str(archive), None)


@pytest.mark.parametrize("part", PARTS)
def test_half_a_download_is_named(tmp_path: Path, part: str) -> None:
    build_nemo_cached(tmp_path / "source", NemoShape())
    path = tmp_path / "source" / f"{part}.onnx"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match=f"{part}.onnx is no ONNX model: ") as raised:
        import_model(str(tmp_path / "source"), "mine", tmp_path / "into")
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "into").glob("*"))


@pytest.mark.parametrize(
    ("size", "named"), [(0, "which has 0 bytes; expected [0-9]+ at least"), (None, "which is missing beside it")]
)
def test_half_a_download_of_weights_is_named(tmp_path: Path, size: int | None, named: str) -> None:
    build_nemo_cached(tmp_path / "source", NemoShape(), external=True)
    weights = tmp_path / "source" / "encoder.onnx.data"
    if size is None:
        weights.unlink()
    else:
        weights.write_bytes(b"")
    with pytest.raises(ModelError, match=f"encoder.onnx keeps weights in encoder.onnx.data, {named}"):
        import_model(str(tmp_path / "source"), "mine", tmp_path / "into")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("<blk> 0\n▁a 1\n▁b 2\n", ["<blk>", "▁a", "▁b"]),
        ("\ufeff<blk> 0\n▁a 1\n▁b 2\n", ["<blk>", "▁a", "▁b"]),
        ("<blk> 0\r\n▁a 1\r\n▁b 2\r\n", ["<blk>", "▁a", "▁b"]),
        ("<blk>\t0\n▁a\t1\n▁b\t2", ["<blk>", "▁a", "▁b"]),
        ("▁b 2\n<blk> 0\n▁a 1\n\n", ["<blk>", "▁a", "▁b"]),
        ("<blk>\n▁a\n1\n", ["<blk>", "▁a", "1"]),
        ("<blk> 0\n 1\n▁b 2\n", ["<blk>", " ", "▁b"]),
        ("<blk> 0\n▁a 1\n▁b 2\n#0 3\n#1 4\n", ["<blk>", "▁a", "▁b"]),
    ],
)
def test_vocabularies_are_read(tmp_path: Path, text: str, pieces: list[str]) -> None:
    """With or without ids, a byte order mark, tabs and returns; in any order."""
    path = tmp_path / "tokens.txt"
    path.write_bytes(text.encode())
    assert read_pieces(path) == pieces


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("<blk> 0\n▁a\n▁b 2\n", "line '▁a' has no id, and others have one"),
        ("<blk> 0\n▁a 1\n▁b 1\n", "'▁a' and '▁b' have the id 1"),
        ("<blk> 0\n▁b 2\n", "has 2 pieces with ids up to 2; expected ids from 0 on"),
        ("", "has 0 pieces"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer instead of the file"),
    ],
)
def test_malformed_vocabularies_are_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "tokens.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelError) as raised:
        read_pieces(path)
    assert named in str(raised.value)


@pytest.mark.parametrize(
    ("pieces", "blank", "expected"),
    [
        (["<blk>", "a", "b"], 0, ["a", "b", "<blk>"]),
        (["<blank>", "a", "b"], 0, ["a", "b", "<blk>"]),
        (["a", "b", "<blank>"], 2, ["a", "b", "<blk>"]),
        (["a", "b"], 2, ["a", "b", "<blk>"]),
    ],
)
def test_blank_becomes_the_last_piece(pieces: list[str], blank: int, expected: list[str]) -> None:
    assert to_convention(pieces, 3, blank, Path("tokens.txt")) == expected


@pytest.mark.parametrize("pieces", [["<blk>", "a", "b"], ["a", "<blank>", "b"], ["a", "b", "c"]])
def test_last_piece_that_is_no_blank_is_named(pieces: list[str]) -> None:
    """As many pieces as the joint network has outputs, but no blank behind them: the last piece would be lost."""
    with pytest.raises(
        ModelError, match=rf"tokens.txt has '{pieces[2]}' at 2; expected the blank there, <blk> or <blank> or <eps>"
    ):
        to_convention(pieces, 3, 2, Path("tokens.txt"))


def _fix_batch(path: Path, name: str) -> None:
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.input if tensor.name == name)
    tensor.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, path)


def test_decoder_of_one_stream_is_refused(tmp_path: Path) -> None:
    """The decoder shares calls among streams, so a batch fixed to 1 can't be kept as an encoder's can."""
    build_icefall(tmp_path / "icefall", IcefallShape())
    build_nemo_cached(tmp_path / "nemo", NemoShape())
    for name, fixed in (("icefall", "y"), ("nemo", "targets")):
        _fix_batch(tmp_path / name / "decoder.onnx", fixed)
        with pytest.raises(ModelError, match=f"decoder.onnx: input {fixed} has a batch of 1; expected any, export it with"):
            import_model(str(tmp_path / name), "mine", tmp_path / "into")


def test_encoder_of_one_stream_is_kept(tmp_path: Path) -> None:
    build_icefall(tmp_path / "source", IcefallShape(seed=1, blank_bias=8.0))
    path = tmp_path / "source" / "encoder.onnx"
    model = onnx.load(path)
    for tensor in (*model.graph.input, *model.graph.output):
        for dim in tensor.type.tensor_type.shape.dim:
            if dim.dim_param == "N":
                dim.dim_value = 1
    onnx.save(model, path)
    import_model(str(tmp_path / "source"), "mine", tmp_path / "into")
    (recogniser,) = recognisers(tmp_path / "into")
    assert recogniser.parameters["encoder_batch"] == "1"


@pytest.mark.parametrize("layout", ["icefall", "nemo"])
def test_graph_in_half_precision_is_refused(tmp_path: Path, layout: str) -> None:
    if layout == "icefall":
        build_icefall(tmp_path / "source", IcefallShape())
    else:
        build_nemo_cached(tmp_path / "source", NemoShape())
    path = tmp_path / "source" / "encoder.onnx"
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, path)
    name = model.graph.input[0].name
    with pytest.raises(
        ModelError, match=f"encoder.onnx: input {name} is FLOAT16; expected FLOAT: convert it with float inputs"
    ):
        import_model(str(tmp_path / "source"), "mine", tmp_path / "into", ImportOptions())


def test_weights_in_half_precision_are_taken(tmp_path: Path) -> None:
    """What keep_io_types of onnxconverter-common gives: floats outside, halves inside."""
    build_nemo_cached(tmp_path / "source", NemoShape(seed=2, blank_bias=6.0))
    path = tmp_path / "source" / "joiner.onnx"
    model = onnx.load(path)
    for tensor in [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT]:
        halves = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(halves, f"{name}_half"))
        model.graph.node.insert(0, onnx.helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))
    onnx.save(model, path)
    found = import_model(str(tmp_path / "source"), "mine", tmp_path / "into")
    assert found.pieces == 41
