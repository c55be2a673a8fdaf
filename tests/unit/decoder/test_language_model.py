"""N-gram models: estimation, look-ups and files, against plain dictionaries."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amira.models.configs import ModelError
from amira.models.language_model import EMPTY, LanguageModel, LanguageModelError
from amira.models.ngrams import FALLBACK_DISCOUNTS, estimate, read_arpa, write_arpa

PIECES = ("▁a", "b", "▁", "▁c", "d e", "", "▁a")  # with some that are no words of an ARPA file
VOCABULARY = len(PIECES)
BEGIN = VOCABULARY
Gram = tuple[int, ...]

texts = st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=12), min_size=1, max_size=30).filter(any)
orders = st.integers(2, 5)


class Plain:
    """Interpolated Kneser-Ney by its definition (Chen & Goodman 1999)."""

    def __init__(self, texts: Sequence[Sequence[int]], order: int) -> None:
        self.order = order
        raw = [Counter[Gram]() for _ in range(order + 1)]
        for text in filter(None, texts):
            line = (BEGIN, *text)
            for length in range(1, order + 1):
                raw[length].update(line[i : i + length] for i in range(len(line) - length + 1))
        self.counts = [Counter[Gram]() for _ in range(order + 1)]
        for length in range(1, order + 1):
            for gram, count in raw[length].items():
                adjusted = count if length == order or gram[0] == BEGIN else sum(g[1:] == gram for g in raw[length + 1])
                if gram[-1] != BEGIN:
                    self.counts[length][gram] = adjusted
        self.discounts = [self._discounts(counts) for counts in self.counts]

    @staticmethod
    def _discounts(counts: Counter[Gram]) -> Sequence[float]:
        n = [sum(count == c for count in counts.values()) for c in (1, 2, 3, 4)]
        if all(n):
            y = n[0] / (n[0] + 2 * n[1])
            found = [1 - 2 * y * n[1] / n[0], 2 - 3 * y * n[2] / n[1], 3 - 4 * y * n[3] / n[2]]
            if all(0 < discount < c for discount, c in zip(found, (1, 2, 3), strict=True)):
                return found
        return FALLBACK_DISCOUNTS

    def probability(self, context: Gram, token: int) -> float:
        context = context[-(self.order - 1) :]
        length = len(context) + 1
        lower = self.probability(context[1:], token) if context else 1 / VOCABULARY
        same = {gram[-1]: count for gram, count in self.counts[length].items() if gram[:-1] == context}
        if not same:
            return lower
        taken = {t: min(self.discounts[length][min(c, 3) - 1], c) for t, c in same.items()}
        total = sum(same.values())
        return (same.get(token, 0) - taken.get(token, 0)) / total + sum(taken.values()) / total * lower


def walk(model: LanguageModel, tokens: Sequence[int]) -> int:
    state = model.start
    for token in tokens:
        state = model.advance(state, token)
    return state


@settings(max_examples=25)
@given(texts, orders, st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=8), min_size=1, max_size=4))
def test_scores_are_kneser_ney(texts: list[list[int]], order: int, histories: list[list[int]]) -> None:
    model, plain = estimate(texts, order, PIECES), Plain(texts, order)
    histories = [*histories, *texts[:2]]
    rows = model.scores([walk(model, history) for history in histories])
    for history, row in zip(histories, rows, strict=True):
        expected = [math.log(plain.probability((BEGIN, *history), token)) for token in range(VOCABULARY)]
        np.testing.assert_allclose(row, expected, atol=0.02)  # FP16
        assert np.exp(row.astype(float)).sum() == pytest.approx(1, abs=0.02)


@settings(max_examples=25)
@given(texts, orders, st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=8), min_size=2, max_size=6))
def test_batches_change_nothing(texts: list[list[int]], order: int, histories: list[list[int]]) -> None:
    model = estimate(texts, order, PIECES)
    states = [walk(model, history) for history in histories]
    together = model.scores(states)
    for state, row in zip(states, together, strict=True):
        np.testing.assert_array_equal(model.scores([state])[0], row)


@settings(max_examples=15)
@given(texts, orders)
def test_files_keep_the_model(tmp_path_factory: pytest.TempPathFactory, texts: list[list[int]], order: int) -> None:
    path = tmp_path_factory.mktemp("models") / "model.npz"
    model = estimate(texts, order, PIECES)
    model.save(path)
    write_arpa(model, PIECES, path.with_suffix(".arpa"))
    loaded, read = LanguageModel.load(path, PIECES), read_arpa(path.with_suffix(".arpa"), PIECES)
    states = range(model.states)
    np.testing.assert_array_equal(loaded.scores(states), model.scores(states))
    np.testing.assert_allclose(read.scores(states), model.scores(states), atol=0.01)
    assert loaded.sizes == read.sizes == model.sizes


def test_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    estimate([[0, 1, 2]], 3, PIECES).save(path)
    with pytest.raises(LanguageModelError, match=r"built for another vocabulary; build it again by amira models lm"):
        LanguageModel.load(path, [*PIECES[:-1], "▁z"])


@pytest.mark.parametrize("content", [b"", b"PK", b"no model"])
def test_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.npz"
    path.write_bytes(content)
    with pytest.raises(LanguageModelError, match="is no language model"):
        LanguageModel.load(path, PIECES)


def test_file_with_a_part_missing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    estimate([[0, 1, 2]], 3, PIECES).save(path)
    with np.load(path) as file:
        parts = dict(file)
    np.savez(path, **{**parts, "tokens": parts["tokens"][:-1]})
    with pytest.raises(LanguageModelError, match=r"tokens has \d+ values instead of \d+"):
        LanguageModel.load(path, PIECES)


def test_arpa_of_pruned_model_falls_back_to_known_suffixes(tmp_path: Path) -> None:
    """SRILM prunes the trigram's suffix ``b c`` but keeps the trigram's own context."""
    path = tmp_path / "model.arpa"
    path.write_text(
        "\\data\\\nngram 1=5\nngram 2=1\nngram 3=1\n\n\\1-grams:\n-1\t<unk>\n-99\t<s>\t-0.3\n-1\t</s>\n"
        "-0.5\t▁a\t-0.2\n-0.6\tb\t-0.1\n\n\\2-grams:\n-0.3\t▁a b\t-0.4\n\n\\3-grams:\n-0.1\t▁a b b\n\n\\end\\\n",
        encoding="utf-8",
    )
    model = read_arpa(path, ("▁a", "b", "c"))
    state = model.advance(model.advance(EMPTY, 0), 1)
    row = model.scores([state])[0] / math.log(10)
    assert row[1] == pytest.approx(-0.1, abs=1e-3), "the trigram"
    assert row[0] == pytest.approx(-0.4 - 0.1 - 0.5, abs=1e-3), "two back-offs and a unigram"
    after = model.scores([model.advance(state, 1)])[0] / math.log(10)
    assert after[0] == pytest.approx(-0.1 - 0.5, abs=1e-3), "the longest known suffix is b"


def test_nemo_arpa_is_read(tmp_path: Path) -> None:
    """NeMo trains KenLM on the characters chr(100 + token)."""
    path = tmp_path / "model.arpa"
    path.write_text(
        "\\data\\\nngram 1=4\nngram 2=1\n\n\\1-grams:\n-99\t<s>\t0\n-1\t</s>\n"
        f"-0.5\t{chr(100)}\t-0.2\n-0.6\t{chr(101)}\n\n\\2-grams:\n-0.3\t{chr(100)} {chr(101)}\n\n\\end\\\n",
        encoding="utf-8",
    )
    model = read_arpa(path, ("▁hello", "▁world"))
    row = model.scores([model.advance(EMPTY, 0)])[0] / math.log(10)
    assert row.tolist() == pytest.approx([-0.7, -0.3], abs=1e-3)


def test_arpa_without_a_context_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.arpa"
    path.write_text(
        "\\data\\\n\n\\1-grams:\n-1\tb\n\n\\2-grams:\n-1\tb b\n\n\\3-grams:\n-1\t▁a b b\n\\end\\\n", encoding="utf-8"
    )
    with pytest.raises(ModelError, match=r"an n-gram after the tokens \(0, 1\), but not those as an n-gram"):
        read_arpa(path, PIECES[:2])


def test_texts_without_words_are_refused() -> None:
    with pytest.raises(ModelError, match="no words"):
        estimate([[], []], 3, PIECES)


def test_states_are_contexts() -> None:
    """A state is the longest known context, so it depends on the last tokens alone."""
    texts = [[0, 1, 2, 3], [3, 1, 2, 0]]
    model = estimate(texts, 3, PIECES)
    states = defaultdict(set)
    for first in range(VOCABULARY):
        for text in texts:
            tokens = [first, *text]
            states[tuple(tokens[-2:])].add(walk(model, tokens))
    assert all(len(found) == 1 for found in states.values())
