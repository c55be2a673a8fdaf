"""The gateway's image: its Dockerfile checked by hadolint and against the code, and its packages against the tested ones."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml
from typer.main import get_command

from amira.cli import app
from amira.paths import ROOT
from gateway.config.settings import Settings

PINNED = re.compile(r"python:3\.\d+\.\d+-slim-\w+")


def dockerfile() -> list[tuple[str, list[str]]]:
    """Return the instructions of the Dockerfile."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*$", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(keyword, shlex.split(rest)) for keyword, rest in lines]


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image() -> None:
    instructions = dockerfile()
    bases = [words[0] for keyword, words in instructions if keyword == "FROM"]
    assert len(bases) == 2
    assert bases[0] == bases[1]
    assert PINNED.fullmatch(bases[0])
    assert [words for keyword, words in instructions if keyword == "USER"] == [["10001"]]
    assert [words for keyword, words in instructions if keyword == "EXPOSE"] == [[str(Settings().server_port)]]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for keyword, (*sources, _) in instructions:
        if keyword == "COPY" and not sources[0].startswith("--from"):
            assert set(sources) <= kept
            assert all((ROOT / source).exists() for source in sources)
    copied = {sources[0] for keyword, (*sources, _) in instructions if keyword == "COPY"}
    (packaged,) = re.findall(r"^only-include = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[:1]
    assert set(yaml.safe_load(packaged)) <= copied
    (entry,) = (words for keyword, words in instructions if keyword == "ENTRYPOINT")
    (command,) = (words for keyword, words in instructions if keyword == "CMD")
    assert entry == ["[amira]"]
    assert command[0].strip("[]") in get_command(app).commands  # type: ignore[attr-defined]


def test_the_image_has_the_packages_that_were_tested() -> None:
    def pins(path: Path) -> set[str]:
        return set(re.findall(r"^([\w-]+==\S+ ; .*?) \\$", path.read_text(), re.MULTILINE))

    tested, shipped = pins(ROOT / "requirements.lock"), pins(ROOT / "deploy/requirements.lock")
    assert len(shipped) > 20
    assert {pin.split(" ;")[0] for pin in shipped} <= {pin.split(" ;")[0] for pin in tested}
