"""Declare the settings: their names, types, limits and defaults.

A setting's key is its name in ``config.toml`` and ``config.yaml``. Its environment variable is the key in capitals after
``AMIRA_``. ``loading`` reads both.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from annotated_types import Ge, Le, MultipleOf
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SecretStr,
    StringConstraints,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

DEFAULT_TRITON_PORT = 8001
ENDPOINT = re.compile(r"(?:(?P<scheme>https?|grpcs?)://)?(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{1,5}))?/?")

SECRETS = {"api_keys", "session_key"}
"""Keys whose values are never printed."""


class ConfigError(ValueError):
    """The configuration is not usable. The message is one line that says what to change and where."""


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
    """Describe the allowed values of a setting whose type alone does not; the text follows "must be"."""

    text: str


def _parse(value: Any) -> Any:
    """Parse a list or table given as text: JSON, or a list's items separated by commas."""
    if not isinstance(value, str):
        return value
    if value.strip().startswith(("[", "{")):
        return json.loads(value)
    return [item.strip() for item in value.split(",")]


def _split_endpoint(value: str) -> re.Match[str]:
    """Split an endpoint into scheme, host and port.

    Raises:
        ValueError: the text is not an endpoint.
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
    if not re.fullmatch(r"[!-~]+", value.get_secret_value()):  # an HTTP header carries visible ASCII only
        raise ValueError
    return value


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\sA-Z]+)$")]
Key = Annotated[SecretStr, AfterValidator(_check_key)]
A_NAME = "1 … 64 letters, digits, '.', '_' or '-'"

Alias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:/-]{1,128}$")]
Language = Annotated[str, StringConstraints(pattern=r"^[a-z]{2}$")]

Latency = Literal["low", "balanced", "throughput"]

BUNDLED_ENSEMBLE = "asr_ensemble"
BUNDLED_LANGUAGE = "en"
OPENAI_MODELS = (
    "whisper-1",
    "gpt-transcribe",
    "gpt-4o-transcribe",
    "gpt-4o-mini-transcribe",
    "gpt-4o-mini-transcribe-2025-12-15",
    "gpt-live-transcribe",
    "gpt-realtime-whisper",
)
"""OpenAI's transcription models without speaker labels (openai-python 3.57)."""


def _default_aliases(data: dict[str, Any]) -> dict[str, str]:
    """Return OpenAI's names for the first model."""
    return dict.fromkeys(OPENAI_MODELS, next(iter(data.get("models", ())), ""))


def _default_languages(data: dict[str, Any]) -> dict[str, str]:
    """Return the language of the bundled models."""
    return {name: BUNDLED_LANGUAGE for name, ensemble in data.get("models", {}).items() if ensemble == BUNDLED_ENSEMBLE}


