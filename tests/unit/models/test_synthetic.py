"""The synthetic models behave like models, and our decoder decodes them to the same tokens as onnx-asr's does."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx_asr
import onnxruntime
import pytest
from onnx_asr.adapters import TextResultsAsrAdapter
from onnx_asr.asr import TimestampedResult
from onnx_asr.models.nemo import NemoConformerRnnt

from greedy import Floats, JointOutputs, PredictorState, Row, Step, Token, decode
from perf.recogniser import joint_step
from tests.support.cache import built
from tests.support.synthetic import FRAMES_PER_SECOND, HIDDEN, SIZES, Kind, build, move_weights, recordings, vocabulary

UNLIMITED = 10**9
SAMPLE_RATE = 16_000
KINDS: list[Kind] = ["rnnt", "tdt"]


@dataclass(frozen=True)
class Model:
    """A synthetic model, loaded by onnx-asr."""

    kind: Kind
    directory: Path
    adapter: TextResultsAsrAdapter

    @property
    def asr(self) -> NemoConformerRnnt:
        assert isinstance(self.adapter.asr, NemoConformerRnnt)
        return self.adapter.asr

    @property
    def joint(self) -> JointOutputs:
        size = SIZES[self.kind]
        return JointOutputs(size.pieces, tuple(range(size.durations)))

    def recognise(self, waveforms: list[Floats]) -> list[list[tuple[int, int, float]]]:
        """What onnx-asr makes of a batch: (id, frame, probability) of each token."""
        results = self.adapter.with_timestamps().recognize([*waveforms])
        return [self._tokens(result) for result in results]

    def _tokens(self, result: TimestampedResult) -> list[tuple[int, int, float]]:
        assert result.tokens is not None
        assert result.timestamps is not None
        assert result.logprobs is not None
        ids = {piece.replace("▁", " "): index for index, piece in enumerate(vocabulary(self.kind))}
        return [
            (ids[token], round(time * FRAMES_PER_SECOND), float(np.exp(logprob)))
            for token, time, logprob in zip(result.tokens, result.timestamps, result.logprobs, strict=True)
        ]

    def encode(self, waveforms: list[Floats]) -> list[Floats]:
        """Frames [D, T] of a batch, by onnx-asr's front end and session."""
        lengths = np.array([len(samples) for samples in waveforms], np.int64)
        padded = np.zeros((len(waveforms), max(lengths)), np.float32)
        for row, samples in zip(padded, waveforms, strict=True):
            row[: len(samples)] = samples
        encoded, encoded_lengths = self.asr._encode(*self.asr._preprocessor(padded, lengths))
        return [frames[:length].T for frames, length in zip(encoded, encoded_lengths, strict=True)]

    @property
    def step(self) -> Step:
        """Our decoder's view of the session."""
        return joint_step(self.asr._decoder_joint)

    def fresh(self) -> PredictorState:
        state = np.zeros((SIZES[self.kind].layers, HIDDEN), np.float32)
        return PredictorState(self.joint.blank, (state, state))


def load(kind: Kind, directory: Path) -> Model:
    return Model(kind, directory, onnx_asr.load_model(f"nemo-conformer-{kind}", directory, providers=["CPUExecutionProvider"]))


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Model:
    kind: Kind = request.param
    return load(kind, built(kind))


def speech() -> list[Floats]:
    return list(recordings().values())


def mixed_lengths() -> list[Floats]:
    """The recordings and pieces of them, down to a single frame."""
    pieces = [samples[SAMPLE_RATE : SAMPLE_RATE + length] for samples in speech() for length in (37_123, 9_999, 1_280, 700)]
    return [*pieces[:5], *speech(), *pieces[5:]]


def test_the_graphs_are_shaped_as_nemo_exports_them(model: Model) -> None:
    features, outputs, layers = (80, 513, 1) if model.kind == "rnnt" else (128, 1030, 2)
    encoder = {
        "audio_signal": ("tensor(float)", [None, features, None]),
        "length": ("tensor(int64)", [None]),
        "outputs": ("tensor(float)", [None, 256, None]),
        "encoded_lengths": ("tensor(int64)", [None]),
    }
    decoder_joint = {
        "encoder_outputs": ("tensor(float)", [None, 256, None]),
        "targets": ("tensor(int32)", [None, None]),
        "target_length": ("tensor(int32)", [None]),
        "input_states_1": ("tensor(float)", [layers, None, 640]),
        "input_states_2": ("tensor(float)", [layers, None, 640]),
        "outputs": ("tensor(float)", [None, None, None, outputs]),
        "prednet_lengths": ("tensor(int32)", [None]),
        "output_states_1": ("tensor(float)", [layers, None, 640]),
        "output_states_2": ("tensor(float)", [layers, None, 640]),
    }
    for name, tensors in (("encoder", encoder), ("decoder_joint", decoder_joint)):
        session = onnxruntime.InferenceSession(model.directory / f"{name}-model.onnx", providers=["CPUExecutionProvider"])
        found = [*session.get_inputs(), *session.get_outputs()]
        shapes = {x.name: (x.type, [None if isinstance(axis, str) else axis for axis in x.shape]) for x in found}
        assert shapes == tensors
        assert list(shapes) == list(tensors)


