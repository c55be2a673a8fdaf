"""Convert tokens to text and words inside Triton."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from stall_guard import StallGuard
from vocabulary import read_vocabulary
from words import text_of, words_of


class TritonPythonModel:
    """The model ``detokenizer``. It has no state between requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the vocabulary.

        Raises:
            pb_utils.TritonModelException: the vocabulary is missing or malformed.
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
        """Return a response for each request."""
        with self._stall_guard:
            return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        tokens, times, probabilities, stable, segment, alternatives = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)
            for name in ("TOKENS", "TIMES", "PROBABILITIES", "STABLE", "SEGMENT", "ALTERNATIVES")
        )
        if tokens.size and tokens.max() >= len(self._vocabulary):
            message = f"{self._name}: TOKENS has {tokens.max()}, but the vocabulary ends at {len(self._vocabulary) - 1}"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
        pieces = [self._vocabulary[token] for token in tokens]
        columns = pieces, times[0::2].tolist(), times[1::2].tolist(), probabilities.tolist()
        index, final = segment.tolist()
        words = words_of(*columns, final=bool(final))
        stable_words = words_of(*(column[: stable[0]] for column in columns), final=bool(final))
        listed = [{**word._asdict(), "confidence": round(word.confidence, 4)} for word in words]
        return pb_utils.InferenceResponse(
            [
                _string("TEXT", text_of(words, index)),
                _string("WORDS", json.dumps(listed, ensure_ascii=False)),
                pb_utils.Tensor("STABLE_CHARS", np.array([[len(text_of(stable_words, index))]], np.int32)),
                _string("ALTERNATIVES", self._texts(alternatives[0], index)),
            ]
        )

    def _texts(self, alternatives: bytes, segment: int) -> str:
        """Return the different texts of a segment as JSON, the best first; empty if they were not requested."""
        if not alternatives:
            return ""
        confidences: dict[str, float | None] = {}
        for listed in json.loads(alternatives):
            probabilities = listed["probabilities"]
            pieces = [self._vocabulary[token] for token in listed["tokens"]]
            places = [float(place) for place in range(len(pieces) + 1)]
            text = text_of(words_of(pieces, places[:-1], places[1:], probabilities), segment)
            confidences.setdefault(text, round(sum(probabilities) / len(probabilities), 4) if probabilities else None)
        texts = [{"text": text, "confidence": confidence} for text, confidence in confidences.items()]
        return json.dumps(texts, ensure_ascii=False)


def _string(name: str, value: str) -> Any:
    return pb_utils.Tensor(name, np.array([[value.encode()]], np.object_))
