"""The circuit breaker, compared with a reference model of its documentation."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prometheus_client import REGISTRY

from gateway.config.settings import Settings
from gateway.triton.breaker import FAILURE_SHARE, MIN_FAILURES, OPEN_SECS, WINDOW_CALLS, Breaker, BreakerState
from gateway.triton.pool import TritonPool


class BreakerMachine(RuleBasedStateMachine):
    """Reference model with the whole history of calls, beside the breaker."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.breaker = Breaker(lambda: self.now)
        self.outcomes: list[bool] = []  # since it was last closed
        self.opened_at: float | None = None
        self.probe_at: float | None = None

    @property
    def expected(self) -> BreakerState:
        if self.opened_at is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self.now < self.opened_at + OPEN_SECS else BreakerState.HALF_OPEN

    @rule(seconds=st.sampled_from([0.1, 0.5, OPEN_SECS, 3 * OPEN_SECS]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(success=st.booleans())
    @precondition(lambda self: self.expected is BreakerState.CLOSED)
    def call_while_closed(self, success: bool) -> None:
        self.breaker.record(success=success)
        self.outcomes.append(success)
        recent = self.outcomes[-WINDOW_CALLS:]
        failures = recent.count(False)
        if failures >= MIN_FAILURES and failures >= FAILURE_SHARE * len(recent):
            self.opened_at = self.now

    @rule(success=st.booleans())
    @precondition(lambda self: self.expected is BreakerState.OPEN)
    def late_outcome_while_open(self, success: bool) -> None:
        self.breaker.record(success=success)

    @rule()
    def ask(self) -> None:
        probe_runs = self.probe_at is not None and self.now < self.probe_at + OPEN_SECS
        expected = {
            BreakerState.CLOSED: True,
            BreakerState.HALF_OPEN: not probe_runs,
            BreakerState.OPEN: False,
        }[self.expected]
        assert self.breaker.would_allow is expected
        assert self.breaker.allow() is expected
        if expected and self.expected is BreakerState.HALF_OPEN:
            self.probe_at = self.now

    @rule(success=st.booleans())
    @precondition(lambda self: self.expected is BreakerState.HALF_OPEN)
    def probe_ends(self, success: bool) -> None:
        self.breaker.record(success=success)
        self.outcomes = []
        self.probe_at = None
        self.opened_at = None if success else self.now

    @invariant()
    def state_is_the_expected(self) -> None:
        assert self.breaker.state is self.expected


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = settings(stateful_step_count=60)


def test_single_failures_among_successes_never_open_it() -> None:
    breaker = Breaker()
    for call in range(1000):
        breaker.record(success=call % 4 != 0)
    assert breaker.state is BreakerState.CLOSED


def test_few_failures_open_a_fresh_breaker() -> None:
    breaker = Breaker()
    states = []
    for _ in range(MIN_FAILURES):
        breaker.record(success=False)
        states.append(breaker.state)
    assert states == [BreakerState.CLOSED] * (MIN_FAILURES - 1) + [BreakerState.OPEN]


async def test_metric_of_an_unreachable_triton_is_closed() -> None:
    """Such a Triton may be gone for ever, and nothing would close its breaker."""
    triton = TritonPool(Settings(triton_endpoint="127.0.0.1:1"))
    await triton.start()
    (endpoint,) = triton.endpoints
    for _ in range(MIN_FAILURES):
        endpoint.breaker.record(success=False)

    def told() -> float | None:
        return REGISTRY.get_sample_value("asr_circuit_breaker_state", {"endpoint": endpoint.address})

    assert endpoint.breaker.state is BreakerState.OPEN
    assert told() == BreakerState.CLOSED
    endpoint.monitor.latency_secs = 0.001
    assert told() == BreakerState.OPEN
    await triton.close()
