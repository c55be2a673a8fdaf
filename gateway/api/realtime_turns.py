"""Decode the items of a realtime session, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from gateway import metrics
from gateway.api.realtime_config import SessionConfig
from gateway.api.realtime_items import Items, Output
from gateway.errors import ApiError, ErrorKind
from gateway.live.events import Failed, Final, Partial, SegmentFinal
from gateway.live.session import Session
from gateway.service import Service
from gateway.triton.connection import Samples


def decoder_options(service: Service, model: str, config: SessionConfig) -> dict[str, str | int]:
    """Return the decoder's options for a configuration; a language has no effect on a model without a choice of languages.

    Raises:
        ApiError: the model's choice of languages does not have the wanted one, or no Triton can serve the model now.
    """
    latency = {"latency": config.latency} if config.latency else {}
    wanted = config.languages if config.languages and service.languages(model) else ()
    return {**latency, **service.language_options(model, wanted, ErrorKind.INVALID_VALUE)}


@dataclass
class _Turn:
    """An item on its way to the decoder."""

    item_id: str
    model: str
    config: SessionConfig
    audio: asyncio.Queue[Samples | None] = field(default_factory=asyncio.Queue)
    session: Session | None = None
    abandoned: bool = False


class Turns:
    """The items that are decoded or wait for it, each with a live session of its own.

    One at a time: a connection holds one place, and so one sequence at Triton; and transcriptions come in the items' order.

    Args:
        service: the gateway's.
        caller: who is charged.
        items: learn what became of an item.
        report: takes what the items make of it.
        wait_to_report: waits while too much of that is not sent.
    """

    def __init__(
        self,
        service: Service,
        caller: int,
        items: Items,
        report: Callable[[list[Output]], None],
        wait_to_report: Callable[[], Awaitable[None]],
    ) -> None:
        self._service = service
        self._caller = caller
        self._items = items
        self._report = report
        self._wait_to_report = wait_to_report
        self._queue: asyncio.Queue[_Turn] = asyncio.Queue()
        self._turns: dict[str, _Turn] = {}
        self._waiting = 0  # samples that no session has taken
        self._taken = asyncio.Event()

    def open(self, item_id: str, model: str, config: SessionConfig) -> None:
        """Add an item, to be decoded by a model as the configuration says."""
        turn = self._turns[item_id] = _Turn(item_id, model, config)
        self._queue.put_nowait(turn)

    def feed(self, item_id: str, samples: Samples) -> None:
        """Add audio [n] to an item; that of one that failed is dropped."""
        if turn := self._turns.get(item_id):
            self._waiting += len(samples)
            turn.audio.put_nowait(samples)

    def end(self, item_id: str) -> None:
        """Note that an item has all of its audio."""
        if turn := self._turns.get(item_id):
            turn.audio.put_nowait(None)

    def abandon(self, item_id: str) -> None:
        """Decode no more of an item."""
        if turn := self._turns.get(item_id):
            turn.abandoned = True
            if turn.session:
                turn.session.abandon()

    async def wait_below(self, samples: int) -> None:
        """Wait while more audio than this waits for a session."""
        while self._waiting > samples:
            self._taken.clear()
            await self._taken.wait()

    async def run(self) -> None:
        """Decode one item after the other, until cancelled."""
        while True:
            turn = await self._queue.get()
            if not turn.abandoned:
                await self._decode(turn)
            del self._turns[turn.item_id]
            while not turn.audio.empty():
                self._release(turn.audio.get_nowait())

    async def _decode(self, turn: _Turn) -> None:
        try:
            options = decoder_options(self._service, turn.model, turn.config)
            session = self._service.sessions.open(turn.model, self._caller, options=options)
        except ApiError as error:
            self._report(self._items.failed(turn.item_id, error))
            return
        async with session:
            turn.session = session
            feeder = asyncio.create_task(self._feed(turn, session), name="realtime feeder")
            try:
                async for event in session:
                    if isinstance(event, Partial | SegmentFinal):
                        text = event.transcript.text[: event.transcript.stable_chars]
                        self._report(self._items.transcribed(turn.item_id, text))
                    elif isinstance(event, Final):
                        transcript = event.transcript
                        self._report(self._items.completed(turn.item_id, transcript.text, transcript.words))
                    elif isinstance(event, Failed):
                        metrics.REJECTIONS.labels(event.error.kind.code).inc()
                        self._report(self._items.failed(turn.item_id, event.error))
                    await self._wait_to_report()
            finally:
                feeder.cancel()
                await asyncio.gather(feeder, return_exceptions=True)

    async def _feed(self, turn: _Turn, session: Session) -> None:
        while (samples := await turn.audio.get()) is not None:
            await session.append(samples)
            self._release(samples)
        session.end()

    def _release(self, samples: Samples | None) -> None:
        """Count audio that waits no more."""
        if samples is not None:
            self._waiting -= len(samples)
            self._taken.set()
