"""The process of the embedded Triton: start it, keep it ready, stop it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import structlog
from tritonclient.grpc import aio as grpcclient
from tritonclient.utils import InferenceServerException

from amira.engine.confinement import confine
from amira.engine.errors import EngineError
from amira.engine.wheel import Engine
from amira.ports import Ports
from gateway.triton.canary import Canary, ask

RESTART_DELAY_RANGE_SECS = (1.0, 10.0)
"""Shortest and longest delay before a restart, in seconds. Streams wait for ``recovery_timeout_secs``, 30 s by default, within
which Triton must also start."""

RESTRICTED = "shared-memory,logging,trace:Nobody=may"
"""gRPC protocols that nobody may use. Triton asks for a header ``triton-grpc-protocol-Nobody``, which can't be sent: HTTP/2 has
no capitals in names of headers (RFC 9113, 8.2.1), and gRPC refuses a request that has some. A secret would not do: other users
can read it in the command line."""

STUB_CHECK_SECS = 0.5
"""Interval between looks at Triton's child processes, in seconds."""

CANARY_INTERVAL_SECS = 5.0
CANARY_TIMEOUT_SECS = 10.0
CANARIES_TOGETHER = 2
"""Canaries sent at once: more than one call of the encoder reach all its instances in turn."""

MAX_FAILING_SECS = 3.0
"""Time of canaries answered with errors after which Triton is restarted, in seconds."""

MAX_LATE_SECS = 30.0
"""Time of canaries without an answer after which Triton is restarted, in seconds; not while the decoder does other work."""

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
MIN_SHARED_MEMORY_BYTES = 128 * 2**20
"""Shared memory that must be free: eight recordings of half a minute at once took 74 MB (2026-11-27)."""

POLL_SECS = 0.1
"""Interval between looks at the models while Triton starts, in seconds."""

log = structlog.get_logger()


def check_shared_memory() -> None:
    """Check that there is enough shared memory, through which tensors pass between Triton and its models.

    Raises:
        EngineError: there isn't.
    """
    status = os.statvfs(SHARED_MEMORY)
    free = status.f_frsize * status.f_bavail
    if free < MIN_SHARED_MEMORY_BYTES:
        raise EngineError(
            f"{SHARED_MEMORY} has {free >> 20} MB free; Triton needs {MIN_SHARED_MEMORY_BYTES >> 20} MB: enlarge it "
            f"(docker run --shm-size 1g, or mount -o remount,size=1g {SHARED_MEMORY})"
        )


