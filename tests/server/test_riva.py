"""NVIDIA Riva's API, by NVIDIA's own client and by its messages over asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import io
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import numpy as np
import pytest
import riva.client
import soundfile
import soxr
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from riva.client.proto import riva_asr_pb2

from gateway.api import riva_server
from gateway.config.settings import ConfigError
from tests.support.chaos import backends, kill
from tests.support.clients import gateway_metrics, growth, transcribe
from tests.support.commands import until
from tests.support.media import encode_container
from tests.support.riva import audio, bearer, finals, opening, pieces, service_of, stream, stub_of, target_of, text_of
from tests.support.servers import Gateway, Recordings, Samples, run_gateway

MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]

KEY = "a-key-of-tests"
RATE = 16_000
SERVICE = "nvidia.riva.asr.RivaSpeechRecognition"
CODES = ("400", "499")
FRAME_BYTES = 3200
"""A tenth of a second of raw audio."""


@pytest.fixture(scope="module")
async def keyed(make_gateway: MakeGateway) -> AsyncIterator[Gateway]:
    async with make_gateway(max_concurrent_streams=128, api_keys=(KEY,), riva_port=0) as running:
        yield running


@pytest.fixture
async def stub(keyed: Gateway) -> AsyncIterator[Any]:
    async with stub_of(keyed) as running:
        yield running


@pytest.fixture
def service(keyed: Gateway) -> Iterator[riva.client.ASRService]:
    running = service_of(keyed, KEY)
    yield running
    running.auth.channel.close()


@pytest.fixture(scope="module")
def speech(recordings: Recordings) -> Samples:
    """Two utterances between pauses."""
    first, second = recordings["jfk"], recordings["2033-164914-0000"]
    pause = np.zeros(3 * RATE // 2, np.int16)
    spoken: Samples = np.concatenate((pause[:RATE], first[: 5 * RATE], pause, second[: 5 * RATE], pause[:RATE]))
    return spoken


@pytest.fixture
def wav(speech: Samples, tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    soundfile.write(path, speech, RATE, "PCM_16")
    return path


def as_file(samples: Samples, kind: str, subtype: str = "PCM_16", rate: int = RATE) -> bytes:
    file = io.BytesIO()
    resampled = samples if rate == RATE else soxr.resample(samples, RATE, rate)
    soundfile.write(file, resampled, rate, subtype, format=kind)
    return file.getvalue()


def as_raw(samples: Samples, subtype: str, rate: int) -> bytes:
    return as_file(samples, "RAW", subtype, rate)


async def spoken(gateway: Gateway, samples: Samples) -> dict[str, Any]:
    """Return the final of the same audio over the WebSocket."""
    return (await transcribe(gateway.stream_url(), samples, additional_headers=dict(bearer(KEY)))).final


async def recognised(gateway: Gateway, body: bytes, query: str = "") -> dict[str, Any]:
    """Return the answer of REST to the same recording."""
    async with httpx.AsyncClient(timeout=60, headers=dict(bearer(KEY))) as http:
        answer = await http.post(f"{gateway.batch_url()}{query}", content=body)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


@contextlib.asynccontextmanager
async def refused(code: grpc.StatusCode) -> AsyncIterator[list[grpc.aio.AioRpcError]]:
    """Expect a status; yield a list that gets the error."""
    errors: list[grpc.aio.AioRpcError] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield errors
    errors.append(caught.value)
    assert caught.value.code() is code, caught.value


CASES: dict[str, tuple[dict[str, Any], Callable[[Samples], bytes]]] = {
    "WAV with nothing declared": ({}, lambda samples: as_file(samples, "WAV")),
    "raw": ({"encoding": "LINEAR_PCM", "sample_rate_hertz": RATE}, lambda samples: samples.tobytes()),
    "raw at 48 kHz": (
        {"encoding": "LINEAR_PCM", "sample_rate_hertz": 48_000},
        lambda samples: as_raw(samples, "PCM_16", 48_000),
    ),
    "mulaw": ({"encoding": "MULAW"}, lambda samples: as_raw(samples, "ULAW", 8000)),
    "alaw": ({"encoding": "ALAW", "sample_rate_hertz": 8000}, lambda samples: as_raw(samples, "ALAW", 8000)),
    "flac": ({"encoding": "FLAC"}, lambda samples: as_file(samples, "FLAC")),
    "ogg opus": ({"encoding": "OGGOPUS"}, lambda samples: encode_container(samples, "ogg", "libopus")),
    "two channels": (
        {"encoding": "LINEAR_PCM", "sample_rate_hertz": RATE, "audio_channel_count": 2},
        lambda samples: np.repeat(samples, 2).tobytes(),
    ),
}
"""Configurations, and what writes their audio."""

SLOW_CASES = "raw at 48 kHz", "alaw", "two channels"
"""Those that a stream handles as others; as recordings they are always tested."""

QUERIES = {
    "raw at 48 kHz": "?sample_rate=48000",
    "mulaw": "?encoding=mulaw&sample_rate=8000",
    "alaw": "?encoding=alaw&sample_rate=8000",
    "two channels": "?channels=2",
}


@pytest.mark.parametrize("case", CASES)
async def test_recording(keyed: Gateway, service: riva.client.ASRService, speech: Samples, case: str) -> None:
    options, write = CASES[case]
    body = write(speech)
    expected = await recognised(keyed, body, QUERIES.get(case, ""))
    config = riva.client.RecognitionConfig(language_code="en-US", enable_word_time_offsets=True, max_alternatives=1, **options)
    response = await asyncio.to_thread(service.offline_recognize, body, config)
    assert "".join(result.alternatives[0].transcript for result in response.results) == f"{expected['text']} "
    words = [word for result in response.results for word in result.alternatives[0].words]
    assert [(word.word, word.start_time, word.end_time) for word in words] == [
        (word["word"], round(word["start"] * 1000), round(word["end"] * 1000)) for word in expected["words"]
    ]
    assert all(0 < word.confidence <= 1 for word in words)
    assert all(result.audio_processed == pytest.approx(len(speech) / RATE, abs=0.1) for result in response.results)
    assert [result.channel_tag for result in response.results] == [1] * len(expected["segments"])
    assert all(0 < result.alternatives[0].confidence <= 1 for result in response.results)


async def test_recording_with_separate_channels(service: riva.client.ASRService, recordings: Recordings) -> None:
    left, right = (recordings[name][: 4 * RATE] for name in ("jfk", "2033-164914-0000"))
    options: dict[str, Any] = {"encoding": "LINEAR_PCM", "sample_rate_hertz": RATE, "audio_channel_count": 2}
    config = riva.client.RecognitionConfig(enable_separate_recognition_per_channel=True, **options)
    response = await asyncio.to_thread(service.offline_recognize, np.stack((left, right), 1).tobytes(), config)
    texts = {result.channel_tag: result.alternatives[0].transcript for result in response.results}
    mono = opening().streaming_config.config
    alone = [await asyncio.to_thread(service.offline_recognize, side.tobytes(), mono) for side in (left, right)]
    assert texts == {tag: one.results[0].alternatives[0].transcript for tag, one in enumerate(alone, 1)}


async def test_silence_has_an_empty_result(service: riva.client.ASRService) -> None:
    response = await asyncio.to_thread(service.offline_recognize, bytes(2 * RATE), opening().streaming_config.config)
    assert [(result.alternatives[0].transcript, len(result.alternatives[0].words)) for result in response.results] == [("", 0)]


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW_CASES else []) for case in CASES])
async def test_stream(keyed: Gateway, stub: Any, speech: Samples, case: str) -> None:
    """Cut anywhere, also within a sample."""
    options, write = CASES[case]
    body = write(speech)
    first = opening(**{"sample_rate_hertz": 0, "encoding": "ENCODING_UNSPECIFIED", **options}, enable_word_time_offsets=True)
    responses = await stream(stub, [first, *pieces(body, 3001)], bearer(KEY))
    assert all(len(response.results) == 1 for response in responses)
    assert all(response.results[0].channel_tag == 1 for response in responses)
    done = finals(responses)
    if case in ("raw", "WAV with nothing declared", "flac"):  # the same samples
        final = await spoken(keyed, speech)
        assert text_of(responses) == f"{final['text']} "
        words = [(word.word, word.start_time, word.end_time) for result in done for word in result.alternatives[0].words]
        assert words == [(word["word"], round(word["start"] * 1000), round(word["end"] * 1000)) for word in final["words"]]
    assert len(text_of(responses).split()) > 10
    assert all(result.stability == 1 for result in done)
    interims = [response.results[0] for response in responses if not response.results[0].is_final]
    assert interims
    assert all(0 <= result.stability <= 1 for result in interims)
    assert not any(result.alternatives[0].words for result in interims), "Riva sends words with finals alone"
    processed = [response.results[0].audio_processed for response in responses]
    assert processed == sorted(processed)
    assert processed[-1] == pytest.approx(len(speech) / RATE, abs=0.1)


@pytest.mark.parametrize("mode", ["no", "time", "confidence"])
async def test_streaming_script(keyed: Gateway, service: riva.client.ASRService, speech: Samples, wav: Path, mode: str) -> None:
    """The calls of transcribe_file.py: a WAV file with its header, no encoding and no sample rate."""
    config = riva.client.StreamingRecognitionConfig(
        config=riva.client.RecognitionConfig(
            language_code="en-US", max_alternatives=1, verbatim_transcripts=True, enable_word_time_offsets=mode == "time"
        ),
        interim_results=True,
    )
    riva.client.add_endpoint_parameters_to_config(config, -1, -1.0, -1, -1, -1.0, -1.0)
    output = io.StringIO()

    def run() -> None:
        with riva.client.AudioChunkFileIterator(wav, 1600) as chunks:
            responses = service.streaming_response_generator(audio_chunks=chunks, streaming_config=config)
            riva.client.print_streaming(responses, [output], mode, word_time_offsets=mode == "time")

    await asyncio.to_thread(run)
    expected = (await spoken(keyed, speech))["text"].split()
    lines = output.getvalue().splitlines()
    if mode == "time":
        texts = [line.partition("Transcript 0: ")[2] for line in lines if "Transcript 0: " in line]
        assert len([line for line in lines if len(line) > 80 and not line.startswith("Word ")]) == len(expected)
    else:
        texts = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert " ".join(texts).split() == expected


async def test_final_result_comes_while_the_client_speaks(stub: Any, speech: Samples) -> None:
    """For each segment, as soon as it ends."""
    call = stub.StreamingRecognize(metadata=bearer(KEY))
    for request in [opening(interim=False), *pieces(speech[: 9 * RATE].tobytes(), FRAME_BYTES)]:
        await call.write(request)
    responses = aiter(call)
    first = await asyncio.wait_for(anext(responses), 30)
    assert first.results[0].is_final
    assert first.results[0].alternatives[0].transcript.endswith(" ")
    await call.done_writing()
    rest = [response async for response in responses]
    assert all(response.results[0].is_final for response in rest)


async def test_endpointing(keyed: Gateway, stub: Any, speech: Samples) -> None:
    """A longer silence ends fewer segments."""
    counts, texts = {}, {}
    for stop_history in (0, 300, 60_000):
        first = opening(endpointing_config=riva_asr_pb2.EndpointingConfig(stop_history=stop_history) if stop_history else None)
        responses = await stream(stub, [first, *pieces(speech.tobytes(), FRAME_BYTES)], bearer(KEY))
        counts[stop_history], texts[stop_history] = len(finals(responses)), text_of(responses)
    assert counts[60_000] == 1
    assert counts[0] == 2
    assert counts[300] >= 2
    assert texts[0] == f"{(await spoken(keyed, speech))['text']} "


async def test_models(service: riva.client.ASRService, stub: Any) -> None:
    """As the scripts' --list-models reads them."""
    request = riva_asr_pb2.RivaSpeechRecognitionConfigRequest()
    answer = await asyncio.to_thread(
        service.stub.GetRivaSpeechRecognitionConfig, request, metadata=service.auth.get_auth_metadata()
    )
    listed = [(one.model_name, one.parameters["type"], one.parameters["language_code"]) for one in answer.model_config]
    assert listed == [("amira", "online", "en"), ("amira", "offline", "en")]
    request.model_name = "whisper-1"
    by_alias = await stub.GetRivaSpeechRecognitionConfig(request, metadata=bearer(KEY))
    assert {config.model_name for config in by_alias.model_config} == {"amira"}
    request.model_name = "nobody"
    async with refused(grpc.StatusCode.INVALID_ARGUMENT) as errors:
        await stub.GetRivaSpeechRecognitionConfig(request, metadata=bearer(KEY))
    assert "known: amira" in str(errors[0].details())


