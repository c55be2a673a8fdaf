"""Transcripts as text and subtitles, parsed by independent libraries."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence

import pysubs2
import pytest
import webvtt
from hypothesis import given
from hypothesis import strategies as st

from gateway.transcript.segments import Segment
from gateway.transcript.words import Word
from gateway.transcript.writers import (
    MAX_CUE_MS,
    MIN_CUE_MS,
    ROW_CHARS,
    WORD_JOINER,
    make_cues,
    to_srt,
    to_text,
    to_vtt,
)


def segment(words: Sequence[Word], number: int = 0, channel: int | None = None) -> Segment:
    text = " ".join(word["word"] for word in words)
    return Segment(number, words[0]["start"], words[-1]["end"], text, [1], words, 0.5, channel)


def timed(text: str, secs: float = 0.3, gap: float = 0.1, start: float = 0.0) -> list[Word]:
    """Return words spoken at a constant rate."""
    return [
        {"word": word, "start": start + at * (secs + gap), "end": start + at * (secs + gap) + secs, "confidence": 0.9}
        for at, word in enumerate(text.split())
    ]


def compact(text: str) -> str:
    """Return text without white space and characters without width."""
    return re.sub(rf"[\s{WORD_JOINER}]", "", text)


def parse_vtt(text: str) -> list[webvtt.Caption]:
    captions: list[webvtt.Caption] = webvtt.from_buffer(io.StringIO(text)).captions
    return captions


WORDS = st.lists(
    st.tuples(
        st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp", "Zs", "Cf")), min_size=1, max_size=60)
        | st.sampled_from(["<i>", "-->", "&amp;", "{\\an8}", "1", "NOTE", "STYLE", "WEBVTT", "<unk>", "don't"]),
        st.integers(0, 3000),
        st.integers(1, 2000),
    ),
    min_size=1,
    max_size=60,
)


@st.composite
def transcripts(draw: st.DrawFn) -> list[Segment]:
    """Return segments of one channel, or of two that speak at the same time."""
    found: list[Segment] = []
    channels: list[int | None] = draw(st.sampled_from([[None], [0, 1]]))
    for channel in channels:
        at, words = 0, list[Word]()
        for text, gap, length in draw(WORDS):
            at += gap
            words.append({"word": text, "start": at / 1000, "end": (at + length) / 1000, "confidence": 0.5})
            at += length
        half = max(1, draw(st.integers(1, len(words))))
        found += [segment(part, len(found), channel) for part in (words[:half], words[half:]) if part]
    return found


@given(transcripts())
def test_cues_never_overlap_and_fit_the_screen(segments: list[Segment]) -> None:
    cues = make_cues(segments)
    for cue, following in itertools.pairwise(cues):
        assert cue.end <= following.start
    for cue in cues:
        assert cue.start < cue.end
        assert 1 <= len(cue.rows) <= 2
        assert all(0 < len(row) <= ROW_CHARS for row in cue.rows)


@given(transcripts())
def test_subtitles_are_parsed_back(segments: list[Segment]) -> None:
    cues = make_cues(segments)
    srt = pysubs2.SSAFile.from_string(to_srt(segments), format_="srt")
    vtt = parse_vtt(to_vtt(segments))
    assert [(event.start, event.end) for event in srt] == [(cue.start, cue.end) for cue in cues]
    assert [(caption.start_in_seconds, caption.end_in_seconds) for caption in vtt] == [
        (cue.start // 1000, cue.end // 1000) for cue in cues
    ]
    spoken = sorted(compact("".join(segment.text for segment in segments)))
    assert sorted(compact("".join(cue_text for cue in cues for cue_text in cue.rows))) == spoken


@pytest.mark.parametrize("word", ["<i>loud</i>", "{\\an8}top", "a-->b", "<unk>", "5"])
def test_words_are_not_parsed_as_markup(word: str) -> None:
    words = timed(f"one {word} two")
    (event,) = pysubs2.SSAFile.from_string(to_srt([segment(words)]), format_="srt")
    assert compact(event.plaintext) == compact(f"one {word} two").replace("{", "(").replace("}", ")")
    (caption,) = parse_vtt(to_vtt([segment(words)]))
    escaped = word.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert caption.raw_text == f"one {escaped} two"


def test_cue_is_shown_for_a_second_if_there_is_time() -> None:
    first, second = make_cues([segment([*timed("yes"), *timed("no", start=5.0)])])
    assert (first.start, first.end) == (0, MIN_CUE_MS)
    assert second.start == 5000


def test_long_speech_is_divided() -> None:
    cues = make_cues([segment(timed("word " * 200))])
    assert len(cues) >= 200 * 5 / 85
    assert all(cue.end - cue.start <= MAX_CUE_MS for cue in cues)
    assert cues[0].rows[1]


def test_text_has_a_line_for_each_channel() -> None:
    left, right = timed("good morning"), timed("hello there")
    assert to_text([segment(left), segment(right, 1)]) == "good morning hello there\n"
    channels = [segment(right, 0, 1), segment(left, 1, 0), segment(right, 2, 1)]
    assert to_text(channels) == "good morning\nhello there hello there\n"


def test_no_speech() -> None:
    assert (to_text([]), to_srt([]), to_vtt([])) == ("", "", "WEBVTT\n\n")
    assert parse_vtt(to_vtt([])) == []
