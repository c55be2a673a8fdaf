"""The faces: each maps a protocol onto an engine."""
