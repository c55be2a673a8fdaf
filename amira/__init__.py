"""AMIRA ASR: clients for the speech recognition server; the ``amira`` command and the server come with the package's extras."""

from amira.client.blocking import SyncLiveStream
from amira.client.live import LiveStream, Message
from amira.client.rest import AsyncClient, Client
from amira.client.types import AmiraError, RequestError, Segment, StreamError, Transcript, Word

__all__ = [
    "AmiraError",
    "AsyncClient",
    "Client",
    "LiveStream",
    "Message",
    "RequestError",
    "Segment",
    "StreamError",
    "SyncLiveStream",
    "Transcript",
    "Word",
]
