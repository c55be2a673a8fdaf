"""The embedded Triton: the server that the ``nvidia-pytriton`` wheel carries, prepared in the checkout and kept running.

Nothing outside the checkout is touched and no root is needed. Where this engine can't run, the Triton container can: every
``EngineError`` is one line that says what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import filecmp
import importlib.metadata
import ipaddress
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import structlog
from tritonclient.grpc import aio as grpcclient
from tritonclient.utils import InferenceServerException

from gateway.triton.canary import Canary, ask

MIN_GLIBC = (2, 35)
PYTHONS = ("3.10", "3.11", "3.12")
"""CPythons for which the wheel has a stub and numpy 1, which the stub was built against, has wheels."""

CONTAINER_HINT = "use the Triton container instead (docs/Deployment.md)"
RESTART_DELAY_RANGE_SECS = (1.0, 10.0)
"""The gateway's streams wait for ``recovery_timeout_secs``, 30 s by default, in which Triton must also start."""

STUB_CHECK_SECS = 0.5
CANARY_INTERVAL_SECS = 5.0
CANARY_TIMEOUT_SECS = 10.0
CANARIES_TOGETHER = 2
"""More calls of the encoder than one reach all its instances in turn, however many there are."""

MAX_FAILING_SECS = 3.0
"""How long canaries may be answered with errors before Triton is restarted."""

MAX_LATE_SECS = 30.0
"""How long canaries may get no answer before Triton is restarted, if the decoder does not work on other audio meanwhile."""

POLL_SECS = 0.1

log = structlog.get_logger()


class EngineError(RuntimeError):
    """Triton can't be prepared, started or kept ready; one line, with what to do about it."""


@dataclass(frozen=True)
class Ports:
    """Triton's ports, all on one address."""

    host: str
    http: int
    grpc: int
    metrics: int

    def check_free(self) -> None:
        """Raise EngineError where one is taken, or the address is none."""
        try:
            ipaddress.IPv4Address(self.host)
        except ValueError:
            raise EngineError(f"AMIRA_TRITON_HOST is {self.host!r}; it must be an IPv4 address") from None
        for name in ("http", "grpc", "metrics"):
            check_free(self.host, getattr(self, name), f"AMIRA_TRITON_{name.upper()}_PORT")


def check_free(host: str, port: int, setting: str) -> None:
    """Raise EngineError unless this process could listen on the port.

    Args:
        host: address to listen on.
        port: port number; 0 is always free.
        setting: the environment variable that moves it elsewhere.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EngineError(f"can't listen on {host}:{port}: {error.strerror}; set {setting} to another port") from None


def free_ports(host: str, count: int) -> list[int]:
    """Ports that nothing listens on at this moment."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [probe.getsockname()[1] for probe in probes]


@dataclass(frozen=True)
class Engine:
    """A Triton that can be started.

    Attributes:
        binary: the server's executable.
        backends: directory for ``--backend-directory``.
        environment: the process's environment.
    """

    binary: Path
    backends: Path
    environment: dict[str, str]

    @classmethod
    def prepare(cls, home: Path, onnxruntime_backend: Path) -> Engine:
        """Lay out the backends of the installed wheel under ``home``; quick when that was done before.

        Args:
            home: directory of the engine's own.
            onnxruntime_backend: directory of the stand-in for Triton's ONNX Runtime backend.

        Raises:
            EngineError: this machine or this Python can't run it.
        """
        check_platform()
        try:
            wheel = importlib.metadata.distribution("nvidia-pytriton")
        except importlib.metadata.PackageNotFoundError:
            raise EngineError("nvidia-pytriton is not installed; run make setup") from None
        server = Path(str(wheel.locate_file("pytriton/tritonserver")))
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        python_backend = home / "backends" / "python"
        python_backend.mkdir(parents=True, exist_ok=True)
        binary = server / "bin" / "tritonserver"
        stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
        for executable in (binary, stub):
            if not os.access(executable, os.X_OK):
                executable.chmod(0o755)
        for source in (*(server / "backends" / "python").glob("*.*"), stub):
            _copy_if_changed(source, python_backend / source.name)
        _link(home / "backends" / "onnxruntime", onnxruntime_backend)
        libraries = [wheel.locate_file("nvidia_pytriton.libs"), find_libpython().parent]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            # The stub finds its packages as any Python does: by the virtual environment whose python comes first.
            "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ.get('PATH', '')}",
            "PYTHONUTF8": "1",
        }
        return cls(binary, home / "backends", environment)


