"""The ``amira`` command. Commands import modules of extras when they run: the base package has neither server nor engine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine, Mapping
from enum import Enum
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from amira.client.exchange import DEFAULT_MODEL
from amira.commands.ending import USAGE_ERROR, fail
from amira.commands.listen import listen
from amira.commands.transcribe import transcribe
from amira.paths import MODEL_REPOSITORY, MODELS_HOME, SPEECH
from amira.ports import LOOPBACK, PortError, Ports, check_free, free_ports, gateway_listeners

if TYPE_CHECKING:
    from amira.engine.service import Running
    from gateway.config.loading import Loaded
    from gateway.config.settings import Settings

MODULES: Mapping[str, tuple[str, ...]] = {
    "server": ("fastapi", "orjson", "pydantic", "soundfile", "soxr", "structlog", "tritonclient", "uvicorn", "uvloop"),
    "engine": ("onnxruntime", "psutil", "pytriton"),
    "models": ("huggingface_hub", "onnx", "onnx_asr", "onnxruntime"),
}
"""Modules that show that an extra of the package is installed."""

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Speech recognition: server and client."
)
config = typer.Typer(no_args_is_help=True, help="Show the gateway's configuration.")
app.add_typer(config, name="config")
models = typer.Typer(no_args_is_help=True)
app.add_typer(models, name="models")
app.command()(transcribe)
app.command()(listen)
console = Console(stderr=True)

ModelRepository = Annotated[Path, typer.Option(envvar="AMIRA_MODEL_REPOSITORY", help="Models to serve.")]
TritonHost = Annotated[str, typer.Option(envvar="AMIRA_TRITON_HOST", help="IPv4 address of the embedded Triton.")]
GrpcPort = Annotated[int, typer.Option(envvar="AMIRA_TRITON_GRPC_PORT", min=1, max=65535, help="Its gRPC port.")]
MetricsPort = Annotated[int, typer.Option(envvar="AMIRA_TRITON_METRICS_PORT", min=1, max=65535, help="Its metrics port.")]
HttpPort = Annotated[
    int | None,
    typer.Option(envvar="AMIRA_TRITON_HTTP_PORT", min=1, max=65535, help="Its HTTP port; default: no HTTP."),
]


class Format(str, Enum):
    """Formats of a configuration."""

    toml = "toml"
    yaml = "yaml"


class CacheType(str, Enum):
    """Types of a cached encoder's carried values."""

    fp16 = "fp16"
    fp32 = "fp32"


@app.command()
def run(
    model: Annotated[
        str | None,
        typer.Option(
            envvar="AMIRA_MODEL",
            help="Serve this model: a name that amira models known lists, owner/name on Hugging Face, or a directory. "
            "The first start downloads and imports it.",
            show_default=False,
        ),
    ] = None,
    models_home: Annotated[Path, typer.Option(envvar="AMIRA_MODELS_HOME", help="Directory of --model's models.")] = MODELS_HOME,
    model_repository: ModelRepository = MODEL_REPOSITORY,
    triton_host: TritonHost = LOOPBACK,
    triton_grpc_port: GrpcPort = 8001,
    triton_metrics_port: MetricsPort = 8002,
    triton_http_port: HttpPort = None,
) -> None:
    """Start an embedded Triton and the gateway; Ctrl-C stops both."""
    _require("server", "engine")
    from amira.engine.service import service

    settings = _settings()
    if settings.page is None:
        settings = settings.model_copy(update={"page": True})
    if model:
        model_repository, ensemble = _ensure_imported(model, models_home)
        settings = settings.model_copy(update={"models": {DEFAULT_MODEL: ensemble}})
    ports = Ports(triton_host, triton_grpc_port, triton_metrics_port, triton_http_port)

    async def serve() -> None:
        with console.status("starting Triton") as status:

            def show(ready: int, models: int) -> None:
                status.update(f"starting Triton: {ready} of {models} models ready")

            async with service(settings, model_repository.resolve(), ports, show) as (running, serving):
                status.stop()
                _print_welcome(running, settings)
                await asyncio.shield(serving)

    _main(serve())


