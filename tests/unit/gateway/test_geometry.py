"""Windows of streams."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.triton.geometry import LATENCY_PARAMETERS, Windows, read_windows

PARAMETERS = {"frame_samples": "1536", "left_frames": "31", "chunk_frames": "10", "right_frames": "5"}
WINDOWS = st.builds(Windows, st.integers(0, 100), st.integers(1, 50), st.integers(0, 50))


@given(WINDOWS, st.integers(0, 10_000))
def test_next_window_is_due_as_soon_as_its_audio_is_there(windows: Windows, sent: int) -> None:
    due = windows.due(sent)
    assert due > sent
    assert windows.complete(due) == windows.complete(sent) + 1
    assert windows.complete(due - 1) == windows.complete(sent)


@given(WINDOWS, st.integers(0, 1000))
def test_chunk_is_complete_when_it_is_due(windows: Windows, chunk: int) -> None:
    assert windows.complete(windows.chunk_due(chunk)) == chunk + 1


def test_latency_without_windows_has_those_of_balanced() -> None:
    windows = read_windows({**PARAMETERS, "low_latency_frames": "31,6,5"})
    assert windows.keys() == {"balanced", *LATENCY_PARAMETERS}
    assert windows["balanced"] == windows["throughput"] == (31 * 1536, 10 * 1536, 5 * 1536)
    assert windows["low"] == (31 * 1536, 6 * 1536, 5 * 1536)
