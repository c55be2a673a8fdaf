"""Audio that kills a backend: number of attempts, and the effect on other streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.support.chaos import Backend
from tests.support.clients import gateway_metrics, growth, transcribe
from tests.support.commands import edit, until_ready
from tests.support.repositories import copy_repository
from tests.support.servers import Gateway, Recordings, Samples, run_gateway

POISON = np.array([31_111, -31_112, 31_113], np.int16)
DEATHS = {
    "Triton": "os.kill(os.getppid(), 9)",  # as the kernel's out-of-memory killer does
    "model process": "os._exit(1)",
}


class Trap:
    """A Triton whose decoder dies as soon as it gets the poison.

    Attributes:
        backend: the Triton, which is restarted after each death.
    """

    def __init__(self, folder: Path, what_dies: str) -> None:
        repository = copy_repository(folder / "models", warm=False)
        self._deaths = folder / "deaths"
        trap = f"""
        import os
        if all(sample in request.samples for sample in {POISON.tolist()}):
            with open({str(self._deaths)!r}, "a") as deaths:
                deaths.write("x")
            {DEATHS[what_dies]}
            time.sleep(10)  # until the signal has come
        done = request.end"""
        edit(repository / "rnnt_greedy_bls" / "1" / "model.py", "\n        done = request.end", trap)
        self.backend = Backend("poison", repository)

    @property
    def deaths(self) -> int:
        """Number of deaths."""
        return len(self._deaths.read_text()) if self._deaths.exists() else 0


@pytest.fixture(scope="module", params=["Triton", pytest.param("model process", marks=pytest.mark.slow)])
async def trap(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    quick_restarts: None,  # noqa: ARG001 (needed for its effect)
) -> AsyncIterator[Trap]:
    trap = Trap(tmp_path_factory.mktemp("poison"), request.param)
    await trap.backend.start()
    yield trap
    await trap.backend.stop()


@pytest.fixture
async def gateway(trap: Trap) -> AsyncIterator[Gateway]:
    await trap.backend.ready_again()
    async with run_gateway(triton_endpoint=trap.backend.target, recovery_timeout_secs=240) as gateway:
        yield gateway


def poisoned(samples: Samples) -> Samples:
    """Return a recording that kills the decoder after 3 s."""
    return np.concatenate((samples[:48_000], POISON, samples[48_000:]))


async def test_recording_that_ends_a_backend_is_not_resent(trap: Trap, gateway: Gateway, recordings: Recordings) -> None:
    before, deaths, pid = await gateway_metrics(gateway.url), trap.deaths, trap.backend.triton.pid
    headers = {"Content-Type": "audio/pcm"}
    async with httpx.AsyncClient(timeout=90) as http:
        answer = await http.post(gateway.batch_url(), content=poisoned(recordings["jfk"]).tobytes(), headers=headers)
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == "backend_died"
        assert answer.json()["error"]["retryable"] is False
        await trap.backend.started_anew(pid)
        await until_ready(gateway.url)
        assert trap.deaths - deaths == 1
        # Others are served.
        answer = await http.post(gateway.batch_url(), content=recordings["jfk"].tobytes(), headers=headers)
        assert answer.status_code == 200
    grown = growth(before, await gateway_metrics(gateway.url))
    assert grown("asr_rejections_total", reason="backend_died") == 1
    assert grown("asr_backend_deaths_total", endpoint=trap.backend.target) == 1


async def test_stream_that_ends_a_backend_twice_is_given_up(trap: Trap, gateway: Gateway, recordings: Recordings) -> None:
    before, deaths = await gateway_metrics(gateway.url), trap.deaths
    conversation = await asyncio.wait_for(transcribe(gateway.stream_url(), poisoned(recordings["jfk"])), 90)
    assert conversation.close_code == 4503
    assert conversation.error["code"] == "backend_died"
    assert conversation.error["retryable"] is False
    assert trap.deaths - deaths == 2
    grown = growth(before, await gateway_metrics(gateway.url))
    assert grown("asr_stream_recoveries_total", outcome="failed") == 1
    assert grown("asr_backend_deaths_total", endpoint=trap.backend.target) == 2


async def test_streams_beside_the_poison_continue(trap: Trap, gateway: Gateway, recordings: Recordings) -> None:
    """All of them are in flight at both deaths, so each is retried alone and only the cause is given up."""
    expected = (await transcribe(gateway.stream_url(), recordings["jfk"])).final["text"]
    deaths = trap.deaths
    said = [recordings["jfk"], recordings["jfk"], poisoned(recordings["jfk"]), recordings["jfk"]]
    conversations = await asyncio.wait_for(asyncio.gather(*(transcribe(gateway.stream_url(), one) for one in said)), 300)
    assert conversations.pop(2).error["code"] == "backend_died"
    assert [conversation.final["text"] for conversation in conversations] == [expected] * 3
    assert 2 <= trap.deaths - deaths <= 3
