"""The gRPC face's results, codes and addresses."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from gateway.api import riva_call
from gateway.api.riva_results import LiveResults, recording_response
from gateway.errors import ErrorKind
from gateway.live.events import Acknowledged, Event, Final, Partial, SegmentFinal, Snapshot
from gateway.transcript.segments import Segment, Transcription
from gateway.transcript.transcript import Counts
from gateway.transcript.words import Word


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ErrorKind.UNACCEPTABLE, "INVALID_ARGUMENT"),
        (ErrorKind.UNDECODABLE_AUDIO, "INVALID_ARGUMENT"),
        (ErrorKind.UNSUPPORTED_MEDIA, "INVALID_ARGUMENT"),
        (ErrorKind.AUDIO_TOO_LONG, "INVALID_ARGUMENT"),
        (ErrorKind.MODEL_NOT_FOUND, "INVALID_ARGUMENT"),
        (ErrorKind.INVALID_API_KEY, "UNAUTHENTICATED"),
        (ErrorKind.QUOTA_EXCEEDED, "RESOURCE_EXHAUSTED"),
        (ErrorKind.STREAM_IDLE, "DEADLINE_EXCEEDED"),
        (ErrorKind.NO_CAPACITY, "UNAVAILABLE"),
        (ErrorKind.NOT_READY, "UNAVAILABLE"),
        (ErrorKind.DRAINING, "UNAVAILABLE"),
        (ErrorKind.BACKEND_FAILED, "UNAVAILABLE"),
        (ErrorKind.BACKEND_TIMEOUT, "UNAVAILABLE"),
        (ErrorKind.BACKEND_DIED, "INTERNAL"),
        (ErrorKind.INTERNAL, "INTERNAL"),
    ],
)
def test_codes(kind: ErrorKind, code: str) -> None:
    assert riva_call.code_of(kind) is grpc.StatusCode[code]


def test_every_error_has_a_code() -> None:
    assert all(riva_call.code_of(kind) is not grpc.StatusCode.OK for kind in ErrorKind)


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:127.0.0.1:50000", "127.0.0.1"),
        ("ipv6:%5B::1%5D:50000", "::1"),
        ("ipv6:[fe80::1]:50000", "fe80::1"),
        ("unix:/tmp/socket", None),
        ("", None),
    ],
)
def test_addresses(peer: str, address: str | None) -> None:
    assert riva_call.address_of(peer) == address


WORDS: list[Word] = [
    {"word": "one", "start": 0.1, "end": 0.25, "confidence": 0.5},
    {"word": "two", "start": 0.3004, "end": 0.4996, "confidence": 1.0},
]


def snapshot(text: str, *, stable: int = 0, settled: int = 0, words: list[Word] | None = None) -> Snapshot:
    return Snapshot(text, (), words or [], 0.5, stable, 16_000, Counts(settled, 0, 0, 0), 0, 0.25)


def sent(results: LiveResults, *events: Event) -> list[Any]:
    """Return the result of each response, of which each has one."""
    responses = [response for event in events if (response := results.response(event))]
    return [result for response in responses for (result,) in [response.results]]


def test_results_of_a_stream_have_the_segment_alone() -> None:
    results = sent(
        LiveResults(words=True, interim=True),
        Partial(snapshot("on", stable=1, words=WORDS[:1])),
        SegmentFinal(snapshot("one two", stable=7, words=WORDS), changed=True),
        Acknowledged("", 0, Counts(), 0),
        Partial(snapshot("one two thr", stable=9, settled=7)),
        Final(snapshot("one two three", stable=13, settled=7)),
    )
    assert [(result.alternatives[0].transcript, result.is_final) for result in results] == [
        ("on ", False),
        ("one two ", True),
        ("thr ", False),
        ("three ", True),
    ]
    assert [result.stability for result in results] == pytest.approx([0.5, 1, 0.5, 1])
    assert [result.audio_processed for result in results] == [1, 1, 1, 1]
    assert [len(result.alternatives[0].words) for result in results] == [0, 2, 0, 0]
    assert [result.alternatives[0].confidence for result in results] == [0.25] * 4
    assert [(word.start_time, word.end_time) for word in results[1].alternatives[0].words] == [(100, 250), (300, 500)]


def test_without_interim_results_there_are_finals_alone() -> None:
    events = Partial(snapshot("on")), Final(snapshot("one"))
    assert [result.is_final for result in sent(LiveResults(words=False, interim=False), *events)] == [True]


def test_empty_results_are_not_sent() -> None:
    events = Partial(snapshot("")), SegmentFinal(snapshot(""), changed=False), Final(snapshot(""))
    assert not sent(LiveResults(words=True, interim=True), *events)


def test_interim_result_is_taken_back_by_a_final() -> None:
    results = sent(LiveResults(words=True, interim=True), Partial(snapshot("on")), Final(snapshot("")))
    assert [(result.alternatives[0].transcript, result.is_final) for result in results] == [("on ", False), ("", True)]


def test_results_of_a_recording() -> None:
    segments = [
        Segment(0, 0.1, 0.5, "one two", [1, 2], WORDS, 0.5, 0),
        Segment(1, 0.1, 0.5, "one two", [1, 2], WORDS, None, 1),
    ]
    transcription = Transcription(segments, samples=32_000)
    response = recording_response(transcription, words=True)
    assert [result.channel_tag for result in response.results] == [1, 2]
    assert [result.audio_processed for result in response.results] == [2, 2]
    assert [result.alternatives[0].transcript for result in response.results] == ["one two "] * 2
    assert [result.alternatives[0].confidence for result in response.results] == [0.5, 0]
    assert [len(result.alternatives[0].words) for result in response.results] == [2, 2]
    plain = recording_response(transcription, words=False)
    assert not any(result.alternatives[0].words for result in plain.results)
