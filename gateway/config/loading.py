"""Load the settings from environment variables and configuration files, and export them.

Sources by precedence, highest first: ``AMIRA_*`` variables, the legacy variables, ``config.yaml``, ``config.toml``, defaults.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
import yaml
from pydantic import ValidationError

from gateway.config.settings import SECRETS, ConfigError, Settings, allowed_values

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "AMIRA_"
CONFIG_FILE = f"{PREFIX}CONFIG_FILE"
TOP_LEVEL_KEY = re.compile(r"\[?(?P<key>\w+)(\]$| = |:)")
"""Start of a line of TOML or YAML that sets a key; nested YAML is indented."""

DEFAULT = "default"
"""Source of a value that is not configured."""

LEGACY_VARIABLES = {
    "SERVER_HOST": "server_host",
    "SERVER_PORT": "server_port",
    "TRITON_ENDPOINT": "triton_endpoint",
    "INFERENCE_TIMEOUT_SECS": "inference_timeout_secs",
    "VOCABULARY_PATH": "vocabulary_path",
}
"""Environment variables of earlier servers, with their keys."""

LAUNCHER_VARIABLES = {
    CONFIG_FILE,
    *(f"{PREFIX}{name}" for name in ("BASE_URL", "API_KEY", "MODEL", "MODELS_HOME", "MODEL_REPOSITORY")),
    *(f"{PREFIX}TRITON_{name}" for name in ("HOST", "HTTP_PORT", "GRPC_PORT", "METRICS_PORT")),
}
"""``AMIRA_*`` variables that are not settings of the gateway."""

KEYS_WITHOUT_EFFECT = {
    "vocabulary_path": "the vocabulary is part of the model repository",
    "keepalive_check_period_ms": "idle time is measured continuously, not checked periodically",
    "preprocessor_model_name": "rnnt_greedy_bls/config.pbtxt names the models",
    "encoder_model_name": "rnnt_greedy_bls/config.pbtxt names the models",
    "decoder_joint_model_name": "rnnt_greedy_bls/config.pbtxt names the models",
    "enable_cpu_affinity": "the operating system places threads",
    "enable_numa": "the operating system places memory",
    "inference_threads": "Triton runs inference: see instance_group in each config.pbtxt",
    "io_threads": "one event loop serves every connection",
    "network_threads": "one event loop serves every connection",
    "audio_buffer_pool_size": "each stream has its own buffer of audio_buffer_capacity",
    "encoder_pool_size": "Triton manages the tensors",
    "decoder_pool_size": "Triton manages the tensors",
    "max_triton_connections": "one gRPC connection carries every stream",
    "connection_idle_timeout_secs": "the connection to Triton stays open",
    "websocket_buffer_size": "max_frame_bytes limits a frame, audio_buffer_capacity limits waiting audio",
}
"""Accepted keys of earlier servers, with the reason for which they have no effect."""

KNOWN_KEYS = (*Settings.model_fields, *KEYS_WITHOUT_EFFECT)
OWN_VARIABLES = {f"{PREFIX}{key.upper()}": key for key in KNOWN_KEYS}


class Loaded(NamedTuple):
    """The effective settings.

    Attributes:
        settings: the settings.
        sources: the source of each setting's value: the name of an environment variable, the path of a file, or ``default``.
        notices: one line for each configured value that has no effect.
    """

    settings: Settings
    sources: dict[str, str]
    notices: list[str]


class _Given(NamedTuple):
    """A configured value and its source."""

    value: Any
    source: str


def load_settings(environ: Mapping[str, str] = os.environ, directory: Path = Path()) -> Loaded:
    """Load the settings.

    Args:
        environ: environment variables; an empty one counts as not set. ``AMIRA_CONFIG_FILE`` names the only file to read.
        directory: directory of the files.

    Raises:
        ConfigError: a file is not readable, or a key or value is wrong.
    """
    variables = {name: value for name, value in environ.items() if value.strip()}
    given = _gather(variables, directory)
    notices = [
        f"{key} (from {given.pop(key).source}) has no effect: {reason}"
        for key, reason in KEYS_WITHOUT_EFFECT.items()
        if key in given
    ]
    notices += [
        f"{name} has no effect: it is not a setting{_suggest(name, OWN_VARIABLES, PREFIX)}"
        for name in sorted(variables.keys() - OWN_VARIABLES.keys() - LAUNCHER_VARIABLES)
        if name.startswith(PREFIX)
    ]
    try:
        settings = Settings.model_validate({key: value for key, (value, _) in given.items()})
    except ValidationError as error:
        raise ConfigError(_explain(error, given)) from None
    sources = {key: given[key].source if key in given else DEFAULT for key in Settings.model_fields}
    return Loaded(settings, sources, notices)


def to_toml(settings: Settings, sources: Mapping[str, str] | None = None) -> str:
    """Return the settings as a ``config.toml``, without secrets and without unset values, which TOML does not have.

    Args:
        settings: the settings.
        sources: the source of each setting, which is then shown in comments, as are the secrets and unset values.
    """
    exported = settings.model_dump(mode="json", exclude=SECRETS, exclude_none=True)
    return _annotate(tomli_w.dumps(exported), settings, sources)


def to_yaml(settings: Settings, sources: Mapping[str, str] | None = None) -> str:
    """Return the settings as a ``config.yaml``, without secrets; ``sources`` as in ``to_toml``."""
    exported = settings.model_dump(mode="json", exclude=SECRETS)
    return _annotate(yaml.safe_dump(exported, sort_keys=False, width=math.inf), settings, sources)


def _annotate(text: str, settings: Settings, sources: Mapping[str, str] | None) -> str:
    """Add the sources to an exported configuration."""
    if sources is None:
        return text
    lines: list[str] = []
    missing = dict(sources)
    in_table = False  # TOML has its tables last
    for line in text.splitlines():
        match = None if in_table and not line.startswith("[") else TOP_LEVEL_KEY.match(line)
        source = missing.pop(match["key"], None) if match else None
        lines.append(f"{line}  # {source}" if source else line)
        in_table = in_table or line.startswith("[")
    for key, source in missing.items():
        state = "is not shown" if key in SECRETS and getattr(settings, key) else "is not set"
        lines.append(f"# {key} {state}  # {source}")
    return "\n".join(lines) + "\n"


def _gather(variables: Mapping[str, str], directory: Path) -> dict[str, _Given]:
    """Return each configured key's value from the source with the highest precedence."""
    given: dict[str, _Given] = {}
    if named := variables.get(CONFIG_FILE):
        files = {named: f"{CONFIG_FILE} = {named!r}"}
    else:
        files = {name: name for name in ("config.toml", "config.yaml") if (directory / name).exists()}
    for name, title in files.items():
        for key, value in _read_file(directory / name, title).items():
            if key not in KNOWN_KEYS:
                raise ConfigError(f"{key} (from {name}): is not a setting{_suggest(str(key), KNOWN_KEYS)}")
            given[key] = _Given(value, name)
    for name, key in (LEGACY_VARIABLES | OWN_VARIABLES).items():
        if name in variables:
            given[key] = _Given(variables[name], name)
    return given