@app.command()
def serve() -> None:
    """Start the gateway in front of a Triton that runs elsewhere (triton_endpoint)."""
    _require("server")
    from gateway.server import build_server

    settings = _settings()

    async def serve() -> None:
        check_free(gateway_listeners(settings.server_host, settings.server_port, settings.riva_port))
        await build_server(settings).serve()

    _main(serve())


@app.command()
def demo(
    recordings: Annotated[
        list[Path] | None,
        typer.Argument(help="Recordings; default: the bundled ones.", exists=True, dir_okay=False, show_default=False),
    ] = None,
    model_repository: ModelRepository = MODEL_REPOSITORY,
) -> None:
    """Start a server on free ports, transcribe recordings as files and as live streams, and exit."""
    _require("server", "engine")
    from amira import demo as demonstration
    from amira.engine.service import service
    from gateway.logs import configure_logging

    gateway_port, *triton_ports = free_ports(LOOPBACK, 3)
    ours = {"server_host": LOOPBACK, "server_port": gateway_port, "riva_port": None, "log_level": "warning"}
    settings = _settings().model_copy(update=ours)
    configure_logging(settings)
    key = settings.api_keys[0].get_secret_value() if settings.api_keys else None
    bodies = {file.name: file.read_bytes() for file in recordings or sorted(SPEECH.glob("*.flac"))}

    async def show() -> None:
        ports = Ports(LOOPBACK, *triton_ports)
        with console.status("starting the server") as status:
            async with service(settings, model_repository.resolve(), ports, lambda *_: None) as (running, _):
                status.stop()
                for name, body in bodies.items():
                    await demonstration.show(running.url, next(iter(settings.models)), name, body, key)

    _main(show())


@config.command("show")
def config_show(
    output: Annotated[Format, typer.Option("--format", help="Format to print.")] = Format.toml,
) -> None:
    """Print the effective configuration without keys, and the source of each value."""
    _require("server")
    from gateway.config.loading import to_toml, to_yaml

    loaded = _load_settings()
    export = to_toml if output is Format.toml else to_yaml
    typer.echo(export(loaded.settings, loaded.sources), nl=False)


@models.callback()
def models_group() -> None:
    """Import, list and check models."""
    _require("server", "models")


@models.command("import")
def models_import(
    source: Annotated[str, typer.Argument(help="A directory with the ONNX files, or a Hugging Face repository (owner/name).")],
    name: Annotated[
        str | None, typer.Option(help="Name of the new ensemble; default: the source's.", show_default=False)
    ] = None,
    into: Annotated[Path, typer.Option(help="Model repository to write to.")] = Path("models"),
    quantization: Annotated[str | None, typer.Option(help="Variant of the graphs, such as int8.", show_default=False)] = None,
    durations: Annotated[
        str,
        typer.Option(help="Durations of a TDT in frames; default: those of config.json, or 0,1,2,3,4.", show_default=False),
    ] = "",
    files: Annotated[
        str, typer.Option(help="Part of the graphs' names, to choose a variant: chunk-16-left-128.", show_default=False)
    ] = "",
    latency: Annotated[
        list[str] | None,
        typer.Option(help="Source of a cached model's encoder for low or throughput: low=DIRECTORY.", show_default=False),
    ] = None,
    cache_type: Annotated[CacheType, typer.Option(help="Type of a cached model's carried values.")] = CacheType.fp16,
    gpu: Annotated[bool, typer.Option("--gpu", help="Run the graphs on a GPU.")] = False,
) -> None:
    """Add a transducer to a model repository: from NeMo, icefall, sherpa-onnx, onnx-asr or parakeet-rs."""
    from amira.models.configs import ModelError
    from amira.models.importing import ImportOptions, import_model

    chosen = name or Path(source).absolute().name
    if not re.fullmatch(r"(\d+(,\d+)*)?", durations):
        fail(f"--durations is {durations!r}; expected whole numbers with commas, such as 0,1,2,3,4")
    latencies = dict(pair.partition("=")[::2] for pair in latency or [])
    if unknown := sorted(latencies.keys() - {"low", "throughput"}):
        fail(f"--latency is {unknown[0]!r}; expected low=SOURCE or throughput=SOURCE")
    jumps_in_frames = [int(d) for d in durations.split(",") if d]
    options = ImportOptions(quantization, files, jumps_in_frames, latencies, cache_type.value, gpu)
    try:
        transducer = import_model(source, chosen, into, options)
    except ModelError as error:
        fail(str(error))
    jumps = f", durations {transducer.parameters['durations']}" if transducer.durations else ""
    typer.echo(
        f"imported {chosen} into {into}: "
        f"{transducer.kind}, {transducer.pieces - 1} pieces, {transducer.features} mel bins{jumps}"
    )
    names = f"""AMIRA_MODELS='{{"{chosen}": "{chosen}"}}'"""
    if gpu:
        typer.echo(f"serve it: by a Triton with a GPU, and the gateway with {names}; the embedded engine has no GPU")
    else:
        typer.echo(f"check it: amira models check {into}\nserve it: AMIRA_MODEL_REPOSITORY={into} {names} amira run")


