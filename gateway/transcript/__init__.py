"""Transcripts and their formats."""
