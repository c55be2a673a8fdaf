"""Memory of a window: what is measured, what bounds it, and what a configuration may declare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amira.models.configs import ModelError
from amira.models.importing import import_model
from amira.models.memory import MARGIN, Growth, measure_growth
from amira.models.repository import recognisers
from amira.paths import MODEL_REPOSITORY
from tests.support.synthetic import build

SECS = (15.0, 30.0, 60.0, 60.0)
GROWTHS = st.builds(Growth, st.integers(0, 10**8), st.integers(0, 10**6))


@given(GROWTHS, st.lists(st.floats(0.8, 1.2), min_size=len(SECS), max_size=len(SECS)))
def test_fit_bounds_every_peak(growth: Growth, noise: list[float]) -> None:
    peaks = [growth.window_bytes(secs) * factor for secs, factor in zip(SECS, noise, strict=True)]
    fit = Growth.fit(SECS, peaks)
    assert min(fit.bytes_per_sec, fit.bytes_per_sec_squared) >= 0
    for secs, peak in zip(SECS, peaks, strict=True):
        assert peak <= fit.window_bytes(secs) <= MARGIN * 2.5 * max(peak, 1) + secs + secs**2


@given(GROWTHS)
def test_fit_finds_the_growth(growth: Growth) -> None:
    fit = Growth.fit(SECS, [growth.window_bytes(secs) for secs in SECS])
    for secs in (5.0, 60.0, 200.0):
        assert fit.window_bytes(secs) == pytest.approx(MARGIN * growth.window_bytes(secs), abs=2 * secs**2)


def test_bundled_repository_declares_its_memory() -> None:
    (bundled,) = recognisers(MODEL_REPOSITORY)
    measured = bundled.check_memory()
    assert 0.8e9 < measured.window_bytes(60) < 1.6e9
    understated = replace(bundled, parameters={**bundled.parameters, "window_bytes_per_sec_squared": "100000"})
    for parameters, declares in (
        (understated.parameters, r"0\.36 GB"),
        ({key: value for key, value in bundled.parameters.items() if not key.startswith("window_bytes")}, "nothing"),
    ):
        with pytest.raises(
            ModelError, match=rf"declares {declares} .* takes up to 1\.\d\d GB; write into it parameters \{{ key:"
        ):
            replace(bundled, parameters=parameters).check_memory()


@pytest.mark.slow
def test_imported_model_declares_its_memory(tmp_path: Path) -> None:
    build(tmp_path / "source", "rnnt")
    import_model(str(tmp_path / "source"), "mine", tmp_path / "into")
    (mine,) = recognisers(tmp_path / "into")
    declared = Growth.declared(mine.parameters)
    assert declared
    assert declared.window_bytes(60) == pytest.approx(mine.check_memory().window_bytes(60), rel=0.2)
    assert declared.window_bytes(60) < 0.2e9, "the bundled model's, from the template"


def test_graphs_that_cannot_be_run_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(np.random.default_rng(0).bytes(100))
    with pytest.raises(ModelError, match=rf"^{broken} can't encode windows of up to 60 s: .*"):
        measure_growth(MODEL_REPOSITORY / "preprocessor" / "1" / "model.onnx", broken)
