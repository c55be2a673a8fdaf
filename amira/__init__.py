"""AMIRA ASR: clients of the speech recognition server. The package's extras add the server and further commands."""

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
