"""Faces: each maps a protocol onto an engine."""
