"""The items of a realtime transcription session: which audio belongs to which, and which events they cause.

Without input or output. The face feeds what happens, and carries out the outputs in their order. Positions are in samples at
16 kHz since the start of the session.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from gateway.audio import RATE
from gateway.errors import ApiError
from gateway.transcript.words import Word

MIN_COMMIT_SAMPLES = RATE // 10
"""Least audio of a commit, 100 ms, as OpenAI has it."""

DETECTION_SAMPLES = RATE // 2
"""Maximum delay of the detection of speech: audio that is kept beyond the padding."""


class Phase(Enum):
    """Life of an item, in this order; a cleared one ends while it is OPEN."""

    OPEN = auto()
    """Takes audio."""
    COMMITTED = auto()
    """Takes no more audio; its transcription goes on."""


@dataclass(frozen=True)
class SpeechStarted:
    """Event: speech was detected. ``at`` is where the item's audio begins."""

    item_id: str
    at: int


@dataclass(frozen=True)
class SpeechStopped:
    """Event: speech ended. ``at`` is where the item's audio ends."""

    item_id: str
    at: int


@dataclass(frozen=True)
class Committed:
    """Event: the item takes no more audio. ``previous_id`` is that of the item committed before, if any."""

    item_id: str
    previous_id: str | None


@dataclass(frozen=True)
class Delta:
    """Event: more text of the item that can no longer change."""

    item_id: str
    text: str


@dataclass(frozen=True)
class Completed:
    """Event: the item's transcription.

    Attributes:
        text: all deltas, concatenated.
        words: timed from the start of the item.
        samples: length of the item's audio.
    """

    item_id: str
    text: str
    words: Sequence[Word]
    samples: int


@dataclass(frozen=True)
class Failed:
    """Event: the item's transcription failed."""

    item_id: str
    error: ApiError


@dataclass(frozen=True)
class Cleared:
    """Event: what was not committed is dropped."""


@dataclass(frozen=True)
class CommitEmpty:
    """Event: there was too little audio to commit.

    Attributes:
        samples: how much there was.
        event_id: the client's, of its commit.
    """

    samples: int
    event_id: str | None


@dataclass(frozen=True)
class Open:
    """Action: begin to transcribe an item."""

    item_id: str


@dataclass(frozen=True)
class Feed:
    """Action: add the audio from ``start`` to ``end`` to an item."""

    item_id: str
    start: int
    end: int


@dataclass(frozen=True)
class End:
    """Action: an item has all of its audio."""

    item_id: str


@dataclass(frozen=True)
class Abandon:
    """Action: drop an item."""

    item_id: str


Event = SpeechStarted | SpeechStopped | Committed | Delta | Completed | Failed | Cleared | CommitEmpty
Action = Open | Feed | End | Abandon
Output = Event | Action


@dataclass
class Item:
    """One turn.

    Attributes:
        id: the client's name for it.
        start: position of its first sample.
        end: position after its last sample; meaningless while OPEN.
        phase: where in its life it is.
        spoken: whether the start of speech was reported.
        sent_chars: length of the deltas.
        outcome: how the transcription ended, as long as it waits for the commit.
    """

    id: str
    start: int
    end: int = 0
    phase: Phase = Phase.OPEN
    spoken: bool = False
    sent_chars: int = 0
    outcome: Callable[[], list[Output]] | None = None


