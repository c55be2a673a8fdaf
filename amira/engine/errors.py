"""Errors of the embedded Triton."""


class EngineError(RuntimeError):
    """Triton cannot be prepared, started or kept ready. The message is one line and says what to do."""
