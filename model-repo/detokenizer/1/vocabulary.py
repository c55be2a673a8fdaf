"""Read a model's vocabulary: subword pieces by token id; ``▁`` begins a word (SentencePiece, Kudo & Richardson 2018).

``rnnt_greedy_bls`` has a symbolic link to this file; ``stall_guard.py`` gives the reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

WORD_START = "▁"
SEPARATORS = re.compile(rf"[{WORD_START}\s]")
"""Characters between two words."""

BYTE_PIECE = re.compile(rf"({WORD_START}?)((?:<0x[0-9A-Fa-f]{{2}}>)+)")
"""A piece of bytes: one byte of a character that the vocabulary lacks (SentencePiece's byte fallback), or a part of characters
(byte-level BPE), which may begin a word."""

BYTE = re.compile(r"<0x(..)>")


def read_vocabulary(path: Path) -> list[str]:
    """Return the pieces by token id from a file with lines ``piece id``.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is empty or not UTF-8, a line has another form, or the ids are not 0, 1, 2, ….
    """
    pieces: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            piece, _, index = line.rstrip("\n").rpartition(" ")
            if index != str(len(pieces)):
                raise ValueError(f"{path} line {number} is {line.rstrip()!r}; expected 'piece {len(pieces)}'")
            pieces.append(piece)
    if not pieces:
        raise ValueError(f"{path} is empty; expected a line 'piece id' for each token")
    return pieces


def continuations(pieces: Sequence[str]) -> frozenset[int]:
    """Return the ids of pieces that continue the word before them."""
    return frozenset(index for index, piece in enumerate(pieces) if not SEPARATORS.match(piece))
