"""The settings: what there is, where it comes from, and what it may be.

A setting's key is its name in ``config.toml`` and ``config.yaml``, and in capitals after ``AMIRA_`` its environment variable.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import tomli_w
import yaml
from annotated_types import Ge, Le, MultipleOf
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "AMIRA_"
CONFIG_FILE = f"{PREFIX}CONFIG_FILE"
DEFAULT_TRITON_PORT = 8001
ENDPOINT = re.compile(r"(?:(?P<scheme>https?|grpcs?)://)?(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{1,5}))?/?")

LEGACY_VARIABLES = {
    "SERVER_HOST": "server_host",
    "SERVER_PORT": "server_port",
    "TRITON_ENDPOINT": "triton_endpoint",
    "INFERENCE_TIMEOUT_SECS": "inference_timeout_secs",
    "VOCABULARY_PATH": "vocabulary_path",
}
"""Environment variables of the first servers, and their keys; below ``AMIRA_*``, above the files."""

LAUNCHER_VARIABLES = {
    CONFIG_FILE,
    *(f"{PREFIX}{name}" for name in ("BASE_URL", "API_KEY")),
    f"{PREFIX}MODEL_REPOSITORY",
    *(f"{PREFIX}TRITON_{name}" for name in ("HOST", "HTTP_PORT", "GRPC_PORT", "METRICS_PORT")),
}
"""``AMIRA_*`` variables that are no settings."""

KEYS_WITHOUT_EFFECT = {
    "vocabulary_path": "the vocabulary is part of the model repository",
    "keepalive_check_period_ms": "idle time is measured, not checked for now and then",
    "preprocessor_model_name": "rnnt_greedy_bls/config.pbtxt names the models",
    "encoder_model_name": "rnnt_greedy_bls/config.pbtxt names the models",
    "decoder_joint_model_name": "rnnt_greedy_bls/config.pbtxt names the models",
    "enable_cpu_affinity": "the operating system places threads",
    "enable_numa": "the operating system places memory",
    "inference_threads": "inference is Triton's: see instance_group in each config.pbtxt",
    "io_threads": "one event loop serves every connection",
    "network_threads": "one event loop serves every connection",
    "audio_buffer_pool_size": "each stream has a buffer of its own, of audio_buffer_capacity",
    "encoder_pool_size": "tensors are Triton's",
    "decoder_pool_size": "tensors are Triton's",
    "max_triton_connections": "one gRPC connection carries every stream",
    "connection_idle_timeout_secs": "the connection to Triton stays open",
    "websocket_buffer_size": "max_frame_bytes limits a frame, audio_buffer_capacity what waits",
}
"""Keys of earlier servers that are accepted, and why they change nothing here."""


SECRETS = {"api_keys", "session_key"}
"""Keys whose values are never shown."""


class ConfigError(ValueError):
    """The configuration can't be used; one line that says what to change where."""


class Address(NamedTuple):
    """Where a Triton listens for gRPC.

    Attributes:
        target: ``host:port``.
        tls: whether to use TLS.
    """

    target: str
    tls: bool


@dataclass(frozen=True)
class Allowed:
    """On a setting whose type doesn't tell: what it may be, after "must be"."""

    text: str


def _parse(value: Any) -> Any:
    """A list or table given as text: JSON, or a list's items between commas."""
    if not isinstance(value, str):
        return value
    if value.strip().startswith(("[", "{")):
        return json.loads(value)
    return [item.strip() for item in value.split(",")]


def _split_endpoint(value: str) -> re.Match[str]:
    """Scheme, host and port.

    Raises:
        ValueError: it is none.
    """
    match = ENDPOINT.fullmatch(value)
    if not match or not 0 < int(match["port"] or DEFAULT_TRITON_PORT) < 2**16:
        raise ValueError
    return match


def _address(endpoint: str) -> Address:
    parts = _split_endpoint(endpoint)
    return Address(f"{parts['host']}:{parts['port'] or DEFAULT_TRITON_PORT}", parts["scheme"] in ("https", "grpcs"))


