"""The computations of the benchmark."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from amira.paths import MODEL_REPOSITORY, SPEECH
from gateway.triton.geometry import Windows
from perf.endurance import Watch
from perf.evaluate import rates
from perf.labelled import read_speech
from perf.load import percentiles_ms
from perf.recogniser import windows_of
from perf.report import Goal
from perf.speech import audio_secs, join, repeat
from perf.streams import Message, Script, most_held, timings

WINDOWS = Windows(left=64_000, chunk=16_000, right=8_000)
RATE = 16_000


@pytest.mark.parametrize("capacity", [0, 1, 7, 8, 13, 31, 100])
@pytest.mark.parametrize("start", [1, 8, 40])
async def test_search_finds_the_limit(capacity: int, start: int) -> None:
    tried: list[int] = []

    async def holds(streams: int) -> bool:
        tried.append(streams)
        return streams <= capacity

    assert await most_held(holds, start, precision=0.0) == capacity
    assert len(tried) == len(set(tried)), "a trial costs half a minute"
    rough = await most_held(holds, start, precision=0.25)
    assert rough <= capacity <= math.ceil(1.25 * rough) + 1


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        (Goal("", 0.9, must=0.75, aim=0.9, at_least=True), "aim"),
        (Goal("", 0.8, must=0.75, aim=0.9, at_least=True), "pass"),
        (Goal("", 0.7, must=0.75, aim=0.9, at_least=True), "**fail**"),
        (Goal("", 15.1, must=15.0), "**fail**"),
        (Goal("", 14.9, must=15.0), "pass"),
        (Goal("", 30.0, aim=20.0), "not yet"),
        (Goal("", 30.0), ""),
    ],
)
def test_verdicts(goal: Goal, verdict: str) -> None:
    assert goal.verdict() == verdict


def test_windows_are_due_as_the_decoder_cuts_them() -> None:
    assert [WINDOWS.complete(samples) for samples in (0, 23_999, 24_000, 39_999, 40_000)] == [0, 0, 1, 1, 2]
    assert all(WINDOWS.complete(WINDOWS.chunk_due(chunk)) == chunk + 1 for chunk in range(5))
    assert windows_of(MODEL_REPOSITORY).chunk > 0


def test_chunk_is_timed_by_the_first_message_that_covers_it() -> None:
    """Two chunks are covered by one late message, one chunk changes nothing, and the last message never arrives."""
    script = Script(np.zeros(7 * RATE, np.int16), [0, 1, 3, 4])
    sent_at = [100 + 0.1 * frame for frame in range(1, 71)]
    messages = [Message(102.9, 2000), Message(105.0, 4000)]
    partials = timings(script, WINDOWS, 0.0, 100.0, sent_at, messages, gave_up=110.0)
    assert [partial.latency for partial in partials] == pytest.approx([1.9, 0.9, 1.0, 5.0])
    assert [partial.added for partial in partials] == pytest.approx([1.4, 0.4, 0.5, 4.5])
    assert timings(script, WINDOWS, 3.0, 100.0, sent_at, messages, gave_up=110.0) == partials[2:]


def test_growth_leaves_out_the_time_until_the_window_is_full() -> None:
    sizes = iter((50.0, 100.0))
    watch = Watch(WINDOWS, lambda: next(sizes))
    for secs in [0.1] * 6 + [1.0] * 60 + [7.0] * 100 + [2.0] * 60:
        watch.note(secs)
    assert watch.growth() == (2.0, 2.0)


def test_recordings_repeat_until_they_last() -> None:
    recordings = [np.full(RATE, value, np.int16) for value in (1, 2)]
    assert [recording[0] for recording in repeat(recordings, 2.5)] == [1, 2, 1]
    assert audio_secs(repeat(recordings, 2.0)) == 2.0
    assert join(recordings, 2.5)[[0, RATE, 2 * RATE]].tolist() == [1, 2, 1]
    assert len(join(recordings, 2.5)) == 2.5 * RATE


def test_percentiles_are_latencies_that_were_measured() -> None:
    assert percentiles_ms([0.001 * i for i in range(1, 101)]) == (51.0, 96.0, 100.0)


def test_error_rates_are_given_by_set(tmp_path: Path) -> None:
    for name in ("a.flac", "b.flac", "c.flac"):
        shutil.copy(SPEECH / "jfk.flac", tmp_path / name)
    (tmp_path / "manifest.tsv").write_text(
        "file\tset\tsource\ttext\na.flac\tone\tanywhere\tAsk not.\nb.flac\t\tother\tWhat, you\nc.flac\t\t\tcan do\n"
    )
    recordings = read_speech(tmp_path)
    assert [recording.set for recording in recordings] == ["one", "other", tmp_path.name]
    found = rates(recordings, ["ask not", "what can", "can"])
    assert {name: wer for name, (wer, _) in found.items()} == {
        "all": pytest.approx(100 / 3),
        "one": 0,
        "other": 50,
        tmp_path.name: 50,
    }
    assert list(rates(recordings[:1], ["ask"])) == ["all"]
