"""The web pages, in a real browser with a microphone that plays a recording."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import soundfile
from playwright.async_api import Browser, Download, FilePayload

from amira.ports import LOOPBACK, Ports
from tests.support.browser import ONE_RATE_SCRIPT, Watched, install_axe, launched, opened
from tests.support.chaos import Proxy
from tests.support.clients import END, converse, cut, open_socket, transcribe
from tests.support.media import encode_container
from tests.support.servers import Gateway, Recordings, Samples

MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]

RATE = 16_000
PAUSE_AT, PAUSE_SECS, SPOKEN_SECS = 2.7, 1.5, 7.5
"""The microphone plays a sentence with a pause that ends a segment; in seconds."""

MIN_WORDS = 3
"""Words that are recognised even if a busy machine drops parts of what the microphone plays."""

RECORD = '#record[aria-disabled="false"]'
KEY = "key/with=characters,that(no)subprotocol;has"
V3: dict[str, Any] = {"subprotocols": ["amira.v3"]}

DROP = """([data, name]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name));
  window.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
}"""


@pytest.fixture(scope="module")
async def served(make_gateway: MakeGateway, http: httpx.AsyncClient) -> AsyncIterator[Gateway]:
    async with make_gateway(page=True, max_concurrent_streams=16) as running:
        await until_ready(http, running)
        yield running


@pytest.fixture(scope="module")
def speech(recordings: Recordings) -> Samples:
    """Return what the microphone plays."""
    jfk, pause = recordings["jfk"], round(PAUSE_AT * RATE)
    spoken: Samples = np.concatenate((jfk[:pause], np.zeros(round(PAUSE_SECS * RATE), np.int16), jfk[pause:]))
    return spoken[: round(SPOKEN_SECS * RATE)]


@pytest.fixture(scope="module")
async def browser(speech: Samples, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    install_axe()
    microphone = tmp_path_factory.mktemp("microphone") / "speech.wav"
    soundfile.write(microphone, speech, RATE, subtype="PCM_16")
    async with launched(microphone) as running:
        yield running


async def speak(watched: Watched, until_secs: int = 8) -> None:
    """Wait until the page has recorded so many seconds since it was started, below 10."""
    await watched.wait_for(f'document.getElementById("elapsed").textContent >= "0:{until_secs:02}"')


async def until_ready(http: httpx.AsyncClient, gateway: Gateway) -> None:
    while not (await http.get(f"{gateway.url}/health/ready")).is_success:
        await asyncio.sleep(0.05)


async def text_of(download: Download) -> str:
    return (await download.path()).read_text(encoding="utf-8")


async def downloaded(watched: Watched, form: str) -> str:
    async with watched.page.expect_download() as started:
        await watched.page.click(f'[data-format="{form}"]')
    return await text_of(await started.value)


async def test_live_text_by_keyboard_is_that_of_the_stream(browser: Browser, served: Gateway) -> None:
    async with opened(browser, served.url) as watched:
        page = watched.page
        await watched.wait_for('document.getElementById("record").ariaDisabled === "false"')
        for _ in range(6):  # the link to the transcript, the four of the head, the button
            await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.id") == "record"
        await page.keyboard.press("Enter")
        await speak(watched)
        assert int(await page.locator("#level").get_attribute("aria-valuenow") or 0) >= 0
        assert await page.locator("#device option").count() > 1, "the microphones have no names"
        assert (await page.inner_text("#lag")).endswith(" s")
        await page.keyboard.press("Enter")
        await watched.wait_idle()
        final = (await transcribe(served.stream_url(), await watched.recorded())).final
        shown = orjson.loads(await downloaded(watched, "json"))
        assert await watched.text() == final["text"] == shown["text"]
        assert shown["words"] == final["words"]
        assert len(final["words"]) >= MIN_WORDS
        assert await page.locator(".unsettled.word").count() == 0
        assert " ".join((await page.inner_text("#spoken")).split()) == final["text"]

        await page.focus("#segments")
        await page.keyboard.press("ArrowRight")
        await page.keyboard.press("ArrowRight")
        second = final["words"][1]
        assert await page.inner_text(".marked") == second["word"]
        assert await page.inner_text("#tip") == (
            f"{second['start']:.2f} – {second['end']:.2f} s · {round(100 * second['confidence'])} %"
        )
        await page.keyboard.press("Enter")
        await watched.wait_for('!document.getElementById("audio").paused')
        await page.click("#copy")
        assert await page.evaluate("navigator.clipboard.readText()") == final["text"]
        assert await watched.violations() == []


async def test_lost_connections_lose_no_word(browser: Browser, served: Gateway) -> None:
    """At the rate of the device, which the page converts."""
    proxy = Proxy(Ports(LOOPBACK, served.server.port, 0))
    async with proxy.running(), opened(browser, f"http://{LOOPBACK}:{proxy.port}", ONE_RATE_SCRIPT) as watched:
        await watched.page.click(RECORD)
        for secs in (2, 4, 6):
            await speak(watched, secs)
            proxy.reset()
        await speak(watched)
        await watched.page.click("#record")
        await watched.wait_idle()
        assert "The connection is lost; reconnecting." in await watched.notices()
        final = (await transcribe(served.stream_url(), await watched.recorded())).final
        assert await watched.text() == final["text"]
        assert orjson.loads(await downloaded(watched, "json"))["words"] == final["words"]
        assert len(final["words"]) >= MIN_WORDS
        watched.problems[:] = [text for text in watched.problems if "WebSocket" not in text and "ERR_" not in text]


async def continued(gateway: Gateway, recorded: Samples, segments: list[dict[str, Any]]) -> tuple[str, list[float]]:
    """Return text and word times of segments, followed by those of a new stream after them."""
    words = [word for segment in segments for word in segment["words"]]
    border = int(words[-1]["end"] * RATE)
    rest = (await transcribe(gateway.stream_url(), recorded[border:])).final
    times = [word["start"] for word in words] + [word["start"] + border / RATE for word in rest["words"]]
    return f"{''.join(segment['text'] for segment in segments)} {rest['text']}".strip(), times


async def test_restarted_server_that_forgot_the_stream_loses_no_word(
    browser: Browser, served: Gateway, make_gateway: MakeGateway, http: httpx.AsyncClient
) -> None:
    async with make_gateway(page=True) as other:
        await until_ready(http, other)
        proxy = Proxy(Ports(LOOPBACK, served.server.port, 0))
        async with proxy.running(), opened(browser, f"http://{LOOPBACK}:{proxy.port}") as watched:
            await watched.page.click(RECORD)
            await watched.wait_for('document.querySelectorAll("#spoken p").length')  # the first segment is final
            proxy.target = Ports(LOOPBACK, other.server.port, 0)
            proxy.reset()
            await speak(watched)
            await watched.page.click("#record")
            await watched.wait_idle()
            assert "begin a new stream" in await watched.notices()
            recorded = await watched.recorded()
            messages = (await transcribe(served.stream_url(), recorded, **V3)).messages
            segments = [message for message in messages if message.get("segment_final")]
            shown = orjson.loads(await downloaded(watched, "json"))
            assert shown["text"] == await watched.text()
            expected = [await continued(served, recorded, segments[:count]) for count in range(1, len(segments))]
            starts = pytest.approx([word["start"] for word in shown["words"]], abs=0.002)
            assert any(text == shown["text"] and times == starts for text, times in expected), (shown, expected)
            watched.problems[:] = [text for text in watched.problems if "WebSocket" not in text and "ERR_" not in text]


async def test_dropped_m4a_gets_the_text_of_the_batch(
    browser: Browser, served: Gateway, http: httpx.AsyncClient, recordings: Recordings
) -> None:
    pause = np.zeros(RATE, np.int16)
    m4a = encode_container(np.concatenate((recordings["jfk"], pause, *recordings.values())), "mp4", "aac")
    headers = {"Content-Type": "application/octet-stream"}
    answer = (await http.post(served.batch_url(), content=m4a, headers=headers)).json()
    async with opened(browser, served.url) as watched:
        page = watched.page
        await watched.wait_for('document.getElementById("record").ariaDisabled === "false"')
        await page.evaluate(DROP, [base64.b64encode(m4a).decode(), "speech.m4a"])
        await watched.wait_for('document.body.dataset.mode === "reading"')
        await watched.wait_idle()
        assert await watched.text() == answer["text"]
        assert await page.locator("#segments li").count() == len(answer["segments"]) > 1
        assert "speech.m4a" in await page.inner_text("#facts")
        for form in ("srt", "vtt"):
            written = await http.post(f"{served.batch_url()}?format={form}", content=m4a, headers=headers)
            assert await downloaded(watched, form) == written.text
        assert await downloaded(watched, "txt") == f"{answer['text']}\n"
        shown = orjson.loads(await downloaded(watched, "json"))
        assert (shown["words"], shown["segments"]) == (answer["words"], answer["segments"])

        last = answer["words"][-1]
        await page.locator("#segments .word").last.click()
        await watched.wait_for(f'Math.abs(document.getElementById("audio").currentTime - {last["start"]}) < 0.5')
        assert await page.inner_text(".marked") == last["word"]
        first = answer["words"][0]
        await page.evaluate(f'document.getElementById("audio").currentTime = {first["start"] + 0.01}')
        await watched.wait_for(f'document.querySelector(".marked").textContent === "{first["word"]}"')
        assert await watched.violations() == []


async def test_file_that_is_no_audio_is_refused_in_words(browser: Browser, served: Gateway) -> None:
    async with opened(browser, served.url) as watched:
        await watched.wait_for('document.getElementById("record").ariaDisabled === "false"')
        file: FilePayload = {"name": "a.pdf", "mimeType": "application/pdf", "buffer": b"%PDF-1.7\n" * 99}
        await watched.page.set_input_files("#file", file)
        await watched.wait_for('document.getElementById("notice").classList.contains("error")')
        assert "PDF" in await watched.page.inner_text("#notice")
        watched.problems.clear()  # the browser logs the status


async def test_key_is_asked_for_and_stays_in_memory(
    browser: Browser, make_gateway: MakeGateway, http: httpx.AsyncClient
) -> None:
    async with make_gateway(page=True, api_keys=(KEY,)) as guarded, opened(browser, guarded.url) as watched:
        page = watched.page
        await until_ready(http, guarded)
        await page.click(RECORD)
        await page.wait_for_selector("#key:focus")
        assert "API key is needed" in await page.inner_text("#notice")
        assert watched.problems.pop().startswith("Failed to load resource: the server responded with a status of 401")
        await page.keyboard.type(KEY)
        await page.click(RECORD)
        await watched.wait_for('document.querySelectorAll("#segments .word").length')
        await page.click("#record")
        await watched.wait_idle()
        assert await page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        assert (await downloaded(watched, "srt")).startswith("1\n00:00:0")
        await page.reload()
        assert await page.input_value("#key") == ""


async def test_secret_as_subprotocol_opens_a_stream(make_gateway: MakeGateway, http: httpx.AsyncClient) -> None:
    async with make_gateway(api_keys=("one", "two"), max_streams_per_key=1) as guarded:
        await until_ready(http, guarded)
        headers = {"Authorization": "Bearer two"}
        secret = (await http.post(f"{guarded.url}/v1/realtime/client_secrets", json={}, headers=headers)).json()["value"]
        offered: dict[str, Any] = {"subprotocols": ["amira.v3", f"openai-insecure-api-key.{secret}"], "origin": guarded.url}
        async with open_socket(guarded.stream_url(), **offered) as socket:
            assert socket.subprotocol == "amira.v3"
            refused = await converse(guarded.stream_url(), [END], **offered)
            assert refused.error["code"] == "quota_exceeded", "the secret is not charged to the key that made it"
        forged = await converse(guarded.stream_url(), [END], **{**offered, "subprotocols": ["openai-insecure-api-key.ek_no"]})
        assert forged.error["code"] == "invalid_api_key"


async def test_text_that_is_late_is_reported(browser: Browser, served: Gateway) -> None:
    proxy = Proxy(Ports(LOOPBACK, served.server.port, 0))
    async with proxy.running(), opened(browser, f"http://{LOOPBACK}:{proxy.port}") as watched:
        await watched.page.click(RECORD)
        await speak(watched, 2)
        proxy.silent = True
        await watched.wait_for('document.getElementById("notice").textContent.includes(" late: ")')
        watched.problems[:] = [text for text in watched.problems if "WebSocket" not in text and "ERR_" not in text]


async def test_status_shows_streams_tritons_and_errors(
    browser: Browser, served: Gateway, http: httpx.AsyncClient, speech: Samples, triton: Ports
) -> None:
    async with opened(browser, f"{served.url}/status") as watched, open_socket(served.stream_url()) as socket:
        page = watched.page
        await watched.wait_for('document.getElementById("state").textContent === "Ready"')
        await http.post(served.batch_url(), content=b"odd", headers={"Content-Type": "audio/pcm"})
        for frame in cut(speech, RATE):
            await socket.send(frame)
        await watched.wait_for('document.getElementById("streams").textContent === "1"')
        assert await page.inner_text("#streams-of") == "of 16"
        await watched.wait_for('/odd_length/.test(document.getElementById("errors").textContent)')
        row = await page.inner_text("#errors tr:has-text('odd_length')")
        assert row.split()[1].isdigit()
        tritons = await page.inner_text("#tritons")
        assert f"{triton.host}:{triton.grpc}" in tritons
        assert "reachable" in tritons
        await watched.wait_for('document.getElementById("audio").textContent !== "0.0"')
        assert await page.inner_text("#requests tr:has-text('recordings') td:nth-child(5)") != "0"
        assert await watched.violations() == []


RESAMPLE = """async ([rate, tone]) => {
  const { Resampler } = await import("./page/resampler.js");
  const resampler = new Resampler(rate, 16000);
  const samples = [];
  for (let at = 0; at < rate / 2; at += 128) {
    const input = Float32Array.from({ length: 128 }, (_, i) => Math.sin(2 * Math.PI * tone * (at + i) / rate));
    samples.push(...resampler.convert(input));
  }
  return [...samples, ...resampler.flush()];
}"""


@pytest.mark.parametrize("rate", [44_100, 48_000, 96_000])
async def test_resampled_tone_is_the_same_tone(browser: Browser, served: Gateway, rate: int) -> None:
    """And a tone that 16 kHz cannot carry disappears."""
    async with opened(browser, served.url) as watched:
        kept, lost = [np.array(await watched.page.evaluate(RESAMPLE, [rate, tone])) for tone in (1000, 9000)]
    assert len(kept) == pytest.approx(RATE / 2, abs=100)
    inner = slice(200, 7800)
    tone = np.sin(2 * np.pi * 1000 * np.arange(len(kept)) / RATE)
    assert np.abs(kept - tone)[inner].max() < 1e-3
    assert np.abs(lost)[inner].max() < 1e-2


async def test_quantiles_are_those_of_prometheus(browser: Browser, served: Gateway) -> None:
    later = """m_bucket{model="a",le="1.0"} 5\nm_bucket{model="a",le="2.0"} 15\nm_bucket{model="a",le="+Inf"} 16\n"""
    earlier = later.replace("15", "5").replace("16", "5")
    script = """async ([earlier, later, share]) => {
      const { parseMetrics, quantile } = await import("./page/metrics.js");
      return quantile(parseMetrics(earlier), parseMetrics(later), "m", share);
    }"""
    async with opened(browser, served.url) as watched:
        for before, share, expected in ((earlier, 0.5, 1.55), (earlier, 0.99, 2.0), ("", 0.1, 0.32), (later, 0.5, None)):
            assert await watched.page.evaluate(script, [before, later, share]) == pytest.approx(expected)


async def test_api_page_shows_every_operation(browser: Browser, served: Gateway, http: httpx.AsyncClient) -> None:
    schema = (await http.get(f"{served.url}/openapi.json")).json()
    operations = [f"{method.upper()} {path}" for path, item in schema["paths"].items() for method in item]
    async with opened(browser, f"{served.url}/docs", color_scheme="dark") as watched:
        await watched.page.wait_for_selector(".operation")
        shown = [" ".join(text.split()[:2]) for text in await watched.page.locator(".operation summary").all_inner_texts()]
        assert shown == operations
        await watched.page.locator("summary", has_text="/v2/decode/batch/{model}").click()
        assert "ndjson" in await watched.page.inner_text(".operation[open]")
        assert await watched.violations() == []


@pytest.mark.parametrize("path", ["/", "/status", "/docs", "/page/main.js", "/page/style.css"])
async def test_pages_forbid_what_is_from_elsewhere(served: Gateway, http: httpx.AsyncClient, path: str) -> None:
    answer = await http.get(f"{served.url}{path}")
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200
    assert policy.startswith("default-src 'none'; script-src 'self'; ")
    assert not {"unsafe", "http:", "https:", "*"} & set(policy)
    assert "unsafe" not in policy
    assert "://" not in answer.text.replace("https://prometheus.io/docs", "").replace("http://localhost", "")
    again = await http.get(f"{served.url}{path}", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_only_the_api_page_is_served_by_default(gateway: Gateway, http: httpx.AsyncClient) -> None:
    for path in ("/", "/status", "/page/nothing.js", "/page/index.html", "/redoc"):
        answer = await http.get(f"{gateway.url}{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert (await http.post(f"{gateway.url}/page/transcript.srt", json={"segments": []})).status_code == 405
    assert "<nav" not in (await http.get(f"{gateway.url}/docs")).text


WORDS = [{"word": "a", "start": 0, "end": 0.5}, {"word": "<b>", "start": 0.5, "end": 1}]
TRANSCRIPT = {"segments": [{"text": "a <b>", "words": WORDS}]}


def malformed() -> Iterator[tuple[bytes, str]]:
    yield b"", "the body"
    yield b"[]", "the body"
    yield b'{"segments": [{"text": "a", "words": [{"word": "a", "start": -1, "end": 1}]}]}', "segments.0.words.0.start"
    yield b'{"segments": [{"text": "a", "words": [{"word": "a", "start": NaN, "end": 1}]}]}', ""
    yield b'{"segments": [{"text": "a", "words": [{"word": "a", "start": 1, "end": 1e300}]}]}', "segments.0.words.0.end"


async def test_transcripts_of_the_page_are_written_by_the_rules_of_the_api(served: Gateway, http: httpx.AsyncClient) -> None:
    expected = {
        "txt": "a <b>\n",
        "srt": "1\n00:00:00,000 --> 00:00:01,000\na <\u2060b>\n\n",
        "vtt": "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\na &lt;b&gt;\n\n",
    }
    for form, text in expected.items():
        assert (await http.post(f"{served.url}/page/transcript.{form}", json=TRANSCRIPT)).text == text
    assert (await http.post(f"{served.url}/page/transcript.exe", json=TRANSCRIPT)).status_code == 404
    foreign = await http.post(f"{served.url}/page/transcript.txt", json=TRANSCRIPT, headers={"Origin": "https://evil.example"})
    assert foreign.status_code == 403
    for body, place in malformed():
        answer = await http.post(f"{served.url}/page/transcript.srt", content=body)
        assert answer.status_code == 400
        assert place in answer.json()["error"]["message"]