def check_platform() -> None:
    """Raise EngineError where the wheel's binaries can't run."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise EngineError(
            f"the embedded Triton needs x86-64 Linux, this is {platform.machine()} {sys.platform}; {CONTAINER_HINT}"
        )
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split(".")[:2])) < MIN_GLIBC:
        found = f"{library} {version}".strip() or "another C library"
        raise EngineError(
            f"the embedded Triton needs glibc {MIN_GLIBC[0]}.{MIN_GLIBC[1]} or newer, this is {found}; {CONTAINER_HINT}"
        )
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python not in PYTHONS:
        raise EngineError(
            f"the embedded Triton needs Python {', '.join(PYTHONS)}, this is {python}; run make with PYTHON=python3.12"
        )


def find_libpython() -> Path:
    """The running interpreter's shared library, which Triton's stub loads.

    Raises:
        EngineError: there is none.
    """
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    folders = [
        sysconfig.get_config_var("LIBDIR"),
        f"{sys.base_prefix}/lib",
        f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib",
    ]
    for folder in filter(None, folders):
        path = Path(folder) / name
        if path.exists():
            return path
    package = name.removesuffix(".so.1.0")
    raise EngineError(
        f"{name} is missing; install it (Debian, Ubuntu: apt-get install {package}), or make with a Python that has it"
    )


class Triton:
    """A running embedded Triton.

    Args:
        engine: what to run.
        model_repository: its models.
        ports: where it listens.
        log_path: file for what it prints.
        options: more of its command line.
        ensembles: those that must recognise speech; Triton is restarted when one of them no longer does.
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
        """Process id while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self, on_progress: Callable[[int, int], None] = lambda _ready, _models: None) -> None:
        """Start it and wait until every model is ready.

        Args:
            on_progress: told how many models are ready, and how many there are.

        Raises:
            EngineError: it ended, or a model failed to load; the line names the model and the reason.
        """
        if not self._model_repository.is_dir():
            raise EngineError(f"model repository {self._model_repository} is no directory")
        await self._spawn()
        models = [path.name for path in self._model_repository.iterdir() if (path / "config.pbtxt").is_file()]
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
        """Let it finish what it has begun, then end it with all its children."""
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
            *(f"--{service}-address={ports.host}" for service in ("http", "grpc", "metrics")),
            f"--http-port={ports.http}",
            f"--grpc-port={ports.grpc}",
            f"--metrics-port={ports.metrics}",
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
                preexec_fn=_die_with_parent,
            )

    async def _ready_models(self) -> int:
        """How many models are ready; 0 while nothing answers.

        Raises:
            EngineError: one failed to load.
        """
        self._client = self._client or grpcclient.InferenceServerClient(f"{self._ports.host}:{self._ports.grpc}")
        try:
            if not await self._client.is_server_live(client_timeout=1.0):
                return 0
            index = (await self._client.get_model_repository_index(client_timeout=1.0)).models
        except InferenceServerException:
            return 0
        failed = [model for model in index if model.state == "UNAVAILABLE"]
        # An ensemble fails because of its parts, so its own reason says least.
        for model in sorted(failed, key=lambda model: "depends on" in model.reason):
            raise EngineError(f"model {model.name} failed to load: {_one_line(model.reason)}")
        return sum(model.state == "READY" for model in index)

    def _clean_up(self) -> None:
        """End what a dead Triton left: stubs, and their shared memory."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        for path in Path("/dev/shm").glob(f"{self._shm_prefix}*"):  # noqa: S108
            path.unlink(missing_ok=True)

    def _ending(self) -> str:
        """How it ended, and the last error that it printed."""
        code = self._process.returncode if self._process else None
        how = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        lines = self._log_path.read_text(errors="replace").splitlines()
        # Those about CUDA are harmless.
        errors = [line for line in lines if line.startswith(("E", "error")) and "cuda" not in line.lower()]
        return f"{how}, {_one_line(errors[-1]) if errors else 'no error printed'}"


def _die_with_parent() -> None:
    """In the child: ask the kernel for SIGTERM when the launcher dies, however it dies (prctl(2))."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _copy_if_changed(source: Path, target: Path) -> None:
    """A copy, since Triton refuses a backend whose library is a link to somewhere else."""
    if target.is_symlink() or not target.exists() or not filecmp.cmp(source, target):
        target.unlink(missing_ok=True)
        shutil.copy2(source, target)


def _link(link: Path, target: Path) -> None:
    if not (link.is_symlink() and link.readlink() == target):
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def _one_line(text: str) -> str:
    """The part of Triton's message that says what is wrong: without its Python traceback."""
    return " ".join(text.split("\n\nAt:", maxsplit=1)[0].split())