@pytest.mark.parametrize("code", ["", "en", "en-GB", "EN-us", "multi"])
async def test_languages(stub: Any, code: str) -> None:
    request = riva_asr_pb2.RecognizeRequest(config=opening(language_code=code).streaming_config.config, audio=bytes(2 * RATE))
    assert len((await stub.Recognize(request, metadata=bearer(KEY))).results) == 1


async def test_request_id_returns(stub: Any, recordings: Recordings) -> None:
    samples = recordings["jfk"][:RATE].tobytes()
    first = opening()
    first.id.value = "one of mine"
    first.runtime_config["without"] = "effect"
    responses = await stream(stub, [first, *pieces(samples, FRAME_BYTES)], bearer(KEY))
    assert {response.id.value for response in responses} <= {"one of mine"}
    request = riva_asr_pb2.RecognizeRequest(config=first.streaming_config.config, audio=samples, id=first.id)
    call = stub.Recognize(request, metadata=(*bearer(KEY), ("x-request-id", "another")))
    assert (await call).id.value == "one of mine"
    assert dict(await call.initial_metadata())["x-request-id"] == "another"


IGNORED: dict[str, tuple[dict[str, Any], str]] = {
    "profanity_filter": ({"profanity_filter": True}, "profanity_filter"),
    "enable_automatic_punctuation": ({"enable_automatic_punctuation": True}, "enable_automatic_punctuation"),
    "custom_configuration": ({"custom_configuration": {"a": "b"}}, "custom_configuration"),
    "speech_contexts": ({"speech_contexts": [{"phrases": ["amira"], "boost": 20}]}, "speech_contexts.boost"),
    "start_history": ({"endpointing_config": {"start_history": 100}}, "endpointing_config.start_history"),
    "stop_threshold_eou": ({"endpointing_config": {"stop_threshold_eou": 0.5}}, "endpointing_config.stop_threshold_eou"),
    "nothing": ({"verbatim_transcripts": True, "max_alternatives": 1}, ""),
}


