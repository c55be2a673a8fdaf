"""Write reports of measurements."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import orjson

from amira.paths import ROOT
from perf.server import cpu_model

RESULTS = ROOT / "perf" / "results"


def circumstances() -> dict[str, Any]:
    """Return the date, the processor and the number of usable cores."""
    return {
        "date": datetime.now(timezone.utc).isoformat(" ", "minutes"),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
    }


def publish(name: str, report: Mapping[str, Any], page: str) -> None:
    """Write a report to ``perf/results`` as NAME.json and its page as NAME.md."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(page, encoding="utf-8")
    (RESULTS / f"{name}.json").write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
