"""Normalise text to the model's form: lower case, numbers spelled out, no punctuation but the apostrophe."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

from num2words import num2words

_TITLES = {"mr": "mister", "mrs": "missus", "dr": "doctor"}
_YEARS = range(1100, 2100)
_LONGEST_NUMBER = 9  # digits; a longer one is a code, not a number that is spoken


def normalise(text: str) -> str:
    """Return a text in the model's form.

    >>> normalise("Mr. O’Neil paid 1,250 on the 3rd, in 1999 -- 100%!")
    "mister o'neil paid one thousand two hundred and fifty on the third in nineteen ninety nine one hundred percent"
    """
    text = text.lower().replace("’", "'").replace("‘", "'").replace("&", " and ").replace("%", " percent ")
    text = re.sub(r"\b(mr|mrs|dr)\b\.?", lambda title: _TITLES[title[1]], text)
    text = re.sub(r"(\d+(?:,\d{3})*)(st|nd|rd|th)?", _say, text)
    text = re.sub(r"[^a-z' ]", " ", text)
    text = re.sub(r"(?<![a-z])'|'(?![a-z])", " ", text)
    return " ".join(text.split())


def _say(match: re.Match[str]) -> str:
    digits = match[1].replace(",", "")
    if len(digits) > _LONGEST_NUMBER:
        return " "
    number = int(digits)
    if match[2]:
        words = num2words(number, ordinal=True)
    elif number in _YEARS and digits == match[1]:
        words = num2words(number, to="year")
    else:
        words = num2words(number)
    return f" {words} "


def sentences(path: Path) -> list[str]:
    """Read a file of sentences: one per line, gzip-compressed UTF-8."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]
