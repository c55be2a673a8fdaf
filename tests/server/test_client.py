"""The REST clients and ``amira transcribe`` against a real server."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import numpy as np
import pytest
import soundfile

from amira import AsyncClient, Client, Message, RequestError, Segment
from amira.paths import SPEECH
from gateway.audio import RATE
from tests.support.commands import AMIRA, run_amira, until
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


async def test_full_server_is_retried(make_gateway: MakeGateway, recordings: Recordings) -> None:
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


async def test_transcribe_command_continues_after_a_failure(gateway: Gateway, tmp_path: Path) -> None:
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF and nothing more")
    recordings = [str(SPEECH / "2609-156975-0001.flac"), str(broken), str(SPEECH / "jfk.flac")]
    code, output, errors = await run_amira("transcribe", *recordings, "--url", gateway.url)
    assert code == 1
    assert len(output.splitlines()) == 2
    assert "ask not what your country can do for you" in output.splitlines()[1]
    (line,) = errors.splitlines()
    assert line.startswith(f"amira: {broken}: ")


async def test_transcribe_command_writes_formats_to_a_directory(gateway: Gateway, tmp_path: Path) -> None:
    recordings = [str(SPEECH / "2609-156975-0001.flac"), str(SPEECH / "jfk.flac")]
    for name, beginning in (
        ("srt", "1\n00:00:0"),
        ("vtt", "WEBVTT\n\n"),
        ("verbose_json", '{"task":"transcribe"'),
        ("json", '{"text":'),
    ):
        options = ["--format", name, "--output-dir", str(tmp_path), "--url", gateway.url]
        assert await run_amira("transcribe", *recordings, *options) == (0, "", "")
        suffix = "json" if "json" in name else name
        for stem in ("2609-156975-0001", "jfk"):
            assert (tmp_path / f"{stem}.{suffix}").read_text().startswith(beginning)


async def test_transcribe_command_reads_standard_input_and_streams(gateway: Gateway) -> None:
    process = await asyncio.create_subprocess_exec(
        AMIRA,
        "transcribe",
        "-",
        "--stream",
        "--url",
        gateway.url,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate((SPEECH / "jfk.flac").read_bytes()), 60)
    assert process.returncode == 0
    assert "ask not what your country can do for you" in output.decode()


async def test_segments_are_reported_by_the_server(gateway: Gateway, recordings: Recordings) -> None:
    told: list[Segment] = []
    audio = np.concatenate([*recordings.values()] * 2).tobytes()
    async with AsyncClient(gateway.url) as client:
        transcript = await client.transcribe(audio, on_segment=told.append)
        plain = await client.transcribe(audio)
        srt = await client.transcribe(audio, format="srt")
    assert len(told) > 2
    assert transcript.segments == tuple(told) == plain.segments
    assert (transcript.text, transcript.words, transcript.tokens) == (plain.text, plain.words, plain.tokens)
    assert (transcript.duration, transcript.confidence) == (plain.duration, plain.confidence)
    assert srt.startswith("1\n00:00:00,")


async def test_sync_live_stream_equals_the_async_one(gateway: Gateway, recordings: Recordings) -> None:
    pcm = recordings["2609-156975-0001"].tobytes()
    async with AsyncClient(gateway.url) as client, client.live() as stream:
        await stream.send(pcm)
        expected = await stream.finish()

    def converse() -> list[Message]:
        with Client(gateway.url) as client, client.live() as stream:
            for start in range(0, len(pcm), 32_000):
                stream.send(pcm[start : start + 32_000])
            final = stream.finish()
            messages = list(stream)
            assert messages[-1] == final
            return messages

    assert (await asyncio.to_thread(converse))[-1] == expected


async def test_listen_command_plays_a_file(gateway: Gateway, recordings: Recordings, tmp_path: Path) -> None:
    path = tmp_path / "speech.wav"
    soundfile.write(path, recordings["2609-156975-0001"], RATE)
    code, output, errors = await run_amira("listen", "--file", str(path), "--url", gateway.url, "--format", "json")
    assert (code, errors) == (0, "")
    final = json.loads(output)
    assert final["final"]
    assert " ".join(word["text"] for word in final["words"]) == final["text"]


async def test_ctrl_c_ends_listening_with_the_final(gateway: Gateway, recordings: Recordings, tmp_path: Path) -> None:
    path, written = tmp_path / "speech.wav", tmp_path / "final.txt"
    soundfile.write(path, np.concatenate([recordings["jfk"]] * 4), RATE)
    process = await asyncio.create_subprocess_exec(
        AMIRA, "listen", "--file", str(path), "--url", gateway.url, "-o", str(written), stderr=asyncio.subprocess.PIPE
    )
    await until(lambda: gateway.server._app.state.service.places.streams)
    await asyncio.sleep(6)
    process.send_signal(signal.SIGINT)
    _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert (process.returncode, errors.decode()) == (0, "")
    assert written.read_text().startswith("and so my fel")
