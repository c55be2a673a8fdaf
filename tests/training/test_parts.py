"""The parts of the training, each against something it can't have made itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import sentencepiece
import torch
from numpy.typing import NDArray

from amira.models.configs import read_config
from amira.paths import MODEL_REPOSITORY
from training import chunks, moonshine, start
from training import config as configuration
from training.config import Config
from training.data import held_out, jobs
from training.distort import Distorter, resample
from training.export import LEFT, RIGHT, WINDOWS, compress, graphs, write
from training.gather import coverage, covering
from training.loss import transducer_loss
from training.model import Joint, Transducer, build, collapse, greedy
from training.speech import RATE, Recording, character, recordings
from training.step import Step
from training.store import Example, Item, Pool, Store, collate, grouped
from training.store import write as write_shard
from training.text import normalise, sentences
from training.train import distance

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
    encoded = torch.randn(3, 5, 8, requires_grad=True)
    predicted = torch.randn(3, 4, 6, requires_grad=True)
    targets = torch.tensor([[1, 2, 2], [0, 0, 0], [0, 0, 0]])
    frames, counts = torch.tensor([5, 3, 1]), torch.tensor([3, 1, 0])
    loss = transducer_loss(joint, encoded, predicted, targets, frames, counts, blank=4)
    rows = zip(encoded, predicted, targets, frames, counts, strict=True)
    slow = torch.stack([_loss_by_definition(joint, e[:t], p[: u + 1], target[:u]) for e, p, target, t, u in rows])
    torch.testing.assert_close(loss, slow)
    weights = torch.tensor([1.0, 2.0, 0.5])
    for leaf in (encoded, predicted, joint.out.weight):
        (fast_gradient,) = torch.autograd.grad((loss * weights).sum(), leaf, retain_graph=True)
        (slow_gradient,) = torch.autograd.grad((slow * weights).sum(), leaf, retain_graph=True)
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


def _noise() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of 100 and 37 frames."""
    audio = torch.randn(2, 100 * moonshine.FRAME_SAMPLES, generator=torch.Generator().manual_seed(1)) * 0.1
    audio[1, 37 * moonshine.FRAME_SAMPLES :] = 0
    return audio, torch.tensor([100, 37])


