"""Transcribe a recording: python examples/transcribe.py RECORDING [URL].

The recording may be in any format that the server decodes. This needs the package amira-asr without extras.
"""

from __future__ import annotations

import sys

from amira import Client, Segment


def main(recording: str = "speech.wav", url: str = "http://localhost:8057") -> None:
    """Print each segment as it comes, then the words."""
    with Client(url) as client:
        transcript = client.transcribe(recording, on_segment=show)
    for word in transcript.words:
        print(f"{word.start:7.2f} {word.end:7.2f}  {word.confidence:4.0%}  {word.text}")


def show(segment: Segment) -> None:
    """Print a segment with its times in seconds."""
    print(f"[{segment.start:.2f} - {segment.end:.2f}] {segment.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
