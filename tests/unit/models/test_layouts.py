"""Conversion of published layouts: the graphs compute the same, and vocabularies become text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import kaldi_native_fbank
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from amira.models.check import check_frames, check_warmups
from amira.models.configs import ModelError
from amira.models.front_ends import Fbank, fbank, nemo_log_mel
from amira.models.importing import ImportOptions, import_model
from amira.models.repository import recognisers
from amira.models.surgery import EditedGraph
from amira.models.vocabularies import BYTE_BPE_CHARACTERS, byte_bpe_text, read_pieces, to_convention
from tests.support.cache import built
from tests.support.commands import edit
from tests.support.native_backend import refused_by_triton
from tests.support.published import NEMO, SOURCES, ZIPFORMER, imported, published
from tests.support.recogniser import open_graph
from tests.support.servers import read_recordings
from tests.support.streaming_models import IcefallShape, NemoShape, build_icefall, build_nemo_cached, write_tokens
from vocabulary import read_vocabulary
from words import text_of, words_of

Floats = npt.NDArray[np.float32]

SPEECH = read_recordings()["2033-164914-0000"].astype(np.float32) / np.float32(32768)
HOP = 160
TOLERANCE = 2e-3
"""Of log-mel values against kaldi-native-fbank, which sums in another order; they range from -16 to 5."""

STATE_OUTPUTS = {
    "nemo": "{}_next",
    "prompted": "{}_next",
    "nemotron": "{}_next",
    "eou": "new_{}",
    "zipformer": "new_{}",
}


def run(graph: EditedGraph, waveform: Floats) -> tuple[Floats, int]:
    session = onnxruntime.InferenceSession(graph.proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"waveforms": waveform[None], "waveforms_lens": np.array([len(waveform)], np.int64)}
    features, lengths = session.run(["features", "features_lens"], feeds)
    return features[0], int(lengths[0])


@pytest.mark.parametrize("name", STATE_OUTPUTS)
def test_packed_graph_equals_the_published_one(name: str) -> None:
    """Bit for bit over several calls, from the initial states on; two streams in a call where the graph takes them."""
    original = open_graph(published(name) / "encoder.onnx")
    packed = open_graph(imported(name, "fp32") / f"{name}_encoder" / "1" / "model.onnx")
    inputs = {node.name: node for node in packed.get_inputs()}
    rows = 1 if inputs["cache"].shape[0] == 1 else 2
    states = initial_states(original, rows)
    cache = np.zeros((rows, inputs["cache"].shape[1]), np.float32)
    random = np.random.default_rng(1)
    for _ in range(6):
        shape = rows, inputs["audio_signal"].shape[1], inputs["audio_signal"].shape[2]
        features = random.normal(-8, 3, shape).astype(np.float32)
        lengths = np.full(rows, shape[2], np.int64)
        prompts = {"prompt_index": np.arange(rows)} if "prompt_index" in inputs else {}
        feeds = {"audio_signal": features, "length": lengths, "cache": cache, **prompts}
        frames, encoded, cache = packed.run(["outputs", "encoded_lengths", "cache_next"], feeds)
        expected, states = run_published(original, features, lengths, states, prompts)
        assert np.array_equal(frames, expected)
        assert set(encoded) == {frames.shape[2]}


def initial_states(session: Any, rows: int) -> dict[str, npt.NDArray[Any]]:
    sizes = {"C": 14, "K": 4, "B": rows, "N": rows}  # those that the graph names but leaves open
    return {
        node.name: np.zeros([sizes.get(size, size) for size in node.shape], np.int64 if "int64" in node.type else np.float32)
        for node in session.get_inputs()
        if "cache" in node.name or node.name in ("embed_states", "processed_lens")
    }


def run_published(
    session: Any, features: Floats, lengths: npt.NDArray[np.int64], states: dict[str, Any], prompts: dict[str, Any]
) -> tuple[Floats, dict[str, Any]]:
    names = [node.name for node in session.get_inputs()]
    signal = next(name for name in names if name in ("audio_signal", "processed_signal", "x"))
    feeds = {signal: features.swapaxes(1, 2) if signal == "x" else features, **states, **prompts}
    feeds |= {name: lengths for name in names if name in ("length", "processed_signal_length")}
    outputs = dict(zip((node.name for node in session.get_outputs()), session.run(None, feeds), strict=True))
    frames = next(outputs[name] for name in ("outputs", "encoded", "encoder_out") if name in outputs)
    candidates = {name: (f"{name}_next", f"new_{name}", "cache_last_channel_next_len") for name in states}
    after = {name: next(outputs[output] for output in outputs if output in candidates[name]) for name in states}
    return (frames.swapaxes(1, 2) if signal == "x" else frames), after


@pytest.mark.parametrize("context", [1, 2, 3])
def test_merged_stateless_decoder_equals_its_parts(tmp_path: Path, context: int) -> None:
    """Ids moved by one; the unknown token counts as blank."""
    shape = IcefallShape(seed=3, context=context)
    build_icefall(tmp_path / "source", shape)
    import_model(str(tmp_path / "source"), "mine", tmp_path / "into")
    merged = open_graph(tmp_path / "into" / "mine_decoder_joint" / "1" / "model.onnx")
    decoder, joiner = (open_graph(tmp_path / "source" / f"{part}.onnx") for part in ("decoder", "joiner"))
    random = np.random.default_rng(0)
    tokens = [[-1] * (context - 1) + [0], [-1] * (context - 1) + [0]]
    blank = shape.pieces - 1
    last, states = np.full(2, blank, np.int32), [np.zeros((1, 2, max(1, context - 1)), np.float32)] * 2
    for _ in range(5):
        frames = random.normal(size=(2, shape.joint, 3)).astype(np.float32)
        feeds = {"encoder_outputs": frames, "targets": last[:, None], "target_length": np.ones(2, np.int32)}
        feeds |= {"input_states_1": states[0], "input_states_2": states[1]}
        logits, *states = merged.run(["outputs", "output_states_1", "output_states_2"], feeds)
        fed = decoder.run(None, {"y": np.array([row[-context:] for row in tokens], np.int64)})[0]
        for b in range(2):
            for t in range(3):
                expected = joiner.run(None, {"encoder_out": frames[b : b + 1, :, t], "decoder_out": fed[b : b + 1]})[0][0]
                assert logits[b, t, 0, blank] == pytest.approx(max(expected[0], expected[2]), abs=1e-5)
                assert np.allclose(logits[b, t, 0, [0, *range(2, blank)]], expected[[1, *range(3, shape.pieces)]], atol=1e-5)
                assert logits[b, t, 0, 1] < -1e20, "<unk>"
        chosen = random.integers(2, blank, 2)
        last = chosen.astype(np.int32)
        for row, token in zip(tokens, chosen, strict=True):
            row.append(int(token) + 1)


def test_filter_bank_equals_kaldis() -> None:
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = 80
    options.mel_opts.high_freq = -400
    bank = kaldi_native_fbank.OnlineFbank(options)
    bank.accept_waveform(16_000, SPEECH.tolist())
    bank.input_finished()
    expected = np.stack([bank.get_frame(i) for i in range(bank.num_frames_ready)]).T
    features, length = run(fbank(Fbank()), SPEECH)
    assert length == features.shape[1] == expected.shape[1]
    difference = np.abs(features - expected)
    assert difference.max() < TOLERANCE
    assert difference.mean() < TOLERANCE / 100


@pytest.mark.parametrize("chunk", [8, 16, 32, 56])
@pytest.mark.parametrize("kind", ["nemo80", "nemo128", "nemo128 for a GPU", "kaldi"])
def test_features_of_windows_equal_those_of_the_whole(kind: str, chunk: int) -> None:
    """With two feature frames more of audio on both sides; bit for bit, unless a convolution sums in blocks of frames."""
    bins = 80 if "80" in kind else 128
    graph = fbank(Fbank()) if kind == "kaldi" else nemo_log_mel(bins, gpu="GPU" in kind)
    whole, length = run(graph, SPEECH)
    for begin in range(0, length - chunk - 2, 7 * chunk):
        first = max(0, begin - 2)
        features, _ = run(graph, SPEECH[first * HOP : (begin + chunk + 2) * HOP])
        found, expected = features[:, begin - first : begin - first + chunk], whole[:, begin : begin + chunk]
        if kind in ("kaldi", "nemo128 for a GPU"):
            assert np.abs(found - expected).max() < TOLERANCE
        else:
            assert np.array_equal(found, expected)


def test_byte_level_pieces_become_text() -> None:
    """Whole characters as text, parts of characters as bytes, after the beginning of a word."""
    spelled = {text: "".join(BYTE_BPE_CHARACTERS[byte] for byte in text.encode()) for text in ("你好", "é", "abc")}
    assert byte_bpe_text(f"▁{spelled['你好']}") == "▁你好"
    assert byte_bpe_text(spelled["abc"]) == "abc"
    assert byte_bpe_text(f"▁{spelled['你好'][:2]}") == "▁<0xE4><0xBD>"
    assert byte_bpe_text(f"{spelled['你好'][2:]}") == "<0xA0><0xE5><0xA5><0xBD>"
    assert len(BYTE_BPE_CHARACTERS) == len(set(BYTE_BPE_CHARACTERS)) == 256
    assert (BYTE_BPE_CHARACTERS[0], BYTE_BPE_CHARACTERS[127], BYTE_BPE_CHARACTERS[145], BYTE_BPE_CHARACTERS[255]) == (
        "Ā", "Ġ", "Ĵ", "Ʀ",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["byte-level BPE", "byte fallback"])
def test_imported_bytes_become_whole_characters(tmp_path: Path, kind: str) -> None:
    """A text cut into single bytes: each partial has its whole characters alone."""
    text = "你好 né 😀"
    bytewise = {byte: BYTE_BPE_CHARACTERS[byte] if kind == "byte-level BPE" else f"<0x{byte:02X}>" for byte in range(256)}
    pieces = ["<blk>", "<sos/eos>", "<unk>", "▁", *bytewise.values()]
    build_icefall(tmp_path / "source", IcefallShape(pieces=len(pieces)), pieces=pieces)
    import_model(str(tmp_path / "source"), "mine", tmp_path / "into")
    imported_pieces = read_vocabulary(tmp_path / "into" / "mine_detokenizer" / "vocab.txt")
    tokens = [3] + [4 + byte if byte != ord(" ") else 3 for byte in text.encode()]  # as the file has them: the blank is first
    shown = [imported_pieces[token - 1] for token in tokens]
    for count in range(len(shown) + 1):
        times = [0.1 * i for i in range(count)]
        words = words_of(shown[:count], times, [at + 0.1 for at in times], [1.0] * count, final=count == len(shown))
        whole = text.encode()[: max(0, count - 1)].decode(errors="ignore").strip()
        assert text_of(words, segment=0) == whole


def test_byte_level_vocabulary_is_recognised(tmp_path: Path) -> None:
    spelled = ["".join(BYTE_BPE_CHARACTERS[byte] for byte in text.encode()) for text in ("你", "好", "中ƀ")]
    pieces = ["<blk>", "<sos/eos>", "<unk>", *(f"▁{text}" for text in spelled), BYTE_BPE_CHARACTERS[0xE4], "Ʀ", "▁the"]
    write_tokens(tmp_path / "tokens.txt", [*pieces, "#0", "#1"])
    read = read_pieces(tmp_path / "tokens.txt")
    assert read == pieces
    assert to_convention(read, len(pieces), 0, tmp_path) == [
        "<sos/eos>", "<unk>", "▁你", "▁好", "▁中ƀ", "<0xE4>", "<0xFF>", "▁the", "<blk>",
    ]  # fmt: skip


def test_language_tags_are_no_text(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens.txt", ["▁a", "<en-US>", "<EOU>", "<unk>", "<blk>"])
    assert to_convention(read_pieces(tmp_path / "tokens.txt"), 5, 4, tmp_path) == ["▁a", "", "", "<unk>", "<blk>"]


@pytest.mark.parametrize("name", ["nemotron", "eou"])
def test_tokenizers_become_vocabularies(name: str) -> None:
    lines = (imported(name) / f"{name}_decoder" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["▁w0 0", "▁w1 1"]
    assert lines[-1] == "<blk> 40"
    assert lines[38:40] == (["▁w38 38", "▁w39 39"] if name == "nemotron" else [" 38", " 39"])


@pytest.mark.parametrize("name", SOURCES)
def test_imported_parameters(name: str) -> None:
    config = pb.ModelConfig()
    text_format.Parse((imported(name) / f"{name}_decoder" / "config.pbtxt").read_text(encoding="utf-8"), config)
    found = {key: value.string_value for key, value in config.parameters.items()}
    expected: dict[str, dict[str, str]] = {
        "nemo": {"window_features": "25", "chunk_features": "16", "fresh_features": "zeros", "frame_samples": "1280"},
        "nemo560": {"window_features": "65", "chunk_features": "56", "cache_size": "9217"},
        "several": {"low_latency_encoder_model": "several_encoder_low", "low_latency_features": "17,8,9217"},
        "nemo-int8": {"cache_size": "2049", "encoder_batch": "8"},
        "zipformer-int8": {"window_features": "45", "encoder_batch": "8"},
        "prompted": {"languages": "auto=5,en-US=0,de-DE=1", "default_language": "auto"},
        "nemotron": {"encoder_batch": "1", "chunk_features": "16", "languages": "auto=5,en-US=0,de-DE=1"},
        "eou": {"endpoint_tokens": "38", "chunk_features": "16", "window_features": "25"},
        "zipformer": {"window_features": "45", "chunk_features": "32", "fresh_features": "none", "frame_samples": "640"},
        "zipformer640": {"window_features": "77", "chunk_features": "64", "final_padding_ms": "300"},
        "offline": {"frame_samples": "640", "left_frames": "250", "max_symbols_per_step": "1"},
    }
    assert {key: found.get(key) for key in expected[name]} == expected[name]
    assert found.get("encoder_kind", "windowed") == ("windowed" if name == "offline" else "cached")


def change_metadata(path: Path, key: str, value: str | None) -> None:
    model = onnx.load(path)
    kept = [entry for entry in model.metadata_props if entry.key != key]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    if value is not None:
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model_type", "conformer", "its metadata name the model type 'conformer'; expected 'zipformer2'"),
        ("T", None, "its metadata lack 'T'; expected T and decode_chunk_len"),
    ],
)
def test_other_streaming_encoders_are_refused(tmp_path: Path, key: str, value: str | None, named: str) -> None:
    build_icefall(tmp_path / "source", ZIPFORMER)
    change_metadata(tmp_path / "source" / "encoder.onnx", key, value)
    with pytest.raises(ModelError, match=named):
        import_model(str(tmp_path / "source"), "mine", tmp_path / "into")
    assert not list((tmp_path / "into").glob("*"))


def test_language_without_a_dictionary_is_refused(tmp_path: Path) -> None:
    build_nemo_cached(tmp_path / "source", NemoShape(prompted=True))
    change_metadata(tmp_path / "source" / "encoder.onnx", "prompt_dictionary", None)
    with pytest.raises(ModelError, match=r"expected a prompt_dictionary in its metadata or in .*config.json"):
        import_model(str(tmp_path / "source"), "mine", tmp_path / "into")


def test_several_files_for_a_part_are_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    build_icefall(source, ZIPFORMER)
    for part in ("encoder", "decoder", "joiner"):
        (source / f"{part}.onnx").rename(source / f"{part}-epoch-99-avg-1-chunk-16-left-128.onnx")
    other = source / "encoder-epoch-99-avg-1-chunk-16-left-64.onnx"
    other.write_bytes((source / "encoder-epoch-99-avg-1-chunk-16-left-128.onnx").read_bytes())
    with pytest.raises(ModelError, match=f"has encoder-.*left-128.onnx and {other.name}; choose one by --files"):
        import_model(str(source), "mine", tmp_path / "into")
    import_model(str(source), "mine", tmp_path / "into", ImportOptions(files="left-128"))
    (source / "joiner-epoch-99-avg-1-chunk-16-left-128.onnx").unlink()
    with pytest.raises(ModelError, match=r"joiner\.onnx is missing"):
        import_model(str(source), "other", tmp_path / "into", ImportOptions(files="left-128"))


def test_latencies_are_several_encoders(tmp_path: Path) -> None:
    build_nemo_cached(tmp_path / "160", NemoShape(seed=2))
    build_nemo_cached(tmp_path / "80", NemoShape(seed=2, right=0))
    build_nemo_cached(tmp_path / "other", NemoShape(size=48))
    options = ImportOptions(latencies={"low": str(tmp_path / "80")})
    import_model(str(tmp_path / "160"), "mine", tmp_path / "into", options)
    text = (tmp_path / "into" / "mine_decoder" / "config.pbtxt").read_text()
    assert 'string_value: "mine_encoder_low"' in text
    assert 'string_value: "17,8,2049"' in text
    with pytest.raises(ModelError, match="has 80 features and 48 values per frame; expected 80 and 32"):
        import_model(str(tmp_path / "160"), "b", tmp_path / "into", ImportOptions(latencies={"low": str(tmp_path / "other")}))


def test_prompt_dictionary_may_be_in_the_configuration() -> None:
    content = json.loads((published("nemotron") / "config.json").read_text())
    assert content["model_defaults"]["prompt_dictionary"]["auto"] == 5


@pytest.mark.parametrize("name", SOURCES)
def test_imported_graphs_are_taken_by_triton(name: str) -> None:
    """By the native backend's rules, with warm-ups that work."""
    repository = imported(name)
    assert refused_by_triton(repository) == []
    check_warmups(repository)
    for recogniser in recognisers(repository):
        check_frames(recogniser)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"cached"', '"windowed"', "parameter encoder_kind is 'windowed'; .*encoder/1/model.onnx is 'cached'"),
        ('"2049"', '"2048"', "parameter cache_size is '2048'; .*encoder/1/model.onnx has '2049'"),
        ('"fp16"', '"fp32"', "parameter cache_type is 'fp32'; .*encoder/1/model.onnx has 'fp16'"),
        ('"25"', '"wide"', "parameter window_features is 'wide'; expected a whole number"),
    ],
)
def test_parameters_that_differ_from_a_cached_encoder_are_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    repository = Path(shutil.copytree(imported("nemo"), tmp_path / "repository"))
    for directory in repository.iterdir():
        if not directory.name.startswith("nemo_") and directory.name != "nemo":
            shutil.rmtree(directory)
    assert [recogniser.name for recogniser in recognisers(repository)] == ["nemo"]
    edit(repository / "nemo_decoder" / "config.pbtxt", f"string_value: {old}", f"string_value: {new}")
    with pytest.raises(ModelError, match=named):
        recognisers(repository)


