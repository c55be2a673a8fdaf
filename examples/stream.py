"""Send a recording at the pace of a microphone: python examples/stream.py [RECORDING] [URL].

The recording is a WAV file with 16 kHz, one channel and 16 bits. This needs the package websockets.
"""

from __future__ import annotations

import asyncio
import json
import sys
import wave

from websockets.asyncio.client import ClientConnection, connect

END_OF_STREAM = b"\x00"
FRAME_SECS = 0.1


async def main(recording: str = "speech.wav", url: str = "ws://localhost:8057/v2/decode/stream/amira") -> None:
    """Print each partial and the final; a bar separates stable text from text that may still change."""
    async with connect(url, compression=None) as socket:
        player = asyncio.create_task(play(recording, socket))
        async for data in socket:
            message = json.loads(data)
            if message["type"] == "error":
                player.cancel()
                raise SystemExit(message["error"]["message"])
            stable, text = message["stable_chars"], message["text"]
            print(f"{message['audio_processed_ms']:6} ms {message['type']:8}{text[:stable]}|{text[stable:]}")


async def play(recording: str, socket: ClientConnection) -> None:
    """Send the recording in real time, then the end of the stream."""
    with wave.open(recording) as file:
        while audio := file.readframes(int(FRAME_SECS * file.getframerate())):
            await socket.send(audio)
            await asyncio.sleep(FRAME_SECS)
    await socket.send(END_OF_STREAM)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
