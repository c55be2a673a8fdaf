"""Read the vocabularies that models are published with, and write them in the repository's convention.

The convention is one piece per line with its id, ``▁`` before a word, the blank last, and ``<0xE4>`` for a byte. A piece may be
several bytes, ``▁<0xE4><0xBD>``; a piece without text is empty.
"""

from __future__ import annotations

import json
import math
import re
import struct
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from amira.models.configs import ModelError
from amira.models.graphs import LFS_POINTER
from amira.models.segmentation import NO_TEXT, Scores

BLANK = "<blk>"
BLANK_NAMES = (BLANK, "<blank>", "<eps>")
"""Names of the blank in published vocabularies."""

WORD_START = "▁"
FILES = ("tokens.txt", "vocab.txt", "tokenizer.json", "tokenizer.model")
"""Names of vocabulary files, in the order in which they are looked for."""

TOKENIZERS = ("tokenizer.model", "bpe.model", "tokenizer.json")
"""Names of tokenizers with scores of pieces, in the order in which they are looked for: NeMo's, icefall's, and the tokenizers
library's."""

SENTENCEPIECE_KINDS = {1: "unigram", 2: "bpe", 3: "unigram", 4: "unigram"}
"""Kind of segmentation by SentencePiece's ``model_type``: words and characters are pieces that never overlap."""

TEXT_PIECES = (1, 4)
"""SentencePiece's types of pieces that text is segmented into: normal and user-defined ones."""

NO_SCORE = -math.inf
"""Score of a piece that no text is segmented into."""

BYTE_BPE_CHARACTERS = (
    *map(chr, range(0x100, 0x120)),
    *map(chr, range(32, 127)),
    *(c for c in map(chr, range(0x120, 0x1A7)) if unicodedata.normalize("NFKC", c) == c),
)
"""The character that stands for each byte in icefall's byte-level BPE: printable, and left alone by NFKC normalisation (Wang et
al. 2020, arXiv:1909.03341)."""

BYTE_OF = {character: byte for byte, character in enumerate(BYTE_BPE_CHARACTERS)} | {"⁇": 32}
HIGHEST_BYTE = 0xC6
"""UTF-8 writes the characters of byte-level BPE with bytes up to this one, and uses this one."""

DISAMBIGUATION = re.compile(r"#\d+")
"""Symbols that icefall adds behind the vocabulary for decoding graphs."""

REPLACEMENT = "\ufffd"
"""What bytes that are no UTF-8 are decoded to."""

WITH_ID = re.compile(r".* \d+ *")
"""A line of a vocabulary with an id."""

SPECIAL = re.compile(r"<(?!unk>)[a-z]{2,3}(-[A-Z]{2})?>|<EO[UB]>")
"""Pieces that are no text: language tags, end of utterance, and end of backchannel."""

CONTINUES = 0x80
"""Bit of a protobuf number's byte: more bytes follow."""

VARINT, FIXED_SIZES = 0, {1: 8, 2: 0, 5: 4}
"""Protobuf's wire types: a number, and the others with their sizes in bytes; 0: the size comes first."""

END_OF_UTTERANCE = "<EOU>"


def find_vocabulary(directory: Path) -> Path:
    """Return the vocabulary file of a source.

    Raises:
        ModelError: there is none.
    """
    for name in FILES:
        if (directory / name).is_file():
            return directory / name
    raise ModelError(f"{directory}: the vocabulary is missing; expected one of {', '.join(FILES)}")


def read_pieces(path: Path) -> list[str]:
    """Return pieces by id, as the file has them.

    Raises:
        ModelError: the file is malformed, or ids are missing.
    """
    _check_pointer(path)
    try:
        if path.suffix == ".json":
            numbered = _tokenizer_json(path)
        elif path.suffix == ".model":
            numbered = dict(enumerate(piece.text for piece in _sentencepiece_pieces(path.read_bytes())))
        else:
            numbered = _numbered_lines(path)
    except (UnicodeDecodeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"{path} is no vocabulary: {str(error) or repr(error)}") from error
    pieces = [numbered[index] for index in range(len(numbered)) if index in numbered]
    if not pieces or len(pieces) != len(numbered):
        raise ModelError(f"{path} has {len(numbered)} pieces with ids up to {max(numbered, default=0)}; expected ids from 0 on")
    while DISAMBIGUATION.fullmatch(pieces[-1]):
        pieces.pop()
    return pieces


