"""Stream a recording that survives a lost connection: python examples/resume.py [RECORDING] [URL].

Cut the connection while it plays, by stopping the server and starting it again: the text goes on where it was. A server that
is stopped for good needs the same session_key when it comes back. The recording is a WAV file with 16 kHz, one channel and
16 bits. This needs the package amira-asr without extras.
"""

from __future__ import annotations

import asyncio
import sys
import wave

from amira import AsyncClient, LiveStream

FRAME_SECS = 0.1


async def main(recording: str = "speech.wav", url: str = "http://localhost:8057") -> None:
    """Print each partial as it comes, then the final and the number of lost connections."""
    async with AsyncClient(url) as client, client.live() as stream:
        player = asyncio.create_task(play(recording, stream))
        async for message in stream:
            print(f"{message.audio_processed_ms:6} ms {'final' if message.final else 'partial':8}{message.text}")
        await player
        print(f"{stream.reconnects} connections were lost")


async def play(recording: str, stream: LiveStream) -> None:
    """Send the recording at the pace of a microphone; what the server has not confirmed is kept, and sent again."""
    with wave.open(recording) as file:
        while audio := file.readframes(int(FRAME_SECS * file.getframerate())):
            await stream.send(audio)
            await asyncio.sleep(FRAME_SECS)
    await stream.finish()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
