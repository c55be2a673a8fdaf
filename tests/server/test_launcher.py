"""The ``amira`` command."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from tritonclient.grpc import InferInput
from tritonclient.grpc import aio as grpcclient
from tritonclient.utils import InferenceServerException
from typer.testing import CliRunner

import amira.engine.service
from amira.cli import app
from amira.engine import process, wheel
from amira.engine.errors import EngineError
from amira.engine.process import TritonProcess
from amira.engine.wheel import Engine
from amira.paths import ENGINE_HOME, MODEL_REPOSITORY, ONNXRUNTIME_BACKEND, ROOT, SPEECH
from amira.ports import LOOPBACK, Ports, free_ports
from gateway.config.loading import load_settings
from tests.support.clients import END, decoder_metric, listen, open_socket, transcribe
from tests.support.commands import AMIRA, edit, environment, run_amira, triton_with, until
from tests.support.repositories import copy_repository
from tests.support.servers import run_gateway


@pytest.fixture
def model_repository(tmp_path: Path) -> Path:
    """Return a copy of the bundled repository that a test may change."""
    return copy_repository(tmp_path / "models", warm=False)


async def test_run_serves_restarts_triton_and_stops_in_order() -> None:
    env = environment()
    process = await asyncio.create_subprocess_exec(AMIRA, "run", env=env, cwd=ROOT, stderr=asyncio.subprocess.PIPE)
    assert process.stderr
    shown = (await asyncio.wait_for(process.stderr.readuntil(b"Ctrl-C stops it."), 60)).decode()
    url = f"http://{LOOPBACK}:{env['AMIRA_SERVER_PORT']}"
    try:
        # The curl line works unchanged.
        line = re.search(r"^  (curl .*)$", shown, re.MULTILINE)
        assert line
        curl = await asyncio.create_subprocess_shell(
            line[1], cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        answer, _ = await curl.communicate()
        assert b"ask not what your country can do for you" in answer

        async with httpx.AsyncClient() as http:

            async def status() -> int:
                return (await http.get(f"{url}/health/ready")).status_code

            assert await status() == 200
            triton = next(child for child in psutil.Process(process.pid).children() if child.name() == "tritonserver")
            stubs = triton.children()
            # One process for each instance that the instance_group settings ask for: two of encoder and encoder_stream, one of
            # each other model.
            assert len(stubs) == 9
            # A process's last argument but one is its instance; those of the encoder give way to all others.
            usual = min(stub.nice() for stub in stubs)
            yielding = {stub.cmdline()[-2] for stub in stubs if stub.nice() > usual}
            assert yielding == {f"{name}_0_{i}" for name in ("encoder", "encoder_stream") for i in (0, 1)}
            triton.kill()
            await until(lambda: _equals(status, 503))
            assert (await http.get(f"{url}/health")).status_code == 200
            assert (await http.get(f"{url}/health/detailed")).json()["status"] == "critical"
            await until(lambda: _equals(status, 200))
            await until(lambda: not any(stub.is_running() and stub.status() != psutil.STATUS_ZOMBIE for stub in stubs))
        samples = np.zeros(16000, np.int16)
        assert (await transcribe(f"ws{url[4:]}/v2/decode/stream/amira", samples)).close_code == 1000

        # Ctrl-C, as a terminal sends it: to the launcher's process group, of which Triton is not.
        processes = psutil.Process(process.pid).children(recursive=True)
        assert len(processes) > 5
        process.send_signal(signal.SIGINT)
        reading = asyncio.create_task(process.stderr.read())
        assert await asyncio.wait_for(process.wait(), 40) == 0
        assert b"Traceback" not in await reading
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    await until(lambda: not any(child.is_running() for child in processes))
    assert not _shared_memory(process.pid)


def _shared_memory(pid: int) -> list[Path]:
    return [*Path("/dev/shm").glob(f"amira_{pid}_*")]  # noqa: S108


async def test_embedded_triton_exposes_only_used_protocols() -> None:
    async with triton_with(MODEL_REPOSITORY) as ports:
        children = psutil.Process().children()
        (process,) = (child for child in children if f"--grpc-port={ports.grpc}" in child.cmdline())
        assert {connection.laddr.port for connection in process.net_connections() if connection.status == "LISTEN"} == {
            ports.grpc,
            ports.metrics,
        }
        async with grpcclient.InferenceServerClient(f"{ports.host}:{ports.grpc}") as client:
            for call in (
                client.get_system_shared_memory_status(),
                client.register_system_shared_memory("region", "/region", 16),
                client.get_cuda_shared_memory_status(),
                client.get_log_settings(),
                client.update_log_settings({"log_verbose_level": 9}),
                client.get_trace_settings(),
                client.update_trace_settings(settings={"trace_level": "TIMESTAMPS"}),
            ):
                with pytest.raises(InferenceServerException, match="This protocol is restricted"):
                    await call
        # Nor by the header that Triton asks for, whose name no gRPC library sends.
        for name, part in ((b"triton-grpc-protocol-nobody", b"restricted"), (b"triton-grpc-protocol-Nobody", b"")):
            answer = await ask_log_settings(ports, (name, b"may"))
            assert part in answer
            assert b"log_verbose_level" not in answer
        shared = [path for path in _shared_memory(os.getpid()) if f"_{ports.grpc}_" in path.name]
        assert {path.stat().st_mode & 0o777 for path in shared} == {0o600}


async def ask_log_settings(ports: Ports, header: tuple[bytes, bytes]) -> bytes:
    """Return the bytes of the answer to a call by plain HTTP/2 (RFC 9113), with a header that is sent unchanged."""

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload

    headers = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/inference.GRPCInferenceService/LogSettings",
        b":authority": b"localhost",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
        **dict([header]),
    }
    # Literals without indexing (RFC 7541, 6.2.2); then a message of no bytes.
    block = b"".join(b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in headers.items())
    reader, writer = await asyncio.open_connection(ports.host, ports.grpc)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, block) + frame(0, 1, 1, bytes(5)))
    answer = b""
    while b"grpc-status" not in answer:
        answer += await asyncio.wait_for(reader.read(4096), 10)
    writer.close()
    return answer


async def test_second_sigterm_ends_the_drain() -> None:
    env = environment(drain_timeout_secs=60)
    process = await asyncio.create_subprocess_exec(AMIRA, "run", env=env, cwd=ROOT, stderr=asyncio.subprocess.PIPE)
    assert process.stderr
    await asyncio.wait_for(process.stderr.readuntil(b"Ctrl-C stops it."), 60)
    children = psutil.Process(process.pid).children(recursive=True)
    async with open_socket(f"ws://{LOOPBACK}:{env['AMIRA_SERVER_PORT']}/v2/decode/stream/amira") as stream:
        await stream.send(bytes(3200))
        process.terminate()
        await asyncio.sleep(1)
        await stream.send(bytes(3200))  # a live stream goes on
        assert process.returncode is None
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 40) == 0
    await until(lambda: not any(child.is_running() for child in children))
    assert not _shared_memory(process.pid)


async def _equals(status: Callable[[], Any], expected: int) -> bool:
    return bool(await status() == expected)


@pytest.mark.slow
async def test_demo_transcribes_the_bundled_recordings() -> None:
    """test_wheel.py does the same with the installed package."""
    code, output, errors = await run_amira("demo", timeout_secs=90)
    assert code == 0, errors
    for path in SPEECH.glob("*.flac"):
        assert path.name in output
    assert output.count("real-time factor") == 3
    assert "ask not what your country can do for you" in output
    assert output.count("final ") == 3


async def test_all_ports_in_use_are_named_in_one_line() -> None:
    with socket.socket() as first, socket.socket() as second:
        for taken in (first, second):
            taken.bind((LOOPBACK, 0))
            taken.listen()
        ports = [taken.getsockname()[1] for taken in (first, second)]
        code, _, errors = await run_amira("run", server_port=ports[0], triton_grpc_port=ports[1])
        assert code == 2
        taken_ports = ", ".join(f"{LOOPBACK}:{port} (Address already in use)" for port in ports)
        settings = "AMIRA_SERVER_PORT and AMIRA_TRITON_GRPC_PORT"
        assert errors == f"amira: can't listen on {taken_ports}; set {settings} to other ports\n"


async def test_port_of_serve_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, output, errors = await run_amira("serve", server_port=port)
    assert (code, output) == (2, "")
    assert (
        errors == f"amira: can't listen on {LOOPBACK}:{port} (Address already in use); set AMIRA_SERVER_PORT to other ports\n"
    )


FAULTS_AT_LOAD: dict[str, tuple[str, str | None, str, list[str]]] = {
    "unknown output": ("encoder/config.pbtxt", '"encoded_lengths"', '"lengths"', ["encoder", "output lengths"]),
    "wrong dims": ("encoder/config.pbtxt", "[ -1, 384, -1 ]", "[ -1, 80, -1 ]", ["encoder", "audio_signal", "80", "384"]),
    "wrong kind": (
        "rnnt_greedy_bls/config.pbtxt",
        'string_value: "rnnt"',
        'string_value: "ctc"',
        ["rnnt_greedy_bls", "'ctc'", "'tdt'"],
    ),
    "wrong warm-up": (
        "encoder/config.pbtxt",
        "dims: [ 1, 384, 184 ]",
        "dims: [ 1, 384 ]",
        ["encoder", "warm-up", "audio_signal", "[1, 384]"],
    ),
    "wrong vocabulary": ("vocab.txt", "▁the 2", "▁the 7", ["detokenizer", "line 3", "▁the 7"]),
    "empty vocabulary": ("vocab.txt", None, "", ["detokenizer", "vocab.txt is empty"]),
}
"""A file of the repository, the replaced text and its replacement, and the parts of the message."""

SLOW_FAULTS = "unknown output", "wrong dims", "empty vocabulary"
"""Others in the same files are always tested; each takes a start of Triton."""


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[pytest.mark.slow] if fault in SLOW_FAULTS else []) for fault in FAULTS_AT_LOAD]
)
async def test_model_that_fails_to_load_is_named(tmp_path: Path, fault: str) -> None:
    file, old, new, named = FAULTS_AT_LOAD[fault]
    model_repository = copy_repository(tmp_path / "models", warm="warm-up" in fault)
    if old is None:
        (model_repository / file).write_text(new)
    else:
        edit(model_repository / file, old, new)
    with pytest.raises(EngineError) as failed:
        async with triton_with(model_repository):
            pass
    for part in named:
        assert part in str(failed.value)


async def test_failed_start_is_one_line(model_repository: Path) -> None:
    (model_repository / "vocab.txt").write_text("")
    code, _, errors = await run_amira("run", model_repository=model_repository)
    assert code == 2
    assert "vocab.txt is empty" in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors


async def test_error_says_why_triton_ended_while_starting(tmp_path: Path) -> None:
    def triton_at(grpc: int, metrics: int) -> TritonProcess:
        prepared = Engine.prepare(ENGINE_HOME, ONNXRUNTIME_BACKEND)
        return TritonProcess(prepared, MODEL_REPOSITORY, Ports(LOOPBACK, grpc, metrics), tmp_path / "triton.log")

    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        grpc = taken.getsockname()[1]
        (metrics,) = free_ports(LOOPBACK, 1)
        with pytest.raises(EngineError, match=rf"ended while it started: exit code 1, .*{grpc}"):
            await triton_at(grpc, metrics).start()

    killed = triton_at(*free_ports(LOOPBACK, 2))
    starting = asyncio.create_task(killed.start())
    await until(lambda: killed.pid)
    assert killed.pid
    os.kill(killed.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="ended while it started: SIGKILL, no error printed"):
        await starting


async def test_triton_that_hangs_while_starting_is_restarted(
    model_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "HUNG_SECS", 5.0)
    hang = f"""
    def initialize(self, args):
        import pathlib
        if not (hung := pathlib.Path({str(tmp_path / "hung")!r})).exists():
            hung.touch()
            time.sleep(600)
        self.start(args)

    def start(self, args"""
    edit(model_repository / "detokenizer" / "1" / "model.py", "\n    def initialize(self, args", hang)
    edit(model_repository / "detokenizer" / "1" / "model.py", "\nimport ", "\nimport time\nimport ")
    prepared = Engine.prepare(ENGINE_HOME, ONNXRUNTIME_BACKEND)
    triton = TritonProcess(prepared, model_repository, Ports(LOOPBACK, *free_ports(LOOPBACK, 2)), tmp_path / "triton.log")
    with pytest.raises(EngineError, match="hung while it started: it did nothing for 5 s"):
        await triton.start()
    assert triton.pid is None
    await triton.start()
    await triton.stop(timeout_secs=0)


async def test_failed_restart_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log keeps the output of every attempt. The program is missing at first, then it ends at once."""
    monkeypatch.setattr(process, "RESTART_DELAY_RANGE_SECS", (0.05, 0.1))
    program, log_path = tmp_path / "tritonserver", tmp_path / "triton.log"
    prepared = Engine(program, tmp_path, dict(os.environ))
    triton = TritonProcess(prepared, MODEL_REPOSITORY, Ports(LOOPBACK, *free_ports(LOOPBACK, 2)), log_path)
    keeper = asyncio.create_task(triton.keep_alive())
    await asyncio.sleep(0.3)
    program.write_text("#!/bin/sh\necho tried\n")
    program.chmod(0o755)
    await until(lambda: log_path.read_text().count("tried") >= 3)
    assert not keeper.done()
    keeper.cancel()
    await asyncio.gather(keeper, return_exceptions=True)
    await triton.stop()


def test_unwritable_engine_home_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(amira.engine.service, "ENGINE_HOME", tmp_path / "file" / "engine")
    result = CliRunner().invoke(app, ["run"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("amira: ")
    assert str(tmp_path / "file") in result.stderr


async def test_missing_recording_is_named() -> None:
    code, _, errors = await run_amira("demo", "none.wav")
    assert code == 2
    assert "'none.wav' does not exist" in errors
    assert "Traceback" not in errors


async def test_unusable_repository_is_one_line(model_repository: Path, tmp_path: Path) -> None:
    """Triton accepts these repositories: without checks, the launcher would wait for ever, or be ready without a model."""

    async def refusal(repository: Path, **settings: Any) -> str:
        code, output, errors = await run_amira("run", model_repository=repository, **settings)
        assert (code, output) == (2, "")
        (line,) = errors.splitlines()
        return line

    (tmp_path / "empty").mkdir()
    assert await refusal(tmp_path / "none") == f"amira: model repository {tmp_path}/none is no directory"
    assert (await refusal(tmp_path / "empty")).startswith(f"amira: model repository {tmp_path}/empty has no models")
    assert await refusal(model_repository, models='{"mine": "mine"}') == (
        f"amira: AMIRA_MODELS names mine; model repository {model_repository} has the ensembles asr_ensemble"
    )
    config = model_repository / "encoder" / "config.pbtxt"
    edit(config, "max_batch_size: 0", "max_batch_size 0")
    assert (await refusal(model_repository)).startswith(f"amira: {config}: 4:16 : ")
    edit(config, "max_batch_size 0", "max_batch_size: 0")
    edit(config, 'name: "encoder"', 'name: "coder"')
    expected = f"{config}: name is 'coder'; expected 'encoder', as its directory is called"
    assert await refusal(model_repository) == f"amira: {expected}"


async def test_model_that_triton_did_not_read_is_named(model_repository: Path) -> None:
    """Triton starts without the model, and reports no state for it."""
    edit(model_repository / "encoder" / "config.pbtxt", "max_batch_size: 0", "max_batch_size 0")
    reason = r"failed to read text proto from .*encoder/config\.pbtxt"
    with pytest.raises(EngineError, match=f"model encoder failed to load: {reason}"):
        async with triton_with(model_repository):
            pass


async def test_small_shared_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MIN_SHARED_MEMORY_BYTES", 2**60)
    with pytest.raises(EngineError, match=r"has \d+ MB free; Triton needs 1099511627776 MB: enlarge it"):
        process.check_shared_memory()


async def test_bad_ports_and_addresses_are_named() -> None:
    code, _, errors = await run_amira("run", triton_http_port=99999)
    assert code == 2
    assert "65535" in errors
    code, _, errors = await run_amira("run", triton_host="::1")
    assert code == 2
    assert errors.strip().endswith("AMIRA_TRITON_HOST is '::1'; it must be an IPv4 address")


async def test_bad_setting_is_one_line() -> None:
    code, _, errors = await run_amira("serve", max_concurrent_streams="many")
    assert code == 2
    assert errors.strip() == (
        "amira: max_concurrent_streams = 'many' (from AMIRA_MAX_CONCURRENT_STREAMS): must be a whole number within 1 … 100000"
    )


async def test_config_show_names_sources(tmp_path: Path) -> None:
    """And the output is a valid configuration."""
    code, output, _ = await run_amira("config", "show", "--format", "toml", max_concurrent_streams=77, api_keys="secret")
    assert code == 0
    lines = output.splitlines()
    assert "max_concurrent_streams = 77  # AMIRA_MAX_CONCURRENT_STREAMS" in lines
    assert "max_concurrent_batches = 8  # config.toml" in lines
    assert "secret" not in output
    (tmp_path / "shown.toml").write_text(output)
    assert load_settings({"AMIRA_CONFIG_FILE": str(tmp_path / "shown.toml")}).settings.max_concurrent_streams == 77
    models = '{"amira": "asr_ensemble", "latency": "other"}'
    code, output, _ = await run_amira("config", "show", "--format", "yaml", models=models)
    assert code == 0
    lines = output.splitlines()
    assert "max_concurrent_streams: 10  # config.toml" in lines
    assert "models:  # AMIRA_MODELS" in lines
    assert "  latency: other" in lines
    (tmp_path / "shown.yaml").write_text(output)
    shown = load_settings({"AMIRA_CONFIG_FILE": str(tmp_path / "shown.yaml")}).settings
    assert shown.models == {"amira": "asr_ensemble", "latency": "other"}


async def test_config_show_marks_defaults(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(AMIRA, "config", "show", cwd=tmp_path, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert b"max_concurrent_streams = 10  # default\n" in output


async def test_idle_sequences_are_evicted_and_counted(model_repository: Path) -> None:
    """Triton drops an idle sequence without notice; the decoder drops its state and counts it."""
    edit(model_repository / "rnnt_greedy_bls" / "config.pbtxt", "microseconds: 60000000", "microseconds: 1000000")
    async with triton_with(model_repository) as ports, grpcclient.InferenceServerClient(f"{ports.host}:{ports.grpc}") as client:

        async def infer(sequence: int, *, start: bool, end: bool) -> None:
            audio = InferInput("AUDIO", [1, 1600], "INT16")
            audio.set_data_from_numpy(np.zeros((1, 1600), np.int16))
            await client.infer("asr_ensemble", [audio], sequence_id=sequence, sequence_start=start, sequence_end=end)

        for sequence in range(1, 6):
            await infer(sequence, start=True, end=False)
        assert await decoder_metric(ports, "asr_decoder_sequences") == 5
        await asyncio.sleep(1.5)
        with pytest.raises(InferenceServerException, match="START"):
            await infer(1, start=False, end=False)
        await infer(9, start=True, end=True)
        assert await decoder_metric(ports, "asr_decoder_sequences") == 0
        assert await decoder_metric(ports, "asr_decoder_evictions_total") == 5

        # The gateway's heartbeat keeps a stream alive whose client is silent for longer than that.
        async with (
            run_gateway(triton_endpoint=f"{ports.host}:{ports.grpc}", stream_timeout_secs=10) as gateway,
            open_socket(gateway.stream_url()) as socket,
        ):
            await socket.send(bytes(3200))
            async with open_socket(gateway.stream_url(), subprotocols=["amira.v2"]) as late:
                await asyncio.sleep(2)
                # Nothing of a stream is at Triton before its first audio, so a late resumption is still looked at.
                await late.send('{"type":"resume","session":"x"}')
                assert (await listen(late)).error["code"] == "invalid_session"
            await socket.send(END)
            assert '"final"' in str(await socket.recv())


async def test_failing_encoder_ends_one_stream(model_repository: Path) -> None:
    """The encoder fails on every window: the stream gets an error, and the decoder keeps no state."""
    edit(model_repository / "rnnt_greedy_bls" / "config.pbtxt", 'string_value: "1536"', 'string_value: "96"')
    async with triton_with(model_repository) as ports:
        async with run_gateway(triton_endpoint=f"{ports.host}:{ports.grpc}") as gateway:
            conversation = await transcribe(gateway.stream_url(), np.zeros(32000, np.int16))
            assert conversation.close_code == 4503
            assert conversation.error["code"] == "backend_failed"
            assert "encoder" not in conversation.error["message"], "internal names stay inside"
        assert await decoder_metric(ports, "asr_decoder_sequences") == 0


async def test_slow_backend_is_a_timeout(triton: Ports) -> None:
    async with run_gateway(triton_endpoint=f"{triton.host}:{triton.grpc}", inference_timeout_secs=0.005) as gateway:
        async with httpx.AsyncClient() as http:
            answer = await http.post(gateway.batch_url(), content=bytes(960000), headers={"Content-Type": "audio/pcm"})
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "backend_timeout"
        assert answer.json()["error"]["retryable"] is True
    await until(lambda: _none_left(triton))


async def _none_left(ports: Ports) -> bool:
    return await decoder_metric(ports, "asr_decoder_sequences") == 0


@pytest.mark.parametrize(
    ("attribute", "value", "named"),
    [
        ("platform.machine", "aarch64", "x86-64 Linux, this is aarch64"),
        ("platform.libc_ver", ("glibc", "2.31"), "glibc 2.35 or newer, this is glibc 2.31"),
        ("platform.libc_ver", ("", ""), "this is another C library"),
    ],
)
def test_unsupported_platform_is_named(monkeypatch: pytest.MonkeyPatch, attribute: str, value: Any, named: str) -> None:
    monkeypatch.setattr(f"amira.engine.wheel.{attribute}", lambda: value)
    with pytest.raises(EngineError, match=re.escape(named)) as raised:
        wheel.check_platform()
    assert "container" in str(raised.value)


def test_missing_libpython_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wheel.find_libpython().is_file()
    monkeypatch.setattr("amira.engine.wheel.Path.exists", lambda _: False)
    with pytest.raises(
        EngineError, match=r"libpython3\.\d+\.so\.1\.0 is missing; install it \(Debian, Ubuntu: apt-get install libpython3"
    ):
        wheel.find_libpython()
