"""An address at which no Triton answers, and how often it is inspected."""

from __future__ import annotations

import asyncio
import itertools

from gateway.config.settings import Address, Settings
from gateway.triton.monitor import (
    INSPECTION_TIMEOUT_SECS,
    MAX_ABSENT_POLL_SECS,
    MAX_UNRESOLVED_POLL_SECS,
    READY_POLL_SECS,
    UNREADY_POLL_SECS,
    Monitor,
    poll_pause_secs,
)


async def test_name_is_resolved_again() -> None:
    """On a new channel: an old one resolves the name again only after up to two minutes."""
    monitor = Monitor(Address("no-such-name.invalid:8001", tls=False), Settings())
    await monitor.start()
    first = monitor.connection
    await asyncio.sleep(INSPECTION_TIMEOUT_SECS + 1)
    assert monitor.connection is not first
    assert not monitor.any_loaded
    await monitor.close()


def test_lost_triton_is_inspected_at_once() -> None:
    assert poll_pause_secs(loaded=True, absent_secs=0, unresolved=False) == READY_POLL_SECS
    for absent_secs in (0, 5, 10):
        assert poll_pause_secs(loaded=False, absent_secs=absent_secs, unresolved=True) == UNREADY_POLL_SECS


def test_absent_triton_is_inspected_less_and_less_often() -> None:
    for unresolved, longest in ((False, MAX_ABSENT_POLL_SECS), (True, MAX_UNRESOLVED_POLL_SECS)):
        pauses = [poll_pause_secs(loaded=False, absent_secs=secs, unresolved=unresolved) for secs in range(10_000)]
        assert all(later >= earlier for earlier, later in itertools.pairwise(pauses))
        assert pauses[100] == 2.0
        assert pauses[-1] == longest


def test_unknown_name_costs_few_inspections() -> None:
    """Each inspection sends a dozen DNS queries, and a cluster may have names for Tritons that do not run."""
    now, inspections = 0.0, 0
    while now < 86_400:
        now += poll_pause_secs(loaded=False, absent_secs=now, unresolved=True)
        inspections += 1
    assert inspections < 86_400 / MAX_UNRESOLVED_POLL_SECS + 400
