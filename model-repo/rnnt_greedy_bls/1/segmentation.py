"""Segment text into a model's pieces, as SentencePiece does with the same pieces and scores (Kudo & Richardson 2018).

Without scores, each piece is the longest one that fits. ``amira/models`` has a symbolic link to this file; ``stall_guard.py``
gives the reason.
"""

from __future__ import annotations

import functools
import heapq
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

WORD_START = "▁"

NO_TEXT = re.compile(r"|<[^<>]+>")
"""Pieces that no text is segmented into: empty ones, ``<unk>``, bytes."""

KINDS = "unigram", "bpe"
"""Kinds of segmentation with scores."""


KEPT_WORDS = 4096
"""Maximum number of words whose tokens are kept."""


class Scores(NamedTuple):
    """How a tokenizer weighs its pieces.

    Attributes:
        kind: ``unigram`` (the best sum of scores) or ``bpe`` (merges in the order of scores).
        values: score of each piece by token id.
    """

    kind: str
    values: tuple[float, ...]


def read_scores(path: Path, pieces: int) -> Scores:
    """Read scores: a line with the kind, and a line with the score of each piece.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is malformed, or has scores of another number of pieces.
    """
    kind, *lines = path.read_text(encoding="ascii").split()
    if kind not in KINDS or len(lines) != pieces:
        raise ValueError(f"{path} has {len(lines)} scores of kind {kind!r}; expected {pieces} of kind {' or '.join(KINDS)}")
    return Scores(kind, tuple(map(float, lines)))


class Segmenter:
    """Segments texts.

    Args:
        pieces: by token id, without the blank.
        scores: of the pieces; None: the longest piece that fits comes first.

    Attributes:
        cased: whether a piece has an upper-case letter.
    """

    def __init__(self, pieces: Sequence[str], scores: Scores | None = None) -> None:
        self._ids: dict[str, int] = {}
        for token, piece in enumerate(pieces):
            if not NO_TEXT.fullmatch(piece):
                self._ids.setdefault(piece, token)
        self._scores = scores
        self._prefixes = {piece[:length] for piece in self._ids for length in range(1, len(piece) + 1)}
        self._characters = frozenset("".join(self._ids))
        self.cased = any(character.isupper() for character in self._characters)
        self._marked = WORD_START in self._characters
        self._words = functools.lru_cache(KEPT_WORDS)(self._segment_word)

    def segment(self, text: str) -> list[int] | None:
        """Return the tokens of a text; None if the pieces cannot spell it.

        The text is put into Unicode's form NFKC, and into lower case if no piece has an upper-case letter. Punctuation that no
        piece has is left out.
        """
        tokens: list[int] = []
        text = unicodedata.normalize("NFKC", text.replace("’", "'"))
        text = text if self.cased else text.lower()
        if strange := set(text) - self._characters:
            text = text.translate({ord(character): " " for character in strange if not character.isalnum()})
        words = text.split()
        if not self._marked:
            words = ["".join(words)] if words else []
        for word in words:
            found = self._words((WORD_START if self._marked else "") + word)
            if found is None:
                return None
            tokens += found
        return tokens

    def _segment_word(self, word: str) -> list[int] | None:
        if self._scores is None:
            return self._by_length(word)
        if self._scores.kind == "bpe":
            return self._by_merges(word, self._scores.values)
        return self._by_sum(word, self._scores.values)

    def _pieces_at(self, word: str, begin: int) -> list[tuple[int, int]]:
        """Return the end and token of each piece that begins at a place of a word, the shortest first."""
        found = []
        for end in range(begin + 1, len(word) + 1):
            if (part := word[begin:end]) not in self._prefixes:
                break
            if (token := self._ids.get(part)) is not None:
                found.append((end, token))
        return found

    def _by_length(self, word: str) -> list[int] | None:
        """Return the longest pieces from the left; from a dead end, go back to a shorter piece."""
        chosen: list[tuple[int, int] | None] = [None] * len(word) + [(0, 0)]  # end and token of each suffix's first piece
        for begin in range(len(word) - 1, -1, -1):
            pieces = reversed(self._pieces_at(word, begin))
            chosen[begin] = next((piece for piece in pieces if chosen[piece[0]]), None)
        tokens, at = [], 0
        while at < len(word):
            if not (piece := chosen[at]):
                return None
            at, token = piece
            tokens.append(token)
        return tokens

    def _by_sum(self, word: str, scores: Sequence[float]) -> list[int] | None:
        """Return the pieces with the best sum of scores (Viterbi)."""
        best = [0.0] + [-math.inf] * len(word)
        last: list[tuple[int, int]] = [(0, 0)] * (len(word) + 1)  # begin and token of the last piece
        for begin in range(len(word)):
            if best[begin] == -math.inf:
                continue
            for end, token in self._pieces_at(word, begin):
                if best[begin] + scores[token] > best[end]:
                    best[end], last[end] = best[begin] + scores[token], (begin, token)
        if best[-1] == -math.inf:
            return None
        tokens, end = [], len(word)
        while end:
            end, token = last[end]
            tokens.append(token)
        return tokens[::-1]

    def _by_merges(self, word: str, scores: Sequence[float]) -> list[int] | None:
        """Merge the adjacent parts that make the piece with the best score, the leftmost first, until none is left."""
        parts = list(word)  # an empty part was merged into the one before
        after = list(range(1, len(parts) + 1))
        before = list(range(-1, len(parts) - 1))
        merges: list[tuple[float, int, str]] = []  # negative score, place and text

        def offer(left: int, right: int) -> None:
            if left >= 0 and right < len(parts) and (token := self._ids.get(parts[left] + parts[right])) is not None:
                heapq.heappush(merges, (-scores[token], left, parts[left] + parts[right]))

        for i in range(len(parts) - 1):
            offer(i, i + 1)
        while merges:
            _, left, text = heapq.heappop(merges)
            right = after[left]
            if not parts[left] or right == len(parts) or parts[left] + parts[right] != text:
                continue  # one of the parts was merged with another one
            parts[left], parts[right] = text, ""
            after[left] = right = after[right]
            if right < len(parts):
                before[right] = left
            offer(before[left], left)
            offer(left, right)
        tokens = [self._ids.get(part) for part in parts if part]
        return None if None in tokens else [token for token in tokens if token is not None]


def phrase_spellings(segmenter: Segmenter, phrase: str) -> list[tuple[int, ...]]:
    """Return the tokens of a phrase as it is typed, in lower case, and with a capital; without doubles."""
    texts = (phrase, phrase.lower(), phrase[:1].upper() + phrase[1:]) if segmenter.cased else (phrase,)
    found: dict[tuple[int, ...], None] = {}
    for text in texts:
        if tokens := segmenter.segment(text):
            found[tuple(tokens)] = None
    return list(found)
