"""GitHub's workflows; ``make lint`` checks the files with actionlint if it is installed."""

from __future__ import annotations

from typing import Any

import yaml

from amira.paths import ROOT

WORKFLOWS = ROOT / ".github" / "workflows"


def commands() -> list[str]:
    found = []
    for path in WORKFLOWS.glob("*.yml"):
        workflow: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        found += [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    return found


def test_continuous_integration_runs_what_a_checkout_runs() -> None:
    assert {".ci/run", "make test-lowest"} <= set(commands())


def test_make_targets_of_workflows_exist() -> None:
    targets = {line.split(":")[0] for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if ":" in line}
    used = {word for command in commands() if command.startswith("make ") for word in command.split()[1:]}
    assert used <= targets
