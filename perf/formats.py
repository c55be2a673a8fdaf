"""Write speech in all formats of ffmpeg and sox, decode it, and print its deviation from the original.

``python -m perf.formats`` prints a table in Markdown, ``python -m perf.formats FORM …`` a part of it.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from gateway.audio import RATE
from gateway.audio.files import decode_audio
from gateway.errors import ApiError

SPEECH = Path(__file__).parents[1] / "tests" / "speech" / "jfk.flac"
SECS = 4
RATES = (6_000, 8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000)
CHANNELS = (1, 2, 6)
MAX_DELAY = 4_000
"""Maximum delay of an encoder, in 16 kHz samples."""

LOSSLESS_DB, COMPANDED_DB, CODED_DB = 60, 25, 5
"""Minimum ratio of the signal to its deviation, by kind of codec."""


@dataclass(frozen=True)
class Form:
    """A format and codec.

    Attributes:
        suffix: suffix of the file's name.
        options: options of ffmpeg or sox for the output.
        least_db: minimum ratio of the signal to its deviation, in dB.
        sox: whether sox writes it.
        most_channels: maximum number of channels.
        only_rate: the single sample rate of the codec in Hz; 0 if there are several.
    """

    suffix: str
    options: str
    least_db: float = CODED_DB
    sox: bool = False
    most_channels: int = 6
    only_rate: int = 0


FORMS = {
    "M4A, AAC": Form("m4a", "-c:a aac -b:a 128k"),
    "M4A, ALAC": Form("m4a", "-c:a alac", LOSSLESS_DB),
    "MP4 in fragments, AAC": Form("mp4", "-c:a aac -b:a 128k -movflags frag_keyframe+empty_moov"),
    "MP4, Opus": Form("mp4", "-c:a libopus -b:a 64k"),
    "MP4, MP3": Form("mp4", "-c:a libmp3lame", most_channels=2),
    "3GP, AAC": Form("3gp", "-c:a aac", most_channels=2),
    "QuickTime, PCM": Form("mov", "-c:a pcm_s16le", LOSSLESS_DB),
    "QuickTime, µ-law": Form("mov", "-c:a pcm_mulaw", COMPANDED_DB),
    "WebM, Opus": Form("webm", "-c:a libopus -b:a 64k"),
    "WebM, Vorbis": Form("webm", "-c:a libvorbis"),
    "Matroska, FLAC": Form("mka", "-c:a flac", LOSSLESS_DB),
    "Matroska, AAC": Form("mka", "-c:a aac -b:a 128k"),
    "Matroska, AC-3": Form("mka", "-c:a ac3"),
    "Matroska, PCM": Form("mka", "-c:a pcm_f32le", LOSSLESS_DB),
    "ADTS, AAC": Form("aac", "-c:a aac -b:a 128k"),
    "WMA 1": Form("wma", "-c:a wmav1 -b:a 96k", most_channels=2),
    "WMA 2": Form("wma", "-c:a wmav2 -b:a 96k", most_channels=2),
    "MP3": Form("mp3", "-c:a libmp3lame", most_channels=2),
    "Ogg, Opus": Form("opus", "-c:a libopus -b:a 64k"),
    "Ogg, Vorbis": Form("ogg", "-c:a libvorbis"),
    "Ogg, FLAC": Form("oga", "-c:a flac", LOSSLESS_DB),
    "Ogg, Speex": Form("spx", "-c:a libspeex", most_channels=2),
    "FLAC": Form("flac", "-c:a flac", LOSSLESS_DB),
    "WAV, PCM 8": Form("wav", "-c:a pcm_u8", COMPANDED_DB),
    "WAV, PCM 16": Form("wav", "-c:a pcm_s16le", LOSSLESS_DB),
    "WAV, PCM 24": Form("wav", "-c:a pcm_s24le", LOSSLESS_DB),
    "WAV, float": Form("wav", "-c:a pcm_f32le", LOSSLESS_DB),
    "WAV, double": Form("wav", "-c:a pcm_f64le", LOSSLESS_DB),
    "WAV, µ-law": Form("wav", "-c:a pcm_mulaw", COMPANDED_DB),
    "WAV, A-law": Form("wav", "-c:a pcm_alaw", COMPANDED_DB),
    "WAV, MS ADPCM": Form("wav", "-c:a adpcm_ms", 10, most_channels=2),
    "WAV, IMA ADPCM": Form("wav", "-c:a adpcm_ima_wav", 10, most_channels=2),
    "WAV, GSM": Form("wav", "-e gsm-full-rate", sox=True, most_channels=1),
    "WAV, MP3": Form("wav", "-c:a libmp3lame", most_channels=2),
    "RF64": Form("wav", "-c:a pcm_s16le -rf64 always", LOSSLESS_DB),
    "W64": Form("w64", "-c:a pcm_s16le", LOSSLESS_DB),
    "AIFF": Form("aiff", "-c:a pcm_s16be", LOSSLESS_DB),
    "AIFF, 24 bits": Form("aiff", "-b 24", LOSSLESS_DB, sox=True),
    "AIFF-C, µ-law": Form("aiff", "-c:a pcm_mulaw", COMPANDED_DB),
    "AU": Form("au", "-e signed -b 16", LOSSLESS_DB, sox=True),
    "AU, µ-law": Form("au", "-c:a pcm_mulaw", COMPANDED_DB),
    "CAF": Form("caf", "-c:a pcm_s16le", LOSSLESS_DB),
    "CAF, ALAC": Form("caf", "-c:a alac", LOSSLESS_DB),
    "CAF, Opus": Form("caf", "-c:a libopus -b:a 64k", most_channels=2),
    "FLAC by sox": Form("flac", "", LOSSLESS_DB, sox=True),
    "Ogg by sox": Form("ogg", "", sox=True),
    "WAV by sox, 24 bits": Form("wav", "-b 24", LOSSLESS_DB, sox=True),
    "AMR-NB by sox": Form("amr-nb", "", 3, sox=True, most_channels=1, only_rate=8_000),
}
"""All forms by name."""


@dataclass(frozen=True)
class Deviation:
    """Deviation of decoded audio from the original.

    Attributes:
        db: ratio of the signal to its deviation in dB, at the best delay.
        delay_ms: the best delay.
        excess_ms: length of the decoded audio beyond the original's.
    """

    db: float
    delay_ms: float
    excess_ms: float


def original(rate: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return speech [n] at a rate, and the same resampled to 16 kHz; full scale 1."""
    speech = soundfile.read(SPEECH, always_2d=True)[0][: SECS * RATE].mean(axis=1)
    wave = soxr.resample(speech, RATE, rate, "VHQ") if rate != RATE else speech
    return wave, soxr.resample(wave, rate, RATE, "VHQ") if rate != RATE else wave