def read_tokenizer(directory: Path, pieces: Sequence[str]) -> Scores | None:
    """Return the scores of a source's pieces by its tokenizer.

    Args:
        directory: the source.
        pieces: by token id in the repository's convention, without the blank.

    Returns:
        The scores; None if the source has no tokenizer with scores, or has one of other pieces.

    Raises:
        ModelError: the tokenizer is malformed.
    """
    for name in TOKENIZERS:
        path = directory / name
        if not path.is_file():
            continue
        _check_pointer(path)
        try:
            found = _read_json_scores(path) if path.suffix == ".json" else _read_sentencepiece_scores(path)
        except (KeyError, TypeError, ValueError, IndexError, struct.error) as error:
            raise ModelError(f"{path} is no tokenizer: {str(error) or repr(error)}; remove it to import without") from error
        if found and all(piece in found[1] for piece in pieces if not _is_special(piece)):
            kind, scores = found
            return Scores(kind, tuple(scores.get(piece, NO_SCORE) for piece in pieces))
    return None


def scores_to_text(scores: Scores) -> str:
    """Return the content of ``piece_scores.txt``; ``segmentation.read_scores`` reads it."""
    return "".join(f"{value}\n" for value in (scores.kind, *scores.values))


def _is_special(piece: str) -> bool:
    """Return whether no text is segmented into a piece."""
    return bool(NO_TEXT.fullmatch(piece) or SPECIAL.fullmatch(piece))


def _read_sentencepiece_scores(path: Path) -> tuple[str, Mapping[str, float]]:
    data = path.read_bytes()
    scores = {piece.text: piece.score if piece.type in TEXT_PIECES else NO_SCORE for piece in _sentencepiece_pieces(data)}
    return _sentencepiece_kind(data), scores


def _read_json_scores(path: Path) -> tuple[str, Mapping[str, float]] | None:
    """Return kind and scores of a file of the tokenizers library; None if its model has none.

    BPE has an order of merges instead of scores: the score of a piece is that of the first merge that makes the piece.
    """
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    if model.get("type") == "Unigram":
        return "unigram", {piece: float(score) for piece, score in model["vocab"]}
    if model.get("type") != "BPE" or not model.get("merges"):
        return None
    scores = dict.fromkeys(model["vocab"], NO_SCORE)
    for rank, merge in reversed(list(enumerate(model["merges"]))):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        scores[left + right] = -float(rank)
    return "bpe", scores


def to_convention(pieces: Sequence[str], logits: int, blank: int, path: Path) -> list[str]:
    """Return a vocabulary with the blank last, and with the text of byte-level BPE and special pieces in the convention.

    Args:
        pieces: by id, as the file has them; a blank behind the last one may be missing.
        logits: number of outputs of the joint network.
        blank: id of the blank: 0 or ``logits - 1``.
        path: of the file, for messages.

    Raises:
        ModelError: the number of pieces does not suit the joint network.
    """
    if blank == logits - 1 and len(pieces) == logits - 1:
        pieces = [*pieces, BLANK]
    if len(pieces) != logits:
        raise ModelError(f"{path} has {len(pieces)} pieces; expected {logits}, as the joint network has outputs")
    if pieces[blank] not in BLANK_NAMES:
        raise ModelError(f"{path} has {pieces[blank]!r} at {blank}; expected the blank there, {' or '.join(BLANK_NAMES)}")
    texts = [*pieces[:blank], *pieces[blank + 1 :]]
    if is_byte_bpe(texts):
        texts = [byte_bpe_text(text) for text in texts]
    return [*("" if SPECIAL.fullmatch(text) else text for text in texts), BLANK]


def is_byte_bpe(pieces: Sequence[str]) -> bool:
    """Whether the pieces are of byte-level BPE: all in its characters, and not in ASCII alone."""
    highest = [max(piece.removeprefix(WORD_START).encode(), default=0) for piece in pieces]
    return max(highest, default=0) == HIGHEST_BYTE


