"""A client for live streams that survives lost connections; docs/API.md specifies the protocol."""

from amira.client.live import LiveStream, Message, StreamError

__all__ = ["LiveStream", "Message", "StreamError"]
