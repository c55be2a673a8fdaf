"""What Schemathesis needs to know beyond OpenAPI: which models there are, and what audio looks like."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import strategies as st

from tests.fuzz.recordings import files, pcm

RECORDINGS = [*files(), pcm()]


@st.composite
def audio(draw: st.DrawFn) -> bytes:
    """A recording, mostly with some bytes changed, cut off or left out; sometimes anything."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=2000))
    body = bytearray(draw(st.sampled_from(RECORDINGS)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, min(len(body), 200)))
        body[start : start + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(body[: draw(st.integers(0, len(body)))] if draw(st.integers(0, 4)) == 0 else body)


for name in ("audio/wav", "audio/flac", "audio/ogg", "application/octet-stream"):
    schemathesis.openapi.media_type(name, audio())


@schemathesis.hook
def before_generate_path_parameters(_context: Any, strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Of a thousand random names none is a model's."""
    return st.one_of(st.just({"model": "amira"}), st.just({"model": "amira"}), strategy)
