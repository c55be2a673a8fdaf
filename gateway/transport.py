"""Transport that uvicorn's protocols get from ``gateway.guard``."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateway.guard import GuardedConnection


class GuardedTransport(asyncio.Transport):
    """Passes the calls of uvicorn's protocol to the connection.

    Args:
        transport: transport of the event loop.
        connection: the connection.
    """

    def __init__(self, transport: asyncio.Transport, connection: GuardedConnection) -> None:
        super().__init__()
        self._transport = transport
        self._connection = connection
        self._protocol: asyncio.BaseProtocol = connection

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return information from the event loop's transport."""
        return self._transport.get_extra_info(name, default)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return uvicorn's protocol."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Change from HTTP to a WebSocket."""
        self._protocol = protocol
        self._connection.upgrade(protocol)

    def is_closing(self) -> bool:
        """Return whether the connection is closed for uvicorn."""
        return self._connection.is_closing()

    def pause_reading(self) -> None:
        """Pause the calls of ``data_received``."""
        self._connection.pause_reading()

    def resume_reading(self) -> None:
        """Resume the calls of ``data_received``."""
        self._connection.resume_reading()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write, unless the connection is closed for uvicorn."""
        self._connection.write(data)

    def close(self) -> None:
        """Close after the written data, and after the peer has sent its request or frame."""
        self._connection.close()

    def abort(self) -> None:
        """Close without the written data."""
        self._connection.abort()
