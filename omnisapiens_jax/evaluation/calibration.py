"""Whether a model is as often right as it says."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Reliability:
    """Samples sorted into bins of equal width by how sure the model was: `counts [B]`, mean `confidence [B]` and `accuracy [B]`.

    Bin b holds confidences above b / B up to (b + 1) / B, the first one 0 as well. Means of empty bins are nan.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean distance of confidence and accuracy, bins weighted by their samples."""
        held = self.counts > 0
        gaps = np.abs(self.accuracy[held] - self.confidence[held])
        return float(gaps @ self.counts[held] / self.counts.sum())


def reliability(confidences: np.ndarray, correct: np.ndarray, *, bins: int = 15) -> Reliability:
    """Bins N samples by their `confidences [N]` in [0, 1]; `correct [N]` says which answers are right (a verdict may be in between).

    Raises ValueError for rows of unequal length, for none, and for a confidence that is no probability.
    """
    confidences, correct = np.asarray(confidences, float), np.asarray(correct, float)
    if confidences.shape != correct.shape or confidences.ndim != 1 or not len(confidences):
        raise ValueError(f"expected two equally long, non-empty rows, got shapes {confidences.shape} and {correct.shape}")
    if not ((confidences >= 0) & (confidences <= 1)).all():
        wrong = confidences[~((confidences >= 0) & (confidences <= 1))]
        raise ValueError(f"{len(wrong)} confidences are no probabilities, the first is {wrong[0]}")
    places = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidences)
    counts = np.bincount(places, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(places, values, minlength=bins) / counts for values in (confidences, correct)]
    return Reliability(counts, *means)
