"""Results and errors of the clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SAMPLE_RATE = 16_000
"""Sample rate in which the server counts audio, in Hz."""


@dataclass(frozen=True)
class Word:
    """A recognised word.

    Attributes:
        text: the word.
        start: seconds from the start of the audio.
        end: seconds from the start of the audio.
        confidence: probability, 0 to 1.
        channel: index of the channel; None where the channels are mixed.
    """

    text: str
    start: float
    end: float
    confidence: float
    channel: int | None = None

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Word:
        """Read a word of the server's JSON."""
        return cls(body["word"], body["start"], body["end"], body["confidence"], body.get("channel"))


@dataclass(frozen=True)
class Segment:
    """A part of a transcript.

    Attributes:
        text: the transcript of the part.
        start: seconds from the start of the audio.
        end: seconds from the start of the audio.
        words: the words of the part.
        confidence: mean probability of the tokens, 0 to 1; None where there are none.
        channel: index of the channel; None where the channels are mixed.
    """

    text: str
    start: float
    end: float
    words: tuple[Word, ...]
    confidence: float | None
    channel: int | None = None

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Segment:
        """Read a segment of the server's JSON."""
        words = tuple(map(Word.read, body["words"]))
        return cls(body["text"], body["start"], body["end"], words, body["confidence"], body.get("channel"))


@dataclass(frozen=True)
class Transcript:
    """The transcript of a recording.

    Attributes:
        text: the whole transcript.
        segments: its parts in order; none where there is no speech.
        words: all words in order.
        tokens: token ids in the model's vocabulary.
        confidence: mean probability of the tokens, 0 to 1; None where there are none.
        duration: seconds of audio.
        request_id: the server's id of the request, for its logs.
    """

    text: str
    segments: tuple[Segment, ...]
    words: tuple[Word, ...]
    tokens: tuple[int, ...]
    confidence: float | None
    duration: float
    request_id: str | None

    @classmethod
    def read(cls, body: Mapping[str, Any], segments: Sequence[Segment], request_id: str | None) -> Transcript:
        """Read the response to ``POST /v2/decode/batch/{model}``, or its last line after the segments."""
        if "words" in body:
            words = tuple(map(Word.read, body["words"]))
        else:
            words = tuple(word for segment in segments for word in segment.words)
        if "segments" in body:
            segments = tuple(map(Segment.read, body["segments"]))
        elif words and not segments:
            segments = (Segment(body["text"], words[0].start, words[-1].end, words, body["confidence"]),)
        duration = body["audio_length_samples"] / SAMPLE_RATE
        return cls(body["text"], tuple(segments), words, tuple(body["tokens"]), body["confidence"], duration, request_id)


class AmiraError(RuntimeError):
    """The server is not reachable, or does not fulfil a request.

    Attributes:
        code: error code of the API, or one of a subclass.
        retryable: whether the same call may succeed later.
    """

    def __init__(self, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable


class RequestError(AmiraError):
    """A request failed.

    Attributes:
        code: error code of the API; ``unreachable`` if no server responded, ``timeout`` if it took too long, ``http`` if
            something other than the server responded, such as a proxy.
        status: HTTP status; None without a response.
        request_id: the server's id of the request, for its logs.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retryable: bool = False,
        status: int | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(code, message, retryable=retryable)
        self.status = status
        self.request_id = request_id


class StreamError(AmiraError):
    """The server ended the stream with an error, or could not be reached for too long.

    Attributes:
        code: error code of the API; ``refused`` if the server refused the upgrade, ``unreachable`` if no server responded,
            ``closed`` if the stream was closed before its final message.
    """
