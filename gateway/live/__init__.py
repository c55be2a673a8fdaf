"""The engine for live streams; it knows no protocol."""
