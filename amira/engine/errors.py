"""Why an embedded Triton does not run."""


class EngineError(RuntimeError):
    """Triton can't be prepared, started or kept ready; one line, with what to do about it."""
