"""Clients of the REST and WebSocket API; they need httpx and websockets alone."""
