"""The whole training in small: speak, encode, learn, stop, go on, export, and the decoder reads what was learnt."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import onnxruntime
import pytest
from rich.progress import Progress

from amira.paths import MODEL_REPOSITORY
from greedy import Predictor, Row, Transducer, decode
from perf.recogniser import joint_step
from training import config as configuration
from training.speech import Voices
from training.text import normalise, sentences
from training.train import Trainer

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


def test_a_miniature_learns_and_its_graphs_are_decoded(config_file: Path, tmp_path: Path) -> None:
    work, repository = tmp_path / "work", tmp_path / "repository"
    _run("data", "--work", work, "--speech", SPEECH, "--config", config_file)
    made = {path: path.stat().st_mtime_ns for path in (work / "features").iterdir()}
    _run("data", "--work", work, "--speech", SPEECH, "--config", config_file)
    assert {path: path.stat().st_mtime_ns for path in (work / "features").iterdir()} == made, "made again"

    _run("train", "--work", work, "--config", config_file)
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    assert log[-1]["at"]["phase"] == 2
    assert set(log[-1]["errors"]) == {"whole", "windows"}
    _run("train", "--work", work, "--config", config_file)
    again = json.loads((work / "log.jsonl").read_text().splitlines()[-1])
    assert again["at"]["step"] == log[-1]["at"]["step"], "a finished training trained on"

    shutil.copytree(MODEL_REPOSITORY, repository)
    assert "MB" in _run("export", "--work", work, "--into", repository, "--config", config_file)
    assert _error_rate(repository, config_file) < 0.85  # 0.64 measured; what has not learnt gives 1 or more


def _error_rate(repository: Path, config_file: Path) -> float:
    """Word error rate of the exported graphs over sentences that were trained on, in another rendering."""
    config = configuration.load(config_file)
    preprocessor, encoder, joint = (
        onnxruntime.InferenceSession(repository / name / "1" / "model.onnx", providers=["CPUExecutionProvider"])
        for name in ("preprocessor", "encoder", "decoder_joint")
    )
    pieces = [line.rsplit(" ", 1)[0] for line in (repository / "vocab.txt").read_text(encoding="utf-8").splitlines()]
    blank = len(pieces) - 1
    step = joint_step(joint)
    voices, random = Voices(config.data.voices), np.random.default_rng(5)
    said, heard = [], []
    for sentence in sentences(config.data.sentences)[:12]:
        _, audio = voices.speak([sentence], random)
        features, count = preprocessor.run(None, {"waveforms": audio[None], "waveforms_lens": np.array([len(audio)])})
        frames, _ = encoder.run(None, {"audio_signal": features, "length": count})
        zeros = np.zeros((1, config.model.predictor), np.float32)
        row = Row(frames[0], Predictor(blank, (zeros, zeros)), max_symbols_per_step=4, max_tokens=1000)
        decode(step, Transducer(blank), [row], 32)
        heard.append("".join(pieces[token.id] for token in row.tokens).replace("▁", " ").strip())
        said.append(normalise(sentence))
    return jiwer.wer(said, heard)


class Interrupting(Progress):
    """Ctrl-C after the third step."""

    steps = 0

    def update(self, *_: Any, **__: Any) -> None:
        self.steps += 1
        if self.steps == 3:
            signal.raise_signal(signal.SIGINT)


def test_a_stopped_training_goes_on_where_it_was(config_file: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    _run("data", "--work", work, "--config", config_file)
    config = configuration.load(config_file)
    first = Trainer(config, work)
    with pytest.raises(KeyboardInterrupt):
        first.run(Interrupting(disable=True))
    second = Trainer(config, work)
    assert second.at == first.at
    assert second.at.step == 3
    for name, tensor in first.average.state_dict().items():
        assert np.array_equal(tensor.numpy(), second.average.state_dict()[name].numpy()), name
