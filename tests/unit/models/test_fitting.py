"""Language models of repositories, and the segmentation of text into pieces."""

from __future__ import annotations

import gzip
import itertools
import shutil
import time
from pathlib import Path
from random import Random
from string import ascii_lowercase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amira.models.configs import ModelError
from amira.models.fitting import fit, load_fitted
from amira.models.language_model import EMPTY
from amira.models.ngrams import write_arpa
from amira.models.repository import recognisers
from amira.models.segmentation import Scores, Segmenter, phrase_spellings, read_scores
from amira.paths import MODEL_REPOSITORY
from phrases import Phrases

PIECES = ("<unk>", "▁", "a", "b", "c", "ab", "▁a", "▁ab", "bc", "▁abc")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of the bundled models."""
    return Path(shutil.copytree(MODEL_REPOSITORY, tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__")))


def bundled_pieces() -> list[str]:
    lines = (MODEL_REPOSITORY / "vocab.txt").read_text(encoding="utf-8").split("\n")
    return [line.rpartition(" ")[0] for line in lines][:512]


def test_fitted_model_prefers_its_text(repository: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.gz"
    with gzip.open(text, "wt", encoding="utf-8") as file:
        file.write("The cat sat.\n" * 5 + "the dog!\n42\n\n")
    fitted = fit(repository, None, [text], None, 3)
    assert (fitted.sentences, fitted.left_out) == (6, 1), "no piece has a digit"
    model, pieces = load_fitted(repository, None)
    segmenter = Segmenter(pieces, read_scores(repository / "rnnt_greedy_bls" / "piece_scores.txt", len(pieces)))
    state = model.start
    for token in segmenter.segment("the") or []:
        state = model.advance(state, token)
    cat, dog = ((segmenter.segment(word) or [])[0] for word in ("cat", "dog"))
    assert model.scores([state])[0, cat] > model.scores([state])[0, dog] > model.scores([state])[0].min()


def test_configuration_names_the_model_once(repository: Path, tmp_path: Path) -> None:
    config = repository / "rnnt_greedy_bls" / "config.pbtxt"
    before = config.read_text(encoding="utf-8")
    (tmp_path / "text").write_text("so it goes\n", encoding="utf-8")
    fit(repository, None, [tmp_path / "text"], None, 2)
    assert config.read_text(encoding="utf-8") == before
    config.write_text("\n".join(line for line in before.splitlines() if '"language_model"' not in line), encoding="utf-8")
    with pytest.raises(ModelError, match="asr_ensemble has no language model; build one by amira models lm"):
        load_fitted(repository, None)
    fit(repository, None, [tmp_path / "text"], None, 2)
    (recogniser,) = recognisers(repository)
    assert recogniser.parameters["language_model"] == "language_model.npz"


def test_arpa_gives_the_same_model(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("so it goes\nso it went\n", encoding="utf-8")
    fit(repository, None, [tmp_path / "text"], None, 3)
    model, pieces = load_fitted(repository, None)
    write_arpa(model, pieces, tmp_path / "model.arpa")
    fit(repository, None, [], tmp_path / "model.arpa", 5)
    read, _ = load_fitted(repository, None)
    assert read.sizes == model.sizes
    assert abs(read.scores([EMPTY, model.start]) - model.scores([EMPTY, model.start])).max() < 0.01


def test_unknown_ensemble_is_named(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("so it goes\n", encoding="utf-8")
    with pytest.raises(ModelError, match="--name is 'other'; expected one of the ensembles asr_ensemble"):
        fit(repository, "other", [tmp_path / "text"], None, 3)


@given(st.text("abc", min_size=1, max_size=7), st.lists(st.integers(-40, -1), min_size=len(PIECES), max_size=len(PIECES)))
def test_unigram_segmentation_has_the_best_sum(word: str, values: list[int]) -> None:
    scores = [value / 4 for value in values]  # exact sums
    tokens = Segmenter(PIECES, Scores("unigram", tuple(scores))).segment(word)
    spelled = f"▁{word}"
    sums = []
    for cuts in itertools.product((False, True), repeat=len(word)):
        borders = [0, *(i for i, cut in enumerate(cuts, 1) if cut), len(spelled)]
        parts = [spelled[begin:end] for begin, end in itertools.pairwise(borders)]
        if all(part in PIECES for part in parts):
            sums.append(sum(scores[PIECES.index(part)] for part in parts))
    assert tokens is not None
    assert "".join(PIECES[token] for token in tokens) == spelled
    assert sum(scores[token] for token in tokens) == max(sums)


def test_segmentation_without_scores_takes_the_longest_piece() -> None:
    segmenter = Segmenter(PIECES)
    assert segmenter.segment("abcab") == [PIECES.index("▁abc"), PIECES.index("ab")]
    assert Segmenter(["▁ab", "▁a", "bc"]).segment("abc") == [1, 2], "the longest one leads to a dead end"
    assert segmenter.segment("abd") is None


def test_bpe_merges_in_the_order_of_scores() -> None:
    pieces = ("▁", "a", "b", "c", "ab", "bc", "▁a")
    order = {"bc": -1.0, "ab": -2.0, "▁a": -3.0}
    scores = Scores("bpe", tuple(order.get(piece, -9.0) for piece in pieces))
    assert Segmenter(pieces, scores).segment("abc") == [pieces.index("▁a"), pieces.index("bc")]


@given(st.text("abc", min_size=1, max_size=9), st.permutations(range(len(PIECES))))
def test_bpe_merges_as_by_its_definition(word: str, order: list[int]) -> None:
    """Search all adjacent pairs anew after each merge."""
    parts = list(f"▁{word}")
    while pairs := [
        (order[PIECES.index(parts[i] + parts[i + 1])], -i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in PIECES
    ]:
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    scores = Scores("bpe", tuple(map(float, order)))
    assert Segmenter(PIECES, scores).segment(word) == [PIECES.index(part) for part in parts]


def test_longest_phrases_take_little_time() -> None:
    """20,000 characters; they took 0.2 s."""
    pieces, random = bundled_pieces(), Random(1)  # noqa: S311 (reproducible)
    scores = read_scores(MODEL_REPOSITORY / "rnnt_greedy_bls" / "piece_scores.txt", len(pieces))
    phrases = [" ".join("".join(random.choices(ascii_lowercase, k=6)) for _ in range(6))[:40] for _ in range(490)]
    phrases += ["".join(random.choices(ascii_lowercase, k=199)) for _ in range(2)]
    took_secs = []
    for _ in range(3):
        began = time.thread_time()
        segmenter = Segmenter(pieces, scores)
        spelled = {tokens: 1.5 for phrase in phrases for tokens in phrase_spellings(segmenter, phrase)}
        automaton = Phrases(spelled, len(pieces), ())
        took_secs.append(time.thread_time() - began)
    assert automaton.states > 10_000
    assert min(took_secs) < 0.09


def test_phrases_are_spelled_as_the_model_writes() -> None:
    lower = Segmenter(bundled_pieces())
    assert phrase_spellings(lower, "New York") == phrase_spellings(lower, "  new  YORK!")
    assert phrase_spellings(lower, "42") == []
    cased = Segmenter(["▁", "A", "a", "B", "b"])
    assert [len(tokens) for tokens in phrase_spellings(cased, "aB")] == [3, 3, 3]
    assert len(set(phrase_spellings(cased, "aB"))) == 3, "as typed, in lower case, with a capital"


def test_words_of_a_model_without_word_starts_are_joined() -> None:
    assert Segmenter(["你", "好", "你好"]).segment("你 好") == [2]