class Items:
    """The items of one session.

    With turn detection an item begins with the padding before detected speech, and is committed when the speech stops. Without
    it, an item begins with the first audio. A commit ends either. Items never share audio.

    Transcriptions must be reported in the order of the items: the face transcribes one at a time.

    Args:
        new_id: returns an id for an item.

    Attributes:
        position: audio received.
    """

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._padding: int | None = None
        self._item: Item | None = None  # takes audio
        self._committed: deque[Item] = deque()  # whose transcription has not ended
        self._previous_id: str | None = None
        self._free_from = 0  # where audio begins that belongs to no item
        self.position = 0

    @property
    def kept_from(self) -> int:
        """Position from which audio may still be fed."""
        return self.position if self._item else self._free_from

    @property
    def idle(self) -> bool:
        """Whether every item is transcribed or dropped."""
        return not self._item and not self._committed

    def detect(self, padding: int | None) -> None:
        """Turn the detection of turns on or off.

        Args:
            padding: samples before detected speech that belong to its item; None turns the detection off.
        """
        self._padding = padding

    def append(self, samples: int) -> list[Output]:
        """Take audio."""
        start, self.position = self.position, self.position + samples
        if self._item:
            return self._feed(self._item, start)
        if self._padding is not None:
            self._free_from = max(self._free_from, self.position - self._padding - DETECTION_SAMPLES)
            return []
        return self._open(self._free_from) if samples else []

    def speech_started(self, at: int) -> list[Output]:
        """Note that speech began at a position."""
        outputs: list[Output] = []
        start = max(self._free_from, at - (self._padding or 0))
        if not self._item:
            outputs = self._open(min(start, self.position))
        assert self._item  # noqa: S101 (it was opened)
        if self._item.spoken:
            return outputs
        self._item.spoken = True
        return [SpeechStarted(self._item.id, max(start, self._item.start)), *outputs]

    def speech_stopped(self) -> list[Output]:
        """Note that speech ended; its item is committed."""
        if not self._item or not self._item.spoken:
            return []
        return [SpeechStopped(self._item.id, self.position), *self._commit(self._item)]

    def commit(self, event_id: str | None = None) -> list[Output]:
        """End the item that takes audio, at the client's request."""
        start = self._item.start if self._item else self._free_from
        if (samples := self.position - start) < MIN_COMMIT_SAMPLES:
            return [CommitEmpty(samples, event_id)]
        opened = [] if self._item else self._open(start)
        assert self._item  # noqa: S101 (it was opened)
        return opened + self._commit(self._item)

    def clear(self) -> list[Output]:
        """Drop what is not committed."""
        return [*self._drop(), Cleared()]

    def finish(self) -> list[Output]:
        """End the item that takes audio, because no more comes."""
        if not self._item or self.position - self._item.start < MIN_COMMIT_SAMPLES:
            return self._drop()
        return self.speech_stopped() or self._commit(self._item)

    def transcribed(self, item_id: str, stable_text: str) -> list[Output]:
        """Note the beginning of an item's text that can no longer change."""
        item = self._find(item_id)
        if not item or item.outcome or len(stable_text) <= item.sent_chars:
            return []
        delta = Delta(item_id, stable_text[item.sent_chars :])
        item.sent_chars = len(stable_text)
        return [delta]

    def completed(self, item_id: str, text: str, words: Sequence[Word]) -> list[Output]:
        """Note the whole transcription of an item."""

        def outcome() -> list[Output]:
            assert item  # noqa: S101 (checked below)
            return [Completed(item_id, text, words, item.end - item.start)]

        item = self._find(item_id)
        if not item or item.outcome:
            return []
        deltas = self.transcribed(item_id, text)
        return deltas + self._settle(item, outcome)

    def failed(self, item_id: str, error: ApiError) -> list[Output]:
        """Note that an item can't be transcribed."""
        item = self._find(item_id)
        return self._settle(item, lambda: [Failed(item_id, error)]) if item and not item.outcome else []

    def _open(self, start: int) -> list[Output]:
        self._item = Item(self._new_id(), start)
        self._free_from = self.position
        return [Open(self._item.id), *self._feed(self._item, start)]

    def _feed(self, item: Item, start: int) -> list[Output]:
        self._free_from = self.position
        return [] if item.outcome or start == self.position else [Feed(item.id, start, self.position)]

    def _commit(self, item: Item) -> list[Output]:
        item.phase, item.end = Phase.COMMITTED, self.position
        outputs: list[Output] = [Committed(item.id, self._previous_id), End(item.id)]
        self._item, self._previous_id = None, item.id
        if item.outcome:
            return outputs + item.outcome()
        self._committed.append(item)
        return outputs

    def _drop(self) -> list[Output]:
        self._free_from = self.position
        if not self._item:
            return []
        item, self._item = self._item, None
        return [Abandon(item.id)]

    def _settle(self, item: Item, outcome: Callable[[], list[Output]]) -> list[Output]:
        """Report an outcome now, or at the commit."""
        if item.phase is Phase.OPEN:
            item.outcome = outcome
            return []
        self._committed.remove(item)
        return outcome()

    def _find(self, item_id: str) -> Item | None:
        candidates = (*self._committed, *((self._item,) if self._item else ()))
        return next((item for item in candidates if item.id == item_id), None)
