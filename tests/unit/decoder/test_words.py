from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocabulary import continuations, read_vocabulary
from words import Word, text_of, words_of

pieces = st.sampled_from(["▁", "▁a", "▁ab", "b", "né", "'", "日", "▁😀", "a▁b", " ", "<0xE7>", "<0x8C>", "<0xAB>", "<0x20>"])
spans = st.tuples(st.integers(0, 4), st.integers(1, 5), st.floats(0, 1))


def vocabulary(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("end", ["", "\n"])
def test_vocabulary_lists_pieces_by_id(tmp_path: Path, end: str) -> None:
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
def test_bad_line_is_named(tmp_path: Path, text: str, number: int, line: str, index: int) -> None:
    path = vocabulary(tmp_path, text)
    with pytest.raises(ValueError, match=r"line") as error:
        read_vocabulary(path)
    assert str(error.value) == f"{path} line {number} is {line!r}; expected 'piece {index}'"


def test_continuations_are_the_pieces_without_a_separator() -> None:
    assert continuations(["▁he", "llo", "▁", "<0xE7>", " x", "x y"]) == {1, 3, 5}


def words_at_once(pieces: Sequence[str], *, final: bool = True) -> list[Word]:
    """Return the words of pieces that follow each other every 0.1 s."""
    starts = [0.1 * i for i in range(len(pieces))]
    return words_of(pieces, starts, [start + 0.1 for start in starts], [0.5] * len(pieces), final=final)


def text(pieces: Sequence[str], segment: int = 0, *, final: bool = True) -> str:
    return text_of(words_at_once(pieces, final=final), segment)


@pytest.mark.parametrize(
    ("given_pieces", "expected"),
    [
        ([], ""),
        (["▁he", "ll", "o", "▁world"], "hello world"),
        (["ing", "▁on"], "ing on"),
        (["▁", "▁né", "e", "▁日", "本", "▁😀"], "née 日本 😀"),
        (["▁in", "▁"], "in"),
        (["▁New▁York", "▁", "er"], "New York er"),
        (["▁a", " b", "c\nd"], "a bc d"),
    ],
)
def test_text_is_the_words_with_spaces(given_pieces: list[str], expected: str) -> None:
    assert text(given_pieces) == expected


def test_later_segment_begins_with_a_space() -> None:
    """A segment begins with a word, even if its first piece has no separator."""
    for pieces in (["▁on", "ly"], ["on", "ly"]):
        assert (text(pieces, 0), text(pieces, 1), text(pieces, 7)) == ("only", " only", " only")
    assert text([], 1) == text(["▁"], 1) == ""


@pytest.mark.parametrize(
    ("given_pieces", "final", "partial"),
    [
        (["▁", "<0xE7>", "<0x8C>", "<0xAB>"], "猫", "猫"),
        (["▁", "<0xE7>", "<0x8C>"], "\ufffd", ""),
        (["▁a", "<0xe7>"], "a\ufffd", "a"),
        (["▁a", "<0xE7>", "<0x8C>", "<0xAB>", "b", "▁c"], "a猫b c", "a猫b c"),
        (["▁a", "<0xE7>", "<0x8C>", "b", "▁c"], "a\ufffdb c", "a\ufffdb c"),
        (["▁a", "<0xE7>", "▁c"], "a\ufffd c", "a\ufffd c"),
        (["▁a", "<0xFF>", "b"], "a\ufffdb", "a\ufffdb"),
        (["<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0xC3>"], "😀\ufffd", "😀"),
        (["▁a", "<0x20>", "b", "<0x0A>", "c"], "a b c", "a b c"),
        (["<0x41>", "<0x61>", "<0xGG>"], "Aa<0xGG>", "Aa<0xGG>"),
    ],
)
def test_byte_pieces_become_whole_characters(given_pieces: list[str], final: str, partial: str) -> None:
    assert text(given_pieces, final=True) == final
    assert text(given_pieces, final=False) == partial


def test_word_spans_its_pieces_with_lowest_confidence() -> None:
    words = words_of(["▁he", "ll", "o", "▁wörld"], [0.0, 0.2, 0.3, 1.0], [0.1, 0.3, 0.4, 1.5], [0.9, 0.4, 0.8, 0.7])
    assert words == [Word("hello", 0.0, 0.4, 0.4), Word("wörld", 1.0, 1.5, 0.7)]


def test_pieces_before_a_word_start_are_a_word() -> None:
    assert words_of(["ing", "s", "▁on"], [1.0, 1.1, 2.0], [1.1, 1.2, 2.1], [0.5, 0.6, 0.7]) == [
        Word("ings", 1.0, 1.2, 0.5),
        Word("on", 2.0, 2.1, 0.7),
    ]


def test_lone_separator_begins_the_next_word() -> None:
    assert words_of(["▁", "a"], [1.0, 1.5], [1.1, 2.0], [0.5, 0.6]) == [Word("a", 1.0, 2.0, 0.5)]
    assert words_of(["▁", "▁a", "▁"], [1.0, 1.5, 2.5], [1.1, 2.0, 3.0], [0.5, 0.6, 0.7]) == [Word("a", 1.5, 2.0, 0.6)]
    assert words_of([], [], [], []) == []


def test_words_of_one_piece_share_its_time() -> None:
    assert words_of(["▁New▁York"], [1.0], [1.5], [0.5]) == [Word("New", 1.0, 1.25, 0.5), Word("York", 1.25, 1.5, 0.5)]


def test_times_are_rounded_down_while_words_keep_a_length() -> None:
    assert words_of(["▁a", "▁b"], [0.096, 0.1441], [0.1441, 10.9999375], [1.0] * 2) == [
        Word("a", 0.096, 0.144, 1.0),
        Word("b", 0.144, 10.999, 1.0),
    ]
    short = words_of(["▁a", "▁b"], [0.5, 0.5002], [0.5002, 0.9], [1.0] * 2)
    assert short == [Word("a", 0.5, 0.5002, 1.0), Word("b", 0.5002, 0.9, 1.0)]


def test_every_piece_needs_its_times_and_probability() -> None:
    with pytest.raises(ValueError, match="zip"):
        words_of(["▁a", "▁b"], [1.0], [2.0, 3.0], [1.0, 1.0])


@given(st.lists(st.tuples(pieces, spans), max_size=12), st.integers(0, 2), st.booleans())
def test_words_join_to_text_in_order_within_audio(
    tokens: list[tuple[str, tuple[int, int, float]]], segment: int, final: bool
) -> None:
    given_pieces = [piece for piece, _ in tokens]
    starts, ends, now = [], [], 0
    for _, (gap, length, _) in tokens:
        starts.append((now + gap) * 0.0006)
        now += gap + length
        ends.append(now * 0.0006)
    probabilities = [probability for _, (_, _, probability) in tokens]
    words = words_of(given_pieces, starts, ends, probabilities, final=final)
    assert text_of(words, segment).strip() == " ".join(word.word for word in words)
    assert all(word.word and not word.word.isspace() for word in words)
    assert all(word.start < word.end for word in words)
    assert all(word.end <= following.start for word, following in pairwise(words))
    assert all(word.end <= ends[-1] + 1e-9 for word in words)
    assert all(word.confidence in probabilities for word in words)


@given(st.lists(pieces, max_size=12), st.data())
def test_text_of_leading_pieces_is_a_prefix(given_pieces: list[str], data: st.DataObject) -> None:
    """The text of the stable pieces is stable."""
    stable = data.draw(st.integers(0, len(given_pieces)))
    for final in (False, True):
        assert text(given_pieces, 1, final=final).startswith(text(given_pieces[:stable], 1, final=False))


def test_chinese_words_are_not_separated() -> None:
    """Byte-level vocabularies begin a word with each character; Latin words among them keep their spaces."""
    pieces = ["▁你", "▁<0xE5><0xA5>", "<0xBD>", "▁the", "▁cat", "▁中", "▁文"]
    times = [0.1 * i for i in range(len(pieces))]
    words = words_of(pieces, times, [at + 0.1 for at in times], [1.0] * len(pieces))
    assert [word.word for word in words] == ["你", "好", "the", "cat", "中", "文"]
    assert text_of(words, 0) == "你好 the cat 中文"
    assert text_of(words_of(pieces[:2], times[:2], [0.1, 0.2], [1.0, 1.0], final=False), 0) == "你"
