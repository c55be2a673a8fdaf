"""The gateway: the REST and WebSocket API in front of Triton."""

from importlib.metadata import version

__version__ = version("amira-asr")
