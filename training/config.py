"""Configuration of a training: data, model, and schedule."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.command import TrainingError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT = Path(__file__).with_name("config.toml")
Share = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """A table of the configuration; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Part):
    """Sentences, vocabulary, voices and recordings."""

    sentences: Path
    most_sentences: int | None = Field(default=None, gt=0)
    tokens: Path | None = None
    pieces: int = Field(ge=64)
    voices: dict[Literal["hibari", "flite", "espeak"], float]
    shard_sentences: int = Field(gt=0)
    longest_secs: float = Field(gt=1)
    held_out: int = Field(ge=2)
    most_of_a_set: dict[str, Share]


class Model(Part):
    """Sizes of the layers that are trained from scratch."""

    width: int = Field(gt=0)
    heads: int = Field(gt=0)
    feed_forward: int = Field(gt=0)
    kernel: int = Field(gt=0)
    blocks_at_48_ms: int = Field(ge=0)
    blocks_at_96_ms: int = Field(ge=0)
    reach_frames: int = Field(gt=0)
    predictor: int = Field(gt=0)
    dropout: Share


class Chunks(Part):
    """Range of chunk and context lengths in training, in frames of 96 ms; live streams use such chunks."""

    share: Share
    shortest: int = Field(gt=0)
    longest: int = Field(gt=0)
    look_ahead: int = Field(ge=0)
    shortest_left: int = Field(gt=0)
    longest_left: int = Field(gt=0)


class Train(Part):
    """Optimisation and schedule; the training ends after `minutes` of wall time or after `steps`."""

    minutes: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0)
    batch_secs: float = Field(gt=0)
    speech_share: Share
    language_epochs: int = Field(ge=0)
    warm_up_steps: int = Field(ge=0)
    rate: float = Field(gt=0)
    lower_rate: float = Field(ge=0)
    upper_rate: float = Field(ge=0)
    weight_decay: float = Field(ge=0)
    clip: float = Field(gt=0)
    average: Share
    ctc_weight: float = Field(ge=0)
    wrong_tokens: Share
    check_minutes: float = Field(gt=0)
    chunks: Chunks


class Config(Part):
    """The whole configuration."""

    seed: int
    data: Data
    model: Model
    train: Train


def load(path: Path) -> Config:
    """Read a configuration file. Relative paths in the file are resolved against its directory.

    Raises:
        TrainingError: the file is not TOML, or a value is missing, unknown or not allowed.
    """
    try:
        config = Config.model_validate(tomllib.loads(path.read_text()))
    except tomllib.TOMLDecodeError as error:
        raise TrainingError(f"{path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise TrainingError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    paths = {"sentences": path.parent / config.data.sentences}
    if config.data.tokens:
        paths["tokens"] = path.parent / config.data.tokens
    return config.model_copy(update={"data": config.data.model_copy(update=paths)})
