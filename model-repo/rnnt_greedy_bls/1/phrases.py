"""Phrases that a stream boosts: an automaton that gives each token a bonus while it continues a phrase.

The automaton of Aho & Corasick (1975) finds the longest suffix of the tokens that begins a phrase: the window. Each token in it
has its bonus. A token that leaves the window keeps its bonus only if a phrase that was completed in the window covers it;
otherwise the bonus is taken back. A phrase is completed by its last token, unless the next one continues that token's word:
"art" is not part of "artist".
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

START = 0
"""State in which no phrase has begun."""


class Phrases:
    """The phrases of one stream.

    Args:
        bonuses: bonus per token by the tokens of a phrase; tokens that begin several phrases have the largest.
        vocabulary: number of tokens, V.
        continuations: ids of the tokens that continue a word.

    Attributes:
        digest: digest of the phrases and their bonuses; states of equal phrases are equal.
        states: number of states; they are 0 … ``states`` - 1.
    """

    def __init__(self, bonuses: Mapping[tuple[int, ...], float], vocabulary: int, continuations: Collection[int]) -> None:
        self.digest = hashlib.sha256(repr(sorted(bonuses.items())).encode()).hexdigest()
        self._vocabulary = vocabulary
        self._continues = np.zeros(vocabulary, bool)
        self._continues[list(continuations)] = True
        self._children: list[dict[int, int]] = [{}]
        self._paths: list[tuple[int, ...]] = [()]
        self._bonuses = [0.0]  # of the last token of each state
        self._ends: list[int] = [0]  # length of the longest phrase that ends at each state
        for tokens, bonus in bonuses.items():
            self._insert(tokens, bonus)
        self.states = len(self._children)
        self._suffixes = self._link()
        self._scores: dict[int, Floats] = {}

    def scores(self, state: int) -> Floats:
        """Return what each token adds to the score of a hypothesis in this state [V]: its bonus, less those taken back."""
        if (scores := self._scores.get(state)) is None:
            scores = self._scores[state] = self._score_all(state)
        return scores

    def advance(self, state: int, token: int) -> int:
        """Return the state after a token."""
        while state != START and token not in self._children[state]:
            state = self._suffixes[state]
        return self._children[state].get(token, START)

    def _insert(self, tokens: Sequence[int], bonus: float) -> None:
        state = START
        for token in tokens:
            if token not in self._children[state]:
                self._children[state][token] = len(self._children)
                self._children.append({})
                self._paths.append((*self._paths[state], token))
                self._bonuses.append(bonus)
                self._ends.append(0)
            state = self._children[state][token]
            self._bonuses[state] = max(self._bonuses[state], bonus)
        self._ends[state] = len(tokens)

    def _link(self) -> list[int]:
        """Return the state of the longest proper suffix of each state's path that begins a phrase, breadth first."""
        suffixes = [START] * len(self._children)
        queue = deque(self._children[START].values())
        while queue:
            state = queue.popleft()
            for token, child in self._children[state].items():
                suffix = suffixes[state]
                while suffix != START and token not in self._children[suffix]:
                    suffix = suffixes[suffix]
                suffixes[child] = self._children[suffix].get(token, START)
                self._ends[child] = self._ends[child] or self._ends[suffixes[child]]
                queue.append(child)
        return suffixes

    def _score_all(self, state: int) -> Floats:
        total, (kept, kept_within_word) = self._total(state), self._kept(state)
        depth = len(self._paths[state])
        scores = np.where(self._continues, kept_within_word[depth], kept[depth]).astype(np.float32) - np.float32(total)
        chain = [state]
        while chain[-1] != START:
            chain.append(self._suffixes[chain[-1]])
        for node in reversed(chain):  # a longer suffix comes first, so its children overwrite those of shorter ones
            left = depth - len(self._paths[node])  # number of tokens that leave the window
            for token, child in self._children[node].items():
                covered = kept_within_word[left] if self._continues[token] else kept[left]
                scores[token] = self._total(child) - total + covered
        return scores

    def _path(self, state: int) -> list[int]:
        """Return the states from the first token to this state."""
        states, node = [], START
        for token in self._paths[state]:
            node = self._children[node][token]
            states.append(node)
        return states

    def _total(self, state: int) -> float:
        """Return the sum of the bonuses of the tokens in the window."""
        return sum(self._bonuses[node] for node in self._path(state))

    def _kept(self, state: int) -> tuple[list[float], list[float]]:
        """Return the bonuses that the first 0, 1, 2, … tokens of the window keep when they leave it.

        Returns:
            The sums before a token that begins a word, and before one that continues a word.
        """
        path, tokens = self._path(state), self._paths[state]
        covered = [False] * len(path)
        for last, node in enumerate(path[:-1]):
            if not self._continues[tokens[last + 1]]:
                self._cover(covered, last, node)
        within_word = list(covered)
        if path:
            self._cover(covered, len(path) - 1, path[-1])
        bonuses = [self._bonuses[node] for node in path]
        return _running_sums(bonuses, covered), _running_sums(bonuses, within_word)

    def _cover(self, covered: list[bool], last: int, node: int) -> None:
        """Mark the tokens of the longest phrase that ends at a place of the window."""
        for i in range(last + 1 - self._ends[node], last + 1):
            covered[i] = True


def _running_sums(bonuses: Sequence[float], covered: Sequence[bool]) -> list[float]:
    sums = [0.0]
    for bonus, is_covered in zip(bonuses, covered, strict=True):
        sums.append(sums[-1] + bonus * is_covered)
    return sums
