"""Transcribe a recording with OpenAI's client: python examples/openai_client.py [RECORDING] [BASE_URL].

Nothing but the base URL differs from OpenAI's service; a key is sent, and checked only where the server has api_keys. This
needs the package openai.
"""

from __future__ import annotations

import sys
from pathlib import Path

from openai import OpenAI


def main(recording: str = "speech.wav", base_url: str = "http://localhost:8057/v1") -> None:
    """Print the text as it comes, the times of the words, and subtitles."""
    file = Path(recording)
    with OpenAI(base_url=base_url, api_key="unused") as client:
        for event in client.audio.transcriptions.create(file=file, model="whisper-1", stream=True):
            if event.type == "transcript.text.delta":
                print(event.delta, end="", flush=True)
        print()

        timed = client.audio.transcriptions.create(
            file=file, model="whisper-1", response_format="verbose_json", timestamp_granularities=["word"]
        )
        for word in timed.words or ():
            print(f"{word.start:7.2f} {word.end:7.2f}  {word.word}")

        print(client.audio.transcriptions.create(file=file, model="whisper-1", response_format="srt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
