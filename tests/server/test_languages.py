"""Language and latency of a stream: by each face and the client, kept by lost streams, refused with what is allowed."""

from __future__ import annotations

import asyncio
import base64
import io
import shutil
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest
import soundfile
from websockets.exceptions import InvalidStatus

from amira.client.rest import AsyncClient
from amira.client.types import StreamError
from tests.server.test_cached import OCTETS, Served, converse_slowly, frames_until_death, pieces_of
from tests.support.chaos import Backend
from tests.support.clients import END, converse, cut, listen, open_socket, transcribe
from tests.support.published import imported
from tests.support.recogniser import Recogniser
from tests.support.servers import Recordings, Samples, run_gateway

MODELS = ("prompted", "several")
"""A model with a choice of languages, and one with several latencies."""


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    repository = tmp_path_factory.mktemp("served")
    for name in MODELS:
        for model in imported(name).glob(f"{name}*"):
            shutil.copytree(model, repository / model.name)
    backend = Backend("languages", repository, ensembles=["prompted"])
    await backend.start()
    names = {**{name: name for name in MODELS}, "english": "several"}
    settings = {
        "models": names,
        "model_languages": {"english": "en"},
        "recovery_timeout_secs": 60,
        "session_key": "one for both gateways",
    }
    try:
        async with run_gateway(triton_endpoint=backend.target, canary_interval_secs=3600, **settings) as gateway:
            yield Served(gateway, backend, repository)
    finally:
        await backend.stop()


async def tokens_in(served: Served, name: str, samples: Samples, **options: str) -> list[int]:
    """Tokens of a stream without Triton."""
    ours = Recogniser(served.repository, name)
    return [token.id for token in (await ours.recognise([samples], None, **options)).tokens]


@pytest.mark.parametrize(("language", "known"), [("en-US", "en-US"), ("de", "de-DE"), ("", "auto")])
async def test_language_reaches_the_encoder(
    served: Served, recordings: Recordings, http: httpx.AsyncClient, language: str, known: str
) -> None:
    """By each face and by the client."""
    samples, query = recordings["jfk"], f"?language={language}" if language else ""
    live = await tokens_in(served, "prompted", samples, language=known)
    batch = await tokens_in(served, "prompted", samples, language=known, context="whole")
    others = [await tokens_in(served, "prompted", samples, language=other) for other in {"en-US", "de-DE", "auto"} - {known}]
    assert live not in others, "the languages do not differ: the test shows nothing"

    url = served.gateway.stream_url("prompted")
    assert (await transcribe(url + query, samples)).final["tokens"] == live
    answer = await http.post(served.gateway.batch_url("prompted") + query, content=samples.tobytes(), headers=OCTETS)
    assert answer.json()["tokens"] == batch
    form = {"model": "prompted", "response_format": "verbose_json", **({"language": language} if language else {})}
    wav = io.BytesIO()
    soundfile.write(wav, samples, 16_000, format="WAV")
    posted = await http.post(
        f"{served.gateway.url}/v1/audio/transcriptions", data=form, files={"file": ("a.wav", wav.getvalue())}
    )
    assert posted.json()["text"] == answer.json()["text"]
    assert posted.json()["language"] == language.partition("-")[0]
    async with AsyncClient(served.gateway.url) as client:
        transcript = await client.transcribe(samples.tobytes(), model="prompted", language=language or None)
        assert list(transcript.tokens) == batch
        text = await client.transcribe(wav.getvalue(), model="prompted", format="text", language=language or None)
        assert text.strip() == transcript.text
        async with client.live(model="prompted", language=language or None) as stream:
            await stream.send(samples.tobytes())
            assert list((await stream.finish()).tokens) == live


async def test_unknown_language_names_the_known(served: Served, recordings: Recordings, http: httpx.AsyncClient) -> None:
    message = "language is 'xx', and model 'prompted' knows auto, en-US, de-DE; leave language out, or choose another"
    body = recordings["jfk"][:16_000].tobytes()
    answer = await http.post(f"{served.gateway.batch_url('prompted')}?language=xx", content=body, headers=OCTETS)
    assert answer.status_code == 422
    assert (answer.json()["error"]["message"], answer.json()["error"]["param"]) == (message, "language")
    with pytest.raises(InvalidStatus) as refused:
        await converse(f"{served.gateway.stream_url('prompted')}?language=xx", [END])
    assert refused.value.response.status_code == 422
    form = {"model": "prompted", "language": "xx"}
    posted = await http.post(f"{served.gateway.url}/v1/audio/transcriptions", data=form, files={"file": ("a.pcm", body)})
    assert posted.status_code == 400
    assert (posted.json()["error"]["message"], posted.json()["error"]["param"]) == (message, "language")
    async with AsyncClient(served.gateway.url) as client, client.live(model="prompted", language="xx") as stream:
        with pytest.raises(StreamError, match="HTTP 422: language is 'xx'"):
            await stream.finish()


