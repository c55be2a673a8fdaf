"""Choosing a language among those that a model recognises."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gateway.languages import LanguageError, choose_language

OFFERED = ("auto", "en-US", "es-ES", "es-US", "de-DE")


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ([], ""),
        (["de-DE"], "de-DE"),
        (["DE-de"], "de-DE"),
        (["de"], "de-DE"),
        (["de_AT"], "de-DE"),
        (["es-us"], "es-US"),
        (["es-MX"], "es-ES"),
        (["fr", "de"], "de-DE"),
        (["auto"], "auto"),
    ],
)
def test_offered_language_is_found(wanted: Sequence[str], chosen: str) -> None:
    assert choose_language("m", wanted, OFFERED, None) == chosen


def test_other_language_names_the_offered() -> None:
    message = "^language is 'xx', and model 'm' knows auto, en-US, es-ES, es-US, de-DE; leave language out, or choose another$"
    with pytest.raises(LanguageError, match=message):
        choose_language("m", ["xx"], OFFERED, "en")


def test_model_without_a_choice() -> None:
    """It takes its own language in any region, any if its language is not known, and no other."""
    assert choose_language("m", ["en-GB"], (), "en") == choose_language("m", ["fr", "en"], (), "en") == ""
    assert choose_language("m", ["fr"], (), None) == ""
    with pytest.raises(LanguageError, match=r"^language is 'ffff+', and model 'm' knows 'en' alone; ") as raised:
        choose_language("m", ["f" * 9999], (), "en")
    assert len(str(raised.value)) < 150
