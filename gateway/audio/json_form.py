"""Unpack the JSON form of a recording, in bounded memory and without blocking other threads.

orjson parses while it holds the interpreter's lock, and 10 MiB of ``[],`` become 300 MiB of lists. So the numbers of a large
body are parsed slice by slice, and the rest of the body is limited.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from typing import Any

import orjson

from gateway.errors import ApiError, ErrorKind

MAX_OTHER_BYTES = 256 * 2**10
"""Maximum size of a body without its audio, in bytes. A whole body up to this size is parsed at once, within 2 ms."""

SLICE_BYTES = 64 * 2**10
"""Size of the slices in which numbers are parsed; each takes about 0.2 ms."""

MAX_BYTE = 0xFF
NO_OBJECT = "The body must be a JSON object whose audio_buffer is an array of integers from 0 to 255."
AUDIO_ARRAY = re.compile(rb'"audio_buffer"\s*:\s*\[')


def unpack_json(body: bytes) -> tuple[bytes, dict[str, Any]]:
    """Unpack `{"audio_buffer": [bytes as integers], "opaque": anything}`.

    Args:
        body: the JSON text; other keys are ignored.

    Returns:
        The audio's bytes, and `{"opaque": …}` if the body has that key.

    Raises:
        ApiError: the body is not such an object, or is large without much audio.
    """
    if len(body) <= MAX_OTHER_BYTES:
        request = _parse(body)
        audio = _octets(request["audio_buffer"], 0)
    else:
        request, start, end = _cut_out_audio(body)
        audio = b"".join(_slices(body, start, end))
    opaque = {key: request[key] for key in ("opaque",) if key in request}
    try:
        orjson.dumps(opaque)
    except orjson.JSONEncodeError as error:  # orjson reads deeper nesting than it writes
        raise ApiError(ErrorKind.INVALID_BODY, f"opaque cannot be repeated in the answer: {error}.", "opaque") from error
    return audio, opaque


def _cut_out_audio(body: bytes) -> tuple[dict[str, Any], int, int]:
    """Return the rest of a large body, and the offsets of start and end of its audio."""
    start, end = max(_audio_arrays(body), key=lambda array: array[1] - array[0], default=(0, 0))
    other_bytes = len(body) - max(0, end - start)
    if other_bytes > MAX_OTHER_BYTES:
        message = f"The body has {other_bytes} bytes besides audio_buffer's numbers; at most {MAX_OTHER_BYTES} are allowed."
        raise ApiError(ErrorKind.BODY_TOO_LARGE, message)
    mark = secrets.token_hex(8)
    other = b"".join((body[:start], b'"', mark.encode(), b'"', body[end:]))
    request = _parse(other)
    if request["audio_buffer"] != [mark]:
        raise ApiError(ErrorKind.INVALID_BODY, NO_OBJECT, "audio_buffer")  # a nested object has the array
    return request, start, end


def _audio_arrays(body: bytes) -> Iterator[tuple[int, int]]:
    """Return where each array named audio_buffer begins and ends, in linear time: many may end at the same bracket.

    Only the beginning is searched: a body with more before the audio is too large. One search holds the interpreter's lock.
    """
    end = 0
    for match in AUDIO_ARRAY.finditer(body, 0, MAX_OTHER_BYTES):
        if end < match.end():
            end = body.find(b"]", match.end())
            if end < 0:
                return
        yield match.end(), end


def _slices(body: bytes, start: int, end: int) -> Iterator[bytes]:
    """Return the bytes of an array's numbers, slice by slice."""
    index, comma = 0, True
    while comma:
        found = body.find(b",", min(start + SLICE_BYTES, end), end)
        comma = found >= 0
        stop = found if comma else end
        octets = _octets(_loads(b"[%b]" % body[start:stop]), index)
        if not octets and (index or comma):
            raise ApiError(ErrorKind.INVALID_BODY, "The body isn't valid JSON: audio_buffer has a comma without a number.")
        yield octets
        start, index = stop + 1, index + len(octets)
        time.sleep(0)  # release the interpreter's lock


def _parse(text: bytes) -> dict[str, Any]:
    request = _loads(text)
    if not isinstance(request, dict) or not isinstance(request.get("audio_buffer"), list):
        raise ApiError(ErrorKind.INVALID_BODY, NO_OBJECT, "audio_buffer")
    return request


def _loads(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ApiError(ErrorKind.INVALID_BODY, f"The body isn't valid JSON: {error.msg} (at character {error.pos}).") from error


def _octets(values: list[Any], first: int) -> bytes:
    """Return integers from 0 to 255 as bytes.

    Args:
        values: values of ``audio_buffer``.
        first: index of the first value.
    """
    try:
        octets = bytes(values) if {*map(type, values)} <= {int} else None
    except ValueError:
        octets = None
    if octets is None:
        index, value = next((i, o) for i, o in enumerate(values, first) if type(o) is not int or not 0 <= o <= MAX_BYTE)
        shown = f"a {type(value).__name__}" if isinstance(value, (list, dict)) else orjson.dumps(value).decode()[:40]
        message = f"audio_buffer[{index}] is {shown}; it must be an integer from 0 to 255."
        raise ApiError(ErrorKind.UNACCEPTABLE, message, "audio_buffer")
    return octets
