"""Write a transcript as text or as subtitles: SubRip (SRT) and WebVTT (https://www.w3.org/TR/webvtt1/).

A cue has at most two rows of 42 characters and is shown for one to seven seconds; cues do not overlap (Netflix's timed text
style guide; the BBC's subtitle guidelines are similar).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from gateway.transcript.segments import Segment
from gateway.transcript.words import Word

ROW_CHARS, ROWS = 42, 2
"""Maximum number of characters in a row, and of rows in a cue."""

MIN_CUE_MS, MAX_CUE_MS = 1000, 7000
"""Minimum and maximum duration of a cue. A cue is shorter if the next one begins earlier, and longer for a longer word."""

PAUSE_MS = 800
"""Length of a pause that ends a cue."""

WORD_JOINER = "\u2060"
"""Character without width; it prevents players from reading a tag or an arrow in the text."""


@dataclass(frozen=True)
class Cue:
    """A subtitle.

    Attributes:
        start, end: in milliseconds since the start of the recording.
        rows: one or two rows of text.
    """

    start: int
    end: int
    rows: tuple[str, ...]


def to_text(segments: Sequence[Segment]) -> str:
    """Return the words of all segments in one line; in one line per channel where channels are separated."""
    lines: dict[int | None, list[str]] = {}
    for segment in segments:
        lines.setdefault(segment.channel, []).append(segment.text)
    return "".join(f"{' '.join(lines[channel])}\n" for channel in sorted(lines, key=lambda channel: channel or 0))


def to_srt(segments: Sequence[Segment]) -> str:
    """Return the transcript as SubRip; each cue's number, times and rows."""
    return "".join(
        f"{number}\n{_time(cue.start, ',')} --> {_time(cue.end, ',')}\n{_srt_text(cue.rows)}\n\n"
        for number, cue in enumerate(make_cues(segments), start=1)
    )


def to_vtt(segments: Sequence[Segment]) -> str:
    """Return the transcript as WebVTT."""
    return "WEBVTT\n\n" + "".join(
        f"{_time(cue.start, '.')} --> {_time(cue.end, '.')}\n{_vtt_text(cue.rows)}\n\n" for cue in make_cues(segments)
    )


def make_cues(segments: Sequence[Segment]) -> list[Cue]:
    """Return the subtitles in the order of their times; none overlaps another."""
    channels: dict[int | None, list[Word]] = {}
    for segment in segments:
        channels.setdefault(segment.channel, []).extend(segment.words)
    cues = sorted((cue for words in channels.values() for cue in _group(words)), key=lambda cue: cue.start)
    return list(_in_turn(cues))


def _group(words: Iterable[Word]) -> Iterator[Cue]:
    """Yield the cues of one channel, each from its first word to the end of its last."""
    texts: list[str] = []
    start = end = 0
    for word in words:
        word_start, word_end = round(1000 * word["start"]), round(1000 * word["end"])
        for text in _fitting(word["word"]):
            full = texts and (word_start - end >= PAUSE_MS or word_end - start > MAX_CUE_MS or _layout([*texts, text]) is None)
            if full:
                yield Cue(start, end, _layout(texts) or ())
                texts = []
            if not texts:
                start = word_start
            texts.append(text)
            end = word_end
    if texts:
        yield Cue(start, end, _layout(texts) or ())


def _in_turn(cues: Sequence[Cue]) -> Iterator[Cue]:
    """Yield cues that end before the next one begins, extended to the minimum duration where there is time."""
    if not cues:
        return
    shown = cues[0]
    for cue in cues[1:]:
        following = replace(cue, start=max(cue.start, shown.start + 1))
        wanted = max(shown.end, shown.start + MIN_CUE_MS)
        yield replace(shown, end=min(wanted, following.start))
        shown = following
    yield replace(shown, end=max(shown.end, shown.start + MIN_CUE_MS))


def _fitting(word: str) -> Iterator[str]:
    """Yield a word without white space, in parts that fit into a row."""
    for part in word.split():
        for at in range(0, len(part), ROW_CHARS):
            yield part[at : at + ROW_CHARS]


def _layout(texts: Sequence[str]) -> tuple[str, ...] | None:
    """Return the rows of a cue, as equal in length as they can be; None if they are too long."""
    line = " ".join(texts)
    if len(line) <= ROW_CHARS:
        return (line,)
    if len(line) > ROWS * ROW_CHARS + 1:
        return None
    splits = ((" ".join(texts[:at]), " ".join(texts[at:])) for at in range(1, len(texts)))
    rows = min(splits, key=lambda rows: max(map(len, rows)), default=(line,))
    return rows if max(map(len, rows)) <= ROW_CHARS else None


def _time(milliseconds: int, point: str) -> str:
    seconds, thousandths = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{thousandths:03}"


def _srt_text(rows: Sequence[str]) -> str:
    """Return rows for SubRip, which has no escapes: a character without width divides tags and arrows; braces are replaced."""
    text = "\n".join(rows).translate(str.maketrans("{}", "()"))
    return text.replace("<", f"<{WORD_JOINER}").replace("-->", f"--{WORD_JOINER}>")


def _vtt_text(rows: Sequence[str]) -> str:
    return "\n".join(rows).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
