"""Tokens to text inside Triton."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from stall_guard import StallGuard
from words import group, join, read_vocabulary


class TritonPythonModel:
    """The model ``detokenizer``."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the vocabulary.

        Raises:
            pb_utils.TritonModelException: it is missing or malformed.
        """
        self._name = args["model_name"]
        parameters = json.loads(args["model_config"])["parameters"]
        path = (Path(args["model_repository"]) / parameters["vocabulary"]["string_value"]).resolve()
        try:
            self._vocabulary = read_vocabulary(path)
        except (OSError, ValueError) as error:
            raise pb_utils.TritonModelException(f"{self._name}: vocabulary: {error}") from error
        self._stall_guard = StallGuard(self._name)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request by itself."""
        with self._stall_guard:
            return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        tokens, times, probabilities, stable, segment = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)
            for name in ("TOKENS", "TIMES", "PROBABILITIES", "STABLE", "SEGMENT")
        )
        if tokens.size and tokens.max() >= len(self._vocabulary):
            message = f"{self._name}: TOKENS has {tokens.max()}, but the vocabulary ends at {len(self._vocabulary) - 1}"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
        pieces = [self._vocabulary[token] for token in tokens]
        text = join(pieces, leading_space=segment[0] > 0)
        stable_text = join(pieces[: stable[0]], leading_space=segment[0] > 0)
        words = group(pieces, times[0::2].tolist(), times[1::2].tolist(), probabilities.tolist())
        listed = [
            {
                "word": word.word,
                "start": round(word.start, 3),
                "end": round(word.end, 3),
                "confidence": round(word.confidence, 4),
            }
            for word in words
        ]
        return pb_utils.InferenceResponse(
            [
                _string("TEXT", text),
                _string("WORDS", json.dumps(listed, ensure_ascii=False)),
                pb_utils.Tensor("STABLE_CHARS", np.array([[len(stable_text)]], np.int32)),
            ]
        )


def _string(name: str, value: str) -> Any:
    return pb_utils.Tensor(name, np.array([[value.encode()]], np.object_))
