"""Convert audio of any format to 16 kHz mono samples.

``sniff`` identifies a body, ``raw`` reads raw audio, ``files`` decodes files, ``pool`` does both for a server.
"""

RATE = 16_000
"""Sample rate of decoded audio and of raw PCM, in Hz."""

BYTES_PER_SAMPLE = 2
"""Size of one sample of raw PCM (s16le)."""
