"""Cuts of long recordings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.audio import RATE
from gateway.recordings.cut import FRAME_SAMPLES, Cutter, Lengths, Piece

LENGTHS = Lengths()
PAUSE_SECS = 0.4
Samples = npt.NDArray[np.int16]


def pieces(samples: Samples, block: int = RATE, lengths: Lengths = LENGTHS) -> list[Piece]:
    """Cut a recording that is pushed in blocks."""
    cutter = Cutter(lengths)
    found: list[Piece] = []
    for at in range(0, len(samples), block):
        found += cutter.push(samples[at : at + block])
    return [*found, *cutter.finish()]


def noise(secs: float, level: float, seed: int = 0) -> Samples:
    return (np.random.default_rng(seed).normal(size=round(secs * RATE)) * level).astype(np.int16)


def speech_with_pauses(spoken: Sequence[float], level: float, floor: float) -> tuple[Samples, list[tuple[int, int]]]:
    """Return noise with quieter pauses at a fixed interval, and the positions of the pauses."""
    parts, pauses, at = [], [], 0
    for number, secs in enumerate(spoken):
        parts += [noise(secs, level, number), noise(PAUSE_SECS, floor, number)]
        at += len(parts[-2])
        pauses.append((at, at + len(parts[-1])))
        at += len(parts[-1])
    return np.concatenate(parts), pauses


@pytest.mark.parametrize("secs", [0.01, 1.0, 20.0, 30.0])
def test_up_to_thirty_seconds_stay_whole(secs: float) -> None:
    samples = noise(secs, 1000)
    (piece,) = pieces(samples)
    assert piece.start == 0
    np.testing.assert_array_equal(piece.samples, samples)


def test_no_audio_has_no_pieces() -> None:
    assert pieces(np.zeros(0, np.int16)) == []


@given(
    st.integers(1, 2_400_000),
    st.sampled_from([1600, 16_000, 16_001, 100_000]),
    st.sampled_from([0, 1, 3000, 32_767]),
    st.sampled_from([60.0, 30.0, 12.0, 1.0]),
)
def test_pieces_are_the_recording(size: int, block: int, level: int, max_secs: float) -> None:
    """For any audio; and the lengths are within the limits."""
    lengths = Lengths.within(max_secs)
    samples = np.random.default_rng(size).integers(-level, level, size, np.int16, endpoint=True)
    found = pieces(samples, block, lengths)
    np.testing.assert_array_equal(np.concatenate([piece.samples for piece in found]), samples)
    assert [piece.start for piece in found] == [0, *np.cumsum([len(piece.samples) for piece in found])[:-1]]
    assert all(lengths.least <= len(piece.samples) + FRAME_SAMPLES for piece in found[:-1])
    assert all(len(piece.samples) <= lengths.most for piece in found[:-1])
    assert len(found[-1].samples) <= lengths.whole <= max_secs * RATE


@given(st.integers(1, 40_000))
def test_blocks_do_not_change_the_cuts(block: int) -> None:
    samples = noise(70, 1000)
    expected = [piece.start for piece in pieces(samples)]
    assert len(expected) > 2
    assert [piece.start for piece in pieces(samples, block)] == expected


@pytest.mark.parametrize(("level", "floor"), [(3000, 0), (3000, 300), (300, 30), (30, 10)])
def test_cuts_are_in_pauses(level: float, floor: float) -> None:
    """At any level of speech and noise."""
    samples, pauses = speech_with_pauses([3.3, 7.1, 5.2, 4.4, 6.7, 8.0] * 3, level, floor)
    cuts = [piece.start for piece in pieces(samples)[1:]]
    assert len(cuts) >= 5
    for cut in cuts:
        assert any(start < cut < end for start, end in pauses), f"{cut / RATE} s"


def test_a_pause_is_preferred_to_a_short_silence() -> None:
    """Stop consonants are silent for a moment, within a word."""
    samples = noise(40, 3000)
    samples[12 * RATE : 12 * RATE + RATE // 20] = 0
    pause = slice(16 * RATE, 16 * RATE + round(0.35 * RATE))
    samples[pause] //= 20
    assert pause.start < pieces(samples)[1].start < pause.stop


def test_memory_does_not_grow_with_the_recording() -> None:
    cutter, held = Cutter(LENGTHS), 0
    for second in range(300):
        held += RATE
        for piece in cutter.push(noise(1, 1000, second)):
            held -= len(piece.samples)
        assert held <= LENGTHS.whole + RATE
