"""Start, supervise and stop the process of the embedded Triton."""

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
"""Minimum and maximum delay before a restart, in seconds. Delay and start must fit into ``recovery_timeout_secs``, for which
streams wait (default: 30 s)."""

RESTRICTED = "shared-memory,logging,trace:Nobody=may"
"""Disabled gRPC protocols. Triton requires the header ``triton-grpc-protocol-Nobody`` for them. No client can send it: HTTP/2
header names have no capitals (RFC 9113, 8.2.1), and gRPC refuses a request with capitals. A secret value would not help: other
users can read it in the command line."""

STUB_CHECK_SECS = 0.5
"""Interval between checks of Triton's child processes, in seconds."""

CANARY_INTERVAL_SECS = 5.0
"""Interval between two rounds of canaries, in seconds."""

CANARY_TIMEOUT_SECS = 10.0
"""Timeout of a canary, in seconds."""

CANARIES_TOGETHER = 2
"""Number of canaries sent at once, so that canaries reach every instance of the encoder."""

MAX_FAILING_SECS = 3.0
"""Time of failed canaries after which Triton is restarted, in seconds."""

MAX_LATE_SECS = 30.0
"""Time of canaries without a response after which Triton is restarted, in seconds, unless the decoder does other work."""

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
MIN_SHARED_MEMORY_BYTES = 128 * 2**20
"""Minimum free shared memory: eight recordings of half a minute at once took 74 MB (2026-11-27)."""

LOW_SHARED_MEMORY_BYTES = 48 * 2**20
"""Minimum shared memory of a running Triton, in use and free: at rest it takes 11 MB, and a recording of 60 s adds 24 MB
(2026-11-28)."""

POLL_SECS = 0.1
"""Interval between checks of the models while Triton starts, in seconds."""

HUNG_SECS, HUNG_CPU_SHARE = 120.0, 0.05
"""A starting Triton hangs when it has loaded no further model within this time and used less than this share of a CPU.

After a stall of the machine, a model's process may wait for Triton indefinitely (seen in 2.51)."""

log = structlog.get_logger()


def check_shared_memory() -> None:
    """Check that enough shared memory is free. Triton and its models exchange tensors through it.

    Raises:
        EngineError: too little is free.
    """
    free = _free_shared_memory()
    if free < MIN_SHARED_MEMORY_BYTES:
        raise EngineError(
            f"{SHARED_MEMORY} has {free >> 20} MB free; Triton needs {MIN_SHARED_MEMORY_BYTES >> 20} MB: enlarge it "
            f"(docker run --shm-size 1g, or mount -o remount,size=1g {SHARED_MEMORY})"
        )


def _free_shared_memory() -> int:
    """Return the free shared memory in bytes."""
    status = os.statvfs(SHARED_MEMORY)
    return status.f_frsize * status.f_bavail


class _Progress:
    """Distinguishes a starting Triton that hangs from a slow one."""

    def __init__(self) -> None:
        self._ready = -1
        self._cpu_secs = 0.0
        self._at = 0.0

    def hangs(self, ready: int, cpu_secs: float, now: float) -> bool:
        """Return whether Triton makes no progress.

        Args:
            ready: number of ready models.
            cpu_secs: CPU time that Triton and its children have used.
            now: time in seconds.
        """
        if ready > self._ready or now - self._at >= HUNG_SECS:
            hangs = ready <= self._ready and cpu_secs - self._cpu_secs < HUNG_CPU_SHARE * (now - self._at)
            self._ready, self._cpu_secs, self._at = ready, cpu_secs, now
            return hangs
        return False


