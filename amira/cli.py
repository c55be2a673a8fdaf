"""The ``amira`` command."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import structlog
import typer
import uvloop
from rich.console import Console

from amira import demo as demonstration
from amira.engine.service import LOOPBACK, MODEL_REPOSITORY, SPEECH, Running, service, transcribe_with_each
from amira.engine.triton import EngineError, Ports, free_ports
from gateway import __version__
from gateway.config.loading import load_settings, to_toml, to_yaml
from gateway.config.settings import ConfigError, Settings
from gateway.logs import configure_logging
from gateway.server import build_server

if TYPE_CHECKING:
    from amira.models.repository import Recogniser

USAGE_ERROR = 2

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Speech recognition server.")
config = typer.Typer(no_args_is_help=True, help="The gateway's configuration.")
app.add_typer(config, name="config")
models = typer.Typer(no_args_is_help=True)
app.add_typer(models, name="models")
console = Console(stderr=True)
log = structlog.get_logger()

ModelRepository = Annotated[Path, typer.Option(envvar="AMIRA_MODEL_REPOSITORY", help="The models to serve.")]
TritonHost = Annotated[str, typer.Option(envvar="AMIRA_TRITON_HOST", help="Address that the embedded Triton listens on.")]
HttpPort = Annotated[int, typer.Option(envvar="AMIRA_TRITON_HTTP_PORT", min=1, max=65535, help="Its HTTP port.")]
GrpcPort = Annotated[int, typer.Option(envvar="AMIRA_TRITON_GRPC_PORT", min=1, max=65535, help="Its gRPC port.")]
MetricsPort = Annotated[int, typer.Option(envvar="AMIRA_TRITON_METRICS_PORT", min=1, max=65535, help="Its metrics port.")]


class Format(str, Enum):
    """Formats of a configuration."""

    toml = "toml"
    yaml = "yaml"


@app.command()
def run(
    model_repository: ModelRepository = MODEL_REPOSITORY,
    triton_host: TritonHost = LOOPBACK,
    triton_http_port: HttpPort = 8000,
    triton_grpc_port: GrpcPort = 8001,
    triton_metrics_port: MetricsPort = 8002,
) -> None:
    """Serve on an embedded Triton: starts it and the gateway, and stops both on Ctrl-C."""
    settings = _settings()
    ports = Ports(triton_host, triton_http_port, triton_grpc_port, triton_metrics_port)

    async def serve() -> None:
        with console.status("starting Triton") as status:

            def show(ready: int, models: int) -> None:
                status.update(f"starting Triton: {ready} of {models} models ready")

            async with service(settings, model_repository.resolve(), ports, show) as (running, serving):
                status.stop()
                _print_welcome(running, settings)
                await asyncio.shield(serving)

    _main(serve)


@app.command()
def serve() -> None:
    """Serve in front of a Triton that runs elsewhere (triton_endpoint)."""
    settings = _settings()
    _main(lambda: build_server(settings).serve())


@app.command()
def demo(
    recordings: Annotated[
        list[Path] | None,
        typer.Argument(help="Recordings; by default the bundled ones.", exists=True, dir_okay=False, show_default=False),
    ] = None,
    model_repository: ModelRepository = MODEL_REPOSITORY,
) -> None:
    """Start a server on free ports, transcribe recordings by batch and by live stream, and exit."""
    gateway_port, *triton_ports = free_ports(LOOPBACK, 4)
    settings = _settings().model_copy(update={"server_host": LOOPBACK, "server_port": gateway_port, "log_level": "warning"})
    configure_logging(settings)
    recorded = [(file.name, file.read_bytes()) for file in recordings or sorted(SPEECH.glob("*.flac"))]

    async def show() -> None:
        with console.status("starting the server") as status:
            async with service(settings, model_repository.resolve(), Ports(LOOPBACK, *triton_ports), lambda *_: None) as (
                running,
                _,
            ):
                status.stop()
                for name, body in recorded:
                    await demonstration.show(running.url, next(iter(settings.models)), name, body, settings.api_keys)

    _main(show)


@config.command("show")
def config_show(
    output: Annotated[Format, typer.Option("--format", help="Format to print.")] = Format.toml,
) -> None:
    """Print the configuration in force; keys are left out."""
    settings = _settings()
    typer.echo(to_toml(settings) if output is Format.toml else to_yaml(settings), nl=False)


@models.callback()
def models_need_their_packages() -> None:
    """Models: bring your own, check a repository."""
    if missing := [name for name in ("huggingface_hub", "onnx", "onnx_asr", "onnxruntime") if not find_spec(name)]:
        _fail(f"{', '.join(missing)} not found; pip install '.[models]' in the checkout brings what amira models needs")


@models.command("import")
def models_import(
    source: Annotated[str, typer.Argument(help="A directory with the ONNX files, or a Hugging Face repository (owner/name).")],
    name: Annotated[
        str | None, typer.Option(help="Name of the new ensemble; by default the source's.", show_default=False)
    ] = None,
    into: Annotated[Path, typer.Option(help="The model repository to write to.")] = MODEL_REPOSITORY,
    quantization: Annotated[str | None, typer.Option(help="Variant of the graphs, such as int8.", show_default=False)] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Run its graphs on a GPU.")] = False,
) -> None:
    """Add a transducer in NeMo's ONNX export to a model repository."""
    from amira.models.graphs import ModelError  # noqa: PLC0415 (brings onnx, which the server has no use for)
    from amira.models.importing import import_model  # noqa: PLC0415

    chosen = name or Path(source).absolute().name
    try:
        transducer = import_model(source, chosen, into, quantization, gpu=gpu)
    except ModelError as error:
        _fail(str(error))
    durations = f", durations {transducer.parameters['durations']} (assumed)" if transducer.durations else ""
    typer.echo(
        f"imported {chosen} into {into}: "
        f"{transducer.kind}, {transducer.pieces - 1} pieces, {transducer.features} mel bins{durations}"
    )
    names = f"""AMIRA_MODELS='{{"{chosen}": "{chosen}"}}'"""
    if gpu:
        typer.echo(f"serve it: by a Triton with a GPU, and the gateway with {names}; the embedded engine has no GPU")
    else:
        typer.echo(f"check it: amira models check {into}\nserve it: AMIRA_MODEL_REPOSITORY={into} {names} amira run")


