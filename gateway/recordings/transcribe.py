"""Transcription of recordings of any length: cut into pieces, decoded in parallel, joined in order.

Audio is read only up to the piece that waits for a decoding place, so memory does not depend on the recording's length.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

from gateway import metrics
from gateway.audio import RATE
from gateway.audio.convert import Pcm
from gateway.limits.places import Place, Places, Share
from gateway.limits.quotas import Bill
from gateway.recordings.cut import Cutter, Lengths, Piece, Samples
from gateway.resources import Resources
from gateway.transcript.segments import Segment, Transcription
from gateway.transcript.transcript import Answer

MAX_UNDELIVERED = 64
"""Maximum number of a recording's pieces that are in flight, or decoded but not delivered: a slow client stops the reading."""


class Audio(Protocol):
    """A recording as it is read.

    Attributes:
        channels: number of channels; 1 where they are mixed.
    """

    channels: int

    def __aiter__(self) -> AsyncIterator[Pcm]:
        """Iterate over blocks of 16 kHz samples [channels, n].

        Raises:
            ApiError: the rest is not decodable, or is longer than allowed.
        """


class Decoder(Protocol):
    """Decodes one piece; an ``Utterance``."""

    async def send(self, samples: Samples, *, end: bool) -> Answer:
        """Return the decoder's answer to 16 kHz audio [n].

        Raises:
            ApiError: it cannot be decoded.
        """

    def give_up(self) -> None:
        """Stop retrying: no client waits for the answer any more."""


async def cut_pieces(audio: Audio, lengths: Lengths, charge: Callable[[float], None]) -> AsyncGenerator[Piece, None]:
    """Yield the pieces of a recording in the order of their starts.

    Args:
        audio: the recording.
        lengths: lengths of the pieces.
        charge: called with the length of each block in seconds, summed over the channels, before the block is used.
    """
    cutters = [Cutter(lengths, channel) for channel in range(audio.channels)]
    async for block in audio:
        charge(block.size / RATE)
        for cutter, samples in zip(cutters, block, strict=True):
            for piece in cutter.push(samples):
                yield piece
    for piece in sorted((piece for cutter in cutters for piece in cutter.finish()), key=lambda piece: piece.start):
        yield piece


class _Decoded(NamedTuple):
    """A piece and the decoder's answer to it."""

    piece: Piece
    answer: Answer


class Recording:
    """A recording that is admitted.

    Args:
        model: public name of the model.
        max_secs: maximum length of the audio.
        lengths: lengths of the pieces.
        bill: charges audio to the caller.
        decoder: returns a new decoder for a piece.
        places: places of the gateway.
        share: the recording's share of the decoding places.

    Attributes:
        transcription: transcript so far.
    """

    def __init__(
        self,
        model: str,
        max_secs: float,
        lengths: Lengths,
        bill: Bill,
        decoder: Callable[[], Decoder],
        places: Places,
        share: Share,
    ) -> None:
        self.max_secs = max_secs
        self.transcription = Transcription()
        self._audio_seconds = metrics.AUDIO_SECONDS.labels("batch", model)
        self._lengths = lengths
        self._bill = bill
        self._decoder = decoder
        self._places = places
        self._share = share
        self._in_flight: dict[asyncio.Task[_Decoded], Decoder] = {}

    async def segments(self, audio: Audio, *, separate: bool = False) -> AsyncGenerator[Segment, None]:
        """Decode the recording, once; yield its segments in order, each as soon as it and those before it are decoded.

        Closing the iterator stops the reading. Pieces at Triton then keep their places until they are decoded, without a retry.

        Args:
            audio: the recording.
            separate: whether segments name their channel.

        Raises:
            ApiError: the audio is not decodable or too long, the caller's quota is used up, no place became free in time, or
                Triton failed.
        """
        decoded: asyncio.Queue[asyncio.Future[_Decoded | None]] = asyncio.Queue(MAX_UNDELIVERED)
        feeding = asyncio.create_task(self._feed(audio, decoded))
        try:
            while result := await (await decoded.get()):
                piece, answer = result
                if segment := self.transcription.add(answer, piece.start, piece.channel if separate else None):
                    yield segment
        finally:
            feeding.cancel()
            for decoder in self._in_flight.values():
                decoder.give_up()
            await asyncio.wait({feeding})

    async def _feed(self, audio: Audio, decoded: asyncio.Queue[asyncio.Future[_Decoded | None]]) -> None:
        """Read the recording, and send each piece as soon as there is a place for it."""
        end: asyncio.Future[_Decoded | None] = asyncio.get_running_loop().create_future()
        try:
            async with aclosing(cut_pieces(audio, self._lengths, self._charge)) as pieces:
                async for piece in pieces:
                    await decoded.put(self._begin(piece, await self._places.decoding(self._share)))
            end.set_result(None)
        except Exception as error:  # noqa: BLE001 (raised to the consumer of the segments)
            end.set_exception(error)
            end.exception()  # there may be no consumer any more
        await decoded.put(end)

    def _begin(self, piece: Piece, place: Place) -> asyncio.Future[Any]:
        """Begin to decode a piece."""
        decoder = self._decoder()
        task = asyncio.create_task(_decode(piece, decoder, place))
        self._in_flight[task] = decoder
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task[_Decoded]) -> None:
        del self._in_flight[task]
        if not task.cancelled():
            task.exception()  # mark it as retrieved; there may be no consumer any more

    def _charge(self, audio_secs: float) -> None:
        self._bill.add(audio_secs)
        self._audio_seconds.inc(audio_secs)


async def _decode(piece: Piece, decoder: Decoder, place: Place) -> _Decoded:
    try:
        return _Decoded(piece, await decoder.send(piece.samples, end=True))
    finally:
        place.release()


class Transcriber:
    """Engine of recordings.

    Args:
        resources: resources of the gateway.
    """

    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    @contextmanager
    def admit(self, model: str, caller: int, options: Mapping[str, str | int] | None = None) -> Iterator[Recording]:
        """Hold a place in the queue for one recording that is received completely.

        Args:
            model: public name of the model, one of the settings'.
            caller: caller who is charged for the audio.
            options: options of the decoder, which override those of every recording.

        Raises:
            ApiError: the queue is full, the gateway drains, or no Triton can serve the model now.
        """
        triton, settings, places = self._resources.triton, self._resources.settings, self._resources.places
        with places.batch() as share:
            ensemble = triton.ensemble(settings.models[model])
            decoder = partial(triton.recording, ensemble, {**self._resources.options, **(options or {})})
            yield Recording(
                model,
                settings.max_batch_audio_length_secs,
                Lengths.within(ensemble.max_whole_secs),
                Bill(self._resources.quotas, caller),
                decoder,
                places,
                share,
            )
