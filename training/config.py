"""The configuration of a training: what is spoken, what is learnt, for how long."""

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
    """A table of the configuration; a key it doesn't know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Part):
    """What the features are made of."""

    sentences: Path
    most_sentences: int | None = Field(default=None, gt=0)
    tokens: Path | None = None
    pieces: int = Field(ge=64)
    voices: dict[Literal["hibari", "flite", "espeak"], float]
    shard_sentences: int = Field(gt=0)
    longest_secs: float = Field(gt=1)
    speech_copies: int = Field(ge=1)
    held_out: int = Field(ge=2)
    most_of_a_copy: dict[str, Share]
    windowed: Share
    window_left: int = Field(ge=0)
    window_chunk: int = Field(gt=0)
    window_right: int = Field(ge=0)


class Model(Part):
    """Sizes of what is learnt from nothing."""

    width: int = Field(gt=0)
    heads: int = Field(gt=0)
    feed_forward: int = Field(gt=0)
    kernel: int = Field(gt=0)
    blocks_at_48_ms: int = Field(ge=0)
    blocks_at_96_ms: int = Field(ge=0)
    reach_frames: int = Field(gt=0)
    predictor: int = Field(gt=0)
    dropout: Share


class Phase(Part):
    """One stretch of the training: `hours` of audio, counted as often as they are passed."""

    name: str
    hours: float = Field(gt=0)
    loss: Literal["ctc", "transducer"]
    moonshine_layers: int = Field(ge=0, le=3)
    rate: float = Field(gt=0)
    final_rate: float = Field(ge=0)


class Train(Part):
    """How it is learnt."""

    batch_secs: float = Field(gt=0)
    speech_share: Share
    warm_up_steps: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    clip: float = Field(gt=0)
    average: Share
    moonshine_rate: float = Field(ge=0)
    ctc_weight: float = Field(ge=0)
    wrong_tokens: Share
    check_minutes: float = Field(gt=0)
    phases: list[Phase]


class Config(Part):
    """All of it."""

    seed: int
    data: Data
    model: Model
    train: Train


def load(path: Path) -> Config:
    """Read a configuration; paths in it are relative to its file.

    Raises:
        TrainingError: It is no TOML, or a value is missing, unknown or not allowed.
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