def test_the_directory_is_laid_out_as_models_are_published(model: Model) -> None:
    files = {path.name: path for path in model.directory.iterdir()}
    assert sorted(files) == ["config.json", "decoder_joint-model.onnx", "encoder-model.onnx", "vocab.txt"]
    assert sum(path.stat().st_size for path in files.values()) < 15_000_000
    lines = files["vocab.txt"].read_text(encoding="utf-8").splitlines()
    pieces = [line.split(" ")[0] for line in lines]
    assert lines == [f"{piece} {index}" for index, piece in enumerate(pieces)]
    assert len(set(pieces)) == len(lines) == model.joint.blank + 1
    assert (pieces[0], pieces[-1]) == ("<unk>", "<blk>")
    assert 0.2 < sum(piece.startswith("▁") for piece in pieces) / len(pieces) < 0.6


@pytest.mark.slow
def test_build_is_repeatable(model: Model, tmp_path: Path) -> None:
    build(tmp_path, model.kind)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in model.directory.iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (model.directory / path.name).read_bytes()
    assert load(model.kind, built(model.kind, seed=1)).recognise(speech()) != of_speech(model)


def test_encoder_weights_can_be_external(model: Model, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(model.directory, tmp_path / "external"))
    move_weights(directory)
    assert (directory / "encoder-model.onnx").stat().st_size < 50_000
    assert (directory / "encoder-model.onnx.data").stat().st_size > 1_000_000
    assert load(model.kind, directory).recognise(speech()) == of_speech(model)


def test_tokens_come_as_in_speech(model: Model) -> None:
    recognised = of_speech(model)
    for samples, tokens in zip(speech(), recognised, strict=True):
        assert 3 <= len(tokens) / (len(samples) / SAMPLE_RATE) <= 6
    ids = [token for tokens in recognised for token, _, _ in tokens]
    assert len(set(ids)) > 20
    assert max(Counter(ids).values()) < len(ids) / 5
    shared = [count for tokens in recognised for count in Counter(frame for _, frame, _ in tokens).values() if count > 1]
    assert len(shared) >= 3


