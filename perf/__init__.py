"""Measurements against a real server: accuracy and speed."""
