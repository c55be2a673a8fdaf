"""Add what is known of the language to the scores of tokens: an n-gram model and phrases to boost.

The language model is fused in the logarithmic domain with a weight (shallow fusion, Gulcehre et al. 2015), less the
transducer's own language model with another weight (Meng et al. 2020): the joint network's scores of a frame of zeros. Blanks
stay as the network scores them: a language model that competes with them deletes words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from language_model import EMPTY, LanguageModel
from phrases import START, Phrases

Floats = npt.NDArray[np.float32]


class Context(NamedTuple):
    """What the tokens before the next one mean for its score.

    Attributes:
        language: state of the language model.
        phrase: state of the phrases.
    """

    language: int = EMPTY
    phrase: int = START


EMPTY_CONTEXT = Context()


@dataclass(frozen=True, eq=False)
class Fusion:
    """What is added to the scores of one stream's tokens.

    Attributes:
        language_model: n-gram model; None: without.
        weight: factor of its log probabilities.
        internal_weight: factor of the internal language model's log probabilities, which are subtracted; only with a language
            model.
        phrases: phrases to boost; None: without.
    """

    language_model: LanguageModel | None = None
    weight: float = 0.0
    internal_weight: float = 0.0
    phrases: Phrases | None = None

    @property
    def is_active(self) -> bool:
        """Whether anything is added."""
        return bool(self.language_model or self.phrases)

    @property
    def needs_internal(self) -> bool:
        """Whether the joint network's scores of a frame of zeros are needed."""
        return bool(self.language_model and self.internal_weight)

    @property
    def digest(self) -> str:
        """Digest of the states' meaning; a context of equal digest can go on elsewhere."""
        language = f"{self.language_model.digest}/{self.language_model.sizes}" if self.language_model else ""
        return f"{language}+{self.phrases.digest if self.phrases else ''}"

    def fresh(self) -> Context:
        """Return the context at the beginning of a text."""
        return Context(self.language_model.start if self.language_model else EMPTY)

    def allows(self, context: Context) -> bool:
        """Return whether a context is one of this fusion's."""
        languages = self.language_model.states if self.language_model else 1
        phrases = self.phrases.states if self.phrases else 1
        return 0 <= context.language < languages and 0 <= context.phrase < phrases

    def advance(self, context: Context, token: int) -> Context:
        """Return the context after a token."""
        language = self.language_model.advance(context.language, token) if self.language_model else EMPTY
        phrase = self.phrases.advance(context.phrase, token) if self.phrases else START
        return Context(language, phrase)


NO_FUSION = Fusion()


def token_scores(fusions: Sequence[Fusion], contexts: Sequence[Context], internal: Floats) -> Floats:
    """Return what is added to the scores of all tokens [B, V], for rows of any streams.

    Args:
        fusions: of the rows' streams.
        contexts: of the rows.
        internal: the joint network's logits of a frame of zeros without the blank [B, V]; only read where needed.
    """
    added = np.zeros(internal.shape, np.float32)
    models = {id(fusion.language_model): fusion.language_model for fusion in fusions if fusion.language_model}
    for model in models.values():
        rows = [b for b, fusion in enumerate(fusions) if fusion.language_model is model]
        scores = model.scores([contexts[b].language for b in rows])
        added[rows] = scores * np.array([[fusions[b].weight] for b in rows], np.float32)
    for b, (fusion, context) in enumerate(zip(fusions, contexts, strict=True)):
        if fusion.needs_internal:
            added[b] -= np.float32(fusion.internal_weight) * log_softmax(internal[b])
        if fusion.phrases:
            added[b] += fusion.phrases.scores(context.phrase)
    return added


def log_softmax(scores: Floats) -> Floats:
    """Return log probabilities over the last axis."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