def _check_endpoint(value: str) -> str:
    _split_endpoint(value)
    return value


def _check_key(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[!-~]+", value.get_secret_value()):  # what an HTTP header can carry
        raise ValueError
    return value


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\sA-Z]+)$")]
Key = Annotated[SecretStr, AfterValidator(_check_key)]
A_NAME = "1 … 64 letters, digits, '.', '_' or '-'"


class Settings(
    BaseModel,
    frozen=True,
    extra="forbid",
    use_attribute_docstrings=True,
    validate_default=True,
    str_strip_whitespace=True,
    allow_inf_nan=False,
):
    """Everything that can be set, with its default."""

    server_host: Annotated[str, StringConstraints(pattern=r"^\S+$"), Allowed("a host name or an address")] = "0.0.0.0"  # noqa: S104
    """Address to listen on."""
    server_port: Annotated[int, Field(ge=0, le=65535)] = 8057
    """Port to listen on; 0 takes a free one."""

    triton_endpoint: Annotated[
        str,
        AfterValidator(_check_endpoint),
        Allowed("host:port, optionally after http://, https://, grpc:// or grpcs://"),
    ] = "http://localhost:8001"
    """Triton's gRPC endpoint; https:// and grpcs:// use TLS."""
    triton_endpoints: Annotated[
        tuple[Annotated[str, AfterValidator(_check_endpoint)], ...],
        BeforeValidator(_parse),
        Allowed("a list of endpoints, each as triton_endpoint has it"),
    ] = ()
    """Several Tritons with the same models, which share the streams; if not set, triton_endpoint is the only one."""
    inference_timeout_secs: Annotated[float, Field(ge=0.001, le=3600)] = 5.0
    """Longest wait for one answer of Triton, in seconds."""
    recovery_timeout_secs: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """Longest time in which work that Triton failed is tried again, in seconds; then it fails."""
    canary_interval_secs: Annotated[float, Field(ge=0.5, le=3600)] = 5.0
    """Pause between two checks that each Triton recognises speech, in seconds; a Triton that decodes audio is not checked."""
    models: Annotated[
        dict[Name, Name],
        BeforeValidator(_parse),
        Field(min_length=1),
        Allowed(f'a table of names to Triton ensembles (in the environment {{"amira": "asr_ensemble"}}), each name {A_NAME}'),
    ] = {"amira": "asr_ensemble"}
    """Public names of the models in paths, and the Triton ensemble behind each."""

    max_concurrent_streams: Annotated[int, Field(ge=1, le=100_000)] = 10
    """Most WebSocket streams at once."""
    max_concurrent_batches: Annotated[int, Field(ge=1, le=100_000)] = 8
    """Most batch requests worked on at once."""
    inference_queue_size: Annotated[int, Field(ge=0, le=100_000)] = 100
    """Most batch requests that wait for their turn; more are refused."""

    max_request_size: Annotated[int, Field(ge=1, le=2**30)] = 10 * 2**20
    """Largest body of a batch request, in bytes."""
    max_batch_audio_length_secs: Annotated[float, Field(ge=0.001, le=86_400)] = 30.0
    """Longest recording of a batch request, in seconds of audio."""

    max_frame_bytes: Annotated[int, Field(ge=2, le=16 * 2**20)] = 256 * 2**10
    """Largest WebSocket frame, in bytes."""
    audio_buffer_capacity: Annotated[int, Field(ge=2, le=2**30, multiple_of=2)] = 2**20
    """Audio of one stream that may wait to be decoded, in bytes; at least max_frame_bytes."""
    stream_timeout_secs: Annotated[float, Field(ge=0.001, le=86_400)] = 30.0
    """A stream without a frame for longer is closed, in seconds; keep it below Triton's max_sequence_idle_microseconds."""
    max_stream_audio_secs: Annotated[float, Field(ge=0.001, le=31_536_000)] = 14_400.0
    """Longest stream, in seconds of audio."""

    max_connects_per_address: Annotated[float, Field(ge=1, le=1_000_000)] = 50.0
    """Most new connections from one address, a second on average; twice as many at once. Those of a proxy count as its own."""

    latency: Literal["low", "balanced", "throughput"] = "balanced"
    """Windows of live streams, of those that the model offers: text soon, or many streams, or something between."""
    max_symbols_per_step: Annotated[int | None, Field(ge=1, le=1000)] = None
    """Most tokens on one encoder frame; if not set, the model's own limit."""
    max_total_tokens: Annotated[int | None, Field(ge=1, le=100_000)] = None
    """Most tokens in a segment, which then ends; if not set, the model's own limit."""

    api_keys: Annotated[tuple[Key, ...], BeforeValidator(_parse), Allowed("a list of keys in visible ASCII characters")] = ()
    """Keys of which a client must send one; with none here, nobody needs one."""
    max_streams_per_key: Annotated[int | None, Field(ge=1, le=100_000)] = None
    """Most streams at once with one key; if not set, as many as there are."""
    max_audio_rate_per_key: Annotated[float | None, Field(ge=0.001, le=1_000_000)] = None
    """Most audio with one key, in seconds a second on average over a minute; if not set, any."""
    session_key: Annotated[Annotated[SecretStr, Field(min_length=16)] | None, Allowed("a text of 16 characters or more")] = None
    """Signs the sessions with which clients go on after a lost connection; the same on every gateway. If not set, random."""
    enable_cors: bool = False
    """Send CORS headers, so that pages of allowed_origins can read answers."""
    allowed_origins: Annotated[
        tuple[Origin, ...],
        BeforeValidator(_parse),
        Allowed("a list of origins such as 'https://app.example.com' (no path), or '*' for all"),
    ] = Field(default_factory=lambda data: ("*",) if data["enable_cors"] else ())
    """Web pages that browsers may connect from, by origin; '*' is any. If not set: any with enable_cors, else none."""

    drain_timeout_secs: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """Time that streams have to end by themselves when the server stops, in seconds."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged."""
    log_format: Literal["json", "console"] = "json"
    """Logs for machines or for people."""
    service_name: Annotated[Name, Allowed(A_NAME)] = "amira-asr-server"
    """Name of this service in health answers and traces."""
    jaeger_endpoint: Annotated[str | None, Field(pattern=r"^https?://\S+$"), Allowed("a URL with http:// or https://")] = None
    """Where traces are sent, as OTLP over HTTP; if not set, where OTEL_EXPORTER_OTLP_ENDPOINT says, or nowhere."""

    @property
    def triton_addresses(self) -> list[Address]:
        """The Tritons to use, each once."""
        return list(dict.fromkeys(map(_address, self.triton_endpoints or (self.triton_endpoint,))))

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would take true for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError
        return value

    @field_validator("audio_buffer_capacity")
    @classmethod
    def _hold_a_frame(cls, value: int, info: ValidationInfo) -> int:
        limit = info.data.get("max_frame_bytes", 0)
        if value < limit:
            raise PydanticCustomError("conflict", "must be at least max_frame_bytes, which is {limit}", {"limit": limit})
        return value


