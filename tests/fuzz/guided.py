"""Start a coverage-guided fuzzer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import atheris


def main(fuzz: Callable[[bytes], None], seeds: Callable[[], Iterable[bytes]]) -> None:
    """Run libFuzzer on a directory, which gets the seeds, or on the one input to repeat."""
    if (corpus := Path(sys.argv[1])).is_dir():
        for number, seed in enumerate(seeds()):
            (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup(sys.argv, fuzz)
    atheris.Fuzz()