def byte_bpe_text(piece: str) -> str:
    """Return a piece of byte-level BPE as text if its bytes are printable characters, else as ``<0x…>`` for each byte."""
    text = piece.removeprefix(WORD_START)
    start = piece[: len(piece) - len(text)]
    if re.fullmatch(r"<[\w/]+>", text) or any(character not in BYTE_OF for character in text):
        return piece
    data = bytes(BYTE_OF[character] for character in text)
    decoded = data.decode(errors="replace")
    if decoded.isprintable() and REPLACEMENT not in decoded:  # a line break would be no line of a vocabulary
        return start + decoded
    return start + "".join(f"<0x{byte:02X}>" for byte in data)


def to_text(pieces: Sequence[str]) -> str:
    """Return the content of ``vocab.txt``.

    Raises:
        ModelError: a piece contains a line break.
    """
    if broken := [piece for piece in pieces if "\n" in piece]:
        raise ModelError(f"the vocabulary has a piece with a line break: {broken[0]!r}")
    return "".join(f"{piece} {index}\n" for index, piece in enumerate(pieces))


def _check_pointer(path: Path) -> None:
    """Raise ModelError if a file was not downloaded."""
    if path.read_bytes()[: len(LFS_POINTER)] == LFS_POINTER:
        raise ModelError(f"{path} is a Git LFS pointer instead of the file; run git lfs pull where it was cloned")


def _numbered_lines(path: Path) -> dict[int, str]:
    """Read lines ``piece id``, or lines ``piece`` in the order of their ids.

    A line of an id alone is a space, as sherpa-onnx reads it.

    Raises:
        ValueError: some lines have an id and others none, or an id occurs twice.
    """
    with path.open(encoding="utf-8-sig", newline="\n") as file:  # with or without a byte order mark
        lines = [line.rstrip("\r\n").replace("\t", " ") for line in file if line.strip()]
    if not any(WITH_ID.fullmatch(line) for line in lines):
        return dict(enumerate(lines))
    numbered: dict[int, str] = {}
    for line in lines:
        piece, _, index = line.rstrip().rpartition(" ")
        if not index.isdecimal():
            raise ValueError(f"line {line!r} has no id, and others have one")
        if int(index) in numbered:
            raise ValueError(f"{numbered[int(index)]!r} and {piece!r} have the id {index}")
        numbered[int(index)] = piece or " "
    return numbered


def _tokenizer_json(path: Path) -> dict[int, str]:
    """Read a file of the tokenizers library: a vocabulary by piece or in order, and added pieces."""
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        numbered = {int(index): piece for piece, index in vocabulary.items()}
    else:
        numbered = {index: piece for index, (piece, _) in enumerate(vocabulary)}
    return numbered | {int(added["id"]): added["content"] for added in content.get("added_tokens", [])}


class _Piece(NamedTuple):
    """A piece of a SentencePiece model."""

    text: str
    score: float
    type: int


def _sentencepiece_pieces(data: bytes) -> Iterator[_Piece]:
    """Yield the pieces of a SentencePiece model (``sentencepiece_model.proto``): field 1 of the model repeats them."""
    for number, content in _fields(data):
        if number == 1 and isinstance(content, bytes):
            fields = dict(_fields(content))
            text, score, kind = fields[1], fields.get(2, bytes(4)), fields.get(3, 1)
            if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
                raise TypeError("a piece has fields of other types")
            yield _Piece(text.decode(), struct.unpack("<f", score)[0], kind)


def _sentencepiece_kind(data: bytes) -> str:
    """Return the kind of a SentencePiece model: field 3 of its trainer's specification, field 2."""
    specification = dict(_fields(data)).get(2, b"")
    kind = dict(_fields(specification)).get(3, 1) if isinstance(specification, bytes) else 1
    return SENTENCEPIECE_KINDS[int(kind)]


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield number and value of a protobuf message's fields (protobuf's encoding guide)."""
    position = 0

    def varint() -> int:
        nonlocal position
        result = shift = 0
        while True:
            byte = data[position]
            position += 1
            result |= (byte & ~CONTINUES) << shift
            shift += 7
            if not byte & CONTINUES:
                return result

    while position < len(data):
        number, wire_type = divmod(varint(), 8)
        if wire_type == VARINT:
            yield number, varint()
            continue
        size = FIXED_SIZES[wire_type] or varint()
        if position + size > len(data):
            raise ValueError("the file is cut short")
        yield number, data[position : position + size]
        position += size
