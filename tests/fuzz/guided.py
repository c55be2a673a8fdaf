"""What the coverage-guided fuzzers share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import atheris


def main(fuzz: Callable[[bytes], None], seeds: Callable[[], Iterable[bytes]]) -> None:
    """Run libFuzzer as the command line says: in a directory, which gets the seeds, or on one input that is to be repeated."""
    if (corpus := Path(sys.argv[1])).is_dir():
        for number, seed in enumerate(seeds()):
            (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup(sys.argv, fuzz)
    atheris.Fuzz()
