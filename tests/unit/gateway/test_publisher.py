"""Which event an answer of the decoder becomes."""

from __future__ import annotations

import math

from gateway.live.events import Final, Partial, SegmentFinal
from gateway.live.publisher import Publisher
from gateway.transcript.transcript import Answer, Counts
from gateway.transcript.words import Word


def answer(text: str, *, segment_final: bool = False, confidence: float = 0.5, samples: int = 0) -> Answer:
    words = [Word(word=word, start=0.0, end=0.1, confidence=0.5) for word in text.split()]
    return Answer(text, [1] * len(words), words, confidence, len(text), segment_final, samples, 0, 0)


def test_unchanged_text_is_no_event() -> None:
    publisher = Publisher()
    assert publisher.publish(answer(""), last=False) is None
    first = publisher.publish(answer("and"), last=False)
    assert isinstance(first, Partial)
    assert first.transcript.text == "and"
    assert publisher.publish(answer("and"), last=False) is None


def test_end_of_a_segment_is_an_event_even_if_the_text_is_unchanged() -> None:
    publisher = Publisher()
    publisher.publish(answer("and"), last=False)
    event = publisher.publish(answer("and", segment_final=True), last=False)
    assert isinstance(event, SegmentFinal)
    assert not event.changed
    assert event.transcript.settled == Counts()
    assert publisher.settled == Counts(3, 1, 1, 1)


def test_partial_has_the_words_of_its_segment_and_the_final_all() -> None:
    publisher = Publisher()
    publisher.publish(answer("and so", segment_final=True), last=False)
    partial = publisher.publish(answer(" my"), last=False)
    assert isinstance(partial, Partial)
    assert partial.transcript.text == "and so my"
    assert [word["word"] for word in partial.transcript.words] == ["my"]
    assert (partial.transcript.segment, partial.transcript.settled) == (1, Counts(6, 2, 2, 1))
    final = publisher.publish(answer(" my", segment_final=True), last=True)
    assert isinstance(final, Final)
    assert [word["word"] for word in final.transcript.words] == ["and", "so", "my"]


def test_last_answer_is_a_final_even_without_text() -> None:
    event = Publisher().publish(answer("", confidence=math.nan, samples=7), last=True)
    assert isinstance(event, Final)
    assert (event.transcript.text, event.transcript.confidence, event.transcript.segment_confidence) == ("", None, None)
    assert event.transcript.samples == 7


def test_resumed_stream_counts_on() -> None:
    publisher = Publisher(before=Counts(3, 1, 1, 1))
    event = publisher.publish(answer(" so", segment_final=True), last=False)
    assert isinstance(event, SegmentFinal)
    assert (event.transcript.text, event.transcript.segment) == (" so", 1)
    assert publisher.settled == Counts(6, 2, 2, 2)
