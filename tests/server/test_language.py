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
from tests.support.clients import transcribe
from tests.support.servers import Gateway, Recordings, Samples

__all__ = ["ensemble"]

pytestmark = pytest.mark.usefixtures("no_sequence_left")

PHRASE = "fellow amerikans"
"""What nobody says in the recording, but what sounds like it."""

MODES: list[dict[str, Any]] = [
    {"context": "whole"},
    {"context": "whole", "beam": 1},
    {"context": "whole", "language_model": "off", "beam": 1},
    {"context": "whole", "phrases": f"{PHRASE}\t5"},
    {"beam": 1},
    {"beam": 1, "language_model": "on"},
    {"beam": 1, "phrases": f"{PHRASE}\t4"},
    {"beam": 4},
    {"beam": 3, "language_model": "off"},
    {"beam": 4, "phrases": f"{PHRASE}\t4"},
]


async def test_streams_with_other_options_share_calls_and_change_nothing(ensemble: Ensemble, recordings: Recordings) -> None:
    samples = recordings["jfk"][: 6 * 16_000]
    alone = [(await ensemble.whole(samples, **mode))["TOKENS"].tolist() for mode in MODES]
    together = await asyncio.gather(*(ensemble.whole(samples, **mode) for mode in MODES * 2))
    assert [answer["TOKENS"].tolist() for answer in together] == alone * 2
    assert len({str(tokens) for tokens in alone}) >= 6, "the options have no effect"


async def test_words_of_a_beam_are_in_order(ensemble: Ensemble, recordings: Recordings) -> None:
    for samples in recordings.values():
        words = (await ensemble.whole(samples, context="whole", beam=4))["WORDS"]
        assert words
        assert all(word["start"] < word["end"] and 0 < word["confidence"] <= 1 for word in words)
        assert all(word["end"] <= following["start"] for word, following in pairwise(words))
        assert words[-1]["end"] <= len(samples) / 16000


@pytest.mark.parametrize(
    "options",
    [
        {"beam": 1, "language_model": "on"},
        {"beam": 1, "phrases": f"{PHRASE}\t4"},
        {"beam": 1},
        {"beam": 4},
        {"beam": 8, "phrases": f"{PHRASE}\t4"},
    ],
)
async def test_state_moves_with_its_language(ensemble: Ensemble, recordings: Recordings, options: dict[str, Any]) -> None:
    """Each request goes to another sequence, which restores the state of the last."""
    samples = recordings["jfk"]
    expected = await send(ensemble, samples, [16_000] * 20, options)
    kept_from, state, tokens = 0, "", list[int]()
    ends = [*range(40_000, len(samples), 40_000), len(samples)]
    for i, end in enumerate(ends):
        restored = {"restore": state, "restore_samples": kept_from} if state else {}
        last = i == len(ends) - 1
        sequence = next(SEQUENCE_IDS)
        answer = await ensemble(sequence, samples[kept_from:end], start=True, end=last, save_state=1, **restored, **options)
        tokens += answer["TOKENS"][0].tolist() if answer["SEGMENT"][0, 1] else []
        if not last:
            state = answer["STATE"][0, 0].decode()
            await ensemble(sequence, samples[:0], start=False, end=True)  # the first one is lost
            kept_from = orjson.loads(state)["needed_from"]
    assert tokens == expected


async def send(ensemble: Ensemble, samples: Samples, sizes: Sequence[int], options: dict[str, Any]) -> list[int]:
    """Return the tokens of a stream sent in pieces."""
    sequence, tokens = next(SEQUENCE_IDS), list[int]()
    pieces = np.split(samples, np.cumsum(sizes))
    for i, piece in enumerate(pieces):
        answer = await ensemble(sequence, piece, start=i == 0, end=i == len(pieces) - 1, **(options if i == 0 else {}))
        tokens += answer["TOKENS"][0].tolist() if answer["SEGMENT"][0, 1] else []
    return tokens


@pytest.mark.parametrize("options", [{"beam": 1, "phrases": PHRASE}, {"beam": 4}, {"beam": 4, "phrases": PHRASE}])
async def test_cuts_change_nothing(ensemble: Ensemble, recordings: Recordings, options: dict[str, Any]) -> None:
    samples = recordings["jfk"]
    whole = await send(ensemble, samples, [], options)
    assert whole
    for sizes in ([1, 0, 50_000, 777], [9_999] * 12):
        assert await send(ensemble, samples, sizes, options) == whole


async def test_stable_tokens_of_a_beam_stay(ensemble: Ensemble, recordings: Recordings) -> None:
    samples, sequence = recordings["jfk"], next(SEQUENCE_IDS)
    before: list[int] = []
    settled = 0
    for i, piece in enumerate(pieces := np.split(samples, range(15_360, len(samples), 15_360))):
        answer = await ensemble(sequence, piece, start=i == 0, end=i == len(pieces) - 1, beam=4)
        tokens, stable = answer["TOKENS"][0].tolist(), int(answer["STABLE"][0, 0])
        assert tokens[: len(before)] == before
        before = [] if answer["SEGMENT"][0, 1] else tokens[:stable]
        settled += len(before) > 0
    assert settled >= 5, "nothing was stable before the end"


