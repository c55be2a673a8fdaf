"""The whole training in small: speak, learn, stop, go on, export."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from amira.paths import MODEL_REPOSITORY
from training import config as configuration
from training.export import graphs
from training.model import build, greedy
from training.speech import recordings
from training.text import sentences
from training.train import Trainer
from training.weights import averaged

ROOT = Path(__file__).parents[2]
SPEECH = ROOT / "tests" / "speech"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("miniature")
    path = directory / "miniature.toml"
    text = Path(__file__).with_name("miniature.toml").read_text()
    path.write_text(text.replace("../../training/sentences.txt.gz", "sentences.txt.gz"))
    chosen = [s for s in sentences(configuration.load(configuration.DEFAULT).data.sentences)[:400] if len(s) < 60][:24]
    with gzip.open(directory / "sentences.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(chosen))
    return path


def _run(step: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-m", f"training.{step}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_miniature_is_spoken_learnt_and_exported(config_file: Path, tmp_path: Path) -> None:
    work, repository = tmp_path / "work", tmp_path / "repository"
    _run("data", "--work", work, "--speech", SPEECH, "--config", config_file)
    made = {path: path.stat().st_mtime_ns for path in (work / "speech").iterdir()}
    _run("data", "--work", work, "--speech", SPEECH, "--config", config_file)
    assert {path: path.stat().st_mtime_ns for path in (work / "speech").iterdir()} == made, "made again"

    _run("train", "--work", work, "--config", config_file, "--copy-to", tmp_path / "copies")
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    language = [line["language"]["loss"] for line in log if "language" in line]
    losses = [line["losses"]["transducer"] for line in log if "losses" in line]
    assert language[-1] < language[0]
    assert losses[-1] < 0.8 * losses[0]
    assert log[-1]["at"]["step"] == 60
    assert set(log[-1]["errors"]) == {"whole", "chunks"}
    _run("train", "--work", work, "--config", config_file)
    again = json.loads((work / "log.jsonl").read_text().splitlines()[-1])
    assert again["at"]["step"] == 60, "a finished training trained on"

    shutil.copytree(MODEL_REPOSITORY, repository)
    assert "MB" in _run("export", "--work", work, "--into", repository, "--config", config_file)
    copied, kept = averaged(tmp_path / "copies"), averaged(work)
    assert copied.keys() == kept.keys()
    assert all(torch.allclose(copied[name], kept[name], atol=1e-3, rtol=1e-3) for name in kept)


def test_graphs_decode_to_what_the_model_does(config_file: Path) -> None:
    torch.manual_seed(3)
    config = configuration.load(config_file)
    model = build(config).eval()
    exported = {
        name: onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        for name, graph in graphs(model, config.model.predictor, config.model.width).items()
    }
    audio = recordings(SPEECH)[0].read()[:80_000]
    features, count = exported["preprocessor"].run(None, {"waveforms": audio[None], "waveforms_lens": np.array([len(audio)])})
    frames, lengths = exported["encoder"].run(None, {"audio_signal": features, "length": count})
    encoded = torch.from_numpy(frames).transpose(1, 2)
    one, state = np.ones(1, np.int32), np.zeros((1, 1, config.model.predictor), np.float32)
    feed = {"encoder_outputs": frames[:, :, :1], "targets": one[None] * model.blank, "target_length": one}
    logits = exported["decoder_joint"].run(None, feed | {"input_states_1": state, "input_states_2": state})[0]
    first = greedy(model, encoded[:, :1], torch.tensor([1]), max_symbols=1)[0]
    best = int(logits[0, 0, 0].argmax())
    assert first == ([] if best == model.blank else [best])
    assert lengths.tolist() == [-(-len(audio) // 1536)]


def test_a_stopped_training_goes_on_where_it_was(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    _run("data", "--work", work, "--config", config_file)
    config = configuration.load(config_file)
    first = Trainer(config, work, torch.device("cpu"))
    step, taken = Trainer._step, list[int]()

    def interrupting(trainer: Trainer, *arguments: Any) -> Any:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(1)
        return step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_step", interrupting)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = Trainer(config, work, torch.device("cpu"))
    assert second.at == first.at
    assert second.at.step == 3
    for name, tensor in first.average.state_dict().items():
        assert torch.equal(tensor, second.average.state_dict()[name]), name
