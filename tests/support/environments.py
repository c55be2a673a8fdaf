"""Fresh virtual environments with the package's wheel; other packages are links to those of this environment."""

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
    """Make a virtual environment with the wheel and the packages that it and its extras require; return its directory."""
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
    """Return the names of all distributions that one requires with these extras."""
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
    """Link a distribution's modules and data into another environment, without its scripts."""
    for file in installed.files or ():
        if ".." not in file.parts:
            source, target = Path(str(installed.locate_file(file))), packages / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.exists() and not target.exists():
                try:
                    os.link(source, target)
                except OSError:  # another file system
                    shutil.copy2(source, target)
