"""Peers for comparison: onnx-asr's transducer loop in this process, and a frame-synchronous model in the same Triton."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onnx_asr.models.nemo import NemoConformerRnnt

from amira.paths import MODEL_REPOSITORY, ROOT
from perf.floor import Floats, FrontEnd, graph_path, to_waveforms
from perf.speech import Samples

PEER_REPOSITORY = ROOT / "perf" / "model-repo"
FRAME_SYNCHRONOUS = "frame_synchronous"


@contextmanager
def merged_repository() -> Iterator[Path]:
    """Yield a model repository with links to the project's models and the peer's."""
    with tempfile.TemporaryDirectory(prefix="amira-bench-") as folder:
        for source in (MODEL_REPOSITORY, PEER_REPOSITORY):
            for path in source.iterdir():
                (Path(folder) / path.name).symlink_to(path)
        yield Path(folder)


class OnnxAsr(NemoConformerRnnt):
    """onnx-asr's decoding class with the graphs of a model repository and ONNX Runtime's default threads.

    The repository's preprocessor replaces onnx-asr's NeMo front end, and the blank penalty is applied.

    Args:
        repository: the model repository.
        parameters: parameters of its decoder.
    """

    def __init__(self, repository: Path, parameters: Mapping[str, str]) -> None:
        self.calls = 0
        self._penalty = float(parameters["blank_penalty"])
        graphs = {name: graph_path(repository, name) for name in ("encoder", "decoder_joint")}
        front_end = FrontEnd(graph_path(repository, "preprocessor"), graphs["encoder"], threads=0)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
            json.dump({"max_tokens_per_step": int(parameters["max_symbols_per_step"])}, config)
            config.flush()
            files = {**graphs, "vocab": repository / "vocab.txt", "config": Path(config.name)}
            super().__init__(files, lambda _: front_end.preprocess, {"providers": ["CPUExecutionProvider"]})

    def _decode(self, prev_tokens: list[int], prev_state: Any, encoder_out: Floats) -> tuple[Floats, int, Any]:
        self.calls += 1
        logits, step, state = super()._decode(prev_tokens, prev_state, encoder_out)
        logits[self._blank_idx] -= self._penalty
        return logits, step, state

    async def transcribe(self, samples: Samples) -> list[int]:
        """Return the tokens of a recording."""
        return await asyncio.to_thread(self._transcribe, samples)

    def _transcribe(self, samples: Samples) -> list[int]:
        frames, lengths = self._encode(*self._preprocessor(*to_waveforms(samples)))
        ((tokens, _, _),) = self._decoding(frames, lengths)
        return list(tokens)

    async def count(self) -> float:
        """Return the number of decoder_joint calls so far."""
        return self.calls
