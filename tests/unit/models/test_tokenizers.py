"""Scores of published tokenizers, against SentencePiece itself.

``tokenizers/`` has two models of 200 pieces that sentencepiece 0.2 trained on words of docs/Reliability.md and CONTRIBUTING.md
(``model_type`` unigram and bpe, ``normalization_rule_name=identity``, ``unk_id=0``, no other special pieces), and the ids into
which it encodes words and sentences.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from amira.models.configs import ModelError
from amira.models.importing import import_model
from amira.models.repository import recognisers
from amira.models.segmentation import Segmenter, read_scores
from amira.models.vocabularies import read_pieces, read_tokenizer, scores_to_text
from tests.support.published import imported, published

TOKENIZERS = Path(__file__).parent / "tokenizers"
KINDS = "unigram", "bpe"


def encoded(kind: str) -> dict[str, list[int]]:
    """What SentencePiece encodes texts into."""
    lines = (TOKENIZERS / f"{kind}.tsv").read_text(encoding="utf-8").splitlines()
    return {text: list(map(int, ids.split())) for text, ids in (line.split("\t") for line in lines)}


def write_json(kind: str, directory: Path) -> None:
    """Write a tokenizer as the tokenizers library does."""
    shutil.copy(TOKENIZERS / f"{kind}.model", directory / "tokenizer.model")
    pieces = read_pieces(directory / "tokenizer.model")
    scores = read_tokenizer(directory, pieces)
    assert scores
    model: dict[str, Any] = {"type": "Unigram", "vocab": list(zip(pieces, scores.values, strict=True))}
    if kind == "bpe":
        order = sorted(zip(scores.values, pieces, strict=True), reverse=True)
        longer = [piece for _, piece in order if len(piece) > 1 and piece != "<unk>"]
        halves = [next([p[:i], p[i:]] for i in range(1, len(p)) if {p[:i], p[i:]} <= set(pieces)) for p in longer]
        merges = [" ".join(pair) if i % 2 else pair for i, pair in enumerate(halves)]  # of older and of newer versions
        model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges}
    (directory / "tokenizer.model").unlink()
    (directory / "tokenizer.json").write_text(json.dumps({"model": model}), encoding="utf-8")


@pytest.mark.parametrize("name", ["tokenizer.model", "bpe.model", "tokenizer.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_segmented_as_the_tokenizer_does(kind: str, name: str, tmp_path: Path) -> None:
    pieces = read_pieces(TOKENIZERS / f"{kind}.model")
    if name.endswith(".json"):
        write_json(kind, tmp_path)
    else:
        shutil.copy(TOKENIZERS / f"{kind}.model", tmp_path / name)
    scores = read_tokenizer(tmp_path, pieces)
    assert scores
    (tmp_path / "piece_scores.txt").write_text(scores_to_text(scores), encoding="ascii")
    segmenter, longest = Segmenter(pieces, read_scores(tmp_path / "piece_scores.txt", len(pieces))), Segmenter(pieces)
    expected = encoded(kind)
    assert {text: segmenter.segment(text) for text in expected} == expected
    assert {text: longest.segment(text) for text in expected} != expected


def test_pieces_may_be_in_another_order_and_have_others_between(tmp_path: Path) -> None:
    """icefall numbers the special pieces by itself."""
    shutil.copy(TOKENIZERS / "unigram.model", tmp_path / "bpe.model")
    pieces = ["<sos/eos>", *reversed(read_pieces(tmp_path / "bpe.model")), "<en-US>"]
    scores = read_tokenizer(tmp_path, pieces)
    assert scores
    segmenter = Segmenter(pieces, scores)
    original = read_pieces(tmp_path / "bpe.model")
    for text, ids in encoded("unigram").items():
        assert [pieces[token] for token in segmenter.segment(text) or []] == [original[token] for token in ids]


def test_tokenizer_of_other_pieces_is_not_used(tmp_path: Path) -> None:
    shutil.copy(TOKENIZERS / "unigram.model", tmp_path / "tokenizer.model")
    pieces = read_pieces(tmp_path / "tokenizer.model")
    assert read_tokenizer(tmp_path, [*pieces, "qqq"]) is None
    assert read_tokenizer(tmp_path / "nothing", pieces) is None
    (tmp_path / "tokenizer.model").rename(tmp_path / "other.model")
    assert read_tokenizer(tmp_path, pieces) is None
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordPiece", "vocab": {}}}', encoding="utf-8")
    assert read_tokenizer(tmp_path, pieces) is None


@pytest.mark.parametrize("content", [b"\x0a\xff", b"version https://git-lfs.github.com/spec/v1\noid", b"\x0a\x03\x08\x01\x10"])
def test_damaged_tokenizer_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.model is (no tokenizer: .*remove it|a Git LFS pointer)"):
        read_tokenizer(tmp_path, ["a"])
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json is (no tokenizer: .*remove it|a Git LFS pointer)"):
        read_tokenizer(tmp_path, ["a"])


def test_import_writes_the_scores_of_the_tokenizer(tmp_path: Path) -> None:
    """NeMo's layout with ``vocab.txt``, and one whose vocabulary is the tokenizer."""
    repository = imported("nemotron")
    (recogniser,) = recognisers(repository)
    decoder = repository / recogniser.decoder
    pieces = int(recogniser.parameters["blank"])
    assert read_scores(decoder / recogniser.parameters["piece_scores"], pieces).kind == "unigram"
    source = Path(shutil.copytree(published("zipformer"), tmp_path / "source"))
    without = tmp_path / "without"
    import_model(str(source), "plain", without)
    assert "piece_scores" not in recognisers(without)[0].parameters
    lines = (source / "tokens.txt").read_text(encoding="utf-8").splitlines()
    spelled = [line.rpartition(" ")[0] for line in lines]
    vocabulary = [[piece, -float(i)] for i, piece in enumerate(spelled)]
    (source / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": vocabulary}}), encoding="utf-8")
    import_model(str(source), "scored", tmp_path / "scored")
    (scored,) = recognisers(tmp_path / "scored")
    scores = read_scores(
        tmp_path / "scored" / scored.decoder / scored.parameters["piece_scores"], int(scored.parameters["blank"])
    )
    assert scores.values == tuple(-float(i) for i in range(1, len(spelled)))
