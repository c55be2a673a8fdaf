"""A gRPC connection to one Triton, which can be given up for another one while calls are in flight."""

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
    ("grpc.max_reconnect_backoff_ms", 1000),  # 120 s by default: too long to find a Triton that is back
    ("grpc.use_local_subchannel_pool", 1),  # else a new client would be given the connection of the old one
]

LIVENESS_TIMEOUT_SECS = 0.5
"""Within this time a connection that was left must show that it is not lost."""

Samples = npt.NDArray[np.int16]
"""Audio at 16 kHz [n]."""


class ConnectionGivenUpError(ConnectionError):
    """The connection was given up while a call was in flight."""


class Connection:
    """A connection to one Triton.

    Attributes:
        client: Triton's.
        began_at: in seconds of ``time.monotonic``.
    """

    def __init__(self, address: Address) -> None:
        self.client = grpcclient.InferenceServerClient(address.target, ssl=address.tls, channel_args=CHANNEL_OPTIONS)
        self.began_at = time.monotonic()
        self._calls: set[asyncio.Task[Any]] = set()
        self._waits: set[asyncio.Future[None]] = set()  # of callers; done when the connection is given up

    @property
    def in_use(self) -> bool:
        """Whether a caller waits for an answer."""
        return bool(self._waits)

    async def infer(
        self,
        model: str,
        samples: Samples,
        timeout_secs: float,
        on_answer: Callable[[Any], None] = lambda _: None,
        **arguments: Any,
    ) -> Any:
        """Send one request and return Triton's answer.

        A request that takes too long goes on, but its caller stops waiting: Triton would decode it though it were cancelled,
        and the gRPC front end of Triton 2.51 may crash when a request is cancelled soon after it came.

        Args:
            model: name of the model.
            samples: its input ``AUDIO``, at 16 kHz [n].
            timeout_secs: how long to wait for the answer.
            on_answer: called with the answer, also with one that comes too late.
            arguments: more of the client's ``infer``.

        Raises:
            ConnectionGivenUpError: the connection was given up meanwhile.
            InferenceServerException: the request failed, or took too long.
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
        """Let callers stop waiting if the connection leads nowhere; a Triton that is merely slow is waited for."""
        try:
            await self.client.is_server_live(client_timeout=LIVENESS_TIMEOUT_SECS)
        except InferenceServerException:
            for wait in self._waits:
                if not wait.done():
                    wait.set_result(None)

    async def close(self, delay_secs: float = 0.0) -> None:
        """Close it after a delay in which calls may finish: closing cancels them, and with them their callers."""
        try:
            await asyncio.sleep(delay_secs)
        finally:
            for call in self._calls:
                call.cancel()
            await asyncio.gather(*self._calls, return_exceptions=True)
            await self.client.close()

    def _finish(self, on_answer: Callable[[Any], None], call: asyncio.Task[Any]) -> None:
        """Hand over the answer of a call, for which there may be no caller any more."""
        self._calls.discard(call)
        if not call.cancelled() and not call.exception():
            on_answer(call.result())
