"""OpenAI's API under /v1, mostly through openai-python."""

from __future__ import annotations

import io
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal

import httpx
import numpy as np
import openai
import orjson
import pysubs2
import pytest
import soundfile
import webvtt
from openai import AsyncOpenAI, omit
from openai.types.audio import TranscriptionTextDeltaEvent, TranscriptionTextDoneEvent, TranscriptionVerbose

from amira.paths import SPEECH
from gateway.api.openai_rest import EVENTS
from gateway.api.streaming import with_error
from gateway.audio import RATE
from gateway.errors import ApiError, ErrorKind
from tests.support.clients import gateway_metrics, growth
from tests.support.servers import Gateway, Recordings

MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]

RECORDING = SPEECH / "2609-156975-0001.flac"

pytestmark = pytest.mark.usefixtures("no_sequence_left")


def client_of(gateway: Gateway, key: str = "any", **options: Any) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, **{"max_retries": 0, **options})


@pytest.fixture(scope="module")
async def client(gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    async with client_of(gateway) as running:
        yield running


@pytest.fixture(scope="module")
async def native(gateway: Gateway, http: httpx.AsyncClient) -> dict[str, Any]:
    """Return the recording's transcript by the native API."""
    body: dict[str, Any] = (await http.post(gateway.batch_url(), content=RECORDING.read_bytes())).raise_for_status().json()
    assert body["text"]
    return body


@pytest.fixture(scope="module")
def long_recording(recordings: Recordings) -> tuple[str, bytes]:
    """Return a recording over 30 s, which the server decodes in pieces."""
    samples = np.concatenate([*recordings.values()] * 2)
    assert len(samples) > 40 * RATE
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="FLAC")
    return "long.flac", file.getvalue()


def silence(secs: float = 1.0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(round(secs * RATE), np.int16), RATE, format="WAV")
    return file.getvalue()


async def test_json_has_the_text_and_its_usage(client: AsyncOpenAI, native: dict[str, Any]) -> None:
    answer = await client.audio.transcriptions.create(file=RECORDING, model="whisper-1")
    assert answer.text == native["text"]
    assert answer.usage
    assert answer.usage.type == "duration"
    assert answer.usage.seconds == pytest.approx(native["audio_length_samples"] / RATE)
    assert answer.logprobs is None


async def test_logprobs_join_to_the_text(client: AsyncOpenAI, native: dict[str, Any]) -> None:
    answer = await client.audio.transcriptions.create(file=RECORDING, model="amira", include=["logprobs"])
    assert answer.logprobs
    assert "".join(entry.token or "" for entry in answer.logprobs) == answer.text == native["text"]
    for entry, word in zip(answer.logprobs, native["words"], strict=True):
        assert entry.logprob is not None
        assert np.exp(entry.logprob) == pytest.approx(word["confidence"], abs=1e-3)
        assert bytes(map(int, entry.bytes or ())).decode() == entry.token


async def test_text_is_plain(client: AsyncOpenAI, native: dict[str, Any]) -> None:
    answer = await client.audio.transcriptions.create(file=RECORDING, model="amira", response_format="text")
    assert answer == native["text"] + "\n"


async def test_subtitles_have_the_words_in_their_times(client: AsyncOpenAI, long_recording: tuple[str, bytes]) -> None:
    plain = await client.audio.transcriptions.create(file=long_recording, model="amira")
    secs = plain.usage.seconds if plain.usage and plain.usage.type == "duration" else 0
    srt = await client.audio.transcriptions.create(file=long_recording, model="amira", response_format="srt")
    vtt = await client.audio.transcriptions.create(file=long_recording, model="amira", response_format="vtt")
    captions: Any = webvtt.from_string(str(vtt))
    cues = [(cue.start / 1000, cue.end / 1000, cue.plaintext) for cue in pysubs2.SSAFile.from_string(str(srt), "srt")]
    assert len(cues) > 5
    assert [(cue.start_in_seconds, cue.end_in_seconds) for cue in captions] == [
        (int(start), int(end)) for start, end, _ in cues
    ]
    for words in (" ".join(text for *_, text in cues), " ".join(cue.text for cue in captions)):
        assert words.split() == plain.text.split()
    assert all(0 <= start < end <= secs + 1 for start, end, _ in cues)


