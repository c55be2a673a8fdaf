"""The engine of live streams: audio in, events out. It knows no protocol."""
