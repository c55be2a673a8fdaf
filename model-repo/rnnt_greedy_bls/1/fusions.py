"""Build what each stream adds to the scores of its tokens, from the model's parameters and the stream's options."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

from fusion import Fusion
from language_model import LanguageModel
from parameters import Options, ParameterError, Parameters
from phrases import Phrases
from segmentation import Segmenter, phrase_spellings, read_scores

MAX_PHRASES = 500
"""Maximum number of phrases of a stream, beside those of the model's file."""

MAX_PHRASE_CHARACTERS = 200
"""Maximum length of a phrase in characters."""

MAX_PHRASES_CHARACTERS = 20_000
"""Maximum length of all phrases of a stream in characters. They take 0.2 s to build, and no stream is decoded meanwhile."""

MAX_PHRASE_FACTOR = 10.0
"""Largest factor of a phrase's bonus."""

KEPT_PHRASES = 32
"""Number of sets of phrases that are kept for further streams."""


class Fusions:
    """Language model and phrases of a model.

    Args:
        parameters: of the decoder.
        pieces: by token id, without the blank.
        directory: of the decoder, which the paths in the parameters are relative to.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is malformed, or of another vocabulary.
    """

    def __init__(self, parameters: Parameters, pieces: Sequence[str], directory: Path) -> None:
        self._parameters = parameters
        self._model: LanguageModel | None = None
        if parameters.language_model:
            self._model = LanguageModel.load(directory / parameters.language_model, pieces)
            self._model.prepare()
        path = directory / parameters.piece_scores
        self._segmenter = Segmenter(pieces, read_scores(path, len(pieces)) if parameters.piece_scores else None)
        self._shared = ""
        if parameters.phrases_file:
            self._shared = (directory / parameters.phrases_file).read_text(encoding="utf-8")
        self._build = functools.lru_cache(KEPT_PHRASES)(self._phrases)
        self._build(self._shared)

    def of(self, options: Options) -> Fusion:
        """Return what a stream with these options adds.

        Raises:
            ParameterError: there are too many phrases, one or all are too long, or one has a factor that is not allowed.
        """
        p = self._parameters
        if (lines := len(options.phrases.splitlines())) > MAX_PHRASES:
            raise ParameterError(f"phrases has {lines} lines; at most {MAX_PHRASES} are allowed")
        if (length := len(options.phrases)) > MAX_PHRASES_CHARACTERS:
            raise ParameterError(f"phrases has {length} characters; at most {MAX_PHRASES_CHARACTERS} are allowed")
        gains = options.context == "whole" or options.width > 1
        is_used = options.language_model == "on" or (options.language_model == "auto" and gains)
        model = self._model if is_used else None
        phrases = self._build(f"{self._shared}\n{options.phrases}" if options.phrases else self._shared)
        return Fusion(model, p.language_model_weight, p.internal_lm_weight, phrases)

    def _phrases(self, lines: str) -> Phrases | None:
        """Return the phrases of lines; None if there are none that the pieces can spell."""
        bonuses: dict[tuple[int, ...], float] = {}
        given = [line.strip() for line in lines.splitlines() if line.strip()]
        for line in given:
            phrase, _, factor = line.partition("\t")
            if len(phrase) > MAX_PHRASE_CHARACTERS:
                raise ParameterError(f"phrase {phrase[:40]!r}… has {len(phrase)} characters; at most {MAX_PHRASE_CHARACTERS}")
            bonus = self._parameters.phrase_bonus * _factor(phrase, factor)
            for tokens in phrase_spellings(self._segmenter, phrase):
                bonuses[tokens] = max(bonus, bonuses.get(tokens, 0.0))
        if not bonuses or self._parameters.phrase_bonus == 0:
            return None
        return Phrases(bonuses, self._parameters.blank, self._parameters.continuations)


def _factor(phrase: str, text: str) -> float:
    try:
        factor = float(text) if text else 1.0
    except ValueError:
        factor = math.nan
    if not 0 < factor <= MAX_PHRASE_FACTOR:
        raise ParameterError(f"phrase {phrase!r} has the factor {text!r}; it must be above 0 and at most {MAX_PHRASE_FACTOR:g}")
    return factor