@pytest.mark.parametrize("by", [None, chunks.cut(6, 24, 5)], ids=["whole", "chunks"])
def test_a_recordings_encoding_does_not_depend_on_its_company(model: Transducer, by: chunks.Cut | None) -> None:
    def encode(samples: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return chunks.encode(model.encoder, samples, frames, by) if by else model.encoder(samples, frames)

    audio, frames = _noise()
    with torch.inference_mode():
        both, counts = encode(audio, frames)
        alone, _ = encode(audio[1:, : 37 * moonshine.FRAME_SAMPLES], frames[1:])
    assert counts.tolist() == [25, 10]
    torch.testing.assert_close(both[1, :10], alone[0], atol=2e-5, rtol=1e-4)
    assert not both[1, 10:].any()


def test_one_chunk_of_all_is_the_whole(model: Transducer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "NORM_STEPS", 250_000)
    monkeypatch.setattr(chunks, "PRIOR_STEPS", 0.0)
    audio, frames = _noise()
    with torch.inference_mode():
        whole, _ = model.encoder(audio, frames)
        chunk, _ = chunks.encode(model.encoder, audio, frames, chunks.cut(25, 24, 5))
    torch.testing.assert_close(chunk, whole, atol=2e-5, rtol=1e-4)


def _in_steps(step: Callable[..., Sequence[torch.Tensor]], size: int, samples: torch.Tensor, window: int) -> torch.Tensor:
    """Encode samples [1, N] as a stream: step by step, with FP16 caches [1, `size`] between the steps."""
    count, chunk = -(-samples.shape[1] // moonshine.FRAME_SAMPLES), window - RIGHT
    cache, encoded = torch.zeros(1, size, dtype=torch.float16), []
    padded = torch.nn.functional.pad(samples, (0, (count + window) * moonshine.FRAME_SAMPLES - samples.shape[1]))
    for begin in range(0, count, chunk):
        signal = padded[:, begin * moonshine.FRAME_SAMPLES : (begin + window) * moonshine.FRAME_SAMPLES]
        signal = signal.reshape(1, window, -1).transpose(1, 2).contiguous()
        outputs, lengths, cache = step(signal, torch.tensor([min(window, count - begin)]), cache)
        assert lengths.tolist() == [-(-min(window, count - begin) // chunks.STACK)]
        encoded.append(outputs[:, :, : chunk // chunks.STACK])
    return torch.cat(encoded, dim=2)[0, :, : -(-count // chunks.STACK)].T


@pytest.mark.parametrize("window", WINDOWS)
def test_steps_with_a_cache_are_the_chunks_of_a_recording(model: Transducer, window: int) -> None:
    audio = torch.randn(1, 400 * moonshine.FRAME_SAMPLES, generator=torch.Generator().manual_seed(1)) * 0.1
    step = Step(model.encoder, LEFT, RIGHT, WINDOWS).eval()
    with torch.inference_mode():
        expected, _ = chunks.encode(model.encoder, audio, torch.tensor([400]), chunks.Cut(window - RIGHT, LEFT, RIGHT))
        found = _in_steps(step, step.cache_size, audio, window)
    torch.testing.assert_close(found, expected[0], atol=5e-3, rtol=1e-2)  # FP16 caches


@pytest.mark.parametrize("window", WINDOWS)
def test_the_bundled_step_is_that_of_the_repositorys_weights(window: int) -> None:
    """On speech, from the same FP16 caches, alone and in a batch. The 8-bit weights are those of the encoder's graph."""
    bundled = build(configuration.load(configuration.DEFAULT))
    start.load(bundled, MODEL_REPOSITORY)
    step = Step(bundled.encoder, LEFT, RIGHT, WINDOWS).eval()
    session = onnxruntime.InferenceSession(MODEL_REPOSITORY / "encoder_stream" / "1" / "model.onnx")
    names, worst = ("audio_signal", "length", "cache"), 0.0

    def both(*inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        nonlocal worst
        ours: Sequence[torch.Tensor] = step(*inputs)
        twice = {name: np.repeat(value.numpy(), 2, axis=0) for name, value in zip(names, inputs, strict=True)}
        alone = session.run(None, dict(zip(names, (value.numpy() for value in inputs), strict=True)))
        for results in (alone, [result[1:] for result in session.run(None, twice)]):
            worst = max(worst, float(np.abs(results[0] - ours[0].numpy())[:, :, : int(ours[1])].max()))
        return ours

    speech = next(r for r in recordings(SPEECH) if "2033" in r.path.name)
    with torch.inference_mode():
        _in_steps(both, step.cache_size, torch.from_numpy(speech.read())[None], window)
    assert 0 < worst < 1e-3


def test_a_chunk_sees_no_further_than_its_look_ahead_and_its_history(model: Transducer) -> None:
    audio, frames = _noise()
    by, end = chunks.cut(6, 6, 5), (24 + 20) * moonshine.FRAME_SAMPLES
    later, earlier = audio.clone(), audio.clone()
    later[:, end:] = 0.5
    with torch.inference_mode():
        plain, changed = (chunks.encode(model.encoder, x, frames, by)[0] for x in (audio, later))
        assert torch.equal(plain[:1, :6], changed[:1, :6])
        assert not torch.equal(plain[:1, 6:12], changed[:1, 6:12])
        earlier[0, : 4 * moonshine.FRAME_SAMPLES] = 0
        assert not torch.equal(plain[0, :6], chunks.encode(model.encoder, earlier, frames, by)[0][0, :6])


def test_fused_attention_and_shifted_convolution_compute_the_same(model: Transducer) -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 4, 9, 36) for _ in range(3))
    mask = (torch.arange(9) < 7)[None, None, None]
    torch.testing.assert_close(moonshine._fused(q, k, v, mask), moonshine.attend(q, k, v, mask), atol=1e-5, rtol=1e-4)
    block, y = model.encoder.at_96_ms[0], torch.randn(2, 12, 128)
    around = torch.nn.functional.pad(y, (0, 0, 4, 4))
    with torch.inference_mode():
        torch.testing.assert_close(block.convolve_within(around), block.convolve(y), atol=1e-5, rtol=1e-4)


def test_moonshine_hears_what_its_published_graph_hears() -> None:
    audio = recordings(SPEECH)[0].read()
    audio = audio[: len(audio) // moonshine.FRAME_SAMPLES * moonshine.FRAME_SAMPLES]
    session = onnxruntime.InferenceSession(str(moonshine.assets() / "encoder_model.ort"), providers=["CPUExecutionProvider"])
    padded = np.pad(audio, (0, 511))[None]
    (theirs,) = session.run(None, {"input_values": padded, "attention_mask": np.ones(padded.shape, np.int64)})
    frames = torch.tensor([len(audio) // moonshine.FRAME_SAMPLES])
    stem, lower, upper = moonshine.load(3)
    with torch.inference_mode():
        ours = upper(lower(stem(torch.from_numpy(audio)[None], frames), frames), frames).numpy()
    # Theirs rounds activations to 8 bits, ours doesn't.
    assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > 0.998


def test_distorted_speech_keeps_its_length_and_stays_in_range() -> None:
    audio = torch.from_numpy(recordings(SPEECH)[0].read())
    rows = audio.repeat(6, 1)
    rows[3:, 50_000:] = 0
    lengths = torch.tensor([len(audio)] * 3 + [50_000] * 3)
    distorter = Distorter(0, torch.device("cpu"))
    distorted = [distorter(rows, lengths) for _ in range(4)]
    for one in distorted:
        assert one.shape == rows.shape
        assert one.isfinite().all()
        assert not one[3:, 50_000:].any()
        assert ((one.abs().amax(1) > 0.1) & (one.abs().amax(1) <= 1)).all()
    assert not torch.equal(distorted[0], distorted[1])
    assert torch.equal(Distorter(0, torch.device("cpu"))(rows, lengths), distorted[0])


def test_a_tone_played_faster_is_higher() -> None:
    tone = torch.sin(torch.arange(16_000) * 0.5)[None].repeat(2, 1)
    played = resample(tone, torch.tensor([1.1, 1.0]), 14_000)[:, 100:13_000]
    at = torch.arange(14_000)[100:13_000]
    assert (played[0] - torch.sin(at * 0.55)).abs().max() < 0.01
    assert (played[1] - torch.sin(at * 0.5)).abs().max() < 1e-4


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
    assert made["choose"] == (Recording(tmp_path / "jfk.flac", "Inauguration", "and so"),)
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
    padded = torch.from_numpy(np.pad(batch, ((0, 0), (0, features.shape[2] * moonshine.FRAME_SAMPLES - batch.shape[1]))))
    real = torch.from_numpy(counts)
    with torch.inference_mode():
        expected, expected_counts = model.encoder(padded, real)
    assert encoded.tolist() == expected_counts.tolist() == [-(-n // 1536) for n in lengths]
    assert np.corrcoef(frames.ravel(), expected.transpose(1, 2).numpy().ravel())[0, 1] > 0.999  # weights are rounded


def test_exported_graphs_fix_just_the_sizes_that_their_configurations_name(model: Transducer, config: Config) -> None:
    """Triton's ONNX Runtime backend refuses an output that is more or less open than ``config.pbtxt`` says."""
    for name, graph in graphs(model, config.model.predictor, config.model.width).items():
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        fixed = {node.name: [isinstance(size, int) for size in node.shape] for node in session.get_outputs()}
        configured = read_config(MODEL_REPOSITORY / name / "config.pbtxt").output
        assert fixed == {tensor.name: [size != -1 for size in tensor.dims] for tensor in configured}


def _compressed(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a matrix [128, 64] as a compressed graph's product computes with it."""
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
    stored: NDArray[np.float32] = session.run(None, {"x": np.eye(128, dtype=np.float32)})[0]
    return stored


def test_a_tie_of_scale_and_axis_keeps_matrices_exact_to_a_half_step() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((128, 64)).astype(np.float32) * np.logspace(-2, 1, 64, dtype=np.float32)
    stored = _compressed(weight)
    assert (np.abs(stored - weight) <= np.abs(weight).max(axis=0) / 254 + 1e-7).all()


@pytest.mark.parametrize("zero", [0, 111, 255])
def test_a_matrix_that_is_in_8_bits_already_stays_as_it_is(zero: int) -> None:
    steps = np.random.default_rng(0).integers(0, 256, (128, 64))
    weight = (steps - zero).astype(np.float32) * np.float32(0.00317)
    assert (_compressed(weight) == weight).all()


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


def _examples(count: int) -> list[Example]:
    sizes = [(10 + i) * 1000 for i in range(count)]
    return [Example(Item(str(i), "s", n), [1], torch.zeros(n, dtype=torch.int16)) for i, n in enumerate(sizes)]


def test_each_example_comes_once_before_any_comes_again() -> None:
    pool = Pool(np.random.default_rng(0))
    pool.add(_examples(20))
    everything = pool.hours * 3600
    first = pool.take(everything / 2) + pool.take(everything / 2)
    assert len({e.item.text for e in first}) == 20
    pool.add(_examples(1))
    assert pool.take(0.1)[0].item.text == "0", "new examples come first"


def test_batches_have_similar_lengths_and_a_limited_size() -> None:
    examples = _examples(20)
    batches = grouped(examples, 8, np.random.default_rng(0))
    assert sorted(e.item.text for batch in batches for e in batch) == sorted(e.item.text for e in examples)
    assert all(len(batch) * max(e.item.samples for e in batch) <= 8 * RATE * 1.05 for batch in batches)
    batch = collate(batches[0], torch.device("cpu"), [1.1] * len(batches[0]))
    assert batch.lengths.tolist() == [int(e.item.samples / 1.1) for e in batches[0]]
    assert batch.samples.shape[1] == int(batch.frames.max()) * moonshine.FRAME_SAMPLES


def test_a_store_takes_up_shards_as_they_appear(tmp_path: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(ROOT / "training" / "tokens.model"))
    random = np.random.default_rng(0)
    store = Store(tmp_path, pieces, torch.device("cpu"), Pool(random), Pool(random))
    store.refresh()
    write_shard(
        [(np.ones(RATE, np.float32) / 2, "so it is", "a"), (np.zeros(RATE, np.float32), "", "a")], tmp_path / "speech-0.json"
    )
    write_shard([(np.zeros(10, np.float32), "far too much text for this", "hibari")], tmp_path / "synthetic-0.json")
    store.refresh()
    store.refresh()
    (example,) = store.speech.examples
    assert example.item == Item("so it is", "a", RATE)
    assert example.samples.unique().tolist() == [16384]
    assert not store.synthetic.examples, "there is no room for its text"


def test_every_item_has_a_character_of_its_own() -> None:
    random = np.random.default_rng(0)
    drawn = [character(random) for _ in range(200)]
    assert len({c.pitch for c in drawn}) == 200
    assert all(0.4 < c.pitch < 1.3 and 0.7 < c.formants < 1.3 and 0.75 <= c.speed <= 1.3 for c in drawn)


def test_any_beginning_of_the_text_covers_what_it_can() -> None:
    ranks = {"the": 0, "walrus": 5_000, "oyster": 8_000, "carpenter": 9_000}
    entries = ["the walrus", "the oyster", "the carpenter", "the walrus the oyster", "the the the"]
    ordered = covering([], entries, ranks, np.random.default_rng(0))
    assert sorted(ordered) == sorted(entries)
    assert coverage(ordered[:3], ranks)["3k-10k"] == (3, 0)


def test_words_are_counted_wrong_as_few_as_possible() -> None:
    assert distance(["the", "cat", "sat"], ["the", "cat", "sat"]) == 0
    assert distance(["the", "cat", "sat"], ["a", "cat", "sat", "down"]) == 2
    assert distance([], ["so"]) == distance(["so"], []) == 1


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