KNOWN_KEYS = (*Settings.model_fields, *KEYS_WITHOUT_EFFECT)
OWN_VARIABLES = {f"{PREFIX}{key.upper()}": key for key in KNOWN_KEYS}


class Loaded(NamedTuple):
    """The settings in force.

    Attributes:
        settings: themselves.
        sources: where each one's value comes from: an environment variable, a file or ``default``.
        notices: a line for whatever was given and has no effect.
    """

    settings: Settings
    sources: dict[str, str]
    notices: list[str]


class _Given(NamedTuple):
    """A value as it was given, and where."""

    value: Any
    source: str


def load_settings(environ: Mapping[str, str] = os.environ, directory: Path = Path()) -> Loaded:
    """Gather the settings: ``AMIRA_*``, then the first servers' variables, ``config.yaml``, ``config.toml`` and the defaults.

    Args:
        environ: environment variables; an empty one counts as not set. ``AMIRA_CONFIG_FILE`` names the one file to read.
        directory: where the files are.

    Raises:
        ConfigError: a file can't be read, or a key or value in it or in the environment is wrong.
    """
    variables = {name: value for name, value in environ.items() if value.strip()}
    given = _gather(variables, directory)
    notices = [
        f"{key} (from {given.pop(key).source}) has no effect: {reason}"
        for key, reason in KEYS_WITHOUT_EFFECT.items()
        if key in given
    ]
    notices += [
        f"{name} has no effect: it is no setting{_suggest(name, OWN_VARIABLES)}"
        for name in sorted(variables.keys() - OWN_VARIABLES.keys() - LAUNCHER_VARIABLES)
        if name.startswith(PREFIX)
    ]
    try:
        settings = Settings.model_validate({key: value for key, (value, _) in given.items()})
    except ValidationError as error:
        raise ConfigError(_explain(error, given)) from None
    sources = {key: given[key].source if key in given else "default" for key in Settings.model_fields}
    return Loaded(settings, sources, notices)


