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

MAX_TOTAL_CHARACTERS = 20_000
"""Maximum length of all phrases in characters; the decoder has the same limit."""

MAX_FACTOR = 10.0
"""Largest factor of a phrase's bonus; the decoder has the same limit."""

MAX_BEAM = 16
"""Largest width of a beam; the decoder has the same limit."""

MAX_ALTERNATIVES = 10
"""Maximum number of texts of a segment; the decoder has the same limit."""


class LanguageModel(Enum):
    """Whether the model's language model is used; each value is the name in the query."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


def phrase_options(phrases: Sequence[str], name: str, kind: ErrorKind = ErrorKind.UNACCEPTABLE) -> dict[str, str | int]:
    """Return the decoder's option for phrases; none without phrases.

    Args:
        phrases: as the client typed them; a tab and a number behind a phrase multiply its bonus.
        name: of the field, for messages.
        kind: of the errors.

    Raises:
        ApiError: there are too many phrases, one or all are too long, or one has a factor that is not allowed.
    """
    lines = []
    for phrase in phrases:
        text, tab, factor = phrase.strip().partition("\t")
        text = " ".join(text.split())
        if not text:
            continue
        if len(text) > MAX_CHARACTERS:
            message = f"{name} has a phrase of {len(text)} characters, {text[:40]!r}…; at most {MAX_CHARACTERS} are allowed"
            raise ApiError(kind, message, name)
        if tab and not _is_factor(factor):
            message = f"{name}: the factor of {text!r} is {factor[:40]!r}; it must be above 0 and at most {MAX_FACTOR:g}"
            raise ApiError(kind, message, name)
        lines.append(f"{text}\t{float(factor):g}" if tab else text)
    if len(lines) > MAX_PHRASES:
        raise ApiError(kind, f"{name} has {len(lines)} phrases; at most {MAX_PHRASES} are allowed", name)
    joined = "\n".join(lines)
    if len(joined) > MAX_TOTAL_CHARACTERS:
        raise ApiError(kind, f"{name} has {len(joined)} characters; at most {MAX_TOTAL_CHARACTERS} are allowed", name)
    return {"phrases": joined} if lines else {}


def _is_factor(text: str) -> bool:
    try:
        return 0 < float(text) <= MAX_FACTOR
    except ValueError:
        return False


def decoding_options(query: QueryParams) -> dict[str, str | int]:
    """Return the decoder's options from a query: ``phrases`` (several), ``language_model``, ``beam`` and ``alternatives``.

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
    for name, most in (("beam", MAX_BEAM), ("alternatives", MAX_ALTERNATIVES)):
        if (number := query.get(name)) is not None:
            options |= number_option(name, number, most)
    return options


def number_option(name: str, text: str, most: int, kind: ErrorKind = ErrorKind.UNACCEPTABLE) -> dict[str, str | int]:
    """Return an option whose value is a whole number from 1 on.

    Raises:
        ApiError: it is not, or is more than ``most``.
    """
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= most:
        raise ApiError(kind, f"{name} is {text[:40]!r}; it must be a whole number from 1 to {most}", name)
    return {name: int(text)}