def _cpu_secs(pid: int) -> float:
    """Return the CPU time of a process and its children, in seconds."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))
    return 0.0


class TritonProcess:
    """Process of the embedded Triton.

    Args:
        engine: the installed Triton.
        model_repository: directory of the models.
        ports: ports to listen on.
        log_path: file for its output.
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
        self._memory_low = False
        self._canaries = [
            Canary(partial(self._ask, ensemble), f"keeper {ensemble}", CANARY_TIMEOUT_SECS, CANARY_INTERVAL_SECS)
            for ensemble in sorted(set(ensembles))
        ]

    @property
    def pid(self) -> int | None:
        """Process id; None while Triton is not running."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self, on_progress: Callable[[int, int], None] = lambda _ready, _models: None) -> None:
        """Start Triton, and wait until every model is ready.

        Args:
            on_progress: called with the number of ready models and of all models.

        Raises:
            EngineError: Triton ended or hung, or a model failed to load. The message names the model and the reason.
        """
        models = [path.parent.name for path in self._model_repository.glob("*/config.pbtxt")]
        if not models:
            raise EngineError(f"model repository {self._model_repository} has no models")
        await self._spawn()
        progress = _Progress()
        try:
            while (ready := await self._ready_models()) < len(models):
                on_progress(ready, len(models))
                if self.pid is None:
                    raise EngineError(f"Triton ended while it started: {self._ending()}; see {self._log_path}")
                if progress.hangs(ready, _cpu_secs(self.pid), time.monotonic()):
                    raise EngineError(f"Triton hung while it started: it did nothing for {HUNG_SECS:g} s; see {self._log_path}")
                await asyncio.sleep(POLL_SECS)
        except BaseException:
            await self.stop()
            raise
        on_progress(len(models), len(models))

    async def keep_alive(self) -> None:
        """Restart Triton whenever it ends; never return. The delay doubles until Triton stays up."""
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
            except (EngineError, OSError) as error:  # such as a temporary lack of memory or descriptors
                log.error("triton restart failed", reason=str(error))

    async def _wait(self, process: asyncio.subprocess.Process) -> int:
        """Wait until Triton ends. Kill it if a child process died (Triton does not replace it), or if recognition fails."""
        for canary in self._canaries:
            canary.forget()
        rounds = [asyncio.create_task(canary.run(lambda: True, lambda: CANARIES_TOGETHER)) for canary in self._canaries]
        try:
            while True:
                with contextlib.suppress(asyncio.TimeoutError):
                    return await asyncio.wait_for(process.wait(), STUB_CHECK_SECS)
                self._watch_shared_memory()
                if any(canary.health.failures for canary in self._canaries):
                    await self._see_progress()
                if reason := self._restart_reason(process):
                    log.error("triton killed", pid=process.pid, reason=reason)
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        finally:
            for task in rounds:
                task.cancel()
            await asyncio.gather(*rounds, return_exceptions=True)

    def _restart_reason(self, process: asyncio.subprocess.Process) -> str | None:
        """Return the reason for which Triton must be restarted, or None."""
        with contextlib.suppress(psutil.Error):
            if any(child.status() == psutil.STATUS_ZOMBIE for child in psutil.Process(process.pid).children()):
                return "a model's process died"
        if self._memory_low:  # a new Triton could not load its models
            return None
        for canary in self._canaries:
            health, failing_secs = canary.health, canary.health.failing_secs(time.monotonic())
            limit_secs = MAX_FAILING_SECS if health.erred else MAX_LATE_SECS
            # An ensemble that has never recognised anything is misconfigured, so a restart would not help.
            if canary.ever_answered and not health.well and failing_secs >= limit_secs:
                return f"speech has not been recognised for {failing_secs:.0f} s"
        return None

    def _watch_shared_memory(self) -> None:
        """Log when too little shared memory is left for a long recording, and when there is enough again."""
        used = sum(path.stat().st_size for path in self._shared_memory())
        free = _free_shared_memory()
        if (low := used + free < LOW_SHARED_MEMORY_BYTES) is not self._memory_low:
            self._memory_low = low
            sizes = {"free_mb": free >> 20, "triton_mb": used >> 20, "needed_mb": LOW_SHARED_MEMORY_BYTES >> 20}
            if low:
                log.error("shared memory low", **sizes)
            else:
                log.info("shared memory restored", **sizes)

    def _shared_memory(self) -> list[Path]:
        return list(SHARED_MEMORY.glob(f"{self._shm_prefix}*"))

    async def _see_progress(self) -> None:
        """Inform late canaries if the decoder works on other audio: then Triton is slow, but not dead."""
        url = f"http://{self._ports.host}:{self._ports.metrics}/metrics"
        with contextlib.suppress(httpx.HTTPError):
            async with httpx.AsyncClient(timeout=STUB_CHECK_SECS) as http:
                lines = (await http.get(url)).text.splitlines()
            calls = [line for line in lines if line.startswith("asr_decoder_calls_total")]
            if calls != self._decoder_calls:
                for canary in self._canaries:
                    canary.see_progress()
            self._decoder_calls = calls

    async def _ask(self, ensemble: str, samples: int) -> None:
        await ask(self._client, ensemble, samples)

    async def stop(self, timeout_secs: float = 20.0) -> None:
        """Stop Triton and all its children after the requests in flight.

        Args:
            timeout_secs: time after which Triton is killed.
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
            "--exit-on-error=false",  # so that the repository index has the failed model and the reason
            "--disable-auto-complete-config",  # every config.pbtxt is complete; completion would start a process per model
            f"--grpc-restricted-protocol={RESTRICTED}",
            f"--grpc-address={ports.host}",
            f"--grpc-port={ports.grpc}",
            f"--metrics-address={ports.host}",
            f"--metrics-port={ports.metrics}",
            *([f"--http-address={ports.host}", f"--http-port={ports.http}"] if ports.http else ["--allow-http=false"]),
            *self._options,
        ]
        with self._log_path.open(self._log_mode) as output:
            self._log_mode = "ab"  # a restart keeps the log of the crash
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._engine.environment,
                start_new_session=True,  # so that a Ctrl-C reaches only the launcher, which stops Triton last
                preexec_fn=confine,
            )

    async def _ready_models(self) -> int:
        """Return the number of ready models; 0 while Triton does not respond.

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
        # Triton is live after it has tried to load all models. A model with an unreadable configuration has no state.
        failed = {
            model.name: model.reason or self._refusal(model.name) for model in index if model.state in ("UNAVAILABLE", "")
        }
        # An ensemble fails because of its models, and has no reason or a less specific one.
        for name in sorted(failed, key=lambda name: not failed[name] or "depends on" in failed[name]):
            raise EngineError(f"model {name} failed to load: {_one_line(failed[name]) or f'see {self._log_path}'}")
        return sum(model.state == "READY" for model in index)

    def _refusal(self, model: str) -> str:
        """Return the reason in Triton's log why it did not read a model's configuration; empty if there is none."""
        found = re.findall(rf"Poll failed for model directory '{re.escape(model)}': (.*?)\"?$", self._log(), re.MULTILINE)
        return found[-1] if found else ""

    def _log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def _clean_up(self) -> None:
        """Kill the remaining stubs of a dead Triton, and remove their shared memory."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        for path in self._shared_memory():
            path.unlink(missing_ok=True)

    def _ending(self) -> str:
        """Return the signal or exit code of Triton, and the last error in its log."""
        code = self._process.returncode if self._process else None
        how = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        lines = self._log().splitlines()
        # Errors about CUDA are harmless.
        errors = [line for line in lines if line.startswith(("E", "error")) and "cuda" not in line.lower()]
        return f"{how}, {_one_line(errors[-1]) if errors else 'no error printed'}"


def _one_line(text: str) -> str:
    """Return an error message of Triton without its Python traceback, as one line."""
    return " ".join(text.split("\n\nAt:", maxsplit=1)[0].split())
