"""Numbers that the papers report, to stand beside ours.

All are from secondary notes and **not verified** against the papers themselves. They are of the published test split: numbers of other
rows cannot be compared with them. Free-form tasks (INT, SOC, NVC) were judged by a language model.
"""

from __future__ import annotations

from collections.abc import Mapping

CAVEAT = (
    "Numbers of the papers come from secondary notes and are not verified; they are of the published test split of Human Behavior Atlas, "
    "and their free-form answers were judged by a language model."
)


def _ten(*scores: float) -> dict[str, float]:
    return dict(zip(("EMO", "HUM", "INT", "PTSD", "ANX", "DEP", "SEN", "SAR", "SOC", "NVC"), scores, strict=True))


TASKS: Mapping[str, Mapping[str, float]] = {
    "Gemma-3-4B": _ten(0.550, 0.597, 0.227, 0.499, 0.601, 0.463, 0.738, 0.529, 0.191, 0.023),
    "Qwen2.5-Omni-7B": _ten(0.583, 0.543, 0.254, 0.760, 0.793, 0.714, 0.672, 0.656, 0.254, 0.069),
    "HumanOmniV2-7B": _ten(0.597, 0.638, 0.263, 0.824, 0.527, 0.654, 0.742, 0.395, 0.282, 0.093),
    "OmniSapiens SFT": _ten(0.631, 0.532, 0.256, 1.00, 0.909, 0.733, 0.768, 0.624, 0.257, 0.121),
    "OmniSapiens BAM": _ten(0.645, 0.644, 0.177, 1.00, 0.909, 0.789, 0.786, 0.795, 0.201, 0.162),
    "OmniSapiens RL": _ten(0.573, 0.639, 0.486, 0.968, 0.919, 0.772, 0.396, 0.647, 0.304, 0.133),
    "OmniSapiens 2.0": {"EMO": 0.7655, "HUM": 0.6985, "SAR": 0.7064, "INT": 0.5052, "DEP": 0.7887},
}
"""Task averages by model and task."""

DATASETS: Mapping[str, Mapping[str, float]] = {
    "Qwen2.5-Omni-7B": {"mmpsy_depression": 0.791, "daicwoz": 0.636},
    "HumanOmniV2-7B": {"mmpsy_depression": 0.672, "daicwoz": 0.636},
    "OmniSapiens SFT": {"mmpsy_depression": 0.839, "daicwoz": 0.626},
    "OmniSapiens BAM": {"mmpsy_depression": 0.839, "daicwoz": 0.738},
    "OmniSapiens RL": {"mmpsy_depression": 0.814, "daicwoz": 0.729},
}
"""Scores of single datasets, those whose dataset is certain; a task's only dataset stands in `TASKS`."""
