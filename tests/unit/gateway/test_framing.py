"""Measuring of heads and frames, without connections."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.framing import (
    MAX_HEAD_BYTES,
    MAX_UPGRADE_LINE_BYTES,
    MAX_UPGRADE_LINES,
    PIECE_BYTES,
    SMALL_BYTES,
    SMALL_FRAMES_PER_SEC,
    FrameMeter,
    FrameQueue,
    Part,
    RequestMeter,
)
from tests.support.hostile import PING, frame

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n\r\n\r\n\r\n0\r\n\r\n"


def head(size: int) -> bytes:
    """Return a request's head of this size."""
    start, end = b"GET / HTTP/1.1\r\nX: ", b"\r\n\r\n"
    return start + b"x" * (size - len(start) - len(end)) + end


def cuts(data: bytes, places: list[int]) -> Iterator[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places})
    for start, end in zip([0, *ends], [*ends, len(data)], strict=True):
        if end > start:
            yield data[start:end]


@pytest.mark.parametrize("step", [1, 100, 1000, 2**16, 2**20])
@pytest.mark.parametrize(("size", "refused"), [(MAX_HEAD_BYTES, False), (MAX_HEAD_BYTES + 1, True)])
def test_head_limit_is_exact(size: int, step: int, *, refused: bool) -> None:
    meter = RequestMeter()
    data = head(size)
    for start in range(0, size, step):
        meter.take(data[start : start + step])
    assert (meter.refusal is not None) is refused
    if meter.refusal:
        assert meter.refusal.status is HTTPStatus.BAD_REQUEST
        assert str(MAX_HEAD_BYTES) in meter.refusal.message


@given(st.lists(st.sampled_from([GET, POST + b"abc\r\n", CHUNKED]), max_size=8), st.lists(st.integers(0, 1000), max_size=20))
def test_pending_heads_in_any_cut(requests: list[bytes], places: list[int]) -> None:
    meter = RequestMeter()
    for piece in cuts(b"".join(requests), places):
        meter.take(piece)
    assert meter.refusal is None
    assert meter.heads == len(requests)
    assert not meter.head_pending
    assert meter.part is Part.NONE
    assert meter.health_only is all(request is GET for request in requests)


@pytest.mark.parametrize("requests", [GET * 2, POST + b"abc\r\n" + GET, CHUNKED + POST + b"a\r\n\r\n"])
def test_pipelined_heads_end_in_any_cut(requests: bytes) -> None:
    for place in range(len(requests)):
        meter = RequestMeter()
        assert b"".join(meter.take(piece) for piece in cuts(requests, [place])) == requests
        assert (meter.heads, meter.head_pending) == (2, False)


def test_large_body_does_not_count_as_head() -> None:
    meter = RequestMeter()
    meter.take(b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
    for _ in range(10):
        meter.take(bytes(100_000))
        assert not meter.head_pending
    meter.take(b"GET / HT")
    assert meter.head_pending
    assert meter.refusal is None


@pytest.mark.parametrize("start", [b"\r\n", b"G", b"GET / HTTP/1.1\r\nHost"])
def test_part_of_a_head_is_pending(start: bytes) -> None:
    meter = RequestMeter()
    meter.take(GET)
    meter.take(start)
    assert meter.head_pending


@pytest.mark.parametrize("offer", [b"h2c", b"TLS/1.0", b"h2c, websocket", b"websocket2", b" " * 200 + b"h2c"])
@given(places=st.lists(st.integers(0, 500), max_size=20))
def test_offers_to_upgrade_are_removed_in_any_cut(offer: bytes, places: list[int]) -> None:
    lines = (b"POST / HTTP/1.1", b"Host: x", b"Upgrade: " + offer, b"Connection: Upgrade, HTTP2-Settings", b"Content-Length: 5")
    meter = RequestMeter()
    data = b"\r\n".join(lines) + b"\r\n\r\nabc\r\n"
    handed_on = b"".join(meter.take(piece) for piece in cuts(data, places))
    assert handed_on == data.replace(b"\r\nUpgrade: " + offer, b"")
    assert meter.part is Part.NONE


@pytest.mark.parametrize("upgrade", [b"Upgrade: websocket", b"upgrade:WebSocket\t", b"X-Upgrade: h2c", b"Upgraded: h2c"])
@given(places=st.lists(st.integers(0, 500), max_size=20))
def test_other_lines_are_passed_on_in_any_cut(upgrade: bytes, places: list[int]) -> None:
    data = b"GET / HTTP/1.1\r\n" + upgrade + b"\r\nHost: x\r\n\r\n"
    meter = RequestMeter()
    assert b"".join(meter.take(piece) for piece in cuts(data, places)) == data


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        ([b"X: " + b"x" * (MAX_UPGRADE_LINE_BYTES - 3)], False),
        ([b"X: " + b"x" * (MAX_UPGRADE_LINE_BYTES - 2)], True),
        ([b"X: x"] * (MAX_UPGRADE_LINES - 2), False),
        ([b"X: x"] * (MAX_UPGRADE_LINES - 1), True),
    ],
)
def test_upgrades_have_limits_of_their_own(headers: list[bytes], *, refused: bool) -> None:
    meter = RequestMeter()
    meter.take(b"\r\n".join([b"GET / HTTP/1.1", b"Upgrade: websocket", b"Connection: Upgrade", *headers]) + b"\r\n\r\n")
    assert (meter.refusal is not None) is refused


