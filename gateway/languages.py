"""Choose a language among those that a model recognises. Languages are named by tags such as ``de`` and ``de-DE`` (BCP 47)."""

from __future__ import annotations

from collections.abc import Sequence

MAX_SHOWN_CHARS = 40
"""Maximum length of a client's tag in an error message."""


class LanguageError(ValueError):
    """A model recognises none of the languages that a client names. The message lists what is allowed."""


def base_of(tag: str) -> str:
    """Return the language of a tag without its region, in lower case."""
    return tag.casefold().replace("_", "-").partition("-")[0]


def choose_language(model: str, wanted: Sequence[str], offered: Sequence[str], spoken: str | None) -> str:
    """Return the language to decode in, as the model names it; empty if the model decides.

    A tag without a region, or with an unknown one, means the model's first region of this language.

    Args:
        model: name of the model, for the message.
        wanted: tags from the client, in order of preference; empty if the client names none.
        offered: languages that a stream of the model can choose; empty if there is no choice.
        spoken: the only language of a model without a choice; None if it is not known.

    Raises:
        LanguageError: the model recognises none of the wanted languages.
    """
    if not wanted:
        return ""
    for tag in wanted:
        exact = [name for name in offered if name.casefold() == tag.casefold()]
        if similar := exact or [name for name in offered if base_of(name) == base_of(tag)]:
            return similar[0]
    if not offered and (spoken is None or spoken in map(base_of, wanted)):
        return ""
    allowed = f"knows {', '.join(offered)}" if offered else f"knows {spoken!r} alone"
    raise LanguageError(
        f"language is {wanted[0][:MAX_SHOWN_CHARS]!r}, and model {model!r} {allowed}; leave language out, or choose another"
    )
