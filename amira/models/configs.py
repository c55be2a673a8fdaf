"""Read the configurations of a model repository."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

CONFIG = "config.pbtxt"


class ModelError(ValueError):
    """A model cannot be used. The message is one line with the file, the tensor, the found and the expected value."""


def read_configs(repository: Path) -> dict[str, pb.ModelConfig]:
    """Return the configurations of a repository by the names of their directories.

    Raises:
        ModelError: the repository is no directory or has no models, or a configuration cannot be read or has another name.
    """
    if not repository.is_dir():
        raise ModelError(f"model repository {repository} is no directory")
    configs = {path.parent.name: read_config(path) for path in sorted(repository.glob(f"*/{CONFIG}"))}
    if not configs:
        raise ModelError(f"model repository {repository} has no models; expected directories with a {CONFIG}")
    for name, config in configs.items():
        if config.name not in ("", name):
            raise ModelError(
                f"{repository / name / CONFIG}: name is {config.name!r}; expected {name!r}, as its directory is called"
            )
    return configs


def read_config(path: Path) -> pb.ModelConfig:
    """Return the configuration of a model.

    Raises:
        ModelError: the file is missing or malformed.
    """
    config = pb.ModelConfig()
    try:
        text_format.Parse(path.read_text(encoding="utf-8"), config)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, text_format.ParseError) as error:
        raise ModelError(f"{path}: {error}") from error
    return config


def check_ensembles(repository: Path, names: Collection[str]) -> None:
    """Check that a repository can be read and has the named ensembles.

    Raises:
        ModelError: the repository cannot be read, or an ensemble is missing.
    """
    configs = read_configs(repository)
    ensembles = [name for name, config in configs.items() if config.HasField("ensemble_scheduling")]
    if missing := [name for name in names if name not in ensembles]:
        raise ModelError(
            f"AMIRA_MODELS names {', '.join(missing)}; model repository {repository} has the ensembles "
            f"{', '.join(ensembles) or 'none'}"
        )