def to_toml(settings: Settings) -> str:
    """The settings as a ``config.toml``, without the API keys and what is not set, which TOML can't express."""
    return tomli_w.dumps(settings.model_dump(mode="json", exclude=SECRETS, exclude_none=True))


def to_yaml(settings: Settings) -> str:
    """The settings as a ``config.yaml``, without the API keys."""
    return yaml.safe_dump(settings.model_dump(mode="json", exclude=SECRETS), sort_keys=False)


def _gather(variables: Mapping[str, str], directory: Path) -> dict[str, _Given]:
    """Each key's value from where it counts most."""
    given: dict[str, _Given] = {}
    if named := variables.get(CONFIG_FILE):
        files = {named: f"{CONFIG_FILE} = {named!r}"}
    else:
        files = {name: name for name in ("config.toml", "config.yaml") if (directory / name).exists()}
    for name, title in files.items():
        for key, value in _read_file(directory / name, title).items():
            if key not in KNOWN_KEYS:
                raise ConfigError(f"{key} (from {name}): is no setting{_suggest(str(key), KNOWN_KEYS)}")
            given[key] = _Given(value, name)
    for name, key in (LEGACY_VARIABLES | OWN_VARIABLES).items():
        if name in variables:
            given[key] = _Given(variables[name], name)
    return given


def _read_file(path: Path, title: str) -> dict[Any, Any]:
    """What a file holds; ``title`` is what errors call it."""
    readers: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
    read = readers.get(path.suffix)
    if not read:
        raise ConfigError(f"{title}: must be a {' or '.join(readers)} file")
    try:
        content = read(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{title}: can't be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        # A YAML error's own text quotes the file, in which there may be API keys.
        mark = getattr(error, "problem_mark", None)
        place = f" (at line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise ConfigError(f"{title}: is no valid {path.suffix[1:].upper()}: {problem}{place}") from None
    if not isinstance(content, dict | None):
        raise ConfigError(f"{title}: must be a table of keys and values")
    return content or {}


def _suggest(name: str, known: Iterable[str]) -> str:
    nearest = get_close_matches(name, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _explain(error: ValidationError, given: Mapping[str, _Given]) -> str:
    """The first of the errors in one line."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    value, source = given.get(key, (first["input"], None))
    shown = "***" if key in SECRETS else repr(value)
    rule = first["msg"] if first["type"] == "conflict" else f"must be {_allowed(key)}"
    return f"{key} = {shown} ({f'from {source}' if source else 'default'}): {rule}"


def _allowed(key: str) -> str:
    """What a setting may be, from its type and limits."""
    field = Settings.model_fields[key]
    limits = {type(limit): limit for limit in field.metadata}
    if Allowed in limits:
        return str(limits[Allowed].text)
    if field.annotation is bool:
        return "true or false"
    if get_origin(field.annotation) is Literal:
        return f"one of {', '.join(get_args(field.annotation))}"
    kind = "a number" if field.annotation in (float, float | None) else "a whole number"
    multiple = f", a multiple of {limits[MultipleOf].multiple_of}" if MultipleOf in limits else ""
    return f"{kind} within {limits[Ge].ge} … {limits[Le].le}{multiple}"
