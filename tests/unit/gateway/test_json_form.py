"""The JSON form of large recordings; test_audio.py has what concerns small ones too."""

from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from gateway.audio.json_form import MAX_OTHER_BYTES, SLICE_BYTES, unpack_json
from gateway.errors import ApiError, ErrorKind

SECOND = bytes(range(256)) * 125
LARGE = SECOND * 10


def form(audio: bytes, separators: tuple[str, str] = (", ", ": "), **others: Any) -> bytes:
    return json.dumps({"description": "x", "audio_buffer": [*audio], **others}, separators=separators).encode()


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,\r\n\t", " : ")])
def test_large_recording_is_unpacked(separators: tuple[str, str]) -> None:
    assert len(form(LARGE)) > MAX_OTHER_BYTES + 10 * SLICE_BYTES
    opaque = {"audio_buffer": [1, 2], "x": '"audio_buffer": [3]'}
    assert unpack_json(form(LARGE, separators, opaque=opaque)) == (LARGE, {"opaque": opaque})
    assert unpack_json(form(LARGE, separators)) == (LARGE, {})


@pytest.mark.parametrize("extra", range(12))
def test_any_length_is_unpacked(extra: int) -> None:
    audio = bytes(5 * SLICE_BYTES + extra)
    assert unpack_json(form(audio, (",", ":")))[0] == audio


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda body: body.replace(b"7, 8", b"7, 256", 1), ErrorKind.UNACCEPTABLE, r"audio_buffer\[8\] is 256"),
        (lambda body: body.replace(b"255]", b"-1]"), ErrorKind.UNACCEPTABLE, r"audio_buffer\[319999\] is -1"),
        (lambda body: body.replace(b"255]", b"1.0]"), ErrorKind.UNACCEPTABLE, r"audio_buffer\[319999\] is 1.0"),
        (lambda body: body.replace(b"255]", b"null]"), ErrorKind.UNACCEPTABLE, r"audio_buffer\[319999\] is null"),
        (lambda body: body.replace(b"255]", b"255,]"), ErrorKind.INVALID_BODY, "JSON"),
        (lambda body: body.replace(b"7, 8", b"7,, 8"), ErrorKind.INVALID_BODY, "JSON"),
        (lambda body: body.replace(b"[0", b"[,0"), ErrorKind.INVALID_BODY, "JSON"),
        (lambda body: body.replace(b"255]", b"255"), ErrorKind.BODY_TOO_LARGE, "besides audio_buffer"),
        (lambda body: body.replace(b"audio_buffer", b"audio_puffer"), ErrorKind.BODY_TOO_LARGE, "besides audio_buffer"),
        (lambda body: b'{"a": ' + body + b"}", ErrorKind.INVALID_BODY, "audio_buffer is an array"),
        (lambda body: body[:-1], ErrorKind.INVALID_BODY, "JSON"),
        (lambda body: body + b"x", ErrorKind.INVALID_BODY, "JSON"),
    ],
)
def test_what_is_no_recording_is_refused(change: Callable[[bytes], bytes], kind: ErrorKind, message: str) -> None:
    with pytest.raises(ApiError, match=message) as error:
        unpack_json(change(form(LARGE)))
    assert error.value.kind is kind


@pytest.mark.parametrize("unit", [b"[],", b"{},", b"0,", b'"a",', b"1.5,", b"99999,", b'{"a":0},'])
@pytest.mark.parametrize("key", ["opaque", "junk"])
def test_ignored_keys_cost_no_memory(unit: bytes, key: str) -> None:
    """The largest body would otherwise become up to 300 MiB of objects."""
    body = b'{"audio_buffer":[0,0],"%b":[%b0]}' % (key.encode(), unit * (8 * 2**20 // len(unit)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ApiError, match=str(MAX_OTHER_BYTES)) as error:
        unpack_json(body)
    assert error.value.kind is ErrorKind.BODY_TOO_LARGE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


@pytest.mark.parametrize("end", [b"1]}", b"1"])
def test_many_arrays_cost_no_time(end: bytes) -> None:
    """All of them end at the last bracket, or never."""
    name = b'"audio_buffer":['
    body = b"{" + name * (8 * 2**20 // len(name)) + end
    began = time.thread_time()
    with pytest.raises(ApiError):
        unpack_json(body)
    assert time.thread_time() - began < 3


@pytest.mark.parametrize("junk", [b'"audio_buffer"' + b" " * (8 * 2**20), b'"audio_buffer":[0],' * (8 * 2**20 // 19)])
def test_the_search_for_the_audio_holds_no_other_thread_up(junk: bytes) -> None:
    """One search of a regular expression keeps the interpreter's lock."""
    began = time.thread_time()
    with pytest.raises(ApiError, match=str(MAX_OTHER_BYTES)):
        unpack_json(b"{" + junk)
    assert time.thread_time() - began < 0.02


def test_other_threads_run_while_numbers_are_parsed() -> None:
    body = form(LARGE * 5)
    parser = threading.Thread(target=unpack_json, args=(body,))
    parser.start()
    turns = 0
    while parser.is_alive():
        time.sleep(0)
        turns += 1
    assert turns > len(body) // SLICE_BYTES // 2
