"""Phrases that a client wants boosted, as an option of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from starlette.datastructures import QueryParams

from gateway.errors import ApiError, ErrorKind

MAX_PHRASES = 500
"""Maximum number of phrases of a stream or recording; the decoder has the same limit."""

MAX_CHARACTERS = 200
"""Maximum length of a phrase in characters; the decoder has the same limit."""


class LanguageModel(Enum):
    """Whether the model's language model is used; each value is the name in the query."""

    ON = "on"
    OFF = "off"


def phrase_options(phrases: Sequence[str], name: str, kind: ErrorKind = ErrorKind.UNACCEPTABLE) -> dict[str, str | int]:
    """Return the decoder's option for phrases; none without phrases.

    Args:
        phrases: as the client typed them.
        name: of the field, for messages.
        kind: of the errors.

    Raises:
        ApiError: there are too many phrases, or one is too long.
    """
    lines = [text for phrase in phrases if (text := " ".join(phrase.split()))]
    if len(lines) > MAX_PHRASES:
        raise ApiError(kind, f"{name} has {len(lines)} phrases; at most {MAX_PHRASES} are allowed", name)
    if longest := max(lines, key=len, default=""):
        if len(longest) > MAX_CHARACTERS:
            message = (
                f"{name} has a phrase of {len(longest)} characters, {longest[:40]!r}…; at most {MAX_CHARACTERS} are allowed"
            )
            raise ApiError(kind, message, name)
        return {"phrases": "\n".join(lines)}
    return {}


def language_options(query: QueryParams) -> dict[str, str | int]:
    """Return the decoder's options from a query: ``phrases``, one per parameter, and ``language_model``.

    Raises:
        ApiError: a value is not allowed.
    """
    options = phrase_options(query.getlist("phrases"), "phrases")
    if (given := query.get("language_model")) is not None:
        known = [one.value for one in LanguageModel]
        if given not in known:
            message = f"language_model is {given[:40]!r}; it must be one of {', '.join(known)}"
            raise ApiError(ErrorKind.UNACCEPTABLE, message, "language_model")
        options["language_model"] = given
    return options
