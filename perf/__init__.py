"""Measure accuracy and speed of a real server."""
