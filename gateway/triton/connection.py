"""gRPC connection to one Triton, which can be given up and replaced while calls are in flight."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import InferInput
from tritonclient.grpc import aio as grpcclient
from tritonclient.utils import InferenceServerException

from gateway.config.settings import Address
from gateway.triton.retry import DEADLINE_EXCEEDED

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # the default, 120 s, is too long after a restart of Triton
    ("grpc.use_local_subchannel_pool", 1),  # otherwise a new client gets the connection of the old one
]

LIVENESS_TIMEOUT_SECS = 0.5
"""Timeout of the liveness check of a replaced connection, in seconds."""

Samples = npt.NDArray[np.int16]
"""Audio at 16 kHz [n]."""


class ConnectionGivenUpError(ConnectionError):
    """The connection was given up while a call was in flight."""


class Connection:
    """A connection to one Triton.

    Attributes:
        client: tritonclient's client.
        began_at: creation of the connection, in seconds of ``time.monotonic``.
    """

    def __init__(self, address: Address) -> None:
        self.client = grpcclient.InferenceServerClient(address.target, ssl=address.tls, channel_args=CHANNEL_OPTIONS)
        self.began_at = time.monotonic()
        self._calls: set[asyncio.Task[Any]] = set()
        self._waits: set[asyncio.Future[None]] = set()  # of callers; done when the connection is given up

    @property
    def in_use(self) -> bool:
        """Whether a caller waits for a response."""
        return bool(self._waits)

    async def infer(
        self,
        model: str,
        samples: Samples,
        timeout_secs: float,
        on_answer: Callable[[Any], None] = lambda _: None,
        **arguments: Any,
    ) -> Any:
        """Send one request, and return Triton's response.

        After the timeout, the caller stops waiting, but the request is not cancelled. Triton would decode it anyway, and the
        gRPC front end of Triton 2.51 may crash when a request is cancelled soon after its arrival.

        Args:
            model: name of the model.
            samples: its input ``AUDIO``, at 16 kHz [n].
            timeout_secs: timeout of the response.
            on_answer: called with the response, even after the timeout.
            arguments: further arguments of tritonclient's ``infer``.

        Raises:
            ConnectionGivenUpError: the connection was given up.
            InferenceServerException: the request failed, or the timeout has passed.
        """
        audio = InferInput("AUDIO", [1, len(samples)], "INT16")
        audio.set_data_from_numpy(samples[None])
        call = asyncio.create_task(self.client.infer(model, [audio], **arguments))
        self._calls.add(call)
        call.add_done_callback(partial(self._finish, on_answer))
        given_up = asyncio.get_running_loop().create_future()
        self._waits.add(given_up)
        try:
            await asyncio.wait({call, given_up}, timeout=timeout_secs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waits.discard(given_up)
        if call.done():
            return call.result()
        if given_up.done():
            raise ConnectionGivenUpError
        raise InferenceServerException("Deadline Exceeded", DEADLINE_EXCEEDED)

    async def give_up_if_lost(self) -> None:
        """Raise ``ConnectionGivenUpError`` in waiting callers if the connection is lost; keep waiting for a slow Triton."""
        try:
            await self.client.is_server_live(client_timeout=LIVENESS_TIMEOUT_SECS)
        except InferenceServerException:
            for wait in self._waits:
                if not wait.done():
                    wait.set_result(None)

    async def close(self, delay_secs: float = 0.0) -> None:
        """Close the connection after a delay. Closing cancels calls in flight and their callers."""
        try:
            await asyncio.sleep(delay_secs)
        finally:
            for call in self._calls:
                call.cancel()
            await asyncio.gather(*self._calls, return_exceptions=True)
            await self.client.close()

    def _finish(self, on_answer: Callable[[Any], None], call: asyncio.Task[Any]) -> None:
        """Pass on the response of a call; its caller may have stopped waiting."""
        self._calls.discard(call)
        if not call.cancelled() and not call.exception():
            on_answer(call.result())
