"""Add a language model to a recogniser of a model repository: ``amira models lm``."""

from __future__ import annotations

import functools
import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from amira.models.configs import CONFIG, ModelError
from amira.models.language_model import LanguageModel
from amira.models.ngrams import estimate, read_arpa
from amira.models.repository import Recogniser, recognisers
from amira.models.segmentation import Segmenter, read_scores

FILE = "language_model.npz"
"""File name of a language model in the directory of its decoder: Triton copies only this directory from a bucket."""

PARAMETER = "language_model"
"""The decoder's parameter that names the file."""


class Fitted(NamedTuple):
    """A language model that was added.

    Attributes:
        path: its file.
        ngrams: number of n-grams.
        sentences: number of sentences that it was estimated from.
        left_out: number of sentences with a word that the pieces cannot spell.
    """

    path: Path
    ngrams: int
    sentences: int
    left_out: int


def fit(repository: Path, name: str | None, texts: Sequence[Path], arpa: Path | None, order: int) -> Fitted:
    """Build a language model over a recogniser's pieces, write it beside its decoder, and name it in the configuration.

    Args:
        repository: model repository.
        name: name of the ensemble; None: the only one.
        texts: files with a sentence per line, UTF-8, gzip-compressed if their names end in ``.gz``.
        arpa: ARPA file to convert instead of ``texts``.
        order: length of the longest n-grams.

    Raises:
        ModelError: the recogniser is not found, a file cannot be read, or there is no text.
    """
    recogniser = _choose(recognisers(repository), name)
    directory = repository / recogniser.decoder
    pieces = read_transducer_pieces(recogniser)
    sentences = left_out = 0
    try:
        if arpa:
            model = read_arpa(arpa, pieces)
        else:
            scores = recogniser.parameters.get("piece_scores")
            segmenter = Segmenter(pieces, read_scores(directory / scores, len(pieces)) if scores else None)
            segmented = list(_segment(segmenter, texts))
            spelled = [tokens for tokens in segmented if tokens is not None]
            sentences, left_out = len(spelled), len(segmented) - len(spelled)
            model = estimate(spelled, order, pieces)
        model.save(directory / FILE)
    except (OSError, UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise ModelError(f"cannot build a language model: {error}") from error
    _set_parameter(directory / CONFIG, PARAMETER, FILE)
    return Fitted(directory / FILE, sum(model.sizes), sentences, left_out)


def read_transducer_pieces(recogniser: Recogniser) -> list[str]:
    """Return a recogniser's pieces by token id, without the blank."""
    lines = recogniser.vocabulary.read_text(encoding="utf-8").split("\n")
    return [line.rpartition(" ")[0] for line in lines][: int(recogniser.parameters["blank"])]


def load_fitted(repository: Path, name: str | None) -> tuple[LanguageModel, list[str]]:
    """Return the language model of a recogniser, and its pieces.

    Raises:
        ModelError: the recogniser is not found or has no language model.
    """
    recogniser = _choose(recognisers(repository), name)
    if not (file := recogniser.parameters.get(PARAMETER)):
        raise ModelError(f"{recogniser.name} has no language model; build one by amira models lm")
    pieces = read_transducer_pieces(recogniser)
    try:
        return LanguageModel.load(repository / recogniser.decoder / file, pieces), pieces
    except (OSError, ValueError) as error:
        raise ModelError(str(error)) from error


def _choose(found: Sequence[Recogniser], name: str | None) -> Recogniser:
    chosen = [recogniser for recogniser in found if name in (None, recogniser.name)]
    if len(chosen) != 1:
        names = ", ".join(recogniser.name for recogniser in found)
        raise ModelError(f"--name is {name!r}; expected one of the ensembles {names}")
    return chosen[0]


def _segment(segmenter: Segmenter, texts: Sequence[Path]) -> Iterator[list[int] | None]:
    """Yield the tokens of each sentence; None if the pieces cannot spell it."""
    segment = functools.cache(segmenter.segment)
    for path in texts:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for line in lines:
                words = [segment(word) for word in line.split()]
                if words:
                    spelled = [word for word in words if word is not None]
                    yield [token for word in spelled for token in word] if len(spelled) == len(words) else None


def _set_parameter(path: Path, key: str, value: str) -> None:
    """Set a parameter in a configuration, and keep the rest of the file as it is."""
    text = path.read_text(encoding="utf-8")
    line = f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}'
    pattern = re.compile(rf'parameters\s*{{\s*key:\s*"{key}"\s*value:?\s*{{\s*string_value:\s*"[^"]*"\s*}}\s*}}')
    changed, count = pattern.subn(line, text, count=1)
    path.write_text(changed if count else f"{text.rstrip()}\n{line}\n", encoding="utf-8")