@pytest.mark.parametrize(
    ("data", "is_one_complete", "incomplete"),
    [
        (b"", False, False),
        (GET, True, False),
        (GET + GET, False, False),
        (GET[:10], False, True),
        (GET + GET[:10], False, True),
        (POST, False, True),
        (POST + b"abcde", True, False),
    ],
)
def test_progress_of_requests(data: bytes, *, is_one_complete: bool, incomplete: bool) -> None:
    meter = RequestMeter()
    meter.take(data)
    assert (meter.is_one_complete, meter.incomplete) == (is_one_complete, incomplete)


def measure(meter: FrameMeter, pieces: list[bytes]) -> tuple[list[bytes], bytes]:
    """Return the data that a meter passes on, fed in pieces, and the rest."""
    handed_on, rest = [], b""
    for piece in pieces:
        rest += piece
        while (end := meter.cut(rest, 0)) > 0:
            handed_on.append(rest[:end])
            rest = rest[end:]
    return handed_on, rest


@given(
    st.lists(st.sampled_from([0, 1, 125, 126, SMALL_BYTES - 1, SMALL_BYTES, 70_000]), max_size=30),
    st.lists(st.integers(0, 2**20), max_size=20),
    st.booleans(),
)
def test_frames_are_counted_in_any_cut(sizes: list[int], places: list[int], unmasked: bool) -> None:
    data = b"".join(frame(os.urandom(size), PING if size == 125 else 2) for size in sizes)
    if unmasked:
        data += b"\x82\x05abcde"
    now = 0.0
    meter = FrameMeter(lambda: now)
    handed_on, rest = measure(meter, list(cuts(data, places)))
    assert b"".join(handed_on) + rest == data
    assert rest == b""
    assert not meter.within_frame
    small = sum(size < SMALL_BYTES for size in sizes) + unmasked
    meter._allowance.take(SMALL_FRAMES_PER_SEC)
    assert meter.wait_secs() == pytest.approx(small / SMALL_FRAMES_PER_SEC)


def test_pieces_are_small_unless_a_frame_is_large() -> None:
    meter = FrameMeter(lambda: 0.0)
    handed_on, _ = measure(meter, [frame(b"\x01") * 10_000 + frame(bytes(100_000)) * 2])
    assert len(handed_on) > 10
    assert max(map(len, handed_on)) < 100_000 + PIECE_BYTES + 100


def test_incomplete_header_is_kept_back() -> None:
    meter = FrameMeter(lambda: 0.0)
    data = frame(bytes(70_000))
    assert [meter.cut(data[:size], 0) for size in (1, 2, 9, 13)] == [0] * 4
    assert meter.cut(data[:14], 0) == 14
    assert meter.within_frame


def test_flood_is_delayed_until_it_stops() -> None:
    now = 100.0
    meter = FrameMeter(lambda: now)
    data = frame(b"\x01") * 2 * SMALL_FRAMES_PER_SEC
    position = 0
    while position < len(data) and meter.wait_secs() <= 0:
        position = meter.cut(data, position)
    assert SMALL_FRAMES_PER_SEC <= position // len(frame(b"\x01")) <= SMALL_FRAMES_PER_SEC + PIECE_BYTES // 7 + 1
    assert meter.wait_secs() > 0
    now += 1.0
    assert meter.flooding_secs() == 1.0
    now += 10.0
    assert meter.flooding_secs() == 0.0


@given(st.lists(st.sampled_from([0, 1, 126, 5000]), max_size=20), st.lists(st.integers(0, 2**20), max_size=20))
def test_queue_passes_all_data_in_order(sizes: list[int], places: list[int]) -> None:
    data = b"".join(frame(os.urandom(size)) for size in sizes)
    queue, passed = FrameQueue(lambda: 0.0), b""
    for received in cuts(data, places):
        queue.append(received)
        while queue.pending and (piece := queue.take_piece()):
            passed += piece
            assert len(piece) <= PIECE_BYTES + 5000 + 8
        assert queue.incomplete or passed == data[: len(passed)]
    assert passed == data
    assert not queue.incomplete


def test_cleared_queue_has_no_data() -> None:
    queue = FrameQueue(lambda: 0.0)
    queue.append(frame(bytes(10)) * 1000)
    assert queue.take_piece()
    assert queue.pending
    queue.clear()
    assert not queue.pending
    assert queue.take_piece() == b""


def test_anything_is_measured_without_an_exception() -> None:
    randomness = random.Random(1)  # noqa: S311
    for _ in range(300):
        data = randomness.randbytes(randomness.randrange(2000))
        meter, requests = FrameMeter(), RequestMeter()
        measure(meter, list(cuts(data, [randomness.randrange(2000) for _ in range(3)])))
        for piece in cuts(GET + data, [randomness.randrange(2000) for _ in range(3)]):
            requests.take(piece)