def test_tokens_and_blanks_use_all_durations(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps: Counter[tuple[bool, int]] = Counter()
    decode_one = model.asr._decode

    def counted(*args: object) -> object:
        logits, jump, state = decode_one(*args)  # type: ignore[arg-type]
        jumps[bool(logits.argmax() == model.joint.blank), jump] += 1
        return logits, jump, state

    monkeypatch.setattr(model.asr, "_decode", counted)
    model.recognise(speech())
    durations = model.joint.durations or (-1,)  # onnx-asr's word for none
    assert set(jumps) == {(blank, jump) for blank in (False, True) for jump in durations}
    assert all(jumps[False, jump] + jumps[True, jump] >= 5 for jump in durations)


def test_padding_changes_nothing(model: Model) -> None:
    rows = mixed_lengths()
    for samples, frames in zip(rows, model.encode(rows), strict=True):
        (alone,) = model.encode([samples])
        assert frames.shape[1] == (len(samples) // 160 - 1) // 8 + 1
        np.testing.assert_allclose(frames, alone, rtol=0, atol=1e-4)
    for samples, tokens in zip(rows, oracle(model, 10)[0], strict=True):
        (alone_tokens,) = model.recognise([samples])
        assert [token[:2] for token in tokens] == [token[:2] for token in alone_tokens]


def test_a_frame_depends_on_half_a_second_to_either_side(model: Model) -> None:
    features = np.random.default_rng(0).normal(size=(1, SIZES[model.kind].features, 801)).astype(np.float32)
    changed = features.copy()
    changed[:, :, 400] += 1
    before, after = (model.asr._encode(x, np.array([801], np.int64))[0][0] for x in (features, changed))
    reached = np.flatnonzero(np.abs(before - after).max(axis=1) > 1e-3) * 8 - 400
    assert -1000 < reached.min() * 10 <= -400
    assert 400 <= reached.max() * 10 < 1000


def test_the_history_matters(model: Model) -> None:
    """After the same last token the same frames give other tokens where what came before was different."""
    (frames, *_) = model.encode(speech())
    blank = model.joint.blank
    histories = np.random.default_rng(0).integers(1, blank, (8, 5), np.int32)
    histories[:, -1] = 7
    states = tuple(np.zeros((SIZES[model.kind].layers, 8, HIDDEN), np.float32) for _ in range(2))
    for targets in histories.T:
        logits, states = model.step(np.repeat(frames[None], 8, axis=0), targets, states)
    best = logits[:, :, :blank].argmax(axis=2)
    assert np.mean([len(set(column)) for column in best.T]) > 3


@cache
def of_speech(model: Model) -> list[list[tuple[int, int, float]]]:
    """Tokens that onnx-asr gives for ``speech``."""
    return model.recognise(speech())


@cache
def oracle(model: Model, max_tokens_per_frame: int) -> tuple[list[list[tuple[int, int, float]]], list[Floats]]:
    """Tokens that onnx-asr gives for ``mixed_lengths``, and the frames that it decodes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(model.asr.config, "max_tokens_per_step", max_tokens_per_frame)
        return model.recognise(mixed_lengths()), model.encode(mixed_lengths())


@pytest.mark.parametrize("max_tokens_per_frame", [10, 2, 1])
@pytest.mark.parametrize("block_frames", [1, 3, 16, 64])
def test_our_decoder_gives_the_tokens_of_onnx_asr(model: Model, block_frames: int, max_tokens_per_frame: int) -> None:
    expected, rows = oracle(model, max_tokens_per_frame)
    assert sum(map(len, expected)) > 50
    for batches in [rows], [[row] for row in rows]:
        found: list[list[Token]] = []
        for batch in batches:
            decoded = [Row(frames, model.fresh(), max_tokens_per_frame, UNLIMITED) for frames in batch]
            decode(model.step, model.joint, decoded, block_frames)
            assert [row.done_frames for row in decoded] == [frames.shape[1] for frames in batch]
            found += [row.tokens for row in decoded]
        assert_same(found, expected)


@pytest.mark.parametrize("chunk_frames", [1, 4, 10])
def test_chunks_change_nothing(model: Model, chunk_frames: int) -> None:
    rows = model.encode(speech())
    predictors = [model.fresh() for _ in rows]
    found: list[list[Token]] = [[] for _ in rows]
    for start in range(0, max(row.shape[1] for row in rows), chunk_frames):
        chunks = [
            Row(row[:, start : start + chunk_frames], predictor, 10, UNLIMITED)
            for row, predictor in zip(rows, predictors, strict=True)
        ]
        decode(model.step, model.joint, chunks, 16)
        for row_tokens, chunk in zip(found, chunks, strict=True):
            row_tokens += [token._replace(frame=token.frame + start) for token in chunk.tokens]
    assert_same(found, of_speech(model))


@pytest.mark.parametrize("model", ["tdt"], indirect=True)
def test_other_durations_are_ours_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnx-asr takes the index of the best duration for the duration: told which it stands for, it finds what we find."""
    durations = (0, 1, 2, 4, 8)
    rows = [Row(frames, model.fresh(), 10, UNLIMITED) for frames in model.encode(speech())]
    decode(model.step, JointOutputs(model.joint.blank, durations), rows, 16)
    untold = of_speech(model)
    decode_one = model.asr._decode

    def told(*args: object) -> object:
        logits, index, state = decode_one(*args)  # type: ignore[arg-type]
        return logits, durations[index], state

    monkeypatch.setattr(model.asr, "_decode", told)
    assert_same([row.tokens for row in rows], model.recognise(speech()))
    assert model.recognise(speech()) != untold


def assert_same(found: list[list[Token]], expected: list[list[tuple[int, int, float]]]) -> None:
    for tokens, expected_tokens in zip(found, expected, strict=True):
        assert [(token.id, token.frame) for token in tokens] == [token[:2] for token in expected_tokens]
        probabilities = [probability for _, _, probability in expected_tokens]
        assert [token.probability for token in tokens] == pytest.approx(probabilities, rel=1e-3)
