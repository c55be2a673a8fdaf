"""The reference tables of docs/ list what the code defines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.metrics import MetricWrapperBase

from gateway import metrics
from gateway.config.loading import KEYS_WITHOUT_EFFECT, LAUNCHER_VARIABLES, LEGACY_VARIABLES
from gateway.config.settings import Settings
from gateway.errors import ErrorKind

DOCS = Path(__file__).resolve().parents[2] / "docs"
RETRYABLE = "`retryable`, whether the same request may succeed later, is true for "


def rows(page: str, header: str) -> Iterator[list[str]]:
    """Return the cells of each row of the only table with this beginning of its header line."""
    text = (DOCS / page).read_text()
    (table,) = re.findall(rf"^{re.escape(header)}.*\n\|[-:|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    for line in table.splitlines():
        yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def entries(page: str, heading: str) -> Iterator[tuple[list[str], str]]:
    """Return the names and the explanation of each entry of the first list below a heading."""
    _, _, section = (DOCS / page).read_text().partition(f"\n## {heading}\n")
    (first, *_) = re.findall(r"^(?:- .*\n)+", section, re.MULTILINE)
    for line in first.splitlines():
        cell, explanation = re.findall(r"^- (`[^:]*`): (.*)$", line)[0]
        yield names(cell), explanation


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_settings() -> None:
    """Of the file that Configuration.md includes; another test compares the values."""
    listed = re.findall(r"^(?:# )?(\w+) = ", (DOCS.parent / "config.toml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(Settings.model_fields)
    assert "{literalinclude} ../config.toml" in (DOCS / "Configuration.md").read_text()


def test_other_keys_and_variables() -> None:
    text = (DOCS / "Configuration.md").read_text()
    for name in (*KEYS_WITHOUT_EFFECT, *LEGACY_VARIABLES):
        assert f"`{name}`" in text
    for name in LAUNCHER_VARIABLES:
        assert f"`{name}`" in text or f"`…_{name.split('_', 2)[2]}`" in text


def test_errors() -> None:
    documented = [(*map(int, numbers.split(",")), *names(code)) for numbers, code, _ in rows("API.md", "| HTTP, close |")]
    assert documented == [(kind.status, kind.close_code, kind.code) for kind in ErrorKind]


def test_types_of_errors_and_which_are_retryable() -> None:
    text = " ".join((DOCS / "API.md").read_text().split())
    (sentence,) = re.findall(rf"{re.escape(RETRYABLE)}([^.]+)\.", text)
    for kind in ErrorKind:
        assert kind.retryable == (str(kind.status) in sentence and f"`{kind.code}`" not in sentence), kind
    (types,) = re.findall(r"`type` follows the status: ([^.]+)\.", text)
    documented = {
        (name, int(status)) for name, listed in re.findall(r"`(\w+)`\s\(([\d, ]+)\)", types) for status in listed.split(",")
    }
    assert documented == {(kind.type, kind.status) for kind in ErrorKind}


def test_metrics_of_the_gateway() -> None:
    """With their labels."""
    documented = {name for found, _ in entries("Monitoring.md", "Metrics") for name in found}
    ours = {metric for metric in vars(metrics).values() if isinstance(metric, MetricWrapperBase)}
    assert documented == {described(metric) for metric in ours}


def described(metric: MetricWrapperBase) -> str:
    labels = f"{{{','.join(metric._labelnames)}}}" if metric._labelnames else ""
    return f"{metric._name}{'_total' if metric._type == 'counter' else ''}{labels}"


def test_parameters_of_the_decoder() -> None:
    """Every parameter that the bundled configurations set, and every option of a stream."""
    documented = {name for cell, *_ in rows("Models.md", "| parameter |") for name in names(cell)}
    config = (DOCS.parent / "model-repo/rnnt_greedy_bls/config.pbtxt").read_text()
    assert set(re.findall(r'parameters \{ key: "(\w+)"', config)) <= documented
    source = (DOCS.parent / "model-repo/rnnt_greedy_bls/1/parameters.py").read_text()
    assert all(f'"{name}"' in source or f"{name}: " in source for name in documented)
