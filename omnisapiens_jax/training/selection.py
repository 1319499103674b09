"""Which state of a stage is its best: that of the least validation loss, or of the highest metric of the classes that the heads choose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from omnisapiens_jax.evaluation.metrics import SET_SCORES, set_scores
from omnisapiens_jax.training.losses import mean

LOSS = "loss"
CRITERIA = (LOSS, *SET_SCORES)


@dataclasses.dataclass(frozen=True)
class Selection:
    """By the loss, or by one of `SET_SCORES` over the classified samples of all datasets together, as the published trainer reckons."""

    by: str = LOSS

    @property
    def key(self) -> str:
        """What the criterion is called among the metrics of a step."""
        return f"validation_{self.by}"

    @property
    def worst(self) -> float:
        """What any finite value is better than."""
        return math.inf if self.by == LOSS else -math.inf

    def better(self, value: float, best: float) -> bool:
        """Whether a value of the criterion is better than the best so far; one that is not a number never is."""
        return value < best if self.by == LOSS else value > best

    def validate(self, sums: Iterable[tuple[jax.Array, ...]]) -> dict[str, float]:
        """The validation loss, and the criterion if that is another.

        Args:
          sums: of the batches of the split: the summed loss and the number of what it is of; to select by a metric also the counts of
            `losses.confusion`.
        """
        parts = [*sums]
        found = {f"validation_{LOSS}": mean((part[0], part[1]) for part in parts)}
        if self.by != LOSS:
            counts: Any = sum(np.asarray(part[2], np.int64) for part in parts)
            found[self.key] = float(set_scores(counts)[self.by])
        return found


BY_LOSS = Selection()
