"""The items of realtime sessions, in any order of what clients, the detector and the decoder do."""

from __future__ import annotations

from collections import defaultdict
from itertools import count, pairwise

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.api.realtime_items import (
    MIN_COMMIT_SAMPLES,
    Abandon,
    Cleared,
    CommitEmpty,
    Committed,
    Completed,
    Delta,
    End,
    Failed,
    Feed,
    Items,
    Open,
    Output,
    SpeechStarted,
    SpeechStopped,
)
from gateway.errors import ApiError, ErrorKind

SIZES = st.integers(1, 3 * MIN_COMMIT_SAMPLES)
PADDINGS = st.none() | st.integers(0, 8000)


class Session(RuleBasedStateMachine):
    """A client, a detector that is right or wrong, and a decoder that takes one item at a time."""

    def __init__(self) -> None:
        super().__init__()
        ids = count(1)
        self.items = Items(lambda: f"item_{next(ids)}")
        self.outputs: list[Output] = []
        self.decoding: list[str] = []  # opened, and not yet settled; the first is decoded
        self.text: dict[str, str] = defaultdict(str)
        self.finished = False

    def do(self, outputs: list[Output]) -> list[Output]:
        for output in outputs:
            if isinstance(output, Open):
                self.decoding.append(output.item_id)
            elif isinstance(output, Abandon) and output.item_id in self.decoding:
                self.decoding.remove(output.item_id)
        self.outputs += outputs
        return outputs

    @initialize(padding=PADDINGS)
    def begin(self, padding: int | None) -> None:
        self.items.detect(padding)

    @rule(padding=PADDINGS)
    def update(self, padding: int | None) -> None:
        self.items.detect(padding)

    @rule(samples=SIZES)
    def append(self, samples: int) -> None:
        self.do(self.items.append(samples))

    @rule(before=st.integers(0, 3000))
    def start_speech(self, before: int) -> None:
        self.do(self.items.speech_started(max(0, self.items.position - before)))

    @rule()
    def stop_speech(self) -> None:
        self.do(self.items.speech_stopped())

    @rule()
    def commit(self) -> None:
        (answer,) = (each for each in self.do(self.items.commit("mine")) if isinstance(each, CommitEmpty | Committed))
        if isinstance(answer, CommitEmpty):
            assert answer.samples < MIN_COMMIT_SAMPLES
            assert answer.event_id == "mine"

    @rule()
    def clear(self) -> None:
        outputs = self.do(self.items.clear())
        assert isinstance(outputs[-1], Cleared)
        assert self.items.append(0) == []

    @precondition(lambda self: self.decoding)
    @rule(more=st.text(max_size=3))
    def decode(self, more: str) -> None:
        item = self.decoding[0]
        self.text[item] += more
        self.do(self.items.transcribed(item, self.text[item]))

    @precondition(lambda self: self.decoding)
    @rule(rest=st.text(max_size=3))
    def complete(self, rest: str) -> None:
        item = self.decoding.pop(0)
        self.text[item] += rest
        self.do(self.items.completed(item, self.text[item], []))

    @precondition(lambda self: self.decoding)
    @rule()
    def fail(self) -> None:
        self.do(self.items.failed(self.decoding.pop(0), ApiError(ErrorKind.BACKEND_FAILED, "failed")))

    @invariant()
    def audio_belongs_to_one_item_at_most(self) -> None:
        feeds = [output for output in self.outputs if isinstance(output, Feed)]
        assert all(0 <= feed.start < feed.end <= self.items.position for feed in feeds)
        assert all(first.end <= second.start for first, second in pairwise(feeds))
        for first, second in pairwise(feeds):
            assert first.item_id != second.item_id or first.end == second.start, "audio of an item was left out"
        assert self.items.kept_from <= self.items.position

    @invariant()
    def committed_items_follow_each_other(self) -> None:
        committed = [output for output in self.outputs if isinstance(output, Committed)]
        assert [event.previous_id for event in committed] == [None, *(event.item_id for event in committed)][: len(committed)]

    @invariant()
    def events_of_an_item_are_in_order(self) -> None:
        order = (Open, SpeechStarted, Feed, Delta, SpeechStopped, Committed, End, Completed, Failed, Abandon)
        seen: dict[str, list[type]] = defaultdict(list)
        for output in self.outputs:
            if not isinstance(output, Cleared | CommitEmpty):
                seen[output.item_id].append(type(output))
        for kinds in seen.values():
            for once in (Open, SpeechStarted, SpeechStopped, Committed, End, Completed, Failed, Abandon):
                assert kinds.count(once) <= 1
            assert not (Committed in kinds and Abandon in kinds)
            assert not (Completed in kinds and Failed in kinds)
            assert (Completed in kinds or Failed in kinds) <= (Committed in kinds)
            assert (SpeechStopped in kinds) <= (SpeechStarted in kinds)
            if Committed in kinds:
                after = kinds[kinds.index(Committed) + 1 :]
                assert set(after) <= {End, Delta, Completed, Failed}
                assert End in after
            if ended := {Completed, Failed, Abandon} & set(kinds):
                assert kinds[-1] in ended, "something came after the end"
            assert all(kind in order for kind in kinds)

    @invariant()
    def deltas_joined_are_the_transcript(self) -> None:
        text: dict[str, str] = defaultdict(str)
        for output in self.outputs:
            if isinstance(output, Delta):
                assert output.text
                text[output.item_id] += output.text
            elif isinstance(output, Completed):
                assert output.text == text[output.item_id]
                assert output.samples >= MIN_COMMIT_SAMPLES or SpeechStopped in map(type, self.outputs)

    def teardown(self) -> None:
        """Every committed item gets exactly one outcome once the decoder has done its work."""
        self.do(self.items.finish())
        while self.decoding:
            self.complete("end")
        outcomes = [output.item_id for output in self.outputs if isinstance(output, Completed | Failed)]
        assert outcomes == [output.item_id for output in self.outputs if isinstance(output, Committed)]
        assert self.items.idle


TestSession = Session.TestCase


def kinds(outputs: list[Output]) -> list[str]:
    return [type(output).__name__ for output in outputs]


def items_with(padding: int | None) -> Items:
    items = Items(lambda: "item")
    items.detect(padding)
    return items


def test_without_turn_detection_the_first_audio_opens_an_item() -> None:
    items = items_with(None)
    assert items.append(1600) == [Open("item"), Feed("item", 0, 1600)]
    assert kinds(items.commit()) == ["Committed", "End"]
    assert kinds(items.commit()) == ["CommitEmpty"]


def test_item_of_detected_speech_begins_with_the_padding() -> None:
    items = items_with(4800)
    assert items.append(32_000) == []
    assert items.speech_started(31_000) == [
        SpeechStarted("item", 26_200),
        Open("item"),
        Feed("item", 26_200, 32_000),
    ]
    items.append(16_000)
    assert items.speech_stopped()[0] == SpeechStopped("item", 48_000)


def test_padding_does_not_reach_into_the_item_before() -> None:
    items = items_with(4800)
    items.append(16_000)
    items.speech_started(15_000)
    items.append(16_000)
    items.speech_stopped()
    items.append(1000)
    assert SpeechStarted("item", 32_000) in items.speech_started(32_500)


def test_failure_before_the_commit_is_reported_after_it() -> None:
    items = items_with(None)
    items.append(1600)
    assert items.failed("item", ApiError(ErrorKind.NOT_READY, "not ready")) == []
    assert items.append(1600) == []
    assert kinds(items.commit()) == ["Committed", "End", "Failed"]