class Triton:
    """An embedded Triton: started, kept ready, stopped.

    Args:
        engine: the server to run.
        model_repository: directory of its models.
        ports: ports to listen on.
        log_path: file for what it prints.
        options: further options of its command line.
        ensembles: ensembles that must recognise speech; Triton is restarted when one no longer does.
    """

    def __init__(
        self,
        engine: Engine,
        model_repository: Path,
        ports: Ports,
        log_path: Path,
        options: Sequence[str] = (),
        ensembles: Collection[str] = ("asr_ensemble",),
    ) -> None:
        self._engine = engine
        self._model_repository = model_repository
        self._ports = ports
        self._log_path = log_path
        self._options = options
        self._shm_prefix = f"amira_{os.getpid()}_{ports.grpc}_"
        self._process: asyncio.subprocess.Process | None = None
        self._log_mode = "wb"
        self._client: Any = None
        self._decoder_calls: list[str] = []
        self._canaries = [
            Canary(partial(self._ask, ensemble), f"keeper {ensemble}", CANARY_TIMEOUT_SECS, CANARY_INTERVAL_SECS)
            for ensemble in sorted(set(ensembles))
        ]

    @property
    def pid(self) -> int | None:
        """Process id; None while it does not run."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self, on_progress: Callable[[int, int], None] = lambda _ready, _models: None) -> None:
        """Start it and wait until every model is ready.

        Args:
            on_progress: called with the number of models that are ready, and of all.

        Raises:
            EngineError: Triton ended, or a model failed to load; the line names the model and the reason.
        """
        models = [path.parent.name for path in self._model_repository.glob("*/config.pbtxt")]
        if not models:
            raise EngineError(f"model repository {self._model_repository} has no models")
        await self._spawn()
        try:
            while (ready := await self._ready_models()) < len(models):
                on_progress(ready, len(models))
                if self.pid is None:
                    raise EngineError(f"Triton ended while it started: {self._ending()}; all of it is in {self._log_path}")
                await asyncio.sleep(POLL_SECS)
        except BaseException:
            await self.stop()
            raise
        on_progress(len(models), len(models))

    async def keep_alive(self) -> None:
        """Restart it whenever it ends or is ended here, with a delay that doubles while it does not stay up; never returns."""
        shortest, longest = RESTART_DELAY_RANGE_SECS
        delay = 0.0
        while True:
            started = time.monotonic()
            if self._process:
                code = await self._wait(self._process)
                if time.monotonic() - started > 2 * longest:
                    delay = 0.0
                log.error("triton ended", exit_code=code, restart_in_secs=delay, log=str(self._log_path))
            self._clean_up()
            await asyncio.sleep(delay)
            delay = min(max(shortest, 2 * delay), longest)
            try:
                await self.start()
                log.info("triton restarted", pid=self.pid)
            except (EngineError, OSError) as error:  # such as no memory or descriptors, for the moment
                log.error("triton restart failed", reason=str(error))

    async def _wait(self, process: asyncio.subprocess.Process) -> int:
        """Wait until it ends; end it when one of its processes died, which Triton never replaces, or it recognises nothing."""
        for canary in self._canaries:
            canary.forget()
        rounds = [asyncio.create_task(canary.run(lambda: True, lambda: CANARIES_TOGETHER)) for canary in self._canaries]
        try:
            while True:
                with contextlib.suppress(asyncio.TimeoutError):
                    return await asyncio.wait_for(process.wait(), STUB_CHECK_SECS)
                if any(canary.health.failures for canary in self._canaries):
                    await self._see_progress()
                if reason := self._trouble(process):
                    log.error("triton killed", pid=process.pid, reason=reason)
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        finally:
            for task in rounds:
                task.cancel()
            await asyncio.gather(*rounds, return_exceptions=True)

    def _trouble(self, process: asyncio.subprocess.Process) -> str | None:
        """Return why Triton must be restarted, if it must."""
        with contextlib.suppress(psutil.Error):
            if any(child.status() == psutil.STATUS_ZOMBIE for child in psutil.Process(process.pid).children()):
                return "a model's process died"
        for canary in self._canaries:
            health, failing_secs = canary.health, canary.health.failing_secs(time.monotonic())
            limit_secs = MAX_FAILING_SECS if health.erred else MAX_LATE_SECS
            # An ensemble that never recognised anything is misconfigured, and would not after a restart either.
            if canary.ever_answered and not health.well and failing_secs >= limit_secs:
                return f"speech has not been recognised for {failing_secs:.0f} s"
        return None

    async def _see_progress(self) -> None:
        """Tell the canaries that are late where the decoder works on other audio: Triton is slow then, not dead."""
        url = f"http://{self._ports.host}:{self._ports.metrics}/metrics"
        with contextlib.suppress(httpx.HTTPError):
            async with httpx.AsyncClient(timeout=STUB_CHECK_SECS) as http:
                lines = (await http.get(url)).text.splitlines()
            calls = [line for line in lines if line.startswith("asr_decoder_calls_total")]
            if calls != self._decoder_calls:
                for canary in self._canaries:
                    canary.see_progress()
            self._decoder_calls = calls

    async def _ask(self, ensemble: str) -> None:
        await ask(self._client, ensemble)

    async def stop(self, timeout_secs: float = 20.0) -> None:
        """Stop Triton after the requests in flight, with all its children.

        Args:
            timeout_secs: time after which it is killed.
        """
        process = self._process
        if process and process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), timeout_secs)
            except asyncio.TimeoutError:
                log.warning("triton killed", reason=f"it did not end within {timeout_secs:g} s")
        self._clean_up()
        if process:
            await process.wait()
        self._process = None
        if self._client:
            await self._client.close()
            self._client = None

    async def _spawn(self) -> None:
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        ports = self._ports
        command = [
            str(self._engine.binary),
            f"--model-repository={self._model_repository}",
            f"--backend-directory={self._engine.backends}",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            "--exit-on-error=false",  # so that the index can tell which model failed, and why
            "--disable-auto-complete-config",  # every config.pbtxt is complete, and asking costs a process for each model
            f"--grpc-restricted-protocol={RESTRICTED}",
            f"--grpc-address={ports.host}",
            f"--grpc-port={ports.grpc}",
            f"--metrics-address={ports.host}",
            f"--metrics-port={ports.metrics}",
            *([f"--http-address={ports.host}", f"--http-port={ports.http}"] if ports.http else ["--allow-http=false"]),
            *self._options,
        ]
        with self._log_path.open(self._log_mode) as output:
            self._log_mode = "ab"  # a restart keeps what the crash left
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._engine.environment,
                start_new_session=True,  # a Ctrl-C in the terminal is for the launcher, which stops Triton last
                preexec_fn=confine,
            )

    async def _ready_models(self) -> int:
        """Return the number of models that are ready; 0 while nothing answers.

        Raises:
            EngineError: a model failed to load.
        """
        self._client = self._client or grpcclient.InferenceServerClient(f"{self._ports.host}:{self._ports.grpc}")
        try:
            if not await self._client.is_server_live(client_timeout=1.0):
                return 0
            index = (await self._client.get_model_repository_index(client_timeout=1.0)).models
        except InferenceServerException:
            return 0
        # Triton is live when it has tried to load all. A model whose configuration it could not read has no state.
        failed = {
            model.name: model.reason or self._refusal(model.name) for model in index if model.state in ("UNAVAILABLE", "")
        }
        # An ensemble fails because of its parts, and has no reason of its own, or one that says least.
        for name in sorted(failed, key=lambda name: not failed[name] or "depends on" in failed[name]):
            raise EngineError(f"model {name} failed to load: {_one_line(failed[name]) or f'see {self._log_path}'}")
        return sum(model.state == "READY" for model in index)

    def _refusal(self, model: str) -> str:
        """Return why Triton did not read a model's configuration, as its log has it; empty where it has nothing."""
        found = re.findall(rf"Poll failed for model directory '{re.escape(model)}': (.*?)\"?$", self._log(), re.MULTILINE)
        return found[-1] if found else ""

    def _log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def _clean_up(self) -> None:
        """Remove what a dead Triton left: stubs and their shared memory."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        for path in SHARED_MEMORY.glob(f"{self._shm_prefix}*"):
            path.unlink(missing_ok=True)

    def _ending(self) -> str:
        """Return how Triton ended, and the last error that it printed."""
        code = self._process.returncode if self._process else None
        how = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        lines = self._log().splitlines()
        # Those about CUDA are harmless.
        errors = [line for line in lines if line.startswith(("E", "error")) and "cuda" not in line.lower()]
        return f"{how}, {_one_line(errors[-1]) if errors else 'no error printed'}"


def _one_line(text: str) -> str:
    """Return the part of a message of Triton's that says what is wrong: without the Python traceback."""
    return " ".join(text.split("\n\nAt:", maxsplit=1)[0].split())
