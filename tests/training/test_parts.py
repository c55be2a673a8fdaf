"""The parts of the training, each against something it can't have made itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from amira.models.configs import read_config
from amira.paths import MODEL_REPOSITORY
from training import config as configuration
from training import moonshine, start
from training.config import Config
from training.data import held_out, jobs
from training.distort import distort
from training.export import compress, graphs, write
from training.features import Features, Item, Shard, Spoken, Window, read
from training.loss import transducer_loss
from training.model import LOWER, Joint, Transducer, build, collapse, greedy
from training.speech import RATE, Recording, recordings
from training.text import normalise, sentences
from training.train import Draw, Example, batches

ROOT = Path(__file__).parents[2]
SPEECH = ROOT / "tests" / "speech"
MINIATURE = Path(__file__).with_name("miniature.toml")


@pytest.fixture(scope="module")
def config() -> Config:
    return configuration.load(MINIATURE)


@pytest.fixture(scope="module")
def model(config: Config) -> Transducer:
    torch.manual_seed(0)
    made = build(config)
    made.eval()
    return made


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        (
            "Mr. O’Neil paid 1,250 on the 3rd, in 1999!",
            "mister o'neil paid one thousand two hundred and fifty on the third in nineteen ninety nine",
        ),
        ("  'Tis -- 100% «sure» & so on ", "tis one hundred percent sure and so on"),
        ("call 12345678901 now", "call now"),
        ("…", ""),
    ],
)
def test_text_is_brought_to_the_models_spelling(written: str, spoken: str) -> None:
    assert normalise(written) == spoken


def test_the_loss_is_that_of_all_alignments_summed_one_by_one() -> None:
    torch.manual_seed(0)
    joint = Joint(8, 6, blank=4)
    encoded = [torch.randn(5, 8, requires_grad=True), torch.randn(3, 8), torch.randn(1, 8)]
    predicted = [torch.randn(4, 6), torch.randn(2, 6), torch.randn(1, 6)]
    targets = [torch.tensor([1, 2, 2]), torch.tensor([0]), torch.tensor([], dtype=torch.long)]
    loss = transducer_loss(joint, encoded, predicted, targets, blank=4)
    slow = [_loss_by_definition(joint, *row) for row in zip(encoded, predicted, targets, strict=True)]
    torch.testing.assert_close(loss, torch.stack(slow))
    (fast_gradient,) = torch.autograd.grad(loss.sum(), encoded[0], retain_graph=True)
    (slow_gradient,) = torch.autograd.grad(torch.stack(slow).sum(), encoded[0])
    torch.testing.assert_close(fast_gradient, slow_gradient)


def _loss_by_definition(joint: Joint, frames: torch.Tensor, tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    logp: torch.Tensor = joint(joint.frame(frames)[:, None], joint.token(tokens)[None]).log_softmax(-1)

    def ways(frame: int, emitted: int) -> torch.Tensor:
        """Log probability of all that may follow."""
        if frame == len(frames):
            return torch.tensor(0.0 if emitted == len(target) else -torch.inf)
        blank = logp[frame, emitted, 4] + ways(frame + 1, emitted)
        if emitted == len(target):
            return blank
        either: torch.Tensor = torch.logaddexp(blank, logp[frame, emitted, target[emitted]] + ways(frame, emitted + 1))
        return either

    total: torch.Tensor = -ways(0, 0)
    return total


def test_a_recordings_encoding_does_not_depend_on_its_company(model: Transducer) -> None:
    torch.manual_seed(1)
    stem, lower, _ = moonshine.load(LOWER)
    audio = torch.randn(2, 100 * moonshine.FRAME_SAMPLES) * 0.1
    audio[1, 37 * moonshine.FRAME_SAMPLES :] = 0
    frames = torch.tensor([100, 37])
    with torch.inference_mode():
        both, counts = model.encoder(lower(stem(audio, frames), frames), frames)
        one = audio[1:, : 37 * moonshine.FRAME_SAMPLES]
        alone, _ = model.encoder(lower(stem(one, frames[1:]), frames[1:]), frames[1:])
    assert counts.tolist() == [25, 10]
    torch.testing.assert_close(both[1, :10], alone[0], atol=2e-5, rtol=1e-4)
    assert not both[1, 10:].any()


def test_moonshine_hears_what_its_published_graph_hears() -> None:
    audio = recordings(SPEECH)[0].read()
    audio = audio[: len(audio) // moonshine.FRAME_SAMPLES * moonshine.FRAME_SAMPLES]
    session = onnxruntime.InferenceSession(str(moonshine.assets() / "encoder_model.ort"), providers=["CPUExecutionProvider"])
    padded = np.pad(audio, (0, 511))[None]
    (theirs,) = session.run(None, {"input_values": padded, "attention_mask": np.ones(padded.shape, np.int64)})
    frames = torch.tensor([len(audio) // moonshine.FRAME_SAMPLES])
    stem, lower, upper = moonshine.load(LOWER)
    with torch.inference_mode():
        ours = upper(lower(stem(torch.from_numpy(audio)[None], frames), frames), frames).numpy()
    # Theirs rounds activations to 8 bits, ours doesn't.
    assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > 0.998


def test_windows_overlap_and_yield_each_frame_once(config: Config, tmp_path: Path) -> None:
    stem, lower, _ = moonshine.load(LOWER)
    audio = recordings(SPEECH)[0].read()
    spoken = [Spoken(audio, "whole", "s", windowed=False), Spoken(audio, "cut", "s", windowed=True)]
    Features(stem, lower, config.data).write(spoken, tmp_path / "shard.json")
    shard = read(tmp_path / "shard.json")
    whole, cut = shard.items
    assert whole.outputs == cut.outputs == -(-len(audio) // 1536)
    assert len(cut.windows) == -(-cut.outputs // config.data.window_chunk)
    assert cut.windows[1].first == config.data.window_left
    assert cut.offset == whole.frames
    assert len(shard.frames) == whole.frames + cut.frames


def test_distorted_speech_keeps_its_length_and_stays_in_range() -> None:
    audio = recordings(SPEECH)[0].read()
    random = np.random.default_rng(0)
    for _ in range(30):
        distorted = distort(audio, [audio[: RATE * 2]], random)
        assert distorted.shape == audio.shape
        assert np.isfinite(distorted).all()
        assert 0.1 < np.abs(distorted).max() <= 1.0


def test_what_is_held_out_is_never_trained_on(config: Config) -> None:
    found = recordings(SPEECH)
    train, choose = held_out(found, config.data.held_out)
    assert sorted(map(str, (r.path for r in train + choose))) == sorted(str(r.path) for r in found)
    for job in jobs(config, SPEECH, None):
        wrong = choose if job.name.startswith("speech") else train
        assert not set(job.recordings) & set(wrong)


def test_jobs_cover_every_sentence_once(config: Config) -> None:
    numbers = [number for job in jobs(config, None, None) for number in job.sentences or ()]
    assert numbers == list(range(24))
    everything = config.model_copy(update={"data": config.data.model_copy(update={"most_sentences": None})})
    assert sum(len(job.sentences or ()) for job in jobs(everything, None, None)) == len(sentences(config.data.sentences))


def test_other_recordings_can_be_given_to_choose_by(config: Config, tmp_path: Path) -> None:
    shutil.copy(SPEECH / "jfk.flac", tmp_path)
    (tmp_path / "manifest.tsv").write_text("file\ttext\tsource\njfk.flac\tAnd so\tInauguration\n")
    made = {job.name: job.recordings for job in jobs(config, SPEECH, tmp_path)}
    assert made["choose-whole"] == made["choose-windows"] == (Recording(tmp_path / "jfk.flac", "Inauguration", "and so"),)
    assert set(made["speech-00"]) == set(recordings(SPEECH))


def test_exported_graphs_compute_what_the_model_does(model: Transducer, config: Config) -> None:
    exported = {name: compress(graph) for name, graph in graphs(model, config.model.predictor, config.model.width).items()}
    sessions = {
        n: onnxruntime.InferenceSession(g.SerializeToString(), providers=["CPUExecutionProvider"]) for n, g in exported.items()
    }
    waveforms = [recording.read() for recording in recordings(SPEECH)[:2]]
    lengths = np.array([len(w) for w in waveforms])
    batch = np.zeros((2, lengths.max()), np.float32)
    for row, waveform in zip(batch, waveforms, strict=True):
        row[: len(waveform)] = waveform
    features, counts = sessions["preprocessor"].run(None, {"waveforms": batch, "waveforms_lens": lengths})
    frames, encoded = sessions["encoder"].run(None, {"audio_signal": features, "length": counts})
    stem, lower, _ = moonshine.load(LOWER)
    padded = torch.from_numpy(np.pad(batch, ((0, 0), (0, features.shape[2] * moonshine.FRAME_SAMPLES - batch.shape[1]))))
    real = torch.from_numpy(counts)
    with torch.inference_mode():
        expected, expected_counts = model.encoder(lower(stem(padded, real), real), real)
    assert encoded.tolist() == expected_counts.tolist() == [-(-n // 1536) for n in lengths]
    assert np.corrcoef(frames.ravel(), expected.transpose(1, 2).numpy().ravel())[0, 1] > 0.999  # weights are rounded


def test_exported_graphs_fix_just_the_sizes_that_their_configurations_name(model: Transducer, config: Config) -> None:
    """Triton's ONNX Runtime backend refuses an output that is more or less open than ``config.pbtxt`` says."""
    for name, graph in graphs(model, config.model.predictor, config.model.width).items():
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        fixed = {node.name: [isinstance(size, int) for size in node.shape] for node in session.get_outputs()}
        configured = read_config(MODEL_REPOSITORY / name / "config.pbtxt").output
        assert fixed == {tensor.name: [size != -1 for size in tensor.dims] for tensor in configured}


