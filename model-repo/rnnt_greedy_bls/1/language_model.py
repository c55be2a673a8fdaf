"""An n-gram language model over a transducer's pieces, in compact arrays.

The n-grams form a trie in breadth-first order, so the children of a node are adjacent and sorted by token. Node 0 is the empty
context, and n-gram i is node i + 1 unless it has the highest order. Each node has a back-off weight and a link to its longest
proper suffix (the automaton of NGPU-LM, arXiv:2505.22857), so the scores of all tokens after a context take one pass over at
most ``order`` nodes. KenLM answers for one token at a time and needs a compiled package inside Triton; this needs numpy only.

``amira/models`` has a symbolic link to this file; ``stall_guard.py`` gives the reason.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = 1
"""Version of the file's format."""

EMPTY = 0
"""State of an empty context: nothing is known of the tokens before."""

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[Any]


class LanguageModelError(ValueError):
    """A language model cannot be used. The message says why."""


def vocabulary_digest(pieces: Sequence[str]) -> str:
    """Return a digest of pieces by token id, without the blank."""
    return hashlib.sha256("\n".join(pieces).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A back-off model. Token ids are 0 … V - 1; V begins a text. Probabilities are natural logarithms.

    Attributes:
        digest: digest of the vocabulary.
        sizes: number of n-grams of each order, the lowest first. All V + 1 tokens are unigrams.
        tokens: last token of each n-gram [N].
        log_probs: log probability of that token after the others [N], FP16.
        backoffs: log of the back-off weight of each node [M], FP16; 0 for node 0.
        children: number of n-grams that extend each node by one token [M].
    """

    digest: str
    sizes: tuple[int, ...]
    tokens: Integers
    log_probs: Integers
    backoffs: Integers
    children: Integers

    def save(self, path: Path) -> None:
        """Write the model."""
        np.savez_compressed(
            path,
            format=np.array(FORMAT),
            digest=np.array(self.digest),
            sizes=np.array(self.sizes),
            tokens=self.tokens,
            log_probs=self.log_probs,
            backoffs=self.backoffs,
            children=self.children,
        )

    @classmethod
    def load(cls, path: Path, pieces: Sequence[str]) -> LanguageModel:
        """Read a model.

        Args:
            path: file that ``save`` wrote.
            pieces: pieces of the transducer by token id, without the blank.

        Raises:
            OSError: the file cannot be read.
            LanguageModelError: it is no language model of this format, or one for other pieces.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
            if (version := int(found.pop("format"))) != FORMAT:
                raise LanguageModelError(f"{path} has format {version}; expected {FORMAT}: build it again by amira models lm")
            digest, sizes = str(found.pop("digest")), tuple(map(int, found.pop("sizes")))
            model = cls(digest, sizes, **found)
            model._check()
        except (KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise LanguageModelError(f"{path} is no language model: {error!r}") from error
        except ValueError as error:
            raise LanguageModelError(f"{path} is no language model: {error}") from error
        if digest != vocabulary_digest(pieces):
            raise LanguageModelError(f"{path} was built for another vocabulary; build it again by amira models lm")
        return model

    def _check(self) -> None:
        nodes = 1 + sum(self.sizes[:-1])
        lengths = {
            "tokens": (len(self.tokens), sum(self.sizes)),
            "log_probs": (len(self.log_probs), sum(self.sizes)),
            "backoffs": (len(self.backoffs), nodes),
            "children": (len(self.children), nodes),
        }
        for name, (found, expected) in lengths.items():
            if found != expected:
                raise ValueError(f"{name} has {found} values instead of {expected}")
        if int(self.children.sum(dtype=np.int64)) != len(self.tokens) or int(self.children[EMPTY]) != self.sizes[0]:
            raise ValueError(f"the children of all nodes are not the {len(self.tokens)} n-grams")

    @property
    def vocabulary(self) -> int:
        """Number of tokens, V."""
        return self.sizes[0] - 1

    @property
    def start(self) -> int:
        """State at the beginning of a text."""
        return self.sizes[0] if len(self.sizes) > 1 else EMPTY

    @property
    def states(self) -> int:
        """Number of states; they are 0 … ``states`` - 1."""
        return len(self.backoffs)

    def prepare(self) -> None:
        """Compute what ``scores`` and ``advance`` need, so that the first call does not wait."""
        _ = self.suffixes, self._firsts, self._unigrams

    def scores(self, states: Sequence[int]) -> Floats:
        """Return the log probabilities of all tokens after the contexts of these states [B, V]."""
        nodes = np.array(states, np.int64)
        rows = np.repeat(self._unigrams[None], len(nodes), axis=0)
        levels = []
        while nodes.any():
            levels.append(nodes)
            nodes = self.suffixes[nodes]
        for nodes in reversed(levels):  # longer contexts overwrite what shorter ones gave
            rows += self.backoffs[nodes].astype(np.float32)[:, None]
            counts = np.where(nodes == EMPTY, 0, self._firsts[nodes + 1] - self._firsts[nodes])
            ends = counts.cumsum()
            ngrams = np.arange(ends[-1]) + np.repeat(self._firsts[nodes] - (ends - counts), counts)
            rows[np.repeat(np.arange(len(nodes)), counts), self.tokens[ngrams]] = self.log_probs[ngrams]
        return rows

    def advance(self, state: int, token: int) -> int:
        """Return the state after a token: the longest known context."""
        while True:
            first, end = int(self._firsts[state]), int(self._firsts[state + 1])
            ngram = first + int(self.tokens[first:end].searchsorted(token))
            if ngram < end and self.tokens[ngram] == token and ngram + 1 < self.states:
                return ngram + 1
            if state == EMPTY:
                return EMPTY
            state = int(self.suffixes[state])

    @cached_property
    def suffixes(self) -> Integers:
        """Node of the longest known proper suffix of each node's context [M]."""
        suffixes = np.zeros(self.states, np.int32)
        width = self.sizes[0]
        parents = np.repeat(np.arange(self.states, dtype=np.int64), self.children)
        keys = parents * width + self.tokens  # ascending
        begin = self.sizes[0]
        for order in range(2, len(self.sizes)):
            end = begin + self.sizes[order - 1]
            shorter = suffixes[parents[begin:end]].astype(np.int64)
            tokens = self.tokens[begin:end]
            pending = np.arange(end - begin)
            while len(pending):
                wanted = shorter[pending] * width + tokens[pending]
                at = np.minimum(keys.searchsorted(wanted), len(keys) - 1)
                found = keys[at] == wanted  # certain for a unigram: all tokens are
                suffixes[begin + 1 + pending[found]] = at[found] + 1
                pending = pending[~found]
                shorter[pending] = suffixes[shorter[pending]]
            begin = end
        return suffixes

    @cached_property
    def _firsts(self) -> Integers:
        """Index of the first child of each node, and the number of n-grams behind the last [M + 1]."""
        return np.concatenate(([0], np.cumsum(self.children, dtype=np.int64))).astype(np.int32)

    @cached_property
    def _unigrams(self) -> Floats:
        return self.log_probs[: self.vocabulary].astype(np.float32)
