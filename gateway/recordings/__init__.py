"""The engine of recordings: a recording in, a transcript out. It knows no protocol."""