@models.command("known")
def models_known() -> None:
    """List public models that amira run --model downloads."""
    from amira.models.known import KNOWN

    rows = [("name", "languages", "streams", "licence", "download", "memory", "checked", "from")]
    for name, known in KNOWN.items():
        sizes = f"{known.download_mb} MB", f"{known.memory_mb} MB"
        rows.append((name, known.languages, known.kind, known.licence, *sizes, known.checked, known.source))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@models.command("list")
def models_list(repository: Annotated[Path, typer.Argument(help="Model repository.")] = MODEL_REPOSITORY) -> None:
    """List the ensembles of a model repository, with the reason for each that cannot be used."""
    from amira.models.configs import ModelError
    from amira.models.repository import inspect_repository

    try:
        found = inspect_repository(repository)
    except ModelError as error:
        fail(str(error))
    for recogniser in found:
        if isinstance(recogniser, ModelError):
            typer.echo(f"amira: {recogniser}", err=True)
        else:
            typer.echo(recogniser.describe())
    if any(isinstance(recogniser, ModelError) for recogniser in found):
        raise typer.Exit(USAGE_ERROR)


@models.command("check")
def models_check(repository: Annotated[Path, typer.Argument(help="Model repository.")] = MODEL_REPOSITORY) -> None:
    """Check the files, graphs and configurations of a model repository, and transcribe a recording with the embedded Triton."""
    _require("engine")
    from amira.engine.service import transcribe_with_each
    from gateway.config.settings import Settings
    from gateway.logs import configure_logging

    configure_logging(Settings(log_level="warning"))
    with console.status("running the graphs"):
        names = _check_graphs(repository)
    ports = Ports(LOOPBACK, *free_ports(LOOPBACK, 2))
    body = (SPEECH / "jfk.flac").read_bytes()

    async def check() -> None:
        with console.status("starting Triton"):
            async for name, answer in transcribe_with_each(repository.resolve(), names, ports, body):
                frames = f"{answer.samples} samples, {answer.features} feature frames, {answer.frames} encoder frames"
                typer.echo(f"{name}: {frames}, {len(answer.tokens)} tokens: {answer.text}")

    _main(check())


@models.command("lm")
def models_lm(
    repository: Annotated[Path, typer.Argument(help="Model repository.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Sentences, one per line; may be gzip-compressed. May be repeated.", exists=True, show_default=False),
    ] = None,
    arpa: Annotated[
        Path | None, typer.Option(help="ARPA file over the model's pieces, instead of --text.", exists=True, show_default=False)
    ] = None,
    order: Annotated[int, typer.Option(min=2, max=10, help="Length of the longest n-grams.")] = 5,
    name: Annotated[str | None, typer.Option(help="Ensemble; optional if there is only one.", show_default=False)] = None,
    to_arpa: Annotated[
        Path | None, typer.Option(help="Also write the model, or the present one, as an ARPA file.", show_default=False)
    ] = None,
) -> None:
    """Add an n-gram language model over a model's pieces to its repository; restart Triton to use it."""
    from amira.models.configs import ModelError
    from amira.models.fitting import fit, load_fitted
    from amira.models.ngrams import write_arpa

    if bool(text) == bool(arpa) and not (to_arpa and not text):
        fail("expected --text or --arpa, or --to-arpa alone")
    try:
        if text or arpa:
            fitted = fit(repository, name, text or [], arpa, order)
            source = arpa or f"{fitted.sentences} sentences; {fitted.left_out} that the pieces cannot spell are left out"
            typer.echo(f"wrote {fitted.path}: {fitted.ngrams} n-grams from {source}")
        if to_arpa:
            write_arpa(*load_fitted(repository, name), to_arpa)
            typer.echo(f"wrote {to_arpa}")
    except ModelError as error:
        fail(str(error))