async def test_long_recording_streams_a_delta_a_piece(make_gateway: MakeGateway, long_recording: tuple[str, bytes]) -> None:
    events, came = [], list[float]()
    async with make_gateway(max_concurrent_batches=1) as gateway, client_of(gateway) as client:
        began = time.monotonic()
        async for event in await client.audio.transcriptions.create(file=long_recording, model="amira", stream=True):
            events.append(event)
            came.append(time.monotonic() - began)
        verbose = await client.audio.transcriptions.create(file=long_recording, model="amira", response_format="verbose_json")
    *deltas, done = events
    assert isinstance(done, TranscriptionTextDoneEvent)
    assert len(deltas) > 2
    assert "".join(delta.delta for delta in deltas if delta.type == "transcript.text.delta") == done.text
    assert came[0] < 0.7 * came[-1], "the first piece's text came with the last one's"
    assert verbose.text == done.text
    assert verbose.segments
    assert [segment.id for segment in verbose.segments] == list(range(len(deltas)))
    assert "".join(segment.text for segment in verbose.segments) == verbose.text
    times = [time for segment in verbose.segments for time in (segment.start, segment.end)]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("granularities", "has_words", "has_segments"),
    [(None, False, True), (["segment"], False, True), (["word"], True, False), (["word", "segment"], True, True)],
)
async def test_verbose_json_times_what_is_asked_for(
    client: AsyncOpenAI,
    native: dict[str, Any],
    granularities: list[Literal["word", "segment"]] | None,
    has_words: bool,
    has_segments: bool,
) -> None:
    answer: TranscriptionVerbose = await client.audio.transcriptions.create(
        file=RECORDING, model="amira", response_format="verbose_json", timestamp_granularities=granularities or omit
    )
    assert (answer.text, answer.language) == (native["text"], "en")
    assert answer.duration == pytest.approx(native["audio_length_samples"] / RATE)
    assert (answer.words is not None, answer.segments is not None) == (has_words, has_segments)
    for word, expected in zip(answer.words or (), native["words"] if has_words else (), strict=True):
        assert (word.word, word.start, word.end) == (expected["word"], expected["start"], expected["end"])
    if answer.segments:
        assert "".join(segment.text for segment in answer.segments) == answer.text
        assert [token for segment in answer.segments for token in segment.tokens] == native["tokens"]
        for number, segment in enumerate(answer.segments):
            assert segment.id == number
            assert 0 <= segment.start < segment.end <= answer.duration + 0.1
            assert segment.seek == round(segment.start * 100)
            assert -10 < segment.avg_logprob < 0
            assert 0 < segment.compression_ratio < 3
            assert (segment.temperature, segment.no_speech_prob) == (0, 0)


async def test_stream_deltas_join_to_the_text(client: AsyncOpenAI, native: dict[str, Any]) -> None:
    stream = await client.audio.transcriptions.create(
        file=RECORDING, model="gpt-4o-transcribe", stream=True, include=["logprobs"]
    )
    *deltas, done = [event async for event in stream]
    assert isinstance(done, TranscriptionTextDoneEvent)
    assert deltas
    assert all(isinstance(delta, TranscriptionTextDeltaEvent) for delta in deltas)
    assert "".join(delta.delta for delta in deltas if delta.type == "transcript.text.delta") == done.text == native["text"]
    assert done.logprobs
    assert sum(len(delta.logprobs or ()) for delta in deltas if delta.type == "transcript.text.delta") == len(done.logprobs)
    assert done.usage
    assert (done.usage.input_tokens, done.usage.output_tokens) == (native["encoded_length"], len(native["tokens"]))
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens


