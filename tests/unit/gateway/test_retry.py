"""Classification of errors, and retries. The messages are those of Triton 2.51 and gRPC."""

from __future__ import annotations

import pytest

from gateway.triton.retry import Death, Failures, Fault, RetryPolicy, classify

RECORDING = RetryPolicy(attempts=2, whole=True)
STREAM = RetryPolicy(attempts=4, whole=False)


@pytest.mark.parametrize(
    ("status", "message", "fault"),
    [
        (
            "UNAVAILABLE",
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused",
            Fault.ABSENT,
        ),
        ("UNAVAILABLE", "DNS resolution failed for no-such-name.invalid:8001: C-ares status is not ARES_SUCCESS", Fault.ABSENT),
        ("UNAVAILABLE", "Server not ready", Fault.ABSENT),
        (
            "UNAVAILABLE",
            "in ensemble 'asr_ensemble', Server is stopping, scheduler for model has stopped accepting new inference requests",
            Fault.ABSENT,
        ),
        ("UNAVAILABLE", "Stream removed (Socket closed)", Fault.DISCONNECTED),
        ("UNAVAILABLE", "recvmsg:Connection reset by peer", Fault.DISCONNECTED),
        ("UNAVAILABLE", "a text of a later version", Fault.DISCONNECTED),
        (
            "INTERNAL",
            "rnnt_greedy_bls: Failed to increase the shared memory pool size for key 'amira_1' to 2097152 bytes. Error: No",
            Fault.NO_SHARED_MEMORY,
        ),
        ("INTERNAL", "in ensemble 'asr_ensemble', Stub process 'rnnt_greedy_bls_0_0' is not healthy.", Fault.BACKEND_DIED),
        ("INTERNAL", "rnnt_greedy_bls: encoder failed: Stub process 'encoder_0_0' is not healthy.", Fault.BACKEND_DIED),
        ("INTERNAL", "rnnt_greedy_bls: encoder failed: inference failed on inputs {}", Fault.FAILED),
        ("NOT_FOUND", "Request for unknown model: 'asr_ensemble' has no available versions", Fault.FAILED),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", Fault.LATE),
    ],
)
def test_errors_are_classified(status: str, message: str, fault: Fault) -> None:
    assert classify(f"StatusCode.{status}", message, restores=False) is fault


def test_invalid_request_is_a_foreign_state_only_if_it_restores() -> None:
    assert classify("StatusCode.INVALID_ARGUMENT", "version 1", restores=True) is Fault.FOREIGN_STATE
    assert classify("StatusCode.INVALID_ARGUMENT", "sequence 5 is not known", restores=False) is Fault.UNKNOWN_SEQUENCE


def died(generation: int, *, sole: bool = True, alone: bool = False) -> Death:
    return Death(("a:8001", generation), sole, alone)


def test_recording_alone_at_a_death_is_given_up() -> None:
    failures = Failures().after(Fault.DISCONNECTED, died(1, sole=False, alone=True))
    assert not RECORDING.retries(failures, Fault.DISCONNECTED)
    assert RECORDING.poisoned(failures)


def test_recording_among_others_is_retried_once_alone() -> None:
    failures = Failures().after(Fault.BACKEND_DIED, died(1, sole=False))
    assert RECORDING.retries(failures, Fault.BACKEND_DIED)
    assert RECORDING.isolates(failures)
    failures = failures.after(Fault.DISCONNECTED, died(2, sole=False))
    assert not RECORDING.retries(failures, Fault.DISCONNECTED)
    assert RECORDING.poisoned(failures)


def test_recording_without_shared_memory_is_not_retried() -> None:
    assert not RECORDING.retries(Failures().after(Fault.NO_SHARED_MEMORY, None), Fault.NO_SHARED_MEMORY)
    assert STREAM.retries(Failures().after(Fault.NO_SHARED_MEMORY, None), Fault.NO_SHARED_MEMORY)


def test_recording_is_retried_after_a_broken_connection() -> None:
    failures = Failures().after(Fault.DISCONNECTED, None)
    assert RECORDING.retries(failures, Fault.DISCONNECTED)
    assert failures.count == 0


def test_recording_is_retried_once_and_never_after_a_timeout() -> None:
    once = Failures().after(Fault.FAILED, None)
    assert RECORDING.retries(once, Fault.FAILED)
    assert not RECORDING.retries(once.after(Fault.FAILED, None), Fault.FAILED)
    assert not RECORDING.retries(Failures().after(Fault.LATE, None), Fault.LATE)


def test_stream_survives_one_death_and_not_two() -> None:
    once = Failures().after(Fault.DISCONNECTED, died(1, sole=False))
    assert STREAM.retries(once, Fault.DISCONNECTED)
    twice = once.after(Fault.BACKEND_DIED, died(2))
    assert not STREAM.retries(twice, Fault.BACKEND_DIED)
    assert STREAM.poisoned(twice)


def test_stream_among_others_is_isolated_after_two_deaths_and_given_up_after_three() -> None:
    twice = Failures().after(Fault.DISCONNECTED, died(1, sole=False)).after(Fault.DISCONNECTED, died(2, sole=False))
    assert STREAM.retries(twice, Fault.DISCONNECTED)
    assert STREAM.isolates(twice)
    thrice = twice.after(Fault.DISCONNECTED, died(3, sole=False))
    assert not STREAM.retries(thrice, Fault.DISCONNECTED)


def test_one_death_counts_once() -> None:
    """A dead process fails requests until Triton is restarted, which then disconnects them."""
    failures = Failures().after(Fault.BACKEND_DIED, died(1)).after(Fault.DISCONNECTED, died(1))
    assert failures.deaths == 1
    assert failures.count == 1


def test_stream_gives_up_after_its_attempts() -> None:
    failures = Failures()
    for _ in range(4):
        assert STREAM.retries(failures, Fault.FAILED)
        failures = failures.after(Fault.FAILED, None)
    assert not STREAM.retries(failures, Fault.FAILED)
    for _ in range(100):
        failures = Failures().after(Fault.ABSENT, None)
    assert STREAM.retries(failures, Fault.ABSENT), "only the time counts while no Triton is there"


def test_foreign_state_is_final() -> None:
    assert not STREAM.retries(Failures().after(Fault.FOREIGN_STATE, None), Fault.FOREIGN_STATE)


def test_patience_grows_with_failures() -> None:
    failures, given = Failures(), []
    for _ in range(5):
        given.append(STREAM.patience(failures))
        failures = failures.after(Fault.LATE, None)
    assert given == [1, 2, 3, 4, 4]
    assert RECORDING.patience(Failures()) == 4
