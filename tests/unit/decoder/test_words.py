from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from words import Word, group, join, read_vocabulary

pieces = st.sampled_from(["▁", "▁a", "▁ab", "b", "né", "'", "日", "▁😀"])
spans = st.tuples(st.integers(0, 4), st.integers(1, 5), st.floats(0, 1))


def vocabulary(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_vocabulary_lists_pieces_by_id(tmp_path: Path, end: str) -> None:
    path = vocabulary(tmp_path, f"<unk> 0\n▁né 1\n  2\n▁😀 3\n日 4{end}")
    assert read_vocabulary(path) == ["<unk>", "▁né", " ", "▁😀", "日"]


@pytest.mark.parametrize(
    ("text", "number", "line", "index"),
    [
        ("a 0\nb 2\n", 2, "b 2", 1),  # an id is missing
        ("a 1\n", 1, "a 1", 0),
        ("a 0\na 0\n", 2, "a 0", 1),
        ("a 0\n\nb 1\n", 2, "", 1),
        ("a 0\nb\n", 2, "b", 1),
        ("a 0\nb one\n", 2, "b one", 1),
        ("0 a\n", 1, "0 a", 0),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, number: int, line: str, index: int) -> None:
    path = vocabulary(tmp_path, text)
    with pytest.raises(ValueError, match=r"line") as error:
        read_vocabulary(path)
    assert str(error.value) == f"{path} line {number} is {line!r}; expected 'piece {index}'"


@pytest.mark.parametrize(
    ("given_pieces", "text", "with_leading_space"),
    [
        ([], "", ""),
        (["▁he", "ll", "o", "▁world"], "hello world", " hello world"),
        (["ing", "▁on"], "ing on", "ing on"),
        (["▁", "▁né", "e", "▁日", "本", "▁😀"], " née 日本 😀", "  née 日本 😀"),
    ],
)
def test_join(given_pieces: list[str], text: str, with_leading_space: str) -> None:
    assert join(given_pieces, leading_space=False) == text
    assert join(given_pieces, leading_space=True) == with_leading_space


def test_words_span_their_pieces_and_are_as_sure_as_the_least_sure() -> None:
    words = group(["▁he", "ll", "o", "▁wörld"], [0.0, 0.2, 0.3, 1.0], [0.1, 0.3, 0.4, 1.5], [0.9, 0.4, 0.8, 0.7])
    assert words == [Word("hello", 0.0, 0.4, 0.4), Word("wörld", 1.0, 1.5, 0.7)]


def test_pieces_before_a_words_start_are_a_word() -> None:
    assert group(["ing", "s", "▁on"], [1.0, 1.1, 2.0], [1.1, 1.2, 2.1], [0.5, 0.6, 0.7]) == [
        Word("ings", 1.0, 1.2, 0.5),
        Word("on", 2.0, 2.1, 0.7),
    ]


def test_a_start_alone_begins_the_word_of_the_next_piece_or_none() -> None:
    assert group(["▁", "a"], [1.0, 1.5], [1.1, 2.0], [0.5, 0.6]) == [Word("a", 1.0, 2.0, 0.5)]
    assert group(["▁", "▁a", "▁"], [1.0, 1.5, 2.5], [1.1, 2.0, 3.0], [0.5, 0.6, 0.7]) == [Word("a", 1.5, 2.0, 0.6)]
    assert group([], [], [], []) == []


def test_a_word_ends_where_the_next_starts() -> None:
    assert group(["▁a", "▁b", "▁c"], [1.0, 1.5, 1.5], [2.0, 1.6, 1.6], [1.0] * 3) == [
        Word("a", 1.0, 1.5, 1.0),
        Word("b", 1.5, 1.5, 1.0),
        Word("c", 1.5, 1.6, 1.0),
    ]


def test_every_piece_needs_its_times_and_probability() -> None:
    with pytest.raises(ValueError, match="zip"):
        group(["▁a", "▁b"], [1.0], [2.0, 3.0], [1.0, 1.0])


@settings(deadline=None)
@given(st.lists(st.tuples(pieces, spans), max_size=12))
def test_words_are_those_of_the_text_and_in_order(tokens: list[tuple[str, tuple[int, int, float]]]) -> None:
    given_pieces = [piece for piece, _ in tokens]
    starts = [float(sum(gap for _, (gap, _, _) in tokens[: i + 1])) for i in range(len(tokens))]
    ends = [start + length for start, (_, (_, length, _)) in zip(starts, tokens, strict=True)]
    probabilities = [probability for _, (_, _, probability) in tokens]
    words = group(given_pieces, starts, ends, probabilities)
    assert [word.word for word in words] == join(given_pieces, leading_space=False).split()
    assert all(word.start <= word.end for word in words)
    assert all(word.end <= following.start for word, following in pairwise(words))
    assert all(word.confidence in probabilities for word in words)