@pytest.mark.parametrize("name", IGNORED)
async def test_options_without_effect_are_named(stub: Any, recordings: Recordings, name: str) -> None:
    given, expected = IGNORED[name]
    samples = recordings["jfk"][: 2 * RATE].tobytes()
    call = stub.StreamingRecognize(iter([opening(**given), audio(samples)]), metadata=bearer(KEY))
    assert dict(await call.initial_metadata()).get("x-ignored-options", "") == expected
    assert text_of([response async for response in call])
    request = riva_asr_pb2.RecognizeRequest(config=opening(**given).streaming_config.config, audio=samples)
    answer = stub.Recognize(request, metadata=bearer(KEY))
    assert [len(result.alternatives) for result in (await answer).results] == [1]
    assert dict(await answer.initial_metadata()).get("x-ignored-options", "") == expected


async def test_alternatives(stub: Any, recordings: Recordings) -> None:
    samples, given = recordings["jfk"].tobytes(), opening(max_alternatives=3, enable_word_time_offsets=True)
    request = riva_asr_pb2.RecognizeRequest(config=given.streaming_config.config, audio=samples)
    (result,) = (await stub.Recognize(request, metadata=bearer(KEY))).results
    assert 2 <= len(result.alternatives) <= 3
    assert len({alternative.transcript for alternative in result.alternatives}) == len(result.alternatives)
    assert [bool(alternative.words) for alternative in result.alternatives] == [True, False, False][: len(result.alternatives)]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": "nobody"}, "known: amira"),
    "language": ({"language_code": "de-DE"}, "language_code is 'de-DE', but model 'amira' knows 'en' alone"),
    "encoding": ({"encoding": 99}, "encoding is 99; known: ENCODING_UNSPECIFIED, LINEAR_PCM"),
    "rate": ({"sample_rate_hertz": 100}, "sample_rate_hertz is 100; it must be from 6000 to 192000 Hz"),
    "channels": ({"audio_channel_count": 9}, "audio_channel_count is 9; it must be from 1 to 8"),
    "alternatives": ({"max_alternatives": -1}, "max_alternatives is -1; it must be 0 or more"),
    "speakers": ({"diarization_config": {"enable_speaker_diarization": True}}, "diarization_config asks for speakers"),
}
REFUSED_IN_STREAMS: dict[str, tuple[dict[str, Any], str]] = {
    **REFUSED,
    "silence": ({"endpointing_config": {"stop_history": -1}}, "endpointing_config.stop_history is -1; it must be from 1"),
    "separate channels": (
        {"audio_channel_count": 2, "enable_separate_recognition_per_channel": True},
        "enable_separate_recognition_per_channel is true, but channels of a stream are mixed",
    ),
}