def _read_file(path: Path, title: str) -> dict[Any, Any]:
    """Read a file into a dictionary; errors call the file by its ``title``."""
    readers: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
    read = readers.get(path.suffix)
    if not read:
        raise ConfigError(f"{title}: must be a {' or '.join(readers)} file")
    try:
        content = read(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{title}: is not readable: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        # A YAML error's own text quotes the file, which may contain API keys.
        mark = getattr(error, "problem_mark", None)
        place = f" (at line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise ConfigError(f"{title}: is not valid {path.suffix[1:].upper()}: {problem}{place}") from None
    if not isinstance(content, dict | None):
        raise ConfigError(f"{title}: must be a table of keys and values")
    return content or {}


def _suggest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return the part of a message that names the most similar known name; a common prefix does not make names similar."""
    by_rest = {one.removeprefix(prefix): one for one in known}
    nearest = get_close_matches(name.removeprefix(prefix), by_rest, n=1)
    return f"; did you mean {by_rest[nearest[0]]}?" if nearest else ""


def _explain(error: ValidationError, given: Mapping[str, _Given]) -> str:
    """Describe the first error in one line."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    value, source = given.get(key, (first["input"], None))
    shown = "***" if key in SECRETS else repr(value)
    rule = first["msg"] if first["type"] == "conflict" else f"must be {allowed_values(key)}"
    return f"{key} = {shown} ({f'from {source}' if source else DEFAULT}): {rule}"
