"""Clients of the REST and WebSocket API; they need only httpx and websockets."""