@pytest.mark.parametrize("name", REFUSED_IN_STREAMS)
async def test_options_are_refused(keyed: Gateway, stub: Any, name: str) -> None:
    given, message = REFUSED_IN_STREAMS[name]
    before = await gateway_metrics(keyed.url)
    async with refused(grpc.StatusCode.INVALID_ARGUMENT) as errors:
        await stream(stub, [opening(**given), audio(bytes(FRAME_BYTES))], bearer(KEY))
    assert message in str(errors[0].details())
    if name in REFUSED:
        request = riva_asr_pb2.RecognizeRequest(config=opening(**given).streaming_config.config, audio=bytes(FRAME_BYTES))
        async with refused(grpc.StatusCode.INVALID_ARGUMENT) as errors:
            await stub.Recognize(request, metadata=bearer(KEY))
        assert message in str(errors[0].details())
    code = "model_not_found" if name == "model" else "unacceptable"
    assert dict(errors[0].trailing_metadata())["error-code"] == code
    grown = growth(before, await gateway_metrics(keyed.url))
    assert grown("asr_rejections_total", reason=code) == 1 + (name in REFUSED)


async def test_messages_are_refused(keyed: Gateway, stub: Any, speech: Samples) -> None:
    # With one message after the wrong one at most: a write to an RPC that has ended hides its status in grpc.aio.
    wrong: dict[str, list[Any]] = {
        "the first message has no streaming_config": [audio(bytes(FRAME_BYTES))],
        "streaming_config may only be in the first message": [opening(), opening()],
        "the stream does not start like a file": [opening(encoding="FLAC"), audio(speech[:RATE].tobytes())],
        "The stream starts like MP3": [opening(), audio(as_file(speech, "MP3", "MPEG_LAYER_III"))],
        "need": [opening(), audio(bytes(FRAME_BYTES + 1))],
    }
    for message, requests in wrong.items():
        async with refused(grpc.StatusCode.INVALID_ARGUMENT) as errors:
            await stream(stub, requests, bearer(KEY))
        assert message in str(errors[0].details())
    async with grpc.aio.insecure_channel(target_of(keyed)) as channel:
        for method in ("Recognize", "StreamingRecognize"):
            raw = channel.stream_stream(f"/{SERVICE}/{method}")
            async with refused(grpc.StatusCode.INVALID_ARGUMENT) as errors:
                await raw(iter([b"\xff\xff\xff"]), metadata=bearer(KEY)).read()
            assert "not valid protobuf" in str(errors[0].details())
        async with refused(grpc.StatusCode.INVALID_ARGUMENT) as errors:
            await channel.stream_unary(f"/{SERVICE}/Recognize")(iter([]), metadata=bearer(KEY))
        async with refused(grpc.StatusCode.UNIMPLEMENTED):
            await channel.unary_unary(f"/{SERVICE}/Synthesize")(b"", metadata=bearer(KEY))


