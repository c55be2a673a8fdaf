"""Phrases that a stream boosts: an automaton that gives each token a bonus while it continues a phrase.

The automaton of Aho & Corasick (1975) finds the longest suffix of the tokens that begins a phrase: the window. Each token in it
has a part of its bonus, and the rest comes with the phrase's last token. With all of it at once, beginnings of phrases that
nobody says would crowd other hypotheses out of a beam before the bonus is taken back.

A token that leaves the window keeps its whole bonus if a phrase that was completed in the window covers it; otherwise what it
has is taken back. A phrase is completed by its last token, unless the next one continues that token's word: "art" is not part
of "artist".

The states are the nodes of a trie in breadth-first order, so numpy builds the trie level by level.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[Any]

START = 0
"""State in which no phrase has begun."""

NUMBERING = 2
"""Version of the numbers of states, which saved states of streams contain."""

EARLY_SHARE = 0.5
"""Part of the bonus that a token has before its phrase is complete (docs/history/Phrases.md)."""

KEPT_SCORES = 64
"""Maximum number of states whose scores are kept. A stream is mostly in few states, most of all in ``START``."""


class _Trie(NamedTuple):
    """Phrases as a trie. Node 0 is the root, and the others follow in the order of their keys.

    Attributes:
        keys: parent × V + token of each node but the root [M - 1], sorted.
        depths: number of tokens up to each node [M].
        bonuses: whole bonus of the last token of each node [M].
        totals: what the tokens up to each node have [M].
        ends: whether a phrase ends at each node [M].
    """

    keys: Integers
    depths: Integers
    bonuses: Integers
    totals: Integers
    ends: Integers


class Phrases:
    """The phrases of one stream.

    Args:
        bonuses: bonus per token by the tokens of a phrase; tokens that begin several phrases have the largest sum.
        vocabulary: number of tokens, V.
        continuations: ids of the tokens that continue a word.

    Attributes:
        digest: digest of the phrases and their bonuses; states of equal phrases are equal.
        states: number of states; they are 0 … ``states`` - 1.
    """

    def __init__(self, bonuses: Mapping[tuple[int, ...], float], vocabulary: int, continuations: Collection[int]) -> None:
        self.digest = hashlib.sha256(f"{NUMBERING} {sorted(bonuses.items())}".encode()).hexdigest()
        self._vocabulary = vocabulary
        self._continues = np.zeros(vocabulary, bool)
        self._continues[list(continuations)] = True
        trie = _build(bonuses, vocabulary)
        self.states = len(trie.depths)
        self._keys = array("q", trie.keys.tolist())
        self._depths = trie.depths
        self._bonuses, self._totals = trie.bonuses, trie.totals
        self._suffixes = _link(trie, vocabulary)
        self._ends = _longest_ends(trie, self._suffixes)
        firsts = bisect_left(self._keys, vocabulary)  # the children of the root
        self._first_tokens = trie.keys[:firsts]
        self._first_bonuses = self._totals[1 : firsts + 1].astype(np.float32)
        self._scores: dict[int, Floats] = {}

    def scores(self, state: int) -> Floats:
        """Return what each token adds to the score of a hypothesis in this state [V]: its bonus, less those taken back."""
        if (scores := self._scores.get(state)) is None:
            if len(self._scores) >= KEPT_SCORES:
                self._scores.clear()
            scores = self._scores[state] = self._score_all(state)
        return scores

    def advance(self, state: int, token: int) -> int:
        """Return the state after a token."""
        while True:
            if child := self._child(state, token):
                return child
            if state == START:
                return START
            state = int(self._suffixes[state])

    def _child(self, state: int, token: int) -> int:
        """Return the state of a phrase with one more token; ``START`` if there is none."""
        key = state * self._vocabulary + token
        at = bisect_left(self._keys, key)
        return at + 1 if at < len(self._keys) and self._keys[at] == key else START

    def _children(self, state: int) -> range:
        """Return the states with one more token."""
        first, after = (bisect_left(self._keys, node * self._vocabulary) for node in (state, state + 1))
        return range(first + 1, after + 1)

    def _score_all(self, state: int) -> Floats:
        total, (kept, kept_within_word) = float(self._totals[state]), self._kept(state)
        depth = int(self._depths[state])
        scores = np.where(self._continues, kept_within_word[depth] - total, kept[depth] - total).astype(np.float32)
        scores[self._first_tokens] += self._first_bonuses
        chain = []
        while state != START:
            chain.append(state)
            state = int(self._suffixes[state])
        for node in reversed(chain):  # a longer suffix comes last, so its children overwrite those of shorter ones
            left = depth - int(self._depths[node])  # number of tokens that leave the window
            for child in self._children(node):
                token = self._keys[child - 1] % self._vocabulary
                covered = kept_within_word[left] if self._continues[token] else kept[left]
                scores[token] = self._totals[child] - total + covered
        return scores

    def _path(self, state: int) -> list[int]:
        """Return the states from the first token to this state."""
        states = []
        while state != START:
            states.append(state)
            state = self._keys[state - 1] // self._vocabulary
        return states[::-1]

    def _kept(self, state: int) -> tuple[list[float], list[float]]:
        """Return the bonuses that the first 0, 1, 2, … tokens of the window keep when they leave it.

        Returns:
            The sums before a token that begins a word, and before one that continues a word.
        """
        path = self._path(state)
        covered = [False] * len(path)
        for last, node in enumerate(path[:-1]):
            if not self._continues[self._keys[path[last + 1] - 1] % self._vocabulary]:
                self._cover(covered, last, node)
        within_word = list(covered)
        if path:
            self._cover(covered, len(path) - 1, path[-1])
        bonuses = self._bonuses[path].tolist()
        return _running_sums(bonuses, covered), _running_sums(bonuses, within_word)

    def _cover(self, covered: list[bool], last: int, node: int) -> None:
        """Mark the tokens of the longest phrase that ends at a place of the window."""
        for i in range(last + 1 - int(self._ends[node]), last + 1):
            covered[i] = True


def _build(bonuses: Mapping[tuple[int, ...], float], vocabulary: int) -> _Trie:
    """Return the trie of phrases."""
    phrases, given = list(bonuses), np.array(list(bonuses.values()))
    lengths = np.array([len(phrase) for phrase in phrases])
    tokens = np.zeros((len(phrases), lengths.max()), np.int64)
    for row, phrase in zip(tokens, phrases, strict=True):
        row[: len(phrase)] = phrase
    nodes = np.zeros(len(phrases), np.int64)  # of each phrase's prefix
    keys, depths, ends = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)], [np.zeros(1, bool)]
    largest, totals = [np.zeros(1)], [np.zeros(1)]
    first_above = first = 0  # node of the level above, and of this level
    for depth in range(1, tokens.shape[1] + 1):
        first_above, first = first, first + len(depths[-1])
        going = np.flatnonzero(lengths >= depth)
        level, places = np.unique(nodes[going] * vocabulary + tokens[going, depth - 1], return_inverse=True)
        complete = lengths[going] == depth
        sums = totals[-1][level // vocabulary - first_above]
        np.maximum.at(sums, places, given[going] * depth * np.where(complete, 1.0, EARLY_SHARE))
        nodes[going] = first + places
        keys.append(level)
        depths.append(np.full(len(level), depth))
        totals.append(sums)
        largest.append(np.zeros(len(level)))
        np.maximum.at(largest[-1], places, given[going])
        ends.append(np.zeros(len(level), bool))
        ends[-1][places[complete]] = True
    return _Trie(*(np.concatenate(parts) for parts in (keys, depths, largest, totals, ends)))


def _link(trie: _Trie, vocabulary: int) -> Integers:
    """Return the node of the longest proper suffix of each node's path that begins a phrase [M]."""
    suffixes = np.zeros(len(trie.depths), np.int64)
    parents, tokens = np.divmod(trie.keys, vocabulary)
    for begin, end in _levels(trie)[1:]:
        pending = np.arange(begin, end)
        shorter = suffixes[parents[pending - 1]]
        while len(pending):
            wanted = shorter * vocabulary + tokens[pending - 1]
            at = np.minimum(trie.keys.searchsorted(wanted), len(trie.keys) - 1)
            found = trie.keys[at] == wanted
            suffixes[pending[found]] = at[found] + 1
            going = ~found & (shorter != START)
            pending, shorter = pending[going], suffixes[shorter[going]]
    return suffixes


def _longest_ends(trie: _Trie, suffixes: Integers) -> Integers:
    """Return the length of the longest phrase that ends at each node [M]; 0 if none does."""
    ends: Integers = np.where(trie.ends, trie.depths, 0)
    for begin, end in _levels(trie):
        ends[begin:end] = np.where(trie.ends[begin:end], ends[begin:end], ends[suffixes[begin:end]])
    return ends


def _levels(trie: _Trie) -> list[tuple[int, int]]:
    """Return the first node of each depth from 1 on, and the node after the last."""
    borders = np.searchsorted(trie.depths, np.arange(1, trie.depths[-1] + 2)).tolist()
    return list(pairwise(borders))


def _running_sums(bonuses: Sequence[float], covered: Sequence[bool]) -> list[float]:
    sums = [0.0]
    for bonus, is_covered in zip(bonuses, covered, strict=True):
        sums.append(sums[-1] + bonus * is_covered)
    return sums
