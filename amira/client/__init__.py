"""Client for the REST and WebSocket API."""
