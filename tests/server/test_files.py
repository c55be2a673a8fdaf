"""Files of all formats through the gateway, Triton and the decoder, and malicious files."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

import httpx
import jiwer
import numpy as np
import numpy.typing as npt
import orjson
import pytest
import soundfile
import soxr
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from gateway.audio import RATE
from tests.support.media import RECORDER, encode_container
from tests.support.servers import Gateway, Recordings

MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]

OCTETS = {"Content-Type": "application/octet-stream"}
JFK = "and so my fellow americans ask not what your country can do for you ask what you can do for your country"
ATTACKERS = 45
HONEST_SECS = 20.0
"""Limit for a regular recording on a machine that is busy with other tests; with blocked decoding it took minutes."""

pytestmark = pytest.mark.usefixtures("no_sequence_left")


def encode(samples: npt.NDArray[Any], rate: int = RATE, **form: Any) -> bytes:
    file = io.BytesIO()
    audio = samples if rate == RATE else soxr.resample(samples, RATE, rate)
    soundfile.write(file, audio, rate, **form)
    return file.getvalue()


def unfinished(samples: npt.NDArray[np.int16]) -> bytes:
    """Return a WAV file whose recorder stopped before it wrote the sizes."""
    file = bytearray(encode(samples, format="WAV"))
    file[4:8] = file[40:44] = bytes(4)
    return bytes(file)


def too_large(samples: npt.NDArray[np.int16]) -> bytes:
    """Return a WAV file whose sizes include the header."""
    file = bytearray(encode(samples, format="WAV"))
    file[4:8], file[40:44] = (len(file).to_bytes(4, "little") for _ in range(2))
    return bytes(file)


def opposite(samples: npt.NDArray[np.int16]) -> bytes:
    half = samples // 2
    return encode(np.stack([half, -half], axis=1), format="WAV")


LOSSLESS: dict[str, Callable[[npt.NDArray[np.int16]], bytes]] = {
    "unfinished wav": unfinished,
    "wav with sizes too large": too_large,
    "float wav with integer scale": lambda samples: encode(samples.astype(np.float32), format="WAV", subtype="FLOAT"),
    "flac after a tag": lambda samples: b"ID3\4\0\0\0\0\2\0" + bytes(256) + encode(samples, format="FLAC"),
    "aiff": lambda samples: encode(samples, format="AIFF"),
    "au": lambda samples: encode(samples, format="AU"),
    "caf": lambda samples: encode(samples, format="CAF"),
    "w64": lambda samples: encode(samples, format="W64"),
}
LOSSY: dict[str, Callable[[npt.NDArray[np.int16]], bytes]] = {
    "mp3": lambda samples: encode(samples / 0x8000, format="MP3"),
    "mp3 without its first frames": lambda samples: encode(samples / 0x8000, 44_100, format="MP3")[700:],
    "opposite channels": opposite,
    "opposite channels at 48 kHz": lambda samples: encode(
        np.stack([samples, -0.9 * samples], axis=1) / 0x10000, 48_000, format="OGG", subtype="VORBIS"
    ),
}


@pytest.fixture(scope="module")
async def of_raw_pcm(gateway: Gateway, http: httpx.AsyncClient, recordings: Recordings) -> Any:
    """Return the answer to jfk, sent as raw PCM."""
    return (await http.post(gateway.batch_url(), content=recordings["jfk"].tobytes(), headers=OCTETS)).json()


@pytest.mark.parametrize("form", LOSSLESS)
async def test_every_lossless_form_gives_the_text_of_raw_pcm(
    gateway: Gateway, http: httpx.AsyncClient, recordings: Recordings, of_raw_pcm: Any, form: str
) -> None:
    answer = await http.post(gateway.batch_url(), content=LOSSLESS[form](recordings["jfk"]), headers=OCTETS)
    assert answer.status_code == 200, answer.text
    assert answer.json() == of_raw_pcm


@pytest.mark.parametrize("form", LOSSY)
async def test_every_lossy_form_gives_the_words(
    gateway: Gateway, http: httpx.AsyncClient, recordings: Recordings, form: str
) -> None:
    answer = await http.post(gateway.batch_url(), content=LOSSY[form](recordings["jfk"]), headers=OCTETS)
    assert answer.status_code == 200, answer.text
    assert jiwer.wer(JFK, answer.json()["text"]) < 0.25


CONTAINERS: dict[str, tuple[str, str, int, int]] = {
    "m4a": ("ipod", "aac", 44_100, 2),
    "mp4 in fragments": ("mp4", "aac", 48_000, 1),
    "webm": ("webm", "libopus", 48_000, 1),
    "adts": ("adts", "aac", 48_000, 1),
    "wma": ("asf", "wmav2", 44_100, 1),
    "amr": ("amr", "libopencore_amrnb", 8000, 1),
}


@pytest.mark.parametrize("form", CONTAINERS)
async def test_every_container_gives_the_words(
    gateway: Gateway, http: httpx.AsyncClient, recordings: Recordings, form: str
) -> None:
    options = {"movflags": "empty_moov", "frag_duration": "500000"} if "fragments" in form else {}
    file = encode_container(recordings["jfk"], *CONTAINERS[form], options=options)
    types = ("application/octet-stream", "audio/x-unknown", "application/x-www-form-urlencoded")
    for content_type in types if form == "m4a" else types[:1]:
        answer = await http.post(gateway.batch_url(), content=file, headers={"Content-Type": content_type})
        assert answer.status_code == 200, answer.text
        assert jiwer.wer(JFK, answer.json()["text"]) < (0.5 if form == "amr" else 0.25)


async def test_a_container_that_is_damaged_is_refused(gateway: Gateway, http: httpx.AsyncClient) -> None:
    for head in (b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81", b"\0\0\0\x20ftypM4A ", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"):
        answer = await http.post(gateway.batch_url(), content=head + NOISE.tobytes(), headers=OCTETS)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["code"] == "undecodable_audio"


def mulaw(samples: npt.NDArray[np.int16]) -> bytes:
    file = encode(samples / 0x8000, 8000, format="WAV", subtype="ULAW")
    return file[file.index(b"data") + 8 :]


def float48(samples: npt.NDArray[np.int16]) -> bytes:
    audio = soxr.resample(samples / 0x8000, RATE, 48_000).astype("<f4")
    return np.repeat(audio[:, None], 2, axis=1).tobytes()


LIVE: dict[str, tuple[str, Callable[[npt.NDArray[np.int16]], bytes], int]] = {
    "µ-law of 8 kHz": ("?encoding=mulaw&sample_rate=8000", mulaw, 160),
    "float of 48 kHz in two channels": ("?encoding=float32&sample_rate=48000&channels=2", float48, 7680),
    "wav": ("", lambda samples: encode(samples, format="WAV"), 641),
    "wav of 44.1 kHz in two channels": (
        "",
        lambda samples: encode(np.stack([samples] * 2, 1) / 0x8000, 44_100, format="WAV"),
        3333,
    ),
    "wav after a wrong query": ("?encoding=alaw&sample_rate=8000", lambda samples: encode(samples, format="WAV"), 641),
    "webm": ("", lambda samples: encode_container(samples, "webm", "libopus", options=RECORDER), 1001),
    "ogg": ("", lambda samples: encode_container(samples, "ogg", "libopus", options={"page_duration": "100000"}), 777),
    "flac": ("", lambda samples: encode(samples, format="FLAC"), 999),
}


@pytest.mark.parametrize("form", LIVE)
async def test_every_live_form_gives_the_words(gateway: Gateway, recordings: Recordings, form: str) -> None:
    query, make, frame_bytes = LIVE[form]
    body = make(recordings["jfk"])
    async with connect(gateway.stream_url() + query) as socket:
        for at in range(0, len(body), frame_bytes):
            await socket.send(body[at : at + frame_bytes])
        await socket.send(b"\0")
        messages = [orjson.loads(message) async for message in socket]
    assert messages[-1]["type"] == "final", messages[-1]
    assert socket.close_code == 1000
    assert abs(messages[-1]["audio_processed_ms"] - len(recordings["jfk"]) * 1000 // RATE) < 20
    assert jiwer.wer(JFK, messages[-1]["text"]) < 0.35
    assert any(message["type"] == "partial" for message in messages)


async def test_container_ends_with_its_client(gateway: Gateway, recordings: Recordings) -> None:
    body = encode_container(recordings["jfk"], "webm", "libopus", options=RECORDER)
    async with connect(gateway.stream_url()) as socket:
        await socket.send(body[: len(body) // 2])
        while orjson.loads(await socket.recv())["type"] != "partial":
            pass


async def test_a_damaged_container_ends_its_stream_at_once(gateway: Gateway) -> None:
    async with connect(gateway.stream_url()) as socket:
        await socket.send(b"\x1a\x45\xdf\xa3" + bytes(5000))
        message = orjson.loads(await asyncio.wait_for(socket.recv(), 20))
        with pytest.raises(ConnectionClosed):
            await socket.recv()
    assert message["error"]["code"] == "undecodable_audio"
    assert socket.close_code == 1007


@pytest.mark.parametrize(
    ("query", "param"), [("encoding=opus", "encoding"), ("sample_rate=7000", "sample_rate"), ("channels=9", "channels")]
)
async def test_formats_that_are_not_allowed_are_refused_before_the_upgrade(gateway: Gateway, query: str, param: str) -> None:
    with pytest.raises(InvalidStatus) as caught:
        async with connect(f"{gateway.stream_url()}?{query}"):
            pass
    assert caught.value.response.status_code == 422
    assert orjson.loads(caught.value.response.body)["error"]["param"] == param


async def test_only_streams_at_the_recognisers_rate_can_be_resumed(gateway: Gateway) -> None:
    with pytest.raises(InvalidStatus) as caught:
        async with connect(f"{gateway.stream_url()}?sample_rate=8000", subprotocols=[Subprotocol("amira.v2")]):
            pass
    assert caught.value.response.status_code == 422


async def test_chained_ogg_gives_the_words_of_every_link(
    gateway: Gateway, http: httpx.AsyncClient, recordings: Recordings
) -> None:
    link = encode(recordings["jfk"] / 0x8000, 48_000, format="OGG", subtype="OPUS")
    answer = await http.post(gateway.batch_url(), content=link + link, headers=OCTETS)
    assert answer.json()["audio_length_samples"] == pytest.approx(2 * len(recordings["jfk"]), abs=4)
    assert jiwer.wer(f"{JFK} {JFK}", answer.json()["text"]) < 0.25


async def test_file_as_json(gateway: Gateway, http: httpx.AsyncClient, recordings: Recordings) -> None:
    flac = encode(recordings["jfk"], format="FLAC")
    answer = await http.post(gateway.batch_url(), json={"audio_buffer": list(flac), "opaque": 7})
    assert answer.json()["audio_length_samples"] == len(recordings["jfk"])
    assert answer.json()["opaque"] == 7


NOISE = np.random.default_rng(0).integers(-0x8000, 0x8000, 20_000, dtype=np.int16)
FOREIGN = {
    "RealMedia": b".RMF" + NOISE.tobytes(),
    "AMR with several channels": b"#!AMR_MC1.0\n" + NOISE.tobytes(),
    "FLV": b"FLV\1\5" + NOISE.tobytes(),
    "AVI": b"RIFF\0\0\0\0AVI LIST" + NOISE.tobytes(),
    "JSON": orjson.dumps({"audio": "x" * 1000}),
    "WebVTT": "WEBVTT\n\n00:00.000 --> 00:02.000\nask not\n".encode("utf-16") * 9,
    "HTML": b"<html><body>502 Bad Gateway</body></html>" * 9,
}


@pytest.mark.parametrize("name", FOREIGN)
async def test_unsupported_formats_are_named(gateway: Gateway, http: httpx.AsyncClient, name: str) -> None:
    answer = await http.post(gateway.batch_url(), content=FOREIGN[name], headers=OCTETS)
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_media"
    assert name in answer.json()["error"]["message"]


STREAMED = {
    **FOREIGN,
    "MP3": encode(NOISE / 0x8000, format="MP3"),
    "MP4": b"\0\0\0\x20ftypM4A " + NOISE.tobytes(),
}


@pytest.mark.parametrize("frame_bytes", [320, 3200])
@pytest.mark.parametrize("name", STREAMED)
async def test_stream_of_a_file_is_refused_by_format(gateway: Gateway, name: str, frame_bytes: int) -> None:
    body, messages = STREAMED[name] * 2, []
    async with connect(gateway.stream_url()) as socket:
        with suppress(ConnectionClosed):  # it is refused before it is sent completely
            for at in range(0, len(body), frame_bytes):
                await socket.send(body[at : at + frame_bytes])
            await socket.send(b"\0")
        with suppress(ConnectionClosed):
            while True:
                messages.append(orjson.loads(await socket.recv()))
    assert [message["type"] for message in messages] == ["error"]
    assert messages[0]["error"]["code"] == "unsupported_media"
    assert name in messages[0]["error"]["message"]
    assert socket.close_code == messages[0]["close_code"] == 1003


def vorbis_head() -> bytes:
    return encode(np.zeros(RATE), format="OGG", subtype="VORBIS")[:58]


SLOW = {
    "words that are no pages": lambda: vorbis_head() + b"OggS" * 500_000 + b"\0\4",
    "pages with wrong checksums": lambda: vorbis_head() + (b"OggS" + bytes(22) + b"\xff" * 256) * 7_000,
    "links without audio": lambda: encode(np.zeros(1), format="OGG", subtype="OPUS") * 6_000,
}


@pytest.mark.parametrize("kind", SLOW)
async def test_slow_files_end_with_their_clients(
    make_gateway: MakeGateway, http: httpx.AsyncClient, recordings: Recordings, kind: str
) -> None:
    """The bodies are small, and their clients leave; a regular recording is served at once."""
    flac, body = encode(recordings["jfk"], format="FLAC"), SLOW[kind]()

    async def attack(url: str) -> None:
        async with httpx.AsyncClient(timeout=2) as client:
            with suppress(httpx.TimeoutException):
                await client.post(url, content=body)

    async with make_gateway() as gateway:
        attackers = [asyncio.create_task(attack(gateway.batch_url())) for _ in range(ATTACKERS)]
        await asyncio.sleep(1)
        began = time.monotonic()
        answer = await http.post(gateway.batch_url(), content=recordings["jfk"].tobytes(), headers=OCTETS)
        assert answer.status_code == 200
        assert time.monotonic() - began < HONEST_SECS
        await asyncio.gather(*attackers)
        began = time.monotonic()
        answer = await http.post(gateway.batch_url(), content=flac, headers=OCTETS)
        assert answer.status_code == 200
        assert time.monotonic() - began < HONEST_SECS