async def test_alternatives_are_texts(ensemble: Ensemble, recordings: Recordings) -> None:
    for context in ("window", "whole"):
        options = {"context": context, "beam": 4, "alternatives": 3}
        answer = await ensemble.whole(recordings["jfk"], **options)
        listed = orjson.loads(answer["ALTERNATIVES"][0, 0])
        assert 2 <= len(listed) <= 3
        assert listed[0]["text"] == answer["TEXT"]
        assert listed[0]["confidence"] == pytest.approx(float(answer["CONFIDENCE"][0, 0]), abs=1e-3)
        assert len({each["text"] for each in listed}) == len(listed)
    assert (await ensemble.whole(recordings["jfk"], beam=4))["ALTERNATIVES"][0, 0] == b""


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beam": 17}, "beam is 17; it must be within 1 … 16"),
        ({"alternatives": 11, "beam": 4}, "alternatives is 11; it must be within 1 … 10"),
        ({"alternatives": 2, "beam": 1}, "alternatives is 2, but only a beam has several"),
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

    plain, boosted = await batch(), await batch(phrases=["And  Sew\t4", "unheard of"])
    assert "and sew" in boosted
    assert "and sew" not in plain
    assert await batch(language_model="off") != plain

    async def stream(query: str) -> str:
        async with connect(f"{gateway.stream_url()}{query}", compression=None) as socket:
            await socket.send(body[: 2**18])
            await socket.send(body[2**18 :])
            await socket.send(b"\x00")
            messages = [orjson.loads(message) async for message in socket]
        return str(messages[-1]["text"])

    assert await stream("?phrases=and%20sew%094") != await stream("")
    assert await stream("?beam=1") != await stream("?beam=4")


async def test_alternatives_through_the_gateway(gateway: Gateway, http: httpx.AsyncClient, recordings: Recordings) -> None:
    samples = recordings["jfk"]
    answer = await http.post(gateway.batch_url(), content=samples.tobytes(), params={"alternatives": 4, "beam": 4})
    (segment,) = answer.raise_for_status().json()["segments"]
    assert 2 <= len(segment["alternatives"]) <= 4
    assert segment["alternatives"][0]["text"] == segment["text"]
    (segment,) = (await http.post(gateway.batch_url(), content=samples.tobytes())).raise_for_status().json()["segments"]
    assert "alternatives" not in segment
    speech = np.concatenate([samples, np.zeros(40_000, np.int16), samples[:60_000]])
    for dialects in ([], ["amira.v3"]):
        url = f"{gateway.stream_url()}?beam=4&alternatives=3"
        messages = (await transcribe(url, speech, subprotocols=dialects or None)).messages
        ends = [message["alternatives"] for message in messages if "alternatives" in message]
        assert len(ends) >= 2
        assert all(1 <= len(texts) <= 3 for texts in ends)
        assert any(len(texts) > 1 for texts in ends)
        said = " ".join(texts[0]["text"] for texts in ends if texts[0]["text"])
        if not dialects:
            assert said == messages[-1]["text"]


async def test_alternatives_of_openai(gateway: Gateway, http: httpx.AsyncClient, sound: bytes) -> None:
    form = {"model": "amira", "response_format": "verbose_json", "alternatives": "3"}
    answer = await http.post(f"{gateway.url}/v1/audio/transcriptions", files={"file": ("a.flac", sound)}, data=form)
    (segment,) = answer.raise_for_status().json()["segments"]
    assert 2 <= len(segment["alternatives"]) <= 3
    assert segment["alternatives"][0]["text"] == segment["text"]
    for wrong, named in (
        ({"response_format": "json"}, "needs response_format=verbose_json"),
        ({"alternatives": "0"}, "is '0'"),
    ):
        answer = await http.post(f"{gateway.url}/v1/audio/transcriptions", files={"file": ("a.flac", sound)}, data=form | wrong)
        assert answer.status_code == 400
        assert named in answer.json()["error"]["message"]


async def test_keywords_are_boosted(gateway: Gateway, http: httpx.AsyncClient, sound: bytes) -> None:
    async def transcribe(**fields: Any) -> str:
        form = {"model": "amira", **fields}
        answer = await http.post(f"{gateway.url}/v1/audio/transcriptions", files={"file": ("a.flac", sound)}, data=form)
        return str(answer.raise_for_status().json()["text"])

    assert "and sew" in await transcribe(**{"keywords[]": ["and sew\t4", "other"]})
    assert "and sew" not in await transcribe()


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
        ({"alternatives": "11"}, "alternatives is '11'; it must be a whole number from 1 to 10"),
        ({"alternatives": "2", "beam": "1"}, "alternatives is 2, but the beam is 1"),
        ({"language_model": "perhaps"}, "language_model is 'perhaps'; it must be one of auto, on, off"),
    ],
)
async def test_bad_query_is_unacceptable(gateway: Gateway, http: httpx.AsyncClient, query: dict[str, Any], named: str) -> None:
    answer = await http.post(gateway.batch_url(), content=bytes(3200), params=query)
    assert answer.status_code == 422
    assert named in answer.json()["error"]["message"]
