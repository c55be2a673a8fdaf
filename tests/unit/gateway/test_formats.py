"""Every format that ffmpeg and sox write is decoded close to its original, or refused by name; none is taken for raw audio."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gateway.audio.files import decode_audio
from gateway.audio.sniff import RAW, identify
from gateway.errors import ApiError, ErrorKind
from perf.formats import CHANNELS, FORMS, MAX_DELAY, RATES, SPEECH, Deviation, measure, write

HEADERLESS = re.compile(
    r"a|al|u|f|s|ul|mulaw|alaw|vidc|[fsu]\d+(be|le)?|pcm.*|adx|g72\d\w*|gsm|sbc|aptx\w*|apm|codec2raw|dfpwm|rtp\w*|wsaud|data|rawvideo|null|crc|\w*hash|md5"
)
"""Formats without a header, which cannot be told from raw audio, and formats that are not files."""


@pytest.fixture(autouse=True)
def _tools() -> None:
    for command in ("ffmpeg", "sox"):
        if not shutil.which(command):
            reason = f"{command} is not installed; run tools/system-packages as root"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)


def check(deviation: Deviation | None, least_db: float) -> None:
    if deviation:
        assert deviation.db > least_db
        assert abs(deviation.delay_ms) < MAX_DELAY / 16
        assert abs(deviation.excess_ms) < 250


@pytest.mark.parametrize("name", FORMS)
def test_formats_of_ffmpeg_and_sox(name: str) -> None:
    form = FORMS[name]
    rate, channels = form.only_rate or 44_100, min(2, form.most_channels)
    deviation = measure(form, rate, channels)
    if deviation is None:
        pytest.skip("this build of the tool does not write it")
    check(deviation, form.least_db)


@pytest.mark.slow
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", FORMS)
def test_formats_at_all_rates_and_channels(name: str, rate: int) -> None:
    for channels in CHANNELS:
        check(measure(FORMS[name], rate, channels), FORMS[name].least_db)


def muxers() -> list[str]:
    """The formats that the installed ffmpeg writes."""
    if not shutil.which("ffmpeg"):
        return []
    listed = subprocess.run(["ffmpeg", "-v", "error", "-muxers"], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^  E (\S+)", listed, re.MULTILINE)
    return [name for name in names if not HEADERLESS.fullmatch(name)]


@pytest.mark.slow
@pytest.mark.parametrize("muxer", muxers())
def test_no_format_of_ffmpeg_is_taken_for_raw_audio(muxer: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-nostdin",
        "-i",
        str(SPEECH),
        "-t",
        "4",
        "-vn",
        "-strict",
        "-2",
        "-f",
        muxer,
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, check=False, timeout=60)
    if done.returncode or not target.is_file() or not target.stat().st_size:
        pytest.skip("no audio is written in this format")
    body = target.read_bytes()
    assert identify(body).format != RAW
    try:
        samples = decode_audio(body, "", 60)
    except ApiError as error:
        assert error.kind in (ErrorKind.UNSUPPORTED_MEDIA, ErrorKind.UNDECODABLE_AUDIO)  # noqa: PT017
    else:
        expected = decode_audio(SPEECH.read_bytes(), "", 60)[:64_000]
        size = 2**18
        spectra = [np.fft.rfft(one / np.linalg.norm(one.astype(float)), size) for one in (samples, expected)]
        assert np.fft.irfft(spectra[0] * np.conj(spectra[1]), size).max() > 0.5


@pytest.mark.parametrize("content_type", ["audio/wav", "audio/flac", "audio/mpeg", "audio/pcm", "video/mp4"])
@pytest.mark.parametrize("name", ["M4A, AAC", "WebM, Opus", "MP3", "WAV, µ-law", "Ogg, Opus"])
def test_a_wrong_type_changes_nothing(name: str, content_type: str) -> None:
    body = write(FORMS[name], 44_100, 1)
    assert body
    np.testing.assert_array_equal(decode_audio(body, content_type, 60), decode_audio(body, "", 60))