class Settings(
    BaseModel,
    frozen=True,
    extra="forbid",
    use_attribute_docstrings=True,
    validate_default=True,
    str_strip_whitespace=True,
    allow_inf_nan=False,
):
    """All settings of the gateway, each with its default."""

    server_host: Annotated[str, StringConstraints(pattern=r"^\S+$"), Allowed("a host name or an address")] = "0.0.0.0"  # noqa: S104
    """Address to listen on."""
    server_port: Annotated[int, Field(ge=0, le=65535)] = 8057
    """Port to listen on; 0 selects a free port."""
    riva_port: Annotated[int | None, Field(ge=0, le=65535)] = None
    """Port of the gRPC API of NVIDIA Riva, usually 50051; 0 selects a free port. If not set, there is none."""
    tls_certificate: Annotated[str | None, Allowed("the path of a file")] = None
    """File with the certificate of this server and those of its issuers, as PEM; if set, the gateway speaks TLS."""
    tls_key: Annotated[str | None, Allowed("the path of a file")] = None
    """File with the certificate's private key, as PEM; if not set, tls_certificate holds it too."""

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
    """Endpoints of several Tritons with the same models, which share the streams; replaces triton_endpoint."""
    inference_timeout_secs: Annotated[float, Field(ge=0.001, le=3600)] = 5.0
    """Timeout of one request to Triton, in seconds."""
    recovery_timeout_secs: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """Longest time to retry work after Triton failed, in seconds; after it the work fails."""
    canary_interval_secs: Annotated[float, Field(ge=0.5, le=3600)] = 5.0
    """Interval between checks that a Triton recognises speech, in seconds; a Triton that decodes audio is not checked."""
    models: Annotated[
        dict[Name, Name],
        BeforeValidator(_parse),
        Field(min_length=1),
        Allowed(f'a table of names to Triton ensembles (in the environment {{"amira": "asr_ensemble"}}), each name {A_NAME}'),
    ] = {"amira": BUNDLED_ENSEMBLE}
    """Public model names in paths, each with its Triton ensemble."""
    model_aliases: Annotated[
        dict[Alias, Name],
        BeforeValidator(_parse),
        Allowed("a table of other names, of letters, digits and '._:/-', to names in models"),
    ] = Field(default_factory=_default_aliases)
    """Other names of models under /v1; by default those of OpenAI's models that transcribe name the first model."""
    model_languages: Annotated[
        dict[Name, Language],
        BeforeValidator(_parse),
        Allowed("a table of names in models to languages in two letters (ISO 639-1), such as 'en'"),
    ] = Field(default_factory=_default_languages)
    """Language of each model; requests under /v1 in another are refused. A model without an entry accepts any."""

    max_concurrent_streams: Annotated[int, Field(ge=1, le=100_000)] = 10
    """Maximum number of open WebSocket streams."""
    max_concurrent_batches: Annotated[int, Field(ge=1, le=100_000)] = 8
    """Maximum number of batch requests processed at once."""
    inference_queue_size: Annotated[int, Field(ge=0, le=100_000)] = 100
    """Maximum number of batch requests that wait for a place; more are refused."""

    max_request_size: Annotated[int, Field(ge=1, le=2**36)] = 512 * 2**20
    """Maximum body of a batch request, in bytes; one over 1 MiB is kept in a temporary file."""
    max_json_size: Annotated[int, Field(ge=1, le=2**26)] = 8 * 2**20
    """Maximum JSON body of a batch request, in bytes; 8 MiB are 50 s of audio as numbers."""
    max_batch_audio_length_secs: Annotated[float, Field(ge=0.001, le=86_400)] = 14_400.0
    """Maximum length of a recording in a batch request, in seconds of audio."""

    max_frame_bytes: Annotated[int, Field(ge=2, le=16 * 2**20)] = 256 * 2**10
    """Maximum WebSocket frame, in bytes."""
    audio_buffer_capacity: Annotated[int, Field(ge=2, le=2**30, multiple_of=2)] = 2**20
    """Maximum audio of one stream that waits to be decoded, in bytes; at least max_frame_bytes."""
    stream_timeout_secs: Annotated[float, Field(ge=0.001, le=86_400)] = 30.0
    """Idle time after which a stream is closed, in seconds; keep it below Triton's max_sequence_idle_microseconds."""
    max_stream_audio_secs: Annotated[float, Field(ge=0.001, le=31_536_000)] = 14_400.0
    """Maximum length of a stream, in seconds of audio."""

    realtime_timeout_secs: Annotated[float, Field(ge=0.001, le=86_400)] = 600.0
    """Idle time after which a session of /v1/realtime is closed, in seconds."""

    reclaim_silent_secs: Annotated[float, Field(ge=1, le=86_400)] = 60.0
    """A stream without audio for this long, in seconds, loses its place to a new stream when all are taken."""

    max_connects_per_address: Annotated[float, Field(ge=1, le=1_000_000)] = 50.0
    """Maximum rate of new connections from one address, per second on average; a burst may be twice that."""

    latency: Latency = "balanced"
    """Window geometry of live streams: low latency, many streams (throughput), or a balance; the model offers the choices."""
    max_symbols_per_step: Annotated[int | None, Field(ge=1, le=1000)] = None
    """Maximum number of tokens per encoder frame; if not set, the model's own limit."""
    max_total_tokens: Annotated[int | None, Field(ge=1, le=100_000)] = None
    """Maximum number of tokens per segment; at the limit the segment ends. If not set, the model's own limit."""

    api_keys: Annotated[tuple[Key, ...], BeforeValidator(_parse), Allowed("a list of keys in visible ASCII characters")] = ()
    """Valid API keys, of which a client must send one; if empty, no key is needed."""
    max_streams_per_key: Annotated[int | None, Field(ge=1, le=100_000)] = None
    """Maximum number of open streams per key; if not set, no limit."""
    max_audio_rate_per_key: Annotated[float | None, Field(ge=0.001, le=1_000_000)] = None
    """Maximum audio per key, in seconds of audio per second, averaged over one minute; if not set, no limit."""
    max_batches_per_key: Annotated[int | None, Field(ge=1, le=100_000)] = None
    """Maximum batch requests in flight of one key; not limited if not set."""
    max_streams_per_address: Annotated[int | None, Field(ge=1, le=100_000)] = None
    """Maximum concurrent streams of one client address; not limited if not set."""
    max_batches_per_address: Annotated[int | None, Field(ge=1, le=100_000)] = None
    """Maximum batch requests in flight of one client address; not limited if not set."""
    session_key: Annotated[Annotated[SecretStr, Field(min_length=16)] | None, Allowed("a text of 16 characters or more")] = None
    """Key that signs the sessions of resumable streams; use the same key on every gateway. If not set, a random one."""
    enable_cors: bool = False
    """Whether to send CORS headers, so that pages of allowed_origins can read answers."""
    allowed_origins: Annotated[
        tuple[Origin, ...],
        BeforeValidator(_parse),
        Allowed("a list of origins such as 'https://app.example.com' (no path), or '*' for all"),
    ] = Field(default_factory=lambda data: ("*",) if data.get("enable_cors") else ())
    """Origins of web pages that may connect; '*' is any. If not set: any with enable_cors, else none."""

    allowed_hosts: Annotated[
        tuple[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+$")], ...],
        BeforeValidator(_parse),
        Allowed("a list of host names such as 'asr.example.com'"),
    ] = ()
    """Host names of this server, besides localhost and IP addresses. Pages with such a host as origin may connect."""

    page: bool | None = None
    """Whether to serve the web pages / and /status; if not set, ``amira run`` serves them and ``amira serve`` does not."""

    drain_timeout_secs: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """Time for open streams to end by themselves when the server stops, in seconds."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest severity that is logged."""
    log_format: Literal["json", "console"] = "json"
    """Log format: JSON lines, or coloured text for a console."""
    service_name: Annotated[Name, Allowed(A_NAME)] = "amira-asr-server"
    """Name of this service in health answers and traces."""
    jaeger_endpoint: Annotated[str | None, Field(pattern=r"^https?://\S+$"), Allowed("a URL with http:// or https://")] = None
    """URL that takes traces as OTLP over HTTP; if not set, OTEL_EXPORTER_OTLP_ENDPOINT is used, or no traces are sent."""

    @property
    def triton_addresses(self) -> list[Address]:
        """The addresses of all Tritons, without duplicates."""
        return list(dict.fromkeys(map(_address, self.triton_endpoints or (self.triton_endpoint,))))

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true as a number; Pydantic would read it as 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in (bool, bool | None):
            raise ValueError
        return value

    @field_validator("model_aliases")
    @classmethod
    def _name_models(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        models = info.data.get("models")
        if models and (unknown := set(value.values()) - models.keys()):
            raise PydanticCustomError("conflict", "must map to names in models, which has no '{name}'", {"name": min(unknown)})
        return value

    @field_validator("audio_buffer_capacity")
    @classmethod
    def _hold_a_frame(cls, value: int, info: ValidationInfo) -> int:
        limit = info.data.get("max_frame_bytes", 0)
        if value < limit:
            raise PydanticCustomError("conflict", "must be at least max_frame_bytes, which is {limit}", {"limit": limit})
        return value


def allowed_values(key: str) -> str:
    """Return the allowed values of a setting as text that follows "must be"."""
    field = Settings.model_fields[key]
    limits = {type(limit): limit for limit in field.metadata}
    if Allowed in limits:
        return str(limits[Allowed].text)
    if field.annotation in (bool, bool | None):
        return "true or false"
    if get_origin(field.annotation) is Literal:
        return f"one of {', '.join(get_args(field.annotation))}"
    kind = "a number" if field.annotation in (float, float | None) else "a whole number"
    multiple = f", a multiple of {limits[MultipleOf].multiple_of}" if MultipleOf in limits else ""
    return f"{kind} within {limits[Ge].ge} … {limits[Le].le}{multiple}"
