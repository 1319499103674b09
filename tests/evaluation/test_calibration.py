"""Calibration against scikit-learn's curve."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from omnisapiens_jax.evaluation.calibration import reliability

# Also confidences that lie on the edges of bins: k / 15 as the division gives it.
sure = st.one_of(st.floats(0, 1), st.integers(0, 15).map(lambda k: k / 15))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(sure, st.booleans()), min_size=1, max_size=20))
def test_bins_equal_scikit_learns(rows: list[tuple[float, bool]]) -> None:
    confidences, correct = (np.array(column) for column in zip(*rows, strict=True))
    found = reliability(confidences, correct)
    share, mean = calibration_curve(correct, confidences, n_bins=15, strategy="uniform", pos_label=True)
    held = found.counts > 0
    np.testing.assert_allclose(found.accuracy[held], share)
    np.testing.assert_allclose(found.confidence[held], mean)
    assert found.counts.sum() == len(rows) and np.isnan(found.accuracy[~held]).all()
    assert found.ece == pytest.approx(np.average(np.abs(share - mean), weights=found.counts[held]))


def test_what_is_calibrated_has_no_error_and_what_is_always_wrong_has_all() -> None:
    rng = np.random.default_rng(0)
    confidences = rng.random(200_000)
    assert reliability(confidences, rng.random(200_000) < confidences).ece < 0.01
    assert reliability(np.ones(4), np.zeros(4)).ece == 1.0
    assert reliability(np.array([0.5, 0.5]), np.array([0.0, 1.0])).ece == 0.0


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="2 confidences are no probabilities, the first is 1.5"):
        reliability(np.array([0.1, 1.5, np.nan]), np.zeros(3))
    with pytest.raises(ValueError, match="non-empty"):
        reliability(np.zeros(0), np.zeros(0))
