"""A headless Chromium with a microphone that plays a file, and pages that are watched for errors and foreign requests."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright

from tests.support.servers import Samples

CHROMIUM = ("chromium", "google-chrome", "chromium-browser")
AXE = Path(__file__).with_name("axe")
WAV_HEADER_BYTES = 44

RECORDING_SCRIPT = """
window.blobs = []; window.notices = [];
const create = URL.createObjectURL;
URL.createObjectURL = (blob) => { window.blobs.push(blob); return create.call(URL, blob); };
addEventListener("DOMContentLoaded", () => {
  const notice = document.getElementById("notice");
  if (notice) new MutationObserver(() => window.notices.push(notice.textContent)).observe(notice, {childList: true});
});
"""
"""Keeps the audio that a page recorded, and everything that it told its reader."""

ONE_RATE_SCRIPT = """
const Context = AudioContext;
window.AudioContext = class extends Context {
  constructor(options) {
    if (options?.sampleRate) throw new DOMException("as in a browser with one rate", "NotSupportedError");
    super(options);
  }
};
"""
"""Refuses audio contexts of another rate than the device's."""

READ_BLOB = """async () => {
  const bytes = new Uint8Array(await window.blobs.filter(({type}) => type === "audio/wav").at(-1).arrayBuffer());
  let text = "";
  for (let at = 0; at < bytes.length; at += 32768) text += String.fromCharCode(...bytes.subarray(at, at + 32768));
  return btoa(text);
}"""


@dataclass
class Watched:
    """A page, and what went wrong on it.

    Attributes:
        page: the page.
        crashes: errors of its scripts that they did not catch.
        problems: errors that the browser logged, and requests to another server.
    """

    page: Page
    crashes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    async def text(self) -> str:
        """Return the transcript that is shown."""
        lines: list[str] = await self.page.locator("#segments li:not([hidden]) p").all_inner_texts()
        return " ".join(lines)

    async def recorded(self) -> Samples:
        """Return the samples that the page has recorded and sent."""
        wav = base64.b64decode(await self.page.evaluate(READ_BLOB))
        samples: Samples = np.frombuffer(wav[WAV_HEADER_BYTES:], np.int16)
        return samples

    async def notices(self) -> str:
        """Return everything that the page has told its reader, line by line."""
        told: list[str] = await self.page.evaluate("window.notices")
        return "\n".join(told)

    async def violations(self) -> list[str]:
        """Return the accessibility rules that the page violates seriously, with the elements."""
        await self.page.evaluate((AXE / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8"))
        report: dict[str, Any] = await self.page.evaluate("axe.run()")
        return [
            f"{violation['id']}: {[node['html'] for node in violation['nodes']]}"
            for violation in report["violations"]
            if violation["impact"] in ("serious", "critical")
        ]

    async def wait_for(self, condition: str, timeout_secs: float = 120) -> None:
        """Wait until a condition in JavaScript is true. The pages forbid the polls of Playwright, which evaluate text."""
        deadline = time.monotonic() + timeout_secs
        while not await self.page.evaluate(condition):
            assert not self.crashes
            assert time.monotonic() < deadline, f"not within {timeout_secs:g} s: {condition}"
            await asyncio.sleep(0.05)

    async def wait_idle(self) -> None:
        """Wait until a transcription has ended."""
        await self.wait_for('document.body.dataset.mode === "idle"')


def need(*programs: str) -> str:
    """Return the path of the first of these programs that is installed; without any the test is skipped, or fails in CI."""
    if found := next(filter(None, map(shutil.which, programs)), None):
        return found
    reason = f"{programs[0]} is not installed; run tools/system-packages as root"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def install_axe() -> None:
    """Install the accessibility checker, if it is not there."""
    need("npm")
    if not (AXE / "node_modules" / "axe-core").exists():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=AXE, check=True, capture_output=True)


@asynccontextmanager
async def launched(microphone: Path) -> AsyncIterator[Browser]:
    """Run a headless browser; its microphone plays a WAV file once, from the moment at which it is opened."""
    arguments = [
        "--no-sandbox",  # the tests may run as root
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}%noloop",
    ]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=need(*CHROMIUM), args=arguments)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def opened(browser: Browser, url: str, *scripts: str, **options: Any) -> AsyncIterator[Watched]:
    """Open a page in a context of its own; afterwards fail if it logged an error, or asked for anything from elsewhere."""
    context = await browser.new_context(**options)
    await context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = await context.new_page()
    watched = Watched(page)
    own = urlsplit(url).netloc

    def check_address(address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme != "blob" and parts.netloc != own:
            watched.problems.append(f"request to {address}")

    def check_message(message: ConsoleMessage) -> None:
        if message.type == "error":
            watched.problems.append(message.text)

    page.on("console", check_message)
    page.on("pageerror", lambda error: watched.crashes.append(str(error)))
    page.on("request", lambda request: check_address(request.url))
    page.on("websocket", lambda socket: check_address(socket.url))
    for script in (RECORDING_SCRIPT, *scripts):
        await page.add_init_script(script)
    await page.goto(url)
    try:
        yield watched
    finally:
        await context.close()
    assert watched.crashes + watched.problems == []
