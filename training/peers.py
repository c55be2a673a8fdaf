"""`make peers`: print word error rates of Moonshine tiny and PocketSphinx on labelled recordings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jiwer
import numpy as np
import onnxruntime
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from training.command import run
from training.moonshine import assets
from training.speech import RATE, Audio, recordings
from training.text import normalise

_START, _END = 1, 2
_TOKENS_A_SECOND = 6.5
"""Moonshine's own limit of tokens per second; beyond the limit its decoder repeats words."""
_LONGEST_SECS = 30


class Moonshine:
    """Moonshine tiny as published, with greedy decoding. The bundled model starts from its encoder."""

    def __init__(self) -> None:
        self._encoder, self._decoder = (
            onnxruntime.InferenceSession(str(assets() / f"{part}.ort"), providers=["CPUExecutionProvider"])
            for part in ("encoder_model", "decoder_model_merged")
        )
        self._pieces = _pieces((assets() / "tokenizer.bin").read_bytes())

    def __call__(self, audio: Audio) -> str:
        """Return the text of a recording, 30 s at a time."""
        step = _LONGEST_SECS * RATE
        return " ".join(self._transcribe(audio[at : at + step]) for at in range(0, len(audio), step))

    def _transcribe(self, audio: Audio) -> str:
        audio = np.pad(audio, (0, max(0, 1024 - len(audio))))
        mask = np.ones((1, len(audio)), np.int64)
        (encoded,) = self._encoder.run(None, {"input_values": audio[None], "attention_mask": mask})
        inputs = {i.name: i for i in self._decoder.get_inputs()}
        cache: dict[str, NDArray[Any]] = {
            name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
            for name, i in inputs.items()
            if name.startswith("past_key_values")
        }
        names = [o.name.replace("present", "past_key_values") for o in self._decoder.get_outputs()]
        tokens = [_START]
        while len(tokens) <= max(4, _TOKENS_A_SECOND * len(audio) / RATE):
            feed = {"input_ids": np.array([tokens[-1:]]), "encoder_hidden_states": encoded, "encoder_attention_mask": mask}
            feed |= {"use_cache_branch": np.array([len(tokens) > 1]), **cache}
            made = dict(zip(names, self._decoder.run(None, {k: v for k, v in feed.items() if k in inputs}), strict=True))
            cache |= {name: made[name] for name in cache if len(tokens) == 1 or ".decoder." in name}
            best = int(made["logits"][0, -1].argmax())
            if best == _END:
                break
            tokens.append(best)
        return b"".join(self._pieces[t] for t in tokens[1:]).decode(errors="replace").replace("▁", " ").strip()


def _pieces(data: bytes) -> list[bytes]:
    """Parse Moonshine's tokenizer: for each piece its length, in two bytes from 128 on, and its bytes."""
    pieces, at = [], 0
    while at < len(data):
        length, at = data[at], at + 1
        if length >= 128:  # noqa: PLR2004 - of the format
            length, at = data[at] * 128 + length - 128, at + 1
        piece, at = data[at : at + length], at + length
        if piece.startswith(b"<0x"):
            piece = bytes([int(piece[3:5], 16)])
        elif piece.startswith(b"<"):
            piece = b""
        pieces.append(piece)
    return pieces


class PocketSphinx:
    """PocketSphinx 5 with the English model in its wheel."""

    def __init__(self) -> None:
        from pocketsphinx import Decoder  # noqa: PLC0415 - the import loads a dictionary

        self._decoder = Decoder(samprate=RATE, loglevel="FATAL")

    def __call__(self, audio: Audio) -> str:
        """Return the text of a recording."""
        self._decoder.start_utt()
        self._decoder.process_raw((audio * 32767).astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return hypothesis.hypstr if hypothesis else ""


def main(speech: Annotated[Path, typer.Argument(help="Labelled recordings with their manifest.tsv")]) -> None:
    """Print the word error rates by set."""
    found = recordings(speech)
    sets = sorted({recording.set for recording in found})
    table = Table("", *sets, "all")
    peers: dict[str, Callable[[Audio], str]] = {"Moonshine tiny": Moonshine(), "PocketSphinx": PocketSphinx()}
    for name, recognise in peers.items():
        texts = [normalise(recognise(recording.read())) for recording in track(found, name, transient=True)]
        rates = []
        for chosen in [*([s] for s in sets), sets]:
            pairs = [(r.text, text) for r, text in zip(found, texts, strict=True) if r.set in chosen]
            rates.append(f"{100 * jiwer.wer([a for a, _ in pairs], [b for _, b in pairs]):.1f}")
        table.add_row(name, *rates)
    Console().print(table)


if __name__ == "__main__":
    run(main)