def _ensure_imported(model: str, models_home: Path) -> tuple[Path, str]:
    """Return the repository and ensemble of a public model; an error ends the command with one line."""
    _require("models")
    from amira.models.configs import ModelError
    from amira.models.known import ensure_imported

    try:
        return ensure_imported(model, models_home)
    except ModelError as error:
        fail(str(error))


def _check_graphs(repository: Path) -> list[str]:
    """Run the graphs of a repository's ensembles, and return the names of the ensembles."""
    from amira.models.check import check_frames, check_warmups
    from amira.models.configs import ModelError
    from amira.models.repository import recognisers

    try:
        found = recognisers(repository)
        check_warmups(repository)
        for recogniser in found:
            check_frames(recogniser)
            if recogniser.is_cached:
                typer.echo(recogniser.describe())
                if not recogniser.whole_encoder:
                    continue
            growth = recogniser.check_memory()
            typer.echo(f"{recogniser.name}: a window of 60 s takes up to {growth.window_bytes(60) / 1e9:.2f} GB")
    except ModelError as error:
        fail(str(error))
    return [recogniser.name for recogniser in found]


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(installed_version("amira-asr"))


def _require(*extras: str) -> None:
    """Exit with an error unless these extras of the package are installed."""
    missing = [module for extra in extras for module in MODULES[extra] if not find_spec(module)]
    if missing:
        fail(f"{missing[0]} is not installed; this command needs pip install 'amira-asr[{','.join(extras)}]'")


def _settings() -> Settings:
    """Return the configuration; see ``_load_settings``."""
    return _load_settings().settings


def _load_settings() -> Loaded:
    """Load the configuration, and set up logging. Exit with an error if a value is not allowed."""
    import structlog

    from gateway.config.loading import load_settings
    from gateway.config.settings import ConfigError
    from gateway.logs import configure_logging

    try:
        loaded = load_settings()
    except ConfigError as error:
        fail(str(error))
    configure_logging(loaded.settings)
    log = structlog.get_logger(__name__)
    for notice in loaded.notices:
        log.warning("configuration", notice=notice)
    return loaded


def _main(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a command's coroutine. Exit with an error of one line if it cannot start."""
    import uvloop

    from amira.engine.errors import EngineError
    from amira.models.configs import ModelError
    from gateway.config.settings import ConfigError

    try:
        uvloop.run(coroutine)
    except (EngineError, ModelError, PortError, ConfigError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        pass


def _print_welcome(running: Running, settings: Settings) -> None:
    ports = running.ports
    http = f", HTTP {ports.host}:{ports.http}" if ports.http else ""
    model = next(iter(settings.models))
    recording = SPEECH / "jfk.flac"
    shown = recording.relative_to(Path.cwd()) if recording.is_relative_to(Path.cwd()) else recording
    page = f"\n  page       {running.url}/" if settings.page else ""
    key = ' -H "Authorization: Bearer $AMIRA_KEY"' if settings.api_keys else ""
    typer.echo(
        f"""
ready{page}
  REST       {running.url}/v2/decode/batch/{model}
  WebSocket  {running.url.replace("http", "ws", 1)}/v2/decode/stream/{model}
  API        {running.url}/docs
  metrics    {running.url}/metrics, Triton's http://{ports.host}:{ports.metrics}/metrics
  Triton     gRPC {ports.host}:{ports.grpc}{http}
             log {running.log_path}

try
  curl{key} -H "Content-Type: application/octet-stream" --data-binary @{shown} {running.url}/v2/decode/batch/{model}

Ctrl-C stops it.""",
        err=True,
    )