def test_merged_nemo_decoder_equals_its_parts() -> None:
    source = published("nemo")
    merged = open_graph(imported("nemo") / "nemo_decoder_joint" / "1" / "model.onnx")
    decoder, joiner = (open_graph(source / f"{part}.onnx") for part in ("decoder", "joiner"))
    random = np.random.default_rng(0)
    states = [np.zeros((1, 3, NEMO.hidden), np.float32)] * 2
    expected_states = states
    for _ in range(4):
        frames = random.normal(size=(3, NEMO.size, 5)).astype(np.float32)
        targets = {"targets": random.integers(0, 41, (3, 1)).astype(np.int32), "target_length": np.ones(3, np.int32)}
        feeds = {"encoder_outputs": frames, **targets, "input_states_1": states[0], "input_states_2": states[1]}
        logits, *states = merged.run(["outputs", "output_states_1", "output_states_2"], feeds)
        fed, _, *expected_states = decoder.run(
            None, {**targets, "states.1": expected_states[0], "onnx::LSTM_3": expected_states[1]}
        )
        assert np.array_equal(logits, joiner.run(None, {"encoder_outputs": frames, "decoder_outputs": fed})[0])
        assert all(map(np.array_equal, states, expected_states))


def test_offline_nemo_model_in_three_files_is_imported(tmp_path: Path) -> None:
    """As sherpa-onnx publishes it: NeMo's encoder without a cache, beside decoder and joiner."""
    shape = NemoShape(size=256, hidden=640)
    build_nemo_cached(tmp_path / "parts", shape)
    source = tmp_path / "source"
    source.mkdir()
    for name in ("decoder.onnx", "joiner.onnx", "tokens.txt"):
        shutil.copy(tmp_path / "parts" / name, source / name)
    shutil.copy(built("rnnt") / "encoder-model.onnx", source / "encoder.onnx")
    found = import_model(str(source), "mine", tmp_path / "into")
    assert (found.kind, found.features, found.encoder_size, found.hidden, found.pieces) == ("rnnt", 80, 256, 640, 41)
    (recogniser,) = recognisers(tmp_path / "into")
    assert recogniser.describe().startswith("mine: rnnt, 40 pieces, 80 ms a frame, windows of 10.00 + 2.00 + 2.00 s")
    assert refused_by_triton(tmp_path / "into") == []
    with pytest.raises(ModelError, match="has no cache, so --latency has no use"):
        import_model(str(source), "other", tmp_path / "into", ImportOptions(latencies={"low": str(published("nemo"))}))