async def test_undecodable_recordings_are_refused(stub: Any) -> None:
    for config, body in (({"encoding": "FLAC"}, bytes(100)), ({}, b""), ({}, b"%PDF-1.4 not audio"), ({}, bytes(3))):
        request = riva_asr_pb2.RecognizeRequest(config=riva_asr_pb2.RecognitionConfig(**config), audio=body)
        async with refused(grpc.StatusCode.INVALID_ARGUMENT):
            await stub.Recognize(request, metadata=bearer(KEY))


@pytest.mark.parametrize("metadata", [(), bearer("wrong"), (("x-api-key", "wrong"),)])
async def test_key_is_needed(keyed: Gateway, stub: Any, metadata: tuple[tuple[str, str], ...]) -> None:
    before = await gateway_metrics(keyed.url)
    for call in (
        stub.Recognize(riva_asr_pb2.RecognizeRequest(audio=bytes(100)), metadata=metadata),
        stub.StreamingRecognize(iter([opening()]), metadata=metadata).read(),
        stub.GetRivaSpeechRecognitionConfig(riva_asr_pb2.RivaSpeechRecognitionConfigRequest(), metadata=metadata),
    ):
        async with refused(grpc.StatusCode.UNAUTHENTICATED):
            await call
    grown = growth(before, await gateway_metrics(keyed.url))
    assert grown("asr_rejections_total", reason="invalid_api_key") == 3
    assert grown("asr_requests_total", endpoint="stream", model="unknown", status="401") == 1
    assert grown("asr_requests_total", endpoint="batch", model="unknown", status="401") == 1


async def test_key_by_its_own_header(stub: Any) -> None:
    assert await stream(stub, [opening(), audio(bytes(FRAME_BYTES))], (("x-api-key", KEY),)) == []


async def test_requests_are_counted(keyed: Gateway, stub: Any, recordings: Recordings) -> None:
    samples = recordings["jfk"][: 2 * RATE].tobytes()
    before = await gateway_metrics(keyed.url)
    await stream(stub, [opening(), *pieces(samples, FRAME_BYTES)], bearer(KEY))
    await stub.Recognize(riva_asr_pb2.RecognizeRequest(audio=samples), metadata=bearer(KEY))
    grown = growth(before, await gateway_metrics(keyed.url))
    for endpoint in ("stream", "batch"):
        assert grown("asr_requests_total", endpoint=endpoint, model="amira", status="200") == 1
        assert grown("asr_request_duration_seconds_count", endpoint=endpoint, model="amira") == 1
        assert grown("asr_audio_seconds_total", endpoint=endpoint, model="amira") == pytest.approx(2)
    assert grown("asr_final_latency_seconds_count", model="amira") == 1