async def test_events_are_not_buffered_by_proxies(gateway: Gateway, http: httpx.AsyncClient) -> None:
    form = {"model": "amira", "stream": "true"}
    answer = await http.post(f"{gateway.url}/v1/audio/transcriptions", files={"file": ("a.wav", silence())}, data=form)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert (answer.headers["Cache-Control"], answer.headers["X-Accel-Buffering"]) == ("no-cache", "no")
    assert answer.text.startswith('data: {"type":"transcript.text.done","text":"",')
    assert answer.text.endswith("}\n\n")
    assert answer.text.count("data: ") == 1, "silence has no deltas"


async def test_failure_after_the_first_event_is_an_event() -> None:
    async def failing() -> AsyncIterator[dict[str, Any]]:
        yield {"type": "transcript.text.delta", "delta": " second"}
        raise ApiError(ErrorKind.BACKEND_FAILED, "Triton failed")

    first = {"type": "transcript.text.delta", "delta": "first"}
    events = [orjson.loads(sent.removeprefix(b"data: ")) async for sent in with_error(first, failing(), EVENTS)]
    assert [event.get("delta") for event in events] == ["first", " second", None]
    error = events[-1]["error"]
    assert (error["type"], error["code"], error["message"]) == ("server_error", "backend_failed", "Triton failed")


async def test_silence_has_the_same_shape(client: AsyncOpenAI) -> None:
    file = ("silence.wav", silence())
    assert (await client.audio.transcriptions.create(file=file, model="amira")).text == ""
    formats: list[tuple[Literal["text", "srt", "vtt"], str]] = [("text", ""), ("srt", ""), ("vtt", "WEBVTT\n\n")]
    for response_format, expected in formats:
        answer = await client.audio.transcriptions.create(file=file, model="amira", response_format=response_format)
        assert answer == expected
    verbose = await client.audio.transcriptions.create(
        file=file, model="amira", response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert (verbose.text, verbose.words, verbose.segments, verbose.duration) == ("", [], [], 1.0)


async def test_fields_without_effect_are_accepted(client: AsyncOpenAI, native: dict[str, Any]) -> None:
    answer = await client.audio.transcriptions.create(
        file=("speech", RECORDING.read_bytes()),
        model="amira",
        language="EN",
        languages=["de", "en"],
        prompt="Glossary",
        temperature=0.5,
        keywords=["america", "country"],
        chunking_strategy={"type": "server_vad", "threshold": 0.5, "prefix_padding_ms": 300, "silence_duration_ms": 200},
        known_speaker_names=["agent"],
        known_speaker_references=["data:audio/wav;base64,AAAA"],
        extra_body={"never_heard_of": "1"},
    )
    assert answer.text == native["text"]
    answer = await client.audio.transcriptions.create(file=RECORDING, model="amira", chunking_strategy="auto")
    assert answer.text == native["text"]


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("response_format", "diarized_json", "response_format"),
        ("response_format", "yaml", "response_format"),
        ("timestamp_granularities[]", "word", "timestamp_granularities"),
        ("timestamp_granularities", "sentence", "timestamp_granularities"),
        ("include[]", "secrets", "include"),
        ("language", "de", "language"),
        ("languages[]", "de", "language"),
        ("temperature", "1.5", "temperature"),
        ("temperature", "warm", "temperature"),
        ("stream", "maybe", "stream"),
        ("chunking_strategy", "manual", "chunking_strategy"),
        ("chunking_strategy", '{"type": ', "chunking_strategy"),
        ("chunking_strategy[threshold]", "2", "chunking_strategy[threshold]"),
        ("model", "", "model"),
    ],
)
async def test_value_that_is_not_allowed_is_named(
    gateway: Gateway, http: httpx.AsyncClient, field: str, value: str, param: str
) -> None:
    form = {"model": "amira", field: value}
    answer = await http.post(f"{gateway.url}/v1/audio/transcriptions", files={"file": ("a.wav", silence())}, data=form)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("response_format", ["verbose_json", "srt", "vtt", "text"])
