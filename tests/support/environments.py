"""Fresh virtual environments with the package's wheel, quick since their packages are those that are installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def fresh_environment(directory: Path, wheel: Path, extras: tuple[str, ...]) -> Path:
    """Make a virtual environment with the wheel and what it and its extras require, and nothing else; return it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(directory / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    packages = site_packages(directory)
    (ours,) = (found for found in distributions(path=[str(packages)]) if found.metadata["Name"] == "amira-asr")
    for name in required(ours, extras):
        link_files(distribution(name), packages)
    return directory


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python3.*/site-packages")
    return found


def required(ours: Distribution, extras: tuple[str, ...]) -> set[str]:
    """Names of all distributions that one needs with these extras, as pip finds them."""
    found: set[tuple[str, str]] = set()
    pending = [(ours, extra) for extra in ("", *extras)]
    while pending:
        wanting, extra = pending.pop()
        for requirement in map(Requirement, wanting.requires or ()):
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            name = canonicalize_name(requirement.name)
            for key in ((name, ""), *((name, wanted) for wanted in requirement.extras)):
                if key not in found:
                    found.add(key)
                    pending.append((distribution(name), key[1]))
    return {name for name, _ in found}


def link_files(installed: Distribution, packages: Path) -> None:
    """Give a distribution's modules and data a second name in another environment; scripts are left out."""
    for file in installed.files or ():
        if ".." not in file.parts:
            source, target = Path(str(installed.locate_file(file))), packages / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.exists() and not target.exists():
                try:
                    os.link(source, target)
                except OSError:  # another file system
                    shutil.copy2(source, target)
