"""Errors of ``amira transcribe`` and ``amira listen``."""

from __future__ import annotations

import sys
import wave
from pathlib import Path

import pytest
from typer.testing import CliRunner

from amira.cli import app
from amira.ports import LOOPBACK, free_ports


def amira(*arguments: str | Path) -> tuple[int, str]:
    """Return exit code and standard error."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.stdout == ""
    return result.exit_code, result.stderr


@pytest.fixture
def recordings(tmp_path: Path) -> list[Path]:
    """Return two recordings of the same name."""
    paths = [tmp_path / "one.wav", tmp_path / "other" / "one.flac"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
    return paths


def wav(path: Path, rate: int = 16_000, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(bytes(3200))
    return path


def test_stream_of_another_format_is_refused(recordings: list[Path]) -> None:
    code, errors = amira("transcribe", recordings[0], "--stream", "--format", "srt")
    assert (code, errors.startswith("amira: --stream prints text as it is decoded")) == (2, True)


def test_subtitles_of_several_recordings_need_a_directory(recordings: list[Path]) -> None:
    code, errors = amira("transcribe", *recordings, "--format", "vtt")
    assert (code, "add --output-dir" in errors) == (2, True)


def test_recordings_that_would_share_a_file_are_refused(recordings: list[Path], tmp_path: Path) -> None:
    code, errors = amira("transcribe", *recordings, "--output-dir", tmp_path / "out")
    assert (code, f"{tmp_path / 'out' / 'one.txt'}" in errors) == (2, True)
    assert not (tmp_path / "out").exists()


def test_missing_server_error_says_how_to_start_one(
    recordings: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amira.commands.transcribe.RETRY_SECS", 0.0)
    monkeypatch.setattr("amira.commands.listen.RECONNECT_SECS", 0.0)
    (port,) = free_ports(LOOPBACK, 1)
    url = f"http://{LOOPBACK}:{port}"
    commands: tuple[list[str | Path], ...] = (["transcribe", *recordings], ["listen", "--file", wav(tmp_path / "speech.wav")])
    for command in commands:
        code, errors = amira(*command, "--url", url)
        reason, advice = errors.splitlines()
        assert (code, "no server" in reason) == (1, True)
        assert advice.startswith("amira: start one in another terminal: amira run; or name another: --url")


@pytest.mark.parametrize("command", ["transcribe", "listen"])
def test_url_without_a_scheme_is_refused(command: str, recordings: list[Path], tmp_path: Path) -> None:
    arguments = [recordings[0]] if command == "transcribe" else ["--file", wav(tmp_path / "speech.wav")]
    code, errors = amira(command, *arguments, "--url", "localhost")
    assert (code, "expected http://" in errors) == (2, True)


def test_unplayable_file_error_says_how_to_convert_it(recordings: list[Path], tmp_path: Path) -> None:
    for path, reason in (
        (recordings[0], "is not a WAV file"),
        (wav(tmp_path / "stereo.wav", channels=2), "2 channel(s)"),
        (wav(tmp_path / "slow.wav", rate=8000), "8000 Hz"),
    ):
        code, errors = amira("listen", "--file", path)
        assert (code, reason in errors, "ffmpeg -i" in errors) == (2, True, True)


@pytest.mark.parametrize("missing", ["package", "library", "device"])
def test_missing_microphone_error_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if missing == "package":
        monkeypatch.setitem(sys.modules, "sounddevice", None)
    else:
        source = 'raise OSError("PortAudio library not found")' if missing == "library" else NO_DEVICE
        (tmp_path / "sounddevice.py").write_text(source)
        monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))
    code, errors = amira("listen", "--device", "1")
    advice = {"package": "amira-asr[mic]", "library": "apt install libportaudio2", "device": "no microphone: it is gone"}
    assert (code, advice[missing] in errors) == (2, True)


NO_DEVICE = """
class PortAudioError(Exception):
    pass

def check_input_settings(device, **_):
    assert device == 1
    raise PortAudioError("it is gone")
"""