async def test_contradicting_fields_are_refused(gateway: Gateway, http: httpx.AsyncClient, response_format: str) -> None:
    """Events or log probabilities with a format that has none."""
    forms = [{"include[]": "logprobs"}] + ([{"stream": "true"}] if response_format != "text" else [])
    for form in forms:
        answer = await http.post(
            f"{gateway.url}/v1/audio/transcriptions",
            files={"file": ("a.wav", silence())},
            data={"model": "amira", "response_format": response_format, **form},
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")


async def test_request_without_a_form_and_file_is_refused(gateway: Gateway, http: httpx.AsyncClient) -> None:
    url = f"{gateway.url}/v1/audio/transcriptions"
    answers = [
        await http.post(url, json={"model": "amira"}),
        await http.post(url, data={"model": "amira", "file": "speech.wav"}),
        await http.post(url, files={"recording": ("a.wav", silence())}, data={"model": "amira"}),
        await http.post(url, files={"file": ("a.wav", b"")}, data={"model": "amira"}),
        await http.post(url, files={"file": ("a.wav", silence(0))}, data={"model": "amira"}),
        await http.post(url, files={"file": ("a.wav", b"please transcribe this for me")}, data={"model": "amira"}),
        await http.post(url, content=b"--x", headers={"Content-Type": "multipart/form-data"}),
    ]
    found = [(answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]) for answer in answers]
    assert found == [
        (400, "invalid_body", "file"),
        (400, "invalid_body", "file"),
        (400, "invalid_body", "file"),
        (400, "empty_body", None),
        (400, "undecodable_audio", None),
        (415, "unsupported_media", None),
        (400, "invalid_body", None),
    ]
    assert {answer.json()["error"]["type"] for answer in answers} == {"invalid_request_error"}


async def test_models_are_listed_under_every_name(client: AsyncOpenAI, make_gateway: MakeGateway) -> None:
    names = [model.id async for model in client.models.list()]
    assert names[0] == "amira"
    assert {"whisper-1", "gpt-4o-transcribe", "gpt-4o-mini-transcribe"} <= set(names)
    assert (await client.models.retrieve("whisper-1")).object == "model"
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.models.retrieve("nobody")
    assert (unknown.value.code, unknown.value.param, unknown.value.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )
    async with (
        make_gateway(model_aliases={"Systran/faster-whisper-small": "amira"}) as gateway,
        client_of(gateway) as other,
    ):
        assert [model.id async for model in other.models.list()] == ["amira", "Systran/faster-whisper-small"]
        assert (await other.models.retrieve("Systran/faster-whisper-small")).id == "Systran/faster-whisper-small"
        with pytest.raises(openai.NotFoundError, match="'whisper-1' is not known; known: amira"):
            await other.audio.transcriptions.create(file=("a.wav", silence()), model="whisper-1")


