"""Boosting of phrases, against a naive one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from phrases import EARLY_SHARE, START, Phrases

VOCABULARY = 4
CONTINUES = frozenset({2, 3})
Tokens = tuple[int, ...]

tokens = st.integers(0, VOCABULARY - 1)
phrase_sets = st.dictionaries(
    st.lists(tokens, min_size=1, max_size=4).map(tuple), st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=6
)


class Naive:
    """Boosting by its definition: a window over the last tokens, searched for anew after each token."""

    def __init__(self, phrases: Mapping[Tokens, float]) -> None:
        self.phrases = phrases

    def bonuses(self, window: Tokens) -> list[float]:
        """Return the bonus of each token of a window: the largest of the phrases that begin like it."""
        return [
            max(bonus for phrase, bonus in self.phrases.items() if phrase[: i + 1] == window[: i + 1])
            for i in range(len(window))
        ]

    def total(self, window: Tokens) -> float:
        """Return what the tokens of a window have: a part before a phrase's last token, and never less than fewer tokens."""
        shares = [
            bonus * end * (1.0 if len(phrase) == end else EARLY_SHARE)
            for end in range(1, len(window) + 1)
            for phrase, bonus in self.phrases.items()
            if phrase[:end] == window[:end]
        ]
        return max(shares, default=0.0)

    def window(self, history: Tokens) -> Tokens:
        suffixes = (history[i:] for i in range(len(history) + 1))
        return next(suffix for suffix in suffixes if any(phrase[: len(suffix)] == suffix for phrase in self.phrases))

    def score(self, history: Tokens) -> float:
        total = 0.0
        before: Tokens = ()
        for end in range(1, len(history) + 1):
            window = self.window(history[:end])
            left = len(before) + 1 - len(window)
            covered = self._covered(before, history[end - 1])
            kept = sum(bonus for bonus, is_kept in list(zip(self.bonuses(before), covered, strict=True))[:left] if is_kept)
            total += self.total(window) - self.total(before) + kept
            before = window
        return total

    def _covered(self, window: Tokens, following: int) -> list[bool]:
        covered = [False] * len(window)
        spelled = (*window, following)
        for begin in range(len(window)):
            for end in range(begin + 1, len(window) + 1):
                if window[begin:end] in self.phrases and spelled[end] not in CONTINUES:
                    covered[begin:end] = [True] * (end - begin)
        return covered


def total(phrases: Phrases, history: Sequence[int]) -> float:
    state, score = START, 0.0
    for token in history:
        score += float(phrases.scores(state)[token])
        state = phrases.advance(state, token)
    return score


@given(phrase_sets, st.lists(tokens, max_size=12).map(tuple))
def test_scores_are_those_of_the_definition(bonuses: dict[Tokens, float], history: Tokens) -> None:
    phrases, naive = Phrases(bonuses, VOCABULARY, CONTINUES), Naive(bonuses)
    assert abs(total(phrases, history) - naive.score(history)) < 1e-4


def test_mismatch_takes_the_bonus_back() -> None:
    phrases = Phrases({(0, 2, 3): 1.5}, VOCABULARY, CONTINUES)
    assert total(phrases, [0, 2]) == 3.0 * EARLY_SHARE
    assert total(phrases, [0, 2, 1]) == 0.0
    assert total(phrases, [0, 2, 3, 1]) == 4.5
    assert total(phrases, [0, 2, 3, 2]) == 0.0, "the word goes on, so it is another word"
    assert total(phrases, [0, 2, 0, 2, 3]) == 4.5


def test_failure_links_find_a_phrase_within_a_mismatch() -> None:
    phrases = Phrases({(0, 0, 1): 1.0, (0, 1, 2): 1.0}, VOCABULARY, ())
    assert total(phrases, [0, 0, 1, 2]) == 4.0, "the first phrase keeps its token that the second does not have"
    assert total(phrases, [0, 0, 0, 1, 3]) == 3.0


def test_rest_of_the_bonus_comes_with_the_last_token() -> None:
    phrases = Phrases({(0, 1): 2.0, (0, 1, 2): 2.0}, VOCABULARY, ())
    assert [total(phrases, [0, 1, 2][:length]) for length in range(4)] == [0.0, 2.0 * EARLY_SHARE, 4.0, 6.0]


def test_scores_are_zero_without_a_phrase_nearby() -> None:
    phrases = Phrases({(0, 1): 2.0}, VOCABULARY, ())
    np.testing.assert_array_equal(phrases.scores(START), [2 * EARLY_SHARE, 0, 0, 0])


def test_equal_phrases_have_equal_digests() -> None:
    one, two = Phrases({(0,): 1.0, (1,): 1.0}, VOCABULARY, ()), Phrases({(1,): 1.0, (0,): 1.0}, VOCABULARY, ())
    assert one.digest == two.digest != Phrases({(0,): 1.0}, VOCABULARY, ()).digest
