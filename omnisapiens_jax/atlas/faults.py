"""Rows that could not be used: collected once each, counted by dataset and kind, never lost silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from omnisapiens_jax.atlas.schema import SampleError

_SHOWN = 20


class BadSamples(ValueError):
    """Rows of an atlas that cannot be used; the message counts them all and shows the first."""


class FaultLog:
    """The faults of a run: one entry a row, however often the row comes round."""

    def __init__(self, faults: Iterable[SampleError] = ()) -> None:
        self._faults: dict[tuple[str, int], SampleError] = {}
        for fault in faults:
            self.add(fault)

    def __len__(self) -> int:
        return len(self._faults)

    def __iter__(self):
        return iter(self._faults.values())

    def add(self, fault: SampleError) -> None:
        """Notes a fault; a row that is known already stays as it was first seen."""
        self._faults.setdefault((fault.file, fault.row), fault)

    def counts(self) -> Counter[tuple[str, str]]:
        """Rows by (dataset, kind)."""
        return Counter((fault.dataset, fault.kind) for fault in self)

    def report(self) -> str:
        """The counts, then the first faults in full."""
        if not self:
            return "no sample was skipped"
        counts = [f"  {dataset}: {count} {kind}" for (dataset, kind), count in sorted(self.counts().items())]
        shown = [f"  {fault}" for fault in list(self)[:_SHOWN]]
        more = [f"  ... and {len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        return "\n".join([f"{len(self)} samples cannot be used", *counts, *shown, *more])