async def test_request_counts_for_the_model_of_its_form(gateway: Gateway, client: AsyncOpenAI) -> None:
    before = await gateway_metrics(gateway.url)
    await client.audio.transcriptions.create(file=("a.wav", silence()), model="whisper-1")
    with pytest.raises(openai.NotFoundError):
        await client.audio.transcriptions.create(file=("a.wav", silence()), model="nobody")
    grown = growth(before, await gateway_metrics(gateway.url))
    assert grown("asr_requests_total", endpoint="batch", model="amira", status="200") == 1
    assert grown("asr_requests_total", endpoint="batch", model="unknown", status="404") == 1
    assert grown("asr_audio_seconds_total", endpoint="batch", model="amira") == 1.0


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
async def test_translation_is_refused(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.audio.translations.create(file=RECORDING, model="whisper-1")
    assert refused.value.code == "unsupported_task"


async def test_keys(make_gateway: MakeGateway) -> None:
    async with make_gateway(api_keys=["secret"]) as gateway:
        async with client_of(gateway, "wrong") as stranger:
            with pytest.raises(openai.AuthenticationError) as refused:
                await stranger.audio.transcriptions.create(file=("a.wav", silence()), model="amira")
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()
        assert (refused.value.code, refused.value.type) == ("invalid_api_key", "invalid_request_error")
        assert refused.value.response.headers["WWW-Authenticate"] == "Bearer"
        async with client_of(gateway, "secret") as known:
            assert (await known.audio.transcriptions.create(file=("a.wav", silence()), model="amira")).text == ""


async def test_errors_have_the_types_that_clients_know(
    gateway: Gateway, make_gateway: MakeGateway, http: httpx.AsyncClient
) -> None:
    nowhere = await http.get(f"{gateway.url}/v1/nowhere")
    method = await http.get(f"{gateway.url}/v1/audio/transcriptions")
    native = await http.get(f"{gateway.url}/v2/nowhere")
    assert [answer.json()["error"]["type"] for answer in (nowhere, method, native)] == [
        "invalid_request_error",
        "invalid_request_error",
        "not_found",
    ]
    assert "x-should-retry" not in native.headers
    async with make_gateway(max_request_size=1000, max_batch_audio_length_secs=0.01) as small, client_of(small) as client:
        with pytest.raises(openai.APIStatusError) as large:
            await client.audio.transcriptions.create(file=("a.wav", silence()), model="amira")
        with pytest.raises(openai.APIStatusError) as long:
            await client.audio.transcriptions.create(file=("a.pcm", bytes(400)), model="amira")
    found = [(error.value.status_code, error.value.code, error.value.type) for error in (large, long)]
    assert found == [
        (413, "body_too_large", "invalid_request_error"),
        (413, "audio_too_long", "invalid_request_error"),
    ]


async def test_client_retries_retryable_errors(make_gateway: MakeGateway) -> None:
    async with (
        make_gateway(api_keys=["secret"], max_audio_rate_per_key=0.01) as gateway,
        client_of(gateway, "secret") as client,
    ):
        await client.audio.transcriptions.create(file=("a.wav", silence()), model="amira")
        with pytest.raises(openai.RateLimitError) as refused:
            await client.audio.transcriptions.create(file=("a.wav", silence()), model="amira")
    assert (refused.value.code, refused.value.type) == ("quota_exceeded", "rate_limit_error")
    assert int(refused.value.response.headers["Retry-After"]) >= 1
    assert "x-should-retry" not in refused.value.response.headers
    async with make_gateway() as gateway, client_of(gateway) as client:
        gateway.server._app.state.service.places.drain()
        with pytest.raises(openai.InternalServerError) as draining:
            await client.audio.transcriptions.create(file=("a.wav", silence()), model="amira")
    assert (draining.value.code, draining.value.type, draining.value.status_code) == ("draining", "server_error", 503)
    assert int(draining.value.response.headers["Retry-After"]) >= 1


async def test_page_of_an_allowed_origin_may_use_openai_node(make_gateway: MakeGateway, http: httpx.AsyncClient) -> None:
    """In a browser it sends headers of its own, and reads x-should-retry and Retry-After."""
    asked = "authorization,x-stainless-arch,x-stainless-retry-count,x-stainless-timeout"
    async with make_gateway(enable_cors=True, allowed_origins=["https://app.example"]) as gateway:
        preflight = await http.options(
            f"{gateway.url}/v1/audio/transcriptions",
            headers={
                "Origin": "https://app.example",
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": asked,
            },
        )
        answer = await http.get(f"{gateway.url}/v1/models", headers={"Origin": "https://app.example"})
        foreign = await http.get(f"{gateway.url}/v1/models", headers={"Origin": "https://other.example"})
    assert preflight.status_code == 200
    assert set(asked.split(",")) <= {name.strip() for name in preflight.headers["Access-Control-Allow-Headers"].split(",")}
    assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert {"x-should-retry", "Retry-After", "X-Request-ID"} <= set(
        answer.headers["Access-Control-Expose-Headers"].replace(" ", "").split(",")
    )
    assert (foreign.status_code, foreign.json()["error"]["type"]) == (403, "invalid_request_error")
