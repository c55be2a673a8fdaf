"""Random language models and phrases for the random transducers."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from amira.models.ngrams import estimate
from fusion import Fusion
from phrases import Phrases
from tests.support.transducers import VOCABULARY

PIECES = [f"▁{chr(97 + i)}" for i in range(VOCABULARY)]


@functools.cache
def language_model(seed: int) -> Any:  # mypy sees the module behind two names
    """Return a model of random texts."""
    random = np.random.default_rng(seed)
    return estimate([random.integers(0, VOCABULARY, 6).tolist() for _ in range(20)], 3, PIECES)


@functools.cache
def random_fusion(seed: int, *, with_phrases: bool = True) -> Fusion:
    """Return a language model, less the internal one, and three phrases."""
    random = np.random.default_rng(seed)
    bonuses = {tuple(random.integers(0, VOCABULARY, 3).tolist()): 1.0 for _ in range(3)}
    phrases = Phrases(bonuses, VOCABULARY, {1, 3}) if with_phrases else None
    return Fusion(language_model(seed % 5), 0.6, 0.3, phrases)