@models.command("list")
def models_list(repository: Annotated[Path, typer.Argument(help="The model repository.")] = MODEL_REPOSITORY) -> None:
    """List the ensembles of a model repository, and what is wrong with those that can't be used."""
    from amira.models.graphs import ModelError  # noqa: PLC0415 (see models_import)
    from amira.models.repository import look_into  # noqa: PLC0415

    try:
        found = look_into(repository)
    except ModelError as error:
        _fail(str(error))
    for recogniser in found:
        if isinstance(recogniser, ModelError):
            typer.echo(f"amira: {recogniser}", err=True)
        else:
            typer.echo(recogniser.describe())
    if any(isinstance(recogniser, ModelError) for recogniser in found):
        raise typer.Exit(USAGE_ERROR)


@models.command("check")
def models_check(repository: Annotated[Path, typer.Argument(help="The model repository.")] = MODEL_REPOSITORY) -> None:
    """Check a model repository: files, graphs and configurations, and one utterance on the embedded Triton."""
    configure_logging(Settings(log_level="warning"))
    found = _recognisers(repository)
    names = [recogniser.name for recogniser in found]
    with console.status("measuring the memory of windows"):
        for recogniser in found:
            _check_memory(recogniser)
    ports = Ports(LOOPBACK, *free_ports(LOOPBACK, 3))
    body = (SPEECH / "jfk.flac").read_bytes()

    async def check() -> None:
        with console.status("starting Triton"):
            async for name, answer in transcribe_with_each(repository.resolve(), names, ports, body):
                frames = f"{answer.samples} samples, {answer.features} feature frames, {answer.frames} encoder frames"
                typer.echo(f"{name}: {frames}, {len(answer.tokens)} tokens: {answer.text}")

    _main(check)


def _check_memory(recogniser: Recogniser) -> None:
    from amira.models.graphs import ModelError  # noqa: PLC0415 (see models_import)

    try:
        growth = recogniser.check_memory()
    except ModelError as error:
        _fail(str(error))
    typer.echo(f"{recogniser.name}: a window of 60 s takes up to {growth.window_bytes(60) / 1e9:.2f} GB")


def _recognisers(repository: Path) -> list[Recogniser]:
    from amira.models.graphs import ModelError  # noqa: PLC0415 (see models_import)
    from amira.models.repository import recognisers  # noqa: PLC0415

    try:
        return recognisers(repository)
    except ModelError as error:
        _fail(str(error))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _settings() -> Settings:
    """The configuration, logging set up by it; a bad value ends the command with one line."""
    try:
        loaded = load_settings()
    except ConfigError as error:
        _fail(str(error))
    configure_logging(loaded.settings)
    for notice in loaded.notices:
        log.warning("configuration", notice=notice)
    return loaded.settings


def _main(serve: Callable[[], object]) -> None:
    try:
        uvloop.run(serve())  # type: ignore[arg-type]
    except (EngineError, ConfigError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        pass


def _fail(message: str) -> NoReturn:
    typer.echo(f"amira: {message}", err=True)
    raise typer.Exit(USAGE_ERROR)


def _print_welcome(running: Running, settings: Settings) -> None:
    model = next(iter(settings.models))
    recording = SPEECH / "jfk.flac"
    shown = recording.relative_to(Path.cwd()) if recording.is_relative_to(Path.cwd()) else recording
    key = ' -H "Authorization: Bearer $AMIRA_KEY"' if settings.api_keys else ""
    typer.echo(
        f"""
ready
  REST       {running.url}/v2/decode/batch/{model}
  WebSocket  {running.url.replace("http", "ws", 1)}/v2/decode/stream/{model}
  API        {running.url}/docs
  metrics    {running.url}/metrics, Triton's http://{running.ports.host}:{running.ports.metrics}/metrics
  Triton     gRPC {running.ports.host}:{running.ports.grpc}, HTTP {running.ports.host}:{running.ports.http}
             log {running.log_path}

try
  curl{key} -H "Content-Type: application/octet-stream" --data-binary @{shown} {running.url}/v2/decode/batch/{model}

Ctrl-C stops it.""",
        err=True,
    )
