"""The REST clients and ``amira transcribe`` against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest

from amira import AsyncClient, RequestError
from amira.paths import SPEECH
from tests.support.commands import run_amira
from tests.support.servers import Gateway, Recordings

MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]


async def test_clients_transcribe_a_recording(gateway: Gateway, recordings: Recordings) -> None:
    async with AsyncClient(gateway.url) as client:
        of_file = await client.transcribe(SPEECH / "jfk.flac")
        of_pcm = await client.transcribe(recordings["jfk"].tobytes())
    assert "ask not what your country can do for you" in of_file.text
    assert of_file.duration == pytest.approx(11.0)
    assert of_file.request_id != of_pcm.request_id
    assert (of_file.text, of_file.words, of_file.tokens) == (of_pcm.text, of_pcm.words, of_pcm.tokens)
    assert " ".join(word.text for word in of_file.words) == of_file.text.strip()
    (segment,) = of_file.segments
    assert (segment.text, segment.words) == (of_file.text, of_file.words)
    assert 0 <= segment.start < segment.end <= 11.5


async def test_errors_of_the_server_are_raised(gateway: Gateway, make_gateway: MakeGateway) -> None:
    async with AsyncClient(gateway.url) as client:
        with pytest.raises(RequestError, match="'nobody' is not known") as unknown:
            await client.transcribe(b"\0\0", model="nobody")
        with pytest.raises(RequestError) as empty:
            await client.transcribe(b"")
    assert [(error.value.status, error.value.code) for error in (unknown, empty)] == [
        (404, "model_not_found"),
        (400, "empty_body"),
    ]
    assert unknown.value.request_id
    async with make_gateway(api_keys=["key"]) as locked:
        async with AsyncClient(locked.url) as client:
            with pytest.raises(RequestError) as refused:
                await client.transcribe(bytes(3200))
        async with AsyncClient(locked.url, api_key="key") as client:
            assert (await client.transcribe(bytes(3200))).duration == 0.1
    assert refused.value.code == "invalid_api_key"


async def test_full_server_is_asked_again(make_gateway: MakeGateway, recordings: Recordings) -> None:
    async with make_gateway(max_concurrent_batches=1, inference_queue_size=0) as gateway, AsyncClient(gateway.url) as client:
        audio = recordings["jfk"].tobytes()
        transcripts = await asyncio.gather(*(client.transcribe(audio) for _ in range(3)))
        assert len({transcript.text for transcript in transcripts}) == 1
        async with AsyncClient(gateway.url, retry_secs=0) as impatient:
            outcomes = await asyncio.gather(*(impatient.transcribe(audio) for _ in range(3)), return_exceptions=True)
    refused = [outcome.code for outcome in outcomes if isinstance(outcome, RequestError)]
    assert refused
    assert set(refused) == {"no_capacity"}


async def test_transcribe_command(gateway: Gateway) -> None:
    code, output, errors = await run_amira("transcribe", str(SPEECH / "jfk.flac"), "--url", gateway.url)
    assert (code, errors) == (0, "")
    assert "ask not what your country can do for you" in output
    code, _, errors = await run_amira("transcribe", str(SPEECH / "jfk.flac"), "--url", gateway.url, "--model", "nobody")
    assert code == 1
    assert errors.startswith("amira: model 'nobody' is not known")
