"""Limits: who may use the server, how much, and in which order."""
