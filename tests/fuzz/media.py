"""Teach Schemathesis the models and audio, which OpenAPI does not describe."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import strategies as st

from tests.fuzz.recordings import containers, files, pcm

RECORDINGS = [*files(), *containers(), pcm()]


@st.composite
def audio(draw: st.DrawFn) -> bytes:
    """Draw a recording, mostly with bytes changed, cut off or left out; sometimes any bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=2000))
    body = bytearray(draw(st.sampled_from(RECORDINGS)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, min(len(body), 200)))
        body[start : start + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(body[: draw(st.integers(0, len(body)))] if draw(st.integers(0, 4)) == 0 else body)


for name in ("audio/wav", "audio/flac", "audio/ogg", "audio/mp4", "audio/webm", "application/octet-stream"):
    schemathesis.openapi.media_type(name, audio())


@schemathesis.hook
def before_generate_path_parameters(context: Any, strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw the name of a model in most cases; random names never match one."""
    parameter = "model" if "{model}" in context.operation.path else "name"
    return st.one_of(st.just({parameter: "amira"}), st.just({parameter: "amira"}), strategy)
