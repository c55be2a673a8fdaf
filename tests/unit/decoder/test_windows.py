"""Caches of an encoder that is a hash of all it has seen: how far back they reach, and what is equal after a restart."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

from parameters import CachedEncoders, CachedWindows, Options
from windows import Cached, Samples, Window

HOP, CHUNK, RIGHT, FRAME = 4, 6, 2, 8
"""Samples per feature frame, feature frames per chunk and look-ahead, samples per encoder frame."""

SILENCE, NOISE = 0, 1


class Chunk(NamedTuple):
    """A decoded chunk: its number, and all that the encoder had seen."""

    number: int
    seen: bytes


def encoders(warm_up: int, longest: int, *, reset: bool = True, before: int = 0, edge: int = 0) -> CachedEncoders:
    sizes = CachedWindows("encoder", before + CHUNK + RIGHT, CHUNK, 4)
    return CachedEncoders(
        encoders={"balanced": sizes},
        hop_samples=HOP,
        edge_features=edge,
        right_features=RIGHT,
        warm_up_features=warm_up,
        max_cache_features=longest,
        zeros_before=before > 0,
        final_padding_samples=0,
        reset_at_endpoint=reset,
        element="float32",
        languages={},
        default_language="",
    )


def speech(chunks: int, endpoints: set[int]) -> Samples:
    """Random audio; the last chunk before an endpoint is silent."""
    samples = np.random.default_rng(0).integers(1, 1000, (chunks, CHUNK * HOP)).astype(np.int16)
    for endpoint in endpoints:
        samples[endpoint - 1] = SILENCE
    return samples.ravel()


class Run:
    """A stream's windows, encoded; a silent chunk is an endpoint."""

    def __init__(self, cached: CachedEncoders) -> None:
        self.windows = Cached(cached, FRAME, Options())
        self.decoded: list[Chunk] = []
        self.calls: list[Window] = []
        self._next = 0

    @classmethod
    def restored(cls, cached: CachedEncoders, saved: dict[str, int], chunk: int) -> tuple[Run, int]:
        run = cls(cached)
        run._next = chunk
        return run, run.windows.restore(chunk * CHUNK * HOP // FRAME, chunk * CHUNK, saved, saved["needed_from"])

    def push(self, samples: Samples, *, end: bool = False) -> None:
        self.windows.push(samples)
        while window := self.windows.next_window(end):
            self._encode(window)

    def _encode(self, window: Window) -> None:
        carried = window.carried
        assert carried
        own = window.samples[carried.skip * HOP :][: CHUNK * HOP]
        before = b"" if carried.cache is None else carried.cache.tobytes()
        seen = hashlib.sha256(before + window.samples[carried.skip * HOP :].tobytes())
        features = carried.length - (carried.size - CHUNK - RIGHT)
        frames = np.zeros((1, -(-features * HOP // FRAME)), np.float32)
        after = np.frombuffer(hashlib.sha256(seen.digest() + own.tobytes()).digest()[:16], np.float32)
        good, _ = self.windows.receive(window, frames, carried.length, after)
        self.calls.append(window)
        if not carried.decode:
            assert not good.shape[1]
            return
        self.decoded.append(Chunk(self._next, seen.digest()))
        self._next += 1
        if not own.any():
            self.windows.rest()


VARIANTS = [(0, 0), (0, 24), (6, 0), (6, 18), (9, 30), (18, 48), (12, 18)]


@pytest.mark.parametrize(("warm_up", "longest"), VARIANTS)
@pytest.mark.parametrize("reset", [True, False], ids=["endpoints", "no endpoints"])
def test_restored_windows_are_the_same(warm_up: int, longest: int, reset: bool) -> None:
    """Behind every chunk, with the audio that the state asks for: each hash of all that was seen is equal."""
    cached, endpoints = encoders(warm_up, longest, reset=reset), {4, 5, 6, 12, 27, 29}
    samples = speech(40, endpoints)
    whole, saved = Run(cached), []
    for at in range(0, len(samples), HOP):
        whole.push(samples[at : at + HOP])
        saved.append((whole.windows.save(), len(whole.decoded), at + HOP))
    whole.push(samples[:0], end=True)
    assert [chunk.number for chunk in whole.decoded] == [*range(40)]
    for state, chunks, sent in saved[:: CHUNK // 2]:
        again, start = Run.restored(cached, state, chunks)
        again.push(samples[start:sent])
        again.push(samples[sent:], end=True)
        assert again.decoded == whole.decoded[chunks:], f"restored behind chunk {chunks}"
        assert again.windows.save() == whole.windows.save()


@pytest.mark.parametrize(("warm_up", "longest"), [(0, 24), (6, 18), (9, 30), (12, 48)])
@pytest.mark.parametrize("spoken", [True, False], ids=["speech", "silence"])
def test_the_past_that_a_state_needs_is_bounded(warm_up: int, longest: int, spoken: bool) -> None:
    """Without an endpoint, too. Fresh caches begin at equal distances, and are filled with the chunks before."""
    run = Run(encoders(warm_up, longest, reset=False))
    needed, filling = [], -(-warm_up // CHUNK)
    for chunk in range(60):
        run.push(np.full(CHUNK * HOP, spoken, np.int16))
        state = run.windows.save()
        assert len(run.decoded) * CHUNK - state["needed_from"] // HOP < longest
        needed.append(state["needed_from"])
        assert chunk < 2 or run.decoded[-1].number == chunk - 1
    assert needed == sorted(needed)
    assert needed[-1] > 40 * CHUNK * HOP
    fresh = [i for i, window in enumerate(run.calls) if window.carried and window.carried.cache is None]
    assert {after - before for before, after in pairwise(fresh)} == {longest // CHUNK}
    undecoded = [i for i, window in enumerate(run.calls) if window.carried and not window.carried.decode]
    assert undecoded == [i + j for i in fresh[1:] for j in range(filling) if i + j < len(run.calls)]


def test_cuts_change_nothing() -> None:
    cached, samples = encoders(9, 30), speech(40, {4, 12, 27})
    at_once = Run(cached)
    at_once.push(samples, end=True)
    for seed in range(20):
        run = Run(cached)
        for piece in np.split(samples, np.sort(np.random.default_rng(seed).integers(0, len(samples), 30))):
            run.push(piece)
        run.push(samples[:0], end=True)
        assert run.decoded == at_once.decoded


def test_a_single_sample_passes_the_encoder() -> None:
    """Canaries are that short, and must show that every model works."""
    windows = Cached(encoders(0, 0), FRAME, Options())
    windows.push(np.zeros(1, np.int16))
    assert windows.next_window(end=True)


def test_zeros_stand_before_every_fresh_cache() -> None:
    run = Run(encoders(6, 30, before=3, edge=1))
    run.push(speech(40, {4, 12, 27}), end=True)
    assert [chunk.number for chunk in run.decoded] == [*range(40)]
    for window in run.calls:
        assert window.carried
        assert (window.carried.zeros == 3) == (window.carried.cache is None)