async def test_limits(make_gateway: MakeGateway, recordings: Recordings) -> None:
    keys = ("first", "second")
    limits = {"max_concurrent_streams": 2, "max_streams_per_key": 1, "max_batches_per_key": 1, "max_audio_rate_per_key": 0.05}
    async with make_gateway(api_keys=keys, riva_port=0, **limits) as gateway, stub_of(gateway) as stub:
        held = [stub.StreamingRecognize(metadata=bearer(key)) for key in keys]
        for call in held[:1]:
            await call.write(opening())
            await call.initial_metadata()
        async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED) as errors:
            await stream(stub, [opening()], bearer("first"))
        assert dict(errors[0].trailing_metadata())["error-code"] == "quota_exceeded"
        await held[1].write(opening())
        await held[1].initial_metadata()
        async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            await stream(stub, [opening()], bearer("second"))
        held[1].cancel()
        samples = recordings["jfk"][: 4 * RATE].tobytes()
        await stub.Recognize(riva_asr_pb2.RecognizeRequest(audio=samples), metadata=bearer("second"))
        async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED) as errors:
            await stub.Recognize(riva_asr_pb2.RecognizeRequest(audio=samples), metadata=bearer("second"))
        assert "s of audio per second" in str(errors[0].details())
        assert int(dict(errors[0].trailing_metadata())["grpc-retry-pushback-ms"]) > 0
        held[0].cancel()


async def test_full_server_is_unavailable(make_gateway: MakeGateway) -> None:
    async with make_gateway(max_concurrent_streams=1, riva_port=0) as gateway, stub_of(gateway) as stub:
        held = stub.StreamingRecognize()
        await held.write(opening())
        await held.initial_metadata()
        async with refused(grpc.StatusCode.UNAVAILABLE) as errors:
            await stream(stub, [opening()], ())
        trailing = dict(errors[0].trailing_metadata())
        assert trailing["error-code"] == "no_capacity"
        assert 1000 <= int(trailing["grpc-retry-pushback-ms"]) <= 5000
        held.cancel()


async def test_large_message_is_refused(make_gateway: MakeGateway) -> None:
    async with make_gateway(max_request_size=100_000, riva_port=0) as gateway, stub_of(gateway) as stub:
        async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            await stub.Recognize(riva_asr_pb2.RecognizeRequest(audio=bytes(100_001)))
        async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            await stream(stub, [opening(), audio(bytes(100_001))], ())
        await until(lambda: no_stream_is_open(gateway))


async def no_stream_is_open(gateway: Gateway) -> bool:
    metrics = await gateway_metrics(gateway.url)
    return not metrics["asr_active_connections", ()] and not metrics["asr_active_batches", ()]


@pytest.mark.parametrize("ending", ["deadline", "cancel", "connection"])
@pytest.mark.usefixtures("no_sequence_left")
async def test_stream_ends_with_its_client(keyed: Gateway, recordings: Recordings, ending: str) -> None:
    before = await gateway_metrics(keyed.url)
    async with stub_of(keyed) as stub:
        call = stub.StreamingRecognize(metadata=bearer(KEY), timeout=2 if ending == "deadline" else None)
        for request in [opening(), *pieces(recordings["jfk"].tobytes(), FRAME_BYTES)]:
            await call.write(request)
        assert (await call.read()).results
        if ending == "deadline":
            assert await asyncio.wait_for(call.code(), 10) is grpc.StatusCode.DEADLINE_EXCEEDED
        elif ending == "cancel":
            call.cancel()
    await until(lambda: no_stream_is_open(keyed))
    grown = growth(before, await gateway_metrics(keyed.url))
    assert grown("asr_requests_total", endpoint="stream", model="amira", status="499") == 1


async def test_recording_ends_with_its_client(keyed: Gateway, stub: Any, speech: Samples) -> None:
    request = riva_asr_pb2.RecognizeRequest(config=opening().streaming_config.config, audio=np.tile(speech, 20).tobytes())
    before = await gateway_metrics(keyed.url)

    async def decodes() -> bool:
        grown = growth(before, await gateway_metrics(keyed.url))
        return grown("asr_audio_seconds_total", endpoint="batch", model="amira") > 0

    call = stub.Recognize(request, metadata=bearer(KEY))
    await until(decodes)
    call.cancel()
    await until(lambda: no_stream_is_open(keyed))
    grown = growth(before, await gateway_metrics(keyed.url))
    assert grown("asr_requests_total", endpoint="batch", model="amira", status="499") == 1


