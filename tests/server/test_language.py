"""Language model, phrases and beam at Triton and through the gateway, with the bundled model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from tritonclient.utils import InferenceServerException
from websockets.asyncio.client import connect

from amira.paths import SPEECH
from tests.server.test_triton import SEQUENCE_IDS, Ensemble, ensemble
from tests.support.servers import Gateway, Recordings, Samples

__all__ = ["ensemble"]

pytestmark = pytest.mark.usefixtures("no_sequence_left")

PHRASE = "fellow amerikans"
"""What nobody says in the recording, but what sounds like it."""

MODES: list[dict[str, Any]] = [
    {"context": "whole"},
    {"context": "whole", "beam": 1},
    {"context": "whole", "language_model": "off", "beam": 1},
    {"context": "whole", "phrases": PHRASE},
    {},
    {"language_model": "on"},
    {"phrases": f"{PHRASE}\t4"},
]


async def test_streams_with_other_options_share_calls_and_change_nothing(ensemble: Ensemble, recordings: Recordings) -> None:
    samples = recordings["jfk"][: 6 * 16_000]
    alone = [(await ensemble.whole(samples, **mode))["TOKENS"].tolist() for mode in MODES]
    together = await asyncio.gather(*(ensemble.whole(samples, **mode) for mode in MODES * 2))
    assert [answer["TOKENS"].tolist() for answer in together] == alone * 2
    assert len({str(tokens) for tokens in alone}) >= 5, "the options have no effect"


async def test_words_of_a_beam_are_in_order(ensemble: Ensemble, recordings: Recordings) -> None:
    for samples in recordings.values():
        words = (await ensemble.whole(samples, context="whole", beam=4))["WORDS"]
        assert words
        assert all(word["start"] < word["end"] and 0 < word["confidence"] <= 1 for word in words)
        assert all(word["end"] <= following["start"] for word, following in pairwise(words))
        assert words[-1]["end"] <= len(samples) / 16000


@pytest.mark.parametrize("options", [{"language_model": "on"}, {"phrases": f"{PHRASE}\t4"}, {}])
async def test_state_moves_with_its_language(ensemble: Ensemble, recordings: Recordings, options: dict[str, Any]) -> None:
    """Each request goes to another sequence, which restores the state of the last."""
    samples = recordings["jfk"]
    expected = await send(ensemble, samples, [16_000] * 20, options)
    kept_from, state, tokens = 0, "", list[int]()
    ends = [*range(40_000, len(samples), 40_000), len(samples)]
    for i, end in enumerate(ends):
        restored = {"restore": state} if state else {}
        last = i == len(ends) - 1
        sequence = next(SEQUENCE_IDS)
        answer = await ensemble(sequence, samples[kept_from:end], start=True, end=last, save_state=1, **restored, **options)
        tokens += answer["TOKENS"][0].tolist() if answer["SEGMENT"][0, 1] else []
        if not last:
            state = answer["STATE"][0, 0].decode()
            await ensemble(sequence, samples[:0], start=False, end=True)  # the first one is lost
            kept_from = max(0, orjson.loads(state)["frames"] * 1536 - 31 * 1536)
    assert tokens == expected


async def send(ensemble: Ensemble, samples: Samples, sizes: Sequence[int], options: dict[str, Any]) -> list[int]:
    """Return the tokens of a stream sent in pieces."""
    sequence, tokens = next(SEQUENCE_IDS), list[int]()
    pieces = np.split(samples, np.cumsum(sizes))
    for i, piece in enumerate(pieces):
        answer = await ensemble(sequence, piece, start=i == 0, end=i == len(pieces) - 1, **(options if i == 0 else {}))
        tokens += answer["TOKENS"][0].tolist() if answer["SEGMENT"][0, 1] else []
    return tokens


async def test_cuts_change_nothing_with_phrases(ensemble: Ensemble, recordings: Recordings) -> None:
    samples, options = recordings["jfk"], {"phrases": PHRASE}
    whole = await send(ensemble, samples, [], options)
    assert whole
    for sizes in ([1, 0, 50_000, 777], [9_999] * 12):
        assert await send(ensemble, samples, sizes, options) == whole


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beam": 17}, "beam is 17; it must be within 1 … 16"),
        ({"language_model": "maybe"}, "language_model is 'maybe'; allowed are 'on', 'off' and 'auto'"),
        ({"phrases": "a\tb"}, "phrase 'a' has the factor 'b'; it must be above 0 and at most 10"),
        ({"phrases": "x" * 201}, "has 201 characters; at most 200"),
        ({"phrases": "a\n" * 501}, "phrases has 501 lines; at most 500"),
        ({"phrases": ("x" * 199 + "\n") * 101}, "phrases has 20200 characters; at most 20000"),
    ],
)
async def test_bad_language_options_are_refused(ensemble: Ensemble, options: dict[str, Any], named: str) -> None:
    with pytest.raises(InferenceServerException) as raised:
        await ensemble.whole(np.zeros(1600, np.int16), **options)
    assert named in raised.value.message()


async def test_phrases_change_the_text_through_the_gateway(
    gateway: Gateway, http: httpx.AsyncClient, recordings: Recordings
) -> None:
    body = recordings["jfk"].tobytes()

    async def batch(**query: Any) -> str:
        text: str = (await http.post(gateway.batch_url(), content=body, params=query)).raise_for_status().json()["text"]
        return text

    plain, boosted = await batch(), await batch(phrases=["Fellow  Amerikans\t4", "unheard of"])
    assert "amerikans" in boosted
    assert "amerikans" not in plain
    assert await batch(language_model="off") != plain

    async def stream(query: str) -> str:
        async with connect(f"{gateway.stream_url()}{query}", compression=None) as socket:
            await socket.send(body[: 2**18])
            await socket.send(body[2**18 :])
            await socket.send(b"\x00")
            messages = [orjson.loads(message) async for message in socket]
        return str(messages[-1]["text"])

    assert await stream("?language_model=on&phrases=and%20sew%094") != await stream("")


async def test_keywords_are_boosted(gateway: Gateway, http: httpx.AsyncClient, sound: bytes) -> None:
    async def transcribe(**fields: Any) -> str:
        form = {"model": "amira", **fields}
        answer = await http.post(f"{gateway.url}/v1/audio/transcriptions", files={"file": ("a.flac", sound)}, data=form)
        return str(answer.raise_for_status().json()["text"])

    assert "amerikans" in await transcribe(**{"keywords[]": [f"{PHRASE}\t4", "other"]})
    assert "amerikans" not in await transcribe()


@pytest.fixture
def sound() -> bytes:
    return (SPEECH / "jfk.flac").read_bytes()


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ({"phrases": ["a"] * 501}, "phrases has 501 phrases; at most 500 are allowed"),
        ({"phrases": "b" * 201}, "a phrase of 201 characters"),
        ({"phrases": ["b" * 199] * 101}, "phrases has 20199 characters; at most 20000 are allowed"),
        ({"phrases": "b\t11"}, "the factor of 'b' is '11'; it must be above 0 and at most 10"),
        ({"beam": "17"}, "beam is '17'; it must be a whole number from 1 to 16"),
        ({"language_model": "perhaps"}, "language_model is 'perhaps'; it must be one of auto, on, off"),
    ],
)
async def test_bad_query_is_unacceptable(gateway: Gateway, http: httpx.AsyncClient, query: dict[str, Any], named: str) -> None:
    answer = await http.post(gateway.batch_url(), content=bytes(3200), params=query)
    assert answer.status_code == 422
    assert named in answer.json()["error"]["message"]
