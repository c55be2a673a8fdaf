"""Take the pictures of the web pages in ``docs/``: a real server, headless Chromium, and the bundled recordings.

    .venv/bin/python -m perf.screenshots

Needs Chromium. The text is in whichever of the page's fonts are installed (Debian: fonts-noto-core).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from playwright.async_api import Browser

from amira import LiveStream
from amira.paths import ROOT, SPEECH
from perf.server import amira, triton_server
from tests.support.browser import Watched, launched, opened
from tests.support.servers import Samples, read_recordings

RATE = 16_000
DOCS = ROOT / "docs"
DESKTOP: Mapping[str, Any] = {"viewport": {"width": 1200, "height": 780}}
PHONE: Mapping[str, Any] = {
    "viewport": {"width": 390, "height": 780},
    "device_scale_factor": 1.5,
    "is_mobile": True,
    "has_touch": True,
}
SPOKEN_SECS = 9.6
STREAMS, JOIN_SECS = 4, 4.0


@asynccontextmanager
async def streaming(url: str, samples: Samples, count: int) -> AsyncIterator[None]:
    """Keep streams open that speak in real time, and begin one after the other."""

    async def speak(after_secs: float) -> None:
        await asyncio.sleep(after_secs)
        async with LiveStream(f"{url.replace('http', 'ws', 1)}/v2/decode/stream/amira") as stream:
            while True:
                for start in range(0, len(samples), RATE // 10):
                    await stream.send(samples[start : start + RATE // 10].tobytes())
                    await asyncio.sleep(0.1)

    speakers = [asyncio.create_task(speak(index * JOIN_SECS)) for index in range(count)]
    try:
        yield
    finally:
        for speaker in speakers:
            speaker.cancel()
        await asyncio.gather(*speakers, return_exceptions=True)


async def save(watched: Watched, name: str) -> None:
    """Save what the window shows as a picture of the documentation."""
    await watched.page.wait_for_timeout(300)  # the level's transition
    await watched.page.screenshot(path=DOCS / f"{name}.png")


async def picture_live(browser: Browser, url: str) -> None:
    """Take a picture while the microphone speaks."""
    async with opened(browser, url, **DESKTOP) as watched:
        await watched.page.click('#record[aria-disabled="false"]')
        await watched.page.wait_for_timeout(1000 * SPOKEN_SECS)
        await save(watched, "page")
        await watched.page.click("#record")
        await watched.wait_idle()


async def picture_recording(browser: Browser, url: str, name: str, options: Mapping[str, Any], scheme: str) -> None:
    """Take a picture of a transcribed recording."""
    async with opened(browser, url, color_scheme=scheme, **options) as watched:
        await watched.wait_for('document.getElementById("record").ariaDisabled === "false"')
        await watched.page.set_input_files("#file", SPEECH / "jfk.flac")
        await watched.wait_for('document.body.dataset.mode === "reading"')
        await watched.wait_idle()
        if not options.get("has_touch"):
            await watched.page.locator("#segments .word").nth(7).hover()
        await watched.page.evaluate('document.getElementById("audio").currentTime = 3.4')
        await save(watched, name)


async def picture_status(browser: Browser, url: str) -> None:
    """Take a picture of the state of a server that works."""
    async with opened(browser, f"{url}/status", **DESKTOP) as watched:
        await watched.page.wait_for_timeout(28_000)
        await save(watched, "page-status")


async def main() -> None:
    """Take all pictures."""
    recordings = read_recordings()
    speech = np.concatenate([recordings["jfk"], np.zeros(RATE, np.int16), *recordings.values()])
    with tempfile.TemporaryDirectory() as folder:
        microphone = Path(folder) / "speech.wav"
        soundfile.write(microphone, speech, RATE, subtype="PCM_16")
        async with AsyncExitStack() as running:
            triton = await running.enter_async_context(triton_server(None))
            server = await running.enter_async_context(amira("serve", triton_endpoint=triton.endpoint, page="true"))
            browser = await running.enter_async_context(launched(microphone))
            await picture_live(browser, server.url)
            await picture_recording(browser, server.url, "page-phone", PHONE, "light")
            await picture_recording(browser, server.url, "page-dark", DESKTOP, "dark")
            async with streaming(server.url, speech, STREAMS):
                await picture_status(browser, server.url)


if __name__ == "__main__":
    asyncio.run(main())