@pytest.mark.parametrize(("method", "endpoint"), [("Recognize", "batch"), ("StreamingRecognize", "stream")])
async def test_client_leaves_before_its_first_message(keyed: Gateway, method: str, endpoint: str) -> None:
    before = await gateway_metrics(keyed.url)
    async with grpc.aio.insecure_channel(target_of(keyed)) as channel:
        call = channel.stream_stream(f"/{SERVICE}/{method}")(metadata=bearer(KEY))
        await asyncio.sleep(0.3)
        call.cancel()

        async def counted() -> bool:
            grown = growth(before, await gateway_metrics(keyed.url))
            statuses = {
                status: grown("asr_requests_total", endpoint=endpoint, model="unknown", status=status) for status in CODES
            }
            assert not statuses["400"]
            return statuses["499"] == 1

        await until(counted)


async def test_idle_stream_ends(make_gateway: MakeGateway) -> None:
    async with make_gateway(stream_timeout_secs=1.0, riva_port=0) as gateway, stub_of(gateway) as stub:
        for requests in ([], [opening()]):
            call = stub.StreamingRecognize()
            for request in requests:
                await call.write(request)
            began = time.monotonic()
            async with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
                await call.read()
            assert 0.9 < time.monotonic() - began < 5
        messages = [opening(), *[riva_asr_pb2.StreamingRecognizeRequest()] * 8]
        assert await stream(stub, messages, (), pause_secs=0.3) == [], "empty messages keep it open"


@pytest.mark.usefixtures("no_sequence_left")
@pytest.mark.slow
async def test_client_that_does_not_read_is_not_read(make_gateway: MakeGateway, recordings: Recordings) -> None:
    """What it may send is limited by the buffers on the way, and nothing is lost once it reads."""
    samples = np.tile(recordings["jfk"], 8)
    narrow = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    sent = 0
    async with make_gateway(audio_buffer_capacity=2**18, riva_port=0) as gateway, stub_of(gateway, narrow) as stub:
        call = stub.StreamingRecognize()

        async def send() -> None:
            nonlocal sent
            for request in [opening(), *pieces(samples.tobytes(), FRAME_BYTES)]:
                await call.write(request)
                sent += len(request.audio_content)
            await call.done_writing()

        sender = asyncio.create_task(send())
        last = -1
        while last != sent:
            last = sent
            await asyncio.sleep(3)
        assert 2**18 < sent < samples.nbytes - 2**20, "the client was not stopped"
        responses = [response async for response in call]
        await sender
        final = (await transcribe(gateway.stream_url(), samples)).final["text"]
    assert text_of(responses) == f"{final} "


async def test_client_that_never_reads_loses_its_place(make_gateway: MakeGateway, recordings: Recordings) -> None:
    narrow = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with make_gateway(stream_timeout_secs=1.0, riva_port=0) as gateway, stub_of(gateway, narrow) as stub:
        before = await gateway_metrics(gateway.url)
        requests = [opening(), *pieces(np.tile(recordings["jfk"], 8).tobytes(), FRAME_BYTES)]
        call = stub.StreamingRecognize(iter(requests))
        await call.initial_metadata()
        await until(lambda: no_stream_is_open(gateway), 60)
        grown = growth(before, await gateway_metrics(gateway.url))
        call.cancel()
    assert grown("asr_requests_total", endpoint="stream", model="amira", status="408") == 1


async def test_hundred_streams_at_once(keyed: Gateway, stub: Any, recordings: Recordings) -> None:
    said = [recordings[name][: 2 * RATE] for name in ("jfk", "2033-164914-0000")]
    texts = [(await spoken(keyed, samples))["text"] for samples in said]
    assert all(texts)
    calls = (stream(stub, [opening(), *pieces(said[at % 2].tobytes(), FRAME_BYTES)], bearer(KEY)) for at in range(100))
    heard = await asyncio.gather(*calls)
    assert [text_of(responses) for responses in heard] == [f"{texts[at % 2]} " for at in range(100)]


async def test_triton_restarts_within_a_stream(
    quick_restarts: None,  # noqa: ARG001 (needed for its effect)
    recordings: Recordings,
) -> None:
    samples = recordings["jfk"]
    async with (
        backends(1, warm=False) as (backend,),
        run_gateway(triton_endpoint=backend.target, riva_port=0, recovery_timeout_secs=60) as gateway,
        stub_of(gateway) as stub,
    ):
        requests = [opening(), *pieces(samples.tobytes(), FRAME_BYTES)]
        undisturbed = await stream(stub, requests, ())
        before = await gateway_metrics(gateway.url)
        disturbed = asyncio.create_task(stream(stub, requests, (), pause_secs=0.1))
        await asyncio.sleep(4)
        await kill(backend)
        assert text_of(await disturbed) == text_of(undisturbed)
        grown = growth(before, await gateway_metrics(gateway.url))
    assert grown("asr_stream_recoveries_total", outcome="recovered") == 1