async def test_language_of_a_model_without_a_choice(served: Served, http: httpx.AsyncClient) -> None:
    """Its own is accepted and another refused; where it is not known, any is accepted."""
    for name, language, status in (("english", "en-GB", 200), ("english", "de", 422), ("several", "de", 200)):
        url = f"{served.gateway.batch_url(name)}?language={language}"
        answer = await http.post(url, content=bytes(32_000), headers=OCTETS)
        assert answer.status_code == status, answer.text
    assert (await converse(f"{served.gateway.stream_url('several')}?language=de", [END])).close_code == 1000


async def test_realtime_session_chooses_a_language(served: Served, recordings: Recordings) -> None:
    samples = recordings["jfk"]
    ours = Recogniser(served.repository, "prompted")
    chosen = {}
    for language in ("de-DE", "en-US"):
        ids = [token.id for token in (await ours.recognise([samples], language=language)).tokens]
        chosen[language] = "".join(pieces_of(served, "prompted", ids)).strip()
    assert len(set(chosen.values())) == 2
    input_format = {"type": "audio/pcm", "rate": 16_000}
    url = f"{served.gateway.url.replace('http', 'ws', 1)}/v1/realtime?model=prompted"

    def update(language: str) -> bytes:
        given = {"format": input_format, "turn_detection": None, "transcription": {"language": language}}
        return orjson.dumps({"type": "session.update", "session": {"type": "transcription", "audio": {"input": given}}})

    async with open_socket(url) as socket:

        async def until(kind: str) -> dict[str, Any]:
            while True:
                event: dict[str, Any] = orjson.loads(await asyncio.wait_for(socket.recv(), 60))
                if event["type"] in (kind, "error"):
                    return event

        for language, expected in chosen.items():
            await socket.send(update(language).decode())
            assert (await until("session.updated"))["type"] == "session.updated"
            for frame in cut(samples, 16_000):
                audio = base64.b64encode(frame).decode()
                await socket.send(orjson.dumps({"type": "input_audio_buffer.append", "audio": audio}).decode())
            await socket.send('{"type": "input_audio_buffer.commit"}')
            completed = await until("conversation.item.input_audio_transcription.completed")
            assert completed["transcript"].strip() == expected
        await socket.send(update("xx").decode())
        error = (await until("session.updated"))["error"]
        assert error["param"] == "session.audio.input.transcription.language"
        assert "knows auto, en-US, de-DE" in error["message"]


async def test_stream_chooses_its_latency(served: Served, recordings: Recordings) -> None:
    """Another graph for each: chunks of 80 and of 560 ms, so the first words come sooner."""
    samples = recordings["jfk"][:80_000]
    first_ms = {}
    for latency in ("low", "balanced", "throughput"):
        expected = await tokens_in(served, "several", samples, latency=latency)
        said = await transcribe(f"{served.gateway.stream_url('several')}?latency={latency}", samples)
        assert said.final["tokens"] == expected
        first_ms[latency] = next(m["audio_processed_ms"] for m in said.messages if m["tokens"])
    assert first_ms["low"] < first_ms["balanced"] == first_ms["throughput"]
    with pytest.raises(InvalidStatus) as refused:
        await converse(f"{served.gateway.stream_url('several')}?latency=soon", [END])
    assert refused.value.response.status_code == 422
    assert b"latency is 'soon'; it must be one of low, balanced, throughput" in refused.value.response.body


async def test_resumed_stream_keeps_its_language_and_latency(served: Served, recordings: Recordings) -> None:
    """Whatever the connection that resumes it asks for: the token has them."""
    samples = recordings["jfk"]
    url = served.gateway.stream_url("prompted")
    frames = [*cut(samples, 16_000), END]
    whole = await converse(f"{url}?language=de-DE&latency=low", frames, 0.02, subprotocols=["amira.v2"], ping_timeout=None)
    acks = [message for message in whole.messages if message["type"] == "ack"]
    ack = acks[len(acks) // 2]
    async with open_socket(f"{url}?language=en-US", subprotocols=["amira.v2"], ping_timeout=None) as socket:
        await socket.send(orjson.dumps({"type": "resume", "session": ack["session"]}).decode())
        for frame in [*cut(samples[ack["samples"] :], 16_000), END]:
            await socket.send(frame)
        rest = (await listen(socket)).final
    assert whole.final["tokens"][ack["settled"]["tokens"] :] == rest["tokens"]


async def test_killed_triton_costs_no_option(served: Served, recordings: Recordings) -> None:
    """The stream goes on in its language."""
    samples, url = recordings["jfk"], f"{served.gateway.stream_url('prompted')}?language=de-DE"
    undisturbed = (await transcribe(url, samples)).final
    said = await converse_slowly(url, frames_until_death(served, samples, 60_000))
    assert said["tokens"] == undisturbed["tokens"]
