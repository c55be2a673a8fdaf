"""Read raw PCM and its JSON form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from gateway.audio import BYTES_PER_SAMPLE, RATE
from gateway.audio.errors import too_long
from gateway.errors import ApiError, ErrorKind

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_BYTE = 0xFF


def read_pcm(body: bytes, max_secs: float) -> NDArray[np.int16]:
    """Return s16le samples [n]. They are read-only and share the body's memory.

    Raises:
        ApiError: the body has an odd length, or is longer than ``max_secs`` at 16 kHz.
    """
    if len(body) % BYTES_PER_SAMPLE:
        message = f"The body has an odd length, {len(body)} bytes, but raw PCM has 2 bytes per sample."
        raise ApiError(ErrorKind.ODD_LENGTH, message)
    samples = np.frombuffer(body, "<i2")
    if len(samples) > round(max_secs * RATE):
        raise too_long(f"{len(samples) / RATE:.7g} s", max_secs)
    return samples


def unpack_json(body: bytes) -> tuple[bytes, dict[str, Any]]:
    """Unpack the JSON form of a recording, `{"audio_buffer": [bytes as integers], "opaque": anything}`.

    Args:
        body: the JSON text; other keys are ignored.

    Returns:
        The audio's bytes, and `{"opaque": …}` if the body has that key.

    Raises:
        ApiError: the body is not such an object.
    """
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(ErrorKind.INVALID_BODY, f"The body isn't valid JSON: {error.msg} (at character {error.pos}).") from error
    if not isinstance(request, dict) or not isinstance(octets := request.get("audio_buffer"), list):
        message = "The body must be a JSON object whose audio_buffer is an array of integers from 0 to 255."
        raise ApiError(ErrorKind.INVALID_BODY, message, "audio_buffer")
    try:
        audio = bytes(octets) if {*map(type, octets)} <= {int} else None
    except ValueError:
        audio = None
    if audio is None:
        index, value = next((i, o) for i, o in enumerate(octets) if type(o) is not int or not 0 <= o <= MAX_BYTE)
        shown = f"a {type(value).__name__}" if isinstance(value, (list, dict)) else orjson.dumps(value).decode()[:40]
        message = f"audio_buffer[{index}] is {shown}; it must be an integer from 0 to 255."
        raise ApiError(ErrorKind.UNACCEPTABLE, message, "audio_buffer")
    opaque = {key: request[key] for key in ("opaque",) if key in request}
    try:
        orjson.dumps(opaque)
    except orjson.JSONEncodeError as error:  # orjson reads deeper nesting than it writes
        raise ApiError(ErrorKind.INVALID_BODY, f"opaque can't be given back: {error}.", "opaque") from error
    return audio, opaque