async def test_drain(make_gateway: MakeGateway, recordings: Recordings) -> None:
    """What was sent is transcribed, and the status says that the rest is not; new work goes elsewhere."""
    samples = recordings["jfk"][: 4 * RATE]
    async with make_gateway(riva_port=0, drain_timeout_secs=2.0) as gateway, stub_of(gateway) as stub:
        final = (await transcribe(gateway.stream_url(), samples)).final["text"]
        call = stub.StreamingRecognize()
        for request in [opening(interim=False), *pieces(samples.tobytes(), FRAME_BYTES)]:
            await call.write(request)
        await call.initial_metadata()
        gateway.server.should_exit = True
        await until(lambda: gateway.server._app.state.service.places.draining)
        async with refused(grpc.StatusCode.UNAVAILABLE):
            await stream(stub, [opening()], ())
        async with refused(grpc.StatusCode.UNAVAILABLE):
            await stub.Recognize(riva_asr_pb2.RecognizeRequest(audio=samples.tobytes()))
        assert await health(gateway) == health_pb2.HealthCheckResponse.NOT_SERVING
        responses: list[Any] = []
        async with refused(grpc.StatusCode.UNAVAILABLE) as errors:
            while True:
                responses.append(await call.read())
        assert text_of(responses) == f"{final} "
        assert dict(errors[0].trailing_metadata())["error-code"] == "draining"


async def health(gateway: Gateway, name: str = SERVICE) -> int:
    async with grpc.aio.insecure_channel(target_of(gateway)) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
        return int(answer.status)


async def test_health(keyed: Gateway, make_gateway: MakeGateway) -> None:
    assert await health(keyed) == await health(keyed, "") == health_pb2.HealthCheckResponse.SERVING
    async with refused(grpc.StatusCode.NOT_FOUND):
        await health(keyed, "nobody")
    async with make_gateway(triton_endpoint="127.0.0.1:1", riva_port=0) as without_triton:
        assert await health(without_triton) == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_health_is_watched(make_gateway: MakeGateway) -> None:
    async with make_gateway(riva_port=0) as gateway, grpc.aio.insecure_channel(target_of(gateway)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        unknown.cancel()
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        gateway.server._app.state.service.places.drain()
        assert (await asyncio.wait_for(watch.read(), 5)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


async def test_reflection(keyed: Gateway) -> None:
    """By gRPC's own client: the services, and their messages."""

    def reflect() -> tuple[list[str], set[str], list[str]]:
        with grpc.insecure_channel(target_of(keyed)) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            services = list(database.get_services())
            file = database.FindFileContainingSymbol(f"{SERVICE}.Recognize")
            with pytest.raises(KeyError):
                database.FindFileContainingSymbol("nobody.here")
            database.FindFileByName("riva/proto/riva_audio.proto")
            return services, {message.name for message in file.message_type}, [one.name for one in file.service[0].method]

    services, messages, methods = await asyncio.to_thread(reflect)
    assert set(services) == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"}
    assert {"RecognitionConfig", "WordInfo", "StreamingRecognizeResponse"} <= messages
    assert methods == ["Recognize", "StreamingRecognize", "GetRivaSpeechRecognitionConfig"]


async def test_tls(make_gateway: MakeGateway, recordings: Recordings, tmp_path: Path) -> None:
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command = ["openssl", "req", *kind, *names, "-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    async with make_gateway(tls_certificate=str(certificate), tls_key=str(key), riva_port=0) as gateway:
        auth = riva.client.Auth(ssl_root_cert=str(certificate), use_ssl=True, uri=target_of(gateway))
        config = opening().streaming_config.config
        body = recordings["jfk"][: 2 * RATE].tobytes()
        response = await asyncio.to_thread(riva.client.ASRService(auth).offline_recognize, body, config)
        auth.channel.close()
    assert response.results[0].alternatives[0].transcript


async def test_used_port_is_an_error(keyed: Gateway) -> None:
    app = keyed.server._app
    port = app.state.riva.port
    service = app.state.service
    taken = service.settings.model_copy(update={"riva_port": port})
    other = type("Other", (), {"settings": taken, "ready": service.ready})()
    with pytest.raises(ConfigError, match=f"riva_port = {port}: can't listen on"):
        async with riva_server.run(other):
            pass


async def test_off_by_default(gateway: Gateway) -> None:
    assert not hasattr(gateway.server._app.state, "riva")


async def test_small_messages_are_slowed(stub: Any) -> None:
    """A flood of tiny messages is taken at the rate of WebSocket frames, 500 per second after a burst of 500."""
    began = time.monotonic()
    await stream(stub, [opening(), *[audio(bytes(2))] * 1500], bearer(KEY))
    assert time.monotonic() - began > 1.5