def write(form: Form, rate: int, channels: int) -> bytes | None:
    """Return a file with the same speech on every channel; None if the tool does not support this."""
    if channels > form.most_channels or form.only_rate not in (0, rate):
        return None
    wave, _ = original(rate)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source.wav"), Path(folder, f"target.{form.suffix}")
        soundfile.write(source, np.repeat(wave[:, None], channels, axis=1), rate, "PCM_24")
        if form.sox:
            command = ["sox", "-D", str(source), *form.options.split(), str(target)]
        else:
            command = [
                "ffmpeg",
                "-v",
                "error",
                "-nostdin",
                "-i",
                str(source),
                *form.options.split(),
                "-strict",
                "-2",
                str(target),
            ]
        done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 (fixed tools)
        return target.read_bytes() if done.returncode == 0 and target.exists() and target.stat().st_size else None


def compare(decoded: NDArray[np.int16], rate: int) -> Deviation:
    """Return the deviation of decoded speech from the original of a rate."""
    _, expected = original(rate)
    samples = decoded / 0x8000
    size = 1 << math.ceil(math.log2(len(samples) + len(expected)))
    match = np.fft.irfft(np.fft.rfft(samples, size) * np.conj(np.fft.rfft(expected, size)), size)
    delays = np.arange(-MAX_DELAY, MAX_DELAY)
    delay = int(delays[np.argmax(match[delays])])
    start, stop = max(0, -delay), min(len(expected), len(samples) - delay)
    part = expected[start:stop]
    error = np.square(samples[start + delay : stop + delay] - part).sum()
    return Deviation(
        10 * math.log10(np.square(part).sum() / max(error, 1e-12)),
        delay * 1000 / RATE,
        (len(samples) - len(expected)) * 1000 / RATE,
    )


def measure(form: Form, rate: int, channels: int) -> Deviation | None:
    """Write, decode and compare; return None if the tool does not support this.

    Raises:
        ApiError: the file was not decoded.
    """
    file = write(form, rate, channels)
    return compare(decode_audio(file, "", 60), rate) if file else None


def main() -> None:
    """Print a table with the worst ratio over all numbers of channels, by form and rate."""
    print("| format | " + " | ".join(f"{rate / 1000:g}" for rate in RATES) + " | longest delay, ms | longest excess, ms |")
    print("|---|" + "---:|" * (len(RATES) + 2))
    for name in sys.argv[1:] or FORMS:
        cells, delays, excesses = [], [0.0], [0.0]
        for rate in RATES:
            found: list[float] = []
            refused = ""
            for channels in CHANNELS:
                try:
                    deviation = measure(FORMS[name], rate, channels)
                except ApiError as error:
                    refused = error.kind.code
                    print(f"{name}, {rate} Hz, {channels} channels: {error.message}", file=sys.stderr)
                    continue
                if deviation:
                    found.append(deviation.db)
                    delays.append(abs(deviation.delay_ms))
                    excesses.append(abs(deviation.excess_ms))
            cells.append(refused or (f"{min(found):.0f}" if found else "–"))
        print(f"| {name} | " + " | ".join(cells) + f" | {max(delays):.0f} | {max(excesses):.0f} |", flush=True)


if __name__ == "__main__":
    main()