def test_a_tie_of_scale_and_axis_keeps_matrices_exact_to_a_half_step() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((128, 64)).astype(np.float32) * np.logspace(-2, 1, 64, dtype=np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [tensor("x", 1, ["B", 128])],
        [tensor("y", 1, ["B", 64])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(compress(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (stored,) = session.run(None, {"x": np.eye(128, dtype=np.float32)})
    assert (np.abs(stored - weight) <= np.abs(weight).max(axis=0) / 254 + 1e-7).all()


def test_greedy_search_stops_at_blank_and_at_the_symbol_limit(model: Transducer) -> None:
    encoded, frames = torch.zeros(2, 3, model.joint.frame.in_features), torch.tensor([3, 1])
    with torch.no_grad():
        kept = model.joint.out.bias.clone()
        model.joint.out.bias[7] += 100
        assert greedy(model, encoded, frames, max_symbols=2) == [[7] * 6, [7] * 2]
        model.joint.out.bias[model.blank] += 200
        assert greedy(model, encoded, frames) == [[], []]
        model.joint.out.bias.copy_(kept)


def test_ctc_hypotheses_lose_repeats_and_blanks(model: Transducer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = torch.tensor([[1, 1, model.blank, 1, 2, 2, 3]])
    scores = torch.nn.functional.one_hot(path, model.blank + 1).float()
    monkeypatch.setitem(model._modules, "ctc", torch.nn.Identity())  # setattr would delete it afterwards
    assert collapse(model, scores, torch.tensor([6])) == [[1, 1, 2]]


def test_each_example_comes_once_before_any_comes_again() -> None:
    shard = Shard([], np.zeros((0, 288), np.float16))
    examples = [Example(shard, Item(str(i), "s", 0, (Window(10 + i, 0, 3),)), torch.tensor([1])) for i in range(20)]
    draw = Draw(np.random.default_rng(0))
    everything = sum(e.item.frames for e in examples)
    first = draw.take(examples, everything)
    assert sorted(e.item.text for e in first) == sorted(e.item.text for e in examples)
    grouped = batches(first, 60, np.random.default_rng(0))
    assert sorted(e.item.text for batch in grouped for e in batch) == sorted(e.item.text for e in first)
    assert all(len(batch) * max(e.longest for e in batch) <= 60 for batch in grouped)


@pytest.mark.parametrize(
    ("step", "arguments", "named"),
    [
        ("data", [], "training: flite and espeak-ng not found: apt-get install flite espeak-ng"),
        ("data", ["--config", "training/DATA.md"], "training: training/DATA.md: "),
        ("train", [], "run make data first"),
        ("train", ["--begin", "model-repo", "--config", "tests/training/miniature.toml"], "operators have weights"),
        ("export", ["--into", "model-repo"], "run make train first"),
    ],
)
def test_what_its_user_can_mend_is_one_line(tmp_path: Path, step: str, arguments: list[str], named: str) -> None:
    if "--begin" in arguments:
        shutil.copy(ROOT / "training" / "tokens.model", tmp_path)
    command = [sys.executable, "-m", f"training.{step}", "--work", str(tmp_path), *arguments]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert named in line


def test_an_export_leaves_other_names_of_a_graph_alone(model: Transducer, config: Config, tmp_path: Path) -> None:
    shutil.copy(ROOT / "training" / "tokens.model", tmp_path)
    torch.save({"average": model.state_dict()}, tmp_path / "checkpoint.pt")
    graph = tmp_path / "repository" / "encoder" / "1" / "model.onnx"
    graph.parent.mkdir(parents=True)
    graph.write_bytes(b"another's")
    os.link(graph, tmp_path / "other.onnx")
    write(config, tmp_path, tmp_path / "repository")
    assert (tmp_path / "other.onnx").read_bytes() == b"another's"
    assert len(graph.read_bytes()) > 1_000_000


def test_unknown_keys_of_a_configuration_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(MINIATURE.read_text().replace("seed = 1", "seed = 1\nsped = 2"))
    with pytest.raises(ValueError, match="sped"):
        configuration.load(path)


def test_a_training_starts_from_a_repositorys_graphs(tmp_path: Path) -> None:
    original = build(configuration.load(configuration.DEFAULT))
    start.load(original, MODEL_REPOSITORY)
    exported = graphs(original, original.predictor.lstm.hidden_size, original.joint.frame.in_features)
    for name, graph in exported.items():
        (tmp_path / name / "1").mkdir(parents=True)
        onnx.save(graph, tmp_path / name / "1" / "model.onnx")
    copy = build(configuration.load(configuration.DEFAULT))
    start.load(copy, tmp_path)
    ours, theirs = (m.state_dict() for m in (copy, original))
    different = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert different == ["ctc.weight", "ctc.bias"], "what no graph holds is new, the rest is the same"


def test_graphs_of_another_architecture_are_no_start(model: Transducer) -> None:
    with pytest.raises(ValueError, match="operators have weights"):
        start.load(model, MODEL_REPOSITORY)
